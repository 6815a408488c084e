"""The ledger: a view over parts that any input can have written, and an OUTPUT that belongs to one job."""

import itertools
import json
import logging
import random
import threading
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.ledger import ledger
from pipeline.ledger.job_records import Heartbeat, claim, new_run_id, read_run, read_runs
from pipeline.ledger.ledger import COMPACTED, LedgerError, LedgerWriter, prefetched, read
from pipeline.rows import LEDGER_SCHEMA
from pipeline.storage.faults import StorageError
from pipeline.storage.storage import Storage
from tests.pipeline.sample_ledgers import NEVER, rows, statuses, written


@pytest.fixture
def storage(tmp_path):
    """Return a place in memory; tests that need paths, or threads at files, use a folder."""
    return Storage(f"memory://{tmp_path.name}/out")


@pytest.mark.parametrize("place", ["local", "memory"])
def test_an_empty_output_has_an_empty_ledger(tmp_path, place):
    storage = Storage(str(tmp_path / "out") if place == "local" else f"memory://{tmp_path.name}/out")
    assert read(storage).equals(LEDGER_SCHEMA.empty_table())


def test_a_succeeded_row_wins_else_the_latest(tmp_path):
    """Every history of up to 4 parts, as the row of that name."""
    storage = Storage(str(tmp_path))
    histories = ["".join(made) for length in range(1, 5) for made in itertools.product("sf", repeat=length)]
    for number in range(4):
        found = {status: [h for h in histories if h[number : number + 1] == status] for status in "sf"}
        tables = [
            rows(*names, failed=status == "f", own=pa.array([number] * len(names))) for status, names in found.items()
        ]
        written(storage, pa.concat_tables(tables), run=f"{number}")
    own = {row["id"]: row["own"] for row in read(storage).to_pylist()}
    assert own == {history: history.rfind("s" if "s" in history else "f") for history in histories}


def test_later_rows_of_a_run_win_and_parts_are_in_order(storage):
    written(storage, *(rows("x", failed=True, own=pa.array([number])) for number in range(12)))
    assert read(storage)["own"].to_pylist() == [11]


def test_later_runs_win_whatever_their_parts_are_called(storage):
    written(storage, rows("x", failed=True, run="20260102T000000-a", own=pa.array([2])), run="a")
    written(storage, rows("x", failed=True, run="20260101T000000-z", own=pa.array([1])), run="b")
    written(storage, rows("x", failed=True, run="20260101T000000-a", own=pa.array([0])), run="c")
    assert read(storage)["own"].to_pylist() == [2]


def test_a_part_may_hold_rows_of_several_runs(storage):
    first, second = (rows("x", "y", failed=True, run=run, own=pa.array([run] * 2)) for run in ("1", "2"))
    written(storage, pa.concat_tables([second, first]), rows("y", run="0", own=pa.array(["0"])))
    assert read(storage).select(["id", "own"]).to_pylist() == [{"id": "y", "own": "0"}, {"id": "x", "own": "2"}]


def test_of_rows_that_succeeded_the_one_of_the_most_rerolls_wins_whatever_the_clocks_said(storage):
    def rerolled(number: int, run: str, **options: bool) -> pa.Table:
        table = rows("x", run=run, own=pa.array([number]), **options)
        index = table.column_names.index("rerolls")
        return table.set_column(index, table.schema.field(index), pa.array([number], pa.int32()))

    without = rows("x", "old", run="4", own=pa.array([0, 0])).drop_columns(["rerolls"])
    written(storage, rerolled(2, "1"), rerolled(1, "3"), without, rerolled(3, "2", failed=True))
    assert read(storage, ["own"])["own"].to_pylist() == [2, 0]
    [x, old] = read(storage).to_pylist()
    assert (x["rerolls"], old["rerolls"]) == (2, None)


def test_parts_of_before_rerolls_are_read(storage):
    written(storage, *(rows("a", failed=failed).drop_columns(["rerolls"]) for failed in (False, True)))
    assert statuses(storage) == {"a": "succeeded"}


def test_the_view_is_ordered_by_run_then_as_its_rows_appear(storage):
    written(storage, rows("c", "a", failed=True), rows("b"), rows("a", "c", "d"))
    assert list(statuses(storage).items()) == [(row_id, "succeeded") for row_id in "bacd"]
    written(storage, rows("f", "b", run="q"), rows("e", run="s"), run="0")
    assert list(statuses(storage)) == list("fbacde")


def reference(tables: list[pa.Table]) -> list[dict[str, object]]:
    """Return the view as its rule says it, row by row."""
    best: dict[str, tuple[object, ...]] = {}
    found = (row for table in tables for row in table.to_pylist())
    for number, row in enumerate(found):
        rank = (row["status"] == "succeeded", row["run"], number)
        best[row["id"]] = max(best.get(row["id"], rank), rank, key=lambda rank: rank[:3])
    everything = [row for table in tables for row in table.to_pylist()]
    return [everything[number] for _, _, number in sorted(best.values(), key=lambda rank: rank[1:])]


@pytest.mark.parametrize("seed", range(10))
def test_any_history_gives_the_view_that_the_rule_says(tmp_path, seed):
    draw = random.Random(seed)
    storage = Storage(str(tmp_path))
    tables = []
    for number in range(draw.randrange(1, 12)):
        ids = draw.choices("abcdefghijklm", k=draw.randrange(1, 8))
        run = draw.choice(["20260101T000000-1", "20260102T000000-0", "20260102T000000-1"])
        own = pa.array([number * 100 + row for row in range(len(ids))])
        tables.append(rows(*ids, failed=draw.random() < 0.6, run=run, own=own))
    written(storage, *tables)
    expected = reference(tables)
    assert read(storage).to_pylist() == expected
    some = draw.sample("abcdefghijklmno", 5)
    assert read(storage, ids=some).to_pylist() == [row for row in expected if row["id"] in some]
    light = [{"own": row["own"]} for row in expected if row["id"] in some]
    assert read(storage, ["own"], set(some)).to_pylist() == light


@pytest.mark.parametrize("columns", [["id"], ["status"], ["own", "id"], ["run", "prompt"], ["id", "status", "run"]])
def test_only_the_named_columns_are_read(storage, columns):
    written(storage, rows("a", "b", failed=True), rows("b", "c"))
    view = read(storage, columns)
    assert view.column_names == columns
    assert view.equals(read(storage).select(columns))


def test_a_column_that_no_row_has_is_null(storage):
    for _ in range(2):
        view = read(storage, ["id", "nope", "seed"])
        assert view.column_names == ["id", "nope", "seed"]
        assert view.schema.field("seed").type == pa.int64()
        assert view["nope"].null_count == len(view)
        written(storage, rows("a").drop_columns(["seed"]))


def test_parts_of_before_a_column_was_there_are_read_with_it(storage):
    newer = ["image_fit", "image_format", "guidance_decay", "min_guidance_scale", "quality", "cached_levels"]
    later = rows("b")
    filled = later.set_column(later.column_names.index("image_format"), "image_format", pa.array(["png"]))
    written(storage, rows("a").drop_columns(newer), filled)
    assert read(storage)["image_format"].to_pylist() == [None, "png"]
    assert read(storage).schema.field("guidance_decay").type == pa.float64()


def test_a_column_is_not_taken_for_one_that_begins_with_its_name(storage):
    written(storage, rows("a", **{"own": pa.array([1]), "own.x": pa.array([2]), "id.x": pa.array([3])}))
    assert read(storage, ["own"]).to_pylist() == [{"own": 1}]
    assert read(storage, ["own.x"]).to_pylist() == [{"own.x": 2}]
    assert read(storage, ["own"], ["a"]).to_pylist() == [{"own": 1}]


@pytest.mark.parametrize("kind", [list, set, frozenset, lambda ids: pa.array(ids, pa.string())])
def test_only_rows_of_the_wanted_ids_are_read(storage, kind):
    written(storage, rows("a", "b", failed=True), rows("b", "c"), rows("d"))
    assert read(storage, ["id"], kind(["d", "x", "b"]))["id"].to_pylist() == ["b", "d"]
    assert read(storage, ids=kind([])).equals(LEDGER_SCHEMA.empty_table())


def test_ids_are_looked_up_in_every_row_group(storage):
    sink = pa.BufferOutputStream()
    pq.write_table(rows(*"abcdefg"), sink, row_group_size=2)
    storage.put("metadata/part-r-000000.parquet", sink.getvalue().to_pybytes())
    assert read(storage, ids=["c", "g", "a"]).select(["id", "own"]).to_pylist() == [
        {"id": row_id, "own": own} for row_id, own in (("a", 0), ("c", 2), ("g", 6))
    ]


def test_rows_outside_the_view_have_no_say_in_types(storage):
    written(storage, rows("a", failed=True, own=pa.array(["text"])), rows("a", "b", own=pa.array([1, 2])))
    assert read(storage)["own"].type == pa.int64()


def test_results_come_in_order_however_long_they_take():
    released = [threading.Event() for _ in range(30)]

    def slow(number):
        if number % 4 == 0:
            assert released[number + 1].wait(10)  # set by a later call: others go on meanwhile
        released[number].set()
        return number

    assert list(prefetched(slow, range(30))) == list(range(30))


def test_an_error_ends_the_work_ahead():
    called = []

    def breaks(number):
        called.append(number)
        raise ValueError(number)

    with pytest.raises(ValueError, match=r"^0$"):
        list(prefetched(breaks, range(1000)))
    assert len(called) < 100


class Hooked(Storage):
    """A place where something else happens just before a part is read, or while parts are listed."""

    before_get = staticmethod(lambda path: None)
    listed = staticmethod(lambda names: names)

    def get(self, path):
        self.before_get(path)
        return super().get(path)

    def list(self, prefix=""):
        return self.listed(super().list(prefix))


def compacted(storage: Storage, number: int = 0) -> None:
    """Replace all parts by one that holds their view, as a compaction would."""
    view, names = read(storage), storage.list("metadata")
    sink = pa.BufferOutputStream()
    pq.write_table(view, sink)
    storage.put(f"{COMPACTED}{number:06d}-0-0.parquet", sink.getvalue().to_pybytes())
    for name in names:
        storage.delete(name)


def history(storage: Storage) -> pa.Table:
    written(storage, rows("a", "b", "c", failed=True, run="1"), rows("d", run="1"), run="1")
    written(storage, rows("b", "c", failed=True, run="2"), rows("c", "e", run="2"), run="2")
    return read(storage)


@pytest.mark.parametrize("number", range(4))
def test_a_part_that_is_compacted_away_before_it_is_read_is_not_missed(tmp_path, number, caplog):
    expected = history(Storage(str(tmp_path)))
    storage = Hooked(str(tmp_path))
    name = storage.list("metadata")[number]
    lock = threading.Lock()

    def compact(path):
        with lock:
            if path == name and storage.exists(name):
                compacted(Storage(str(tmp_path)))

    storage.before_get = compact
    with caplog.at_level(logging.DEBUG):
        assert read(storage).sort_by("id").equals(expected.sort_by("id"))
    assert len(storage.list("metadata")) == 1
    assert "is gone" in caplog.text
    assert "compacted while it was read, 1 new parts" in caplog.text


@pytest.mark.parametrize("number", range(4))
def test_a_listing_that_shows_neither_the_old_part_nor_the_new_one_is_made_up_for(tmp_path, number):
    expected = history(Storage(str(tmp_path)))
    storage = Hooked(str(tmp_path))

    def raced(names):
        storage.listed = lambda names: names
        compacted(Storage(str(tmp_path)))
        return [name for name in names if name != names[number]]

    storage.listed = raced
    assert read(storage).equals(expected)


def test_a_compaction_of_a_compaction_is_followed(tmp_path):
    expected = history(Storage(str(tmp_path)))
    storage = Hooked(str(tmp_path))
    numbers = itertools.count()

    def compact(path):
        if (number := next(numbers)) < 5:
            compacted(Storage(str(tmp_path)), number)

    storage.before_get = compact
    assert read(storage).sort_by("id").equals(expected.sort_by("id"))


def test_a_part_that_cannot_be_read_is_not_taken_for_one_that_is_gone(tmp_path):
    history(Storage(str(tmp_path)))
    storage = Hooked(str(tmp_path))
    storage.before_get = lambda path: (_ for _ in ()).throw(StorageError("no access"))
    with pytest.raises(StorageError, match="no access"):
        read(storage)


def test_rows_are_written_in_parts_of_the_given_size(storage):
    writer = LedgerWriter(storage, "r", 3, NEVER)
    counts = []
    for number in range(7):
        writer.append(rows(f"{number}"))
        counts.append(len(storage.list("metadata")))
    assert counts == [0, 0, 1, 1, 1, 2, 2]
    writer.flush()
    writer.flush()
    assert len(storage.list("metadata")) == 3
    assert list(statuses(storage)) == [f"{number}" for number in range(7)]


def test_rows_are_written_after_the_given_time(storage, monkeypatch):
    now = 100.0
    monkeypatch.setattr(ledger, "time", SimpleNamespace(monotonic=lambda: now))
    writer = LedgerWriter(storage, "r", 1000, 30.0)
    writer.flush()
    writer.append(rows("a"))
    now += 29.5
    writer.tick()
    assert storage.list("metadata") == []
    now += 0.5
    writer.tick()
    assert list(statuses(storage)) == ["a"]
    now += 100
    writer.tick()  # nothing is open: no empty part
    assert len(storage.list("metadata")) == 1


def test_a_failed_write_loses_no_rows(storage, monkeypatch):
    writer = LedgerWriter(storage, "r", 1000, NEVER)
    writer.append(rows("a"))
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "put", lambda *_: (_ for _ in ()).throw(StorageError("full")))
        with pytest.raises(StorageError):
            writer.flush()
    writer.append(rows("b"))
    writer.flush()
    assert list(statuses(storage)) == ["a", "b"]


KINDS = [
    (pa.int8(), 1),
    (pa.int64(), 2**60 + 1),
    (pa.float64(), 0.5),
    (pa.string(), "text"),
    (pa.null(), None),
    (pa.bool_(), True),
    (pa.list_(pa.int32()), [1]),
    (pa.struct([("a", pa.int32())]), {"a": 1}),
    (pa.struct([("b", pa.string())]), {"b": "x"}),
    (pa.timestamp("us"), 0),
    (pa.dictionary(pa.int8(), pa.string()), "word"),
]


PAIRS = [*itertools.combinations(KINDS, 2)]
AGREE = [
    pair for pair in PAIRS if pa.null() in (kinds := [kind for kind, _ in pair]) or kinds == [pa.int8(), pa.int64()]
]


@pytest.mark.parametrize("together", [True, False], ids=["one part", "two parts"])
@pytest.mark.parametrize("pairs", [PAIRS, AGREE], ids=["any types", "types that agree"])
def test_own_columns_of_one_name_may_differ_in_type(tmp_path, pairs, together):
    """Two rows with a column per pair of types."""
    storage = Storage(str(tmp_path))
    arrays = [
        [
            pa.array([value]).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array([value], kind)
            for kind, value in pair
        ]
        for pair in pairs
    ]
    writer = LedgerWriter(storage, "r", 10**9, NEVER)
    for place, row_id in enumerate("ab"):
        own = {f"own{number}": pair[place] for number, pair in enumerate(arrays)}
        writer.append(rows(row_id, **own, kept=pa.array([7])))
        if not together:
            writer.flush()
    writer.flush()
    view = read(storage)
    assert view["id"].to_pylist() == ["a", "b"]
    assert view["kept"].to_pylist() == [7, 7]
    for number, pair in enumerate(arrays):
        values = [array.to_pylist()[0] for array in pair]
        for found, value in zip(view[f"own{number}"].to_pylist(), values, strict=True):
            assert found == value or found == str(value) or isinstance(value, dict), pairs[number]


@pytest.mark.parametrize("together", [True, False], ids=["one part", "many parts"])
def test_categories_may_be_more_than_their_indices_can_count(storage, together):
    writer = LedgerWriter(storage, "r", 10**9, NEVER)
    small = pa.dictionary(pa.int8(), pa.string())
    for start in (0, 100, 200):
        words = [f"{number}" for number in range(start, start + 100)]
        writer.append(rows(*words, own=pa.array(words).dictionary_encode().cast(small)))
        if not together:
            writer.flush()
    writer.flush()
    view = read(storage)
    assert view["own"].to_pylist() == view["id"].to_pylist() == [f"{number}" for number in range(300)]


def test_own_columns_that_only_some_parts_have_are_null_elsewhere(storage):
    written(storage, rows("a", one=pa.array([1])), rows("b", two=pa.array(["x"])))
    assert read(storage).select(["id", "one", "two"]).to_pylist() == [
        {"id": "a", "one": 1, "two": None},
        {"id": "b", "one": None, "two": "x"},
    ]


def test_other_files_among_the_parts_do_not_matter(storage):
    written(storage, rows("a"))
    storage.put("metadata/README.txt", b"hello")
    assert list(statuses(storage)) == ["a"]


def foreign() -> bytes:
    """Return a Parquet file that is no part of a ledger."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"prompt": ["a"]}), sink)
    return bytes(sink.getvalue().to_pybytes())


@pytest.mark.parametrize("data", [b"", b"junk", b"PAR1" + bytes(100) + b"PAR1", foreign()])
def test_a_damaged_part_is_named(storage, data):
    written(storage, rows("a"))
    storage.put("metadata/part-r-000001.parquet", data)
    with pytest.raises(LedgerError, match=r"part-r-000001\.parquet cannot be read"):
        read(storage)


def test_a_truncated_part_is_named(storage):
    written(storage, rows("a"))
    [name] = storage.list("metadata")
    storage.put(name, storage.get(name)[:-9])
    with pytest.raises(LedgerError, match=r"part-r-000000\.parquet"):
        read(storage)


def test_parts_are_plain_parquet(tmp_path):
    written(Storage(str(tmp_path)), rows("a", "b"))
    [part] = (tmp_path / "metadata").iterdir()
    assert pq.read_schema(part).names[: len(LEDGER_SCHEMA)] == LEDGER_SCHEMA.names


PIXELS = {"model_fingerprint": "abc", "dtype": "float32", "tile": None}


def test_an_output_is_claimed_once_and_by_equal_settings_again(storage):
    claim(storage, {"settings": {"batch_size": 4}}, PIXELS)
    first = storage.get("job.json")
    claim(storage, {"settings": {"batch_size": 8}}, dict(reversed(PIXELS.items())))
    assert storage.get("job.json") == first
    assert json.loads(first)["pixels"] == PIXELS


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_fingerprint": "abd"}, ["model_fingerprint", "'abc'", "'abd'"]),
        ({"dtype": "bfloat16"}, ["dtype", "'float32'", "'bfloat16'"]),
        ({"tile": 256}, ["tile", "None", "256"]),
        ({"lora": "style"}, ["lora", "None", "'style'"]),
    ],
)
def test_another_pixel_setting_is_refused_both_ways_naming_the_difference(storage, change, named):
    claim(storage, {}, PIXELS)
    with pytest.raises(LedgerError) as caught:
        claim(storage, {}, {**PIXELS, **change})
    assert all(text in str(caught.value) for text in [*named, "job.json", "another --output"])
    storage.delete("job.json")
    claim(storage, {}, {**PIXELS, **change})
    with pytest.raises(LedgerError, match=named[0]):
        claim(storage, {}, PIXELS)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"pixels": 5}', b"\xff"])
def test_a_damaged_job_record_is_refused(storage, data):
    storage.put("job.json", data)
    with pytest.raises(LedgerError, match=r"job\.json is damaged"):
        claim(storage, {}, PIXELS)


def test_runs_have_ids_that_sort_by_time():
    ids = [new_run_id() for _ in range(100)]
    assert len(set(ids)) == 100
    assert sorted({run[:15] for run in ids}) == list(dict.fromkeys(run[:15] for run in ids))


def test_a_heartbeat_is_written_when_it_is_due_and_at_the_end(storage):
    heartbeat = Heartbeat(storage, "r", total=3, seconds=1000)
    heartbeat.write("running")
    heartbeat.count(2, 1)
    assert read_runs(storage)[0]["rows"] == {"total": 3, "done": 0, "failed": 0}
    heartbeat.seconds = 0
    heartbeat.count(1, 0)
    [run] = read_runs(storage)
    assert (run["state"], run["rows"]) == ("running", {"total": 3, "done": 3, "failed": 1})
    heartbeat.write("broken", "https://h/t.parquet?X-Amz-Signature=s3cr3t is gone")
    [run] = read_runs(storage)
    assert (run["state"], run["error"]) == ("broken", "https://h/t.parquet?*** is gone")
    assert run["started_at"] <= run["at"]


def test_runs_are_read_in_order_of_time(storage):
    for run in ("20260102T000000-b", "20260101T000000-a"):
        Heartbeat(storage, run, total=0).write("finished")
    assert [run["run"] for run in read_runs(storage)] == ["20260101T000000-a", "20260102T000000-b"]


def test_one_run_is_read_by_the_name_of_its_record(storage):
    Heartbeat(storage, "r", total=7).write("running")
    assert read_run(storage, "runs/r.json") == read_runs(storage)[0]
    storage.put("runs/r.json", b"{}")
    with pytest.raises(LedgerError, match=r"r\.json is damaged"):
        read_run(storage, "runs/r.json")
