"""The ledger: a view over parts that any input can have written, and an OUTPUT that belongs to one job."""

import itertools
import json
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import ledger
from pipeline.faults import StorageError
from pipeline.ledger import Heartbeat, LedgerError, LedgerWriter, claim, new_run_id, read, read_runs
from pipeline.rows import LEDGER_SCHEMA, Batch, Item, RenderRow, RowError, ledger_table
from pipeline.storage import Storage

NEVER = 1e9
ERROR = RowError(stage="sample", type="ValueError", message="no")


@pytest.fixture(params=["local", "memory"])
def storage(request, tmp_path):
    return Storage(str(tmp_path / "out") if request.param == "local" else f"memory://{tmp_path.name}/out")


def rows(*ids: str, failed: bool = False, run: str = "r", **columns: pa.Array) -> pa.Table:
    items = [Item(RenderRow(id=row_id, position="t:0", error=ERROR if failed else None)) for row_id in ids]
    own = columns or {"own": pa.array(list(range(len(ids))))}
    return ledger_table(Batch(tuple(items), pa.table(own)), {"run": run})


def written(storage: Storage, *tables: pa.Table, run: str = "r") -> None:
    writer = LedgerWriter(storage, run, 10**9, NEVER)
    for table in tables:
        writer.append(table)
        writer.flush()


def statuses(storage: Storage) -> dict[str, str]:
    view = read(storage)
    return dict(zip(view["id"].to_pylist(), view["status"].to_pylist(), strict=True))


def test_an_empty_output_has_an_empty_ledger(storage):
    assert read(storage).equals(LEDGER_SCHEMA.empty_table())


@pytest.mark.parametrize("history", [h for n in range(1, 5) for h in itertools.product("sf", repeat=n)], ids="".join)
def test_a_succeeded_row_wins_else_the_latest(tmp_path, history):
    storage = Storage(str(tmp_path))
    tables = [
        rows("other", "x", failed=status == "f", own=pa.array([0, number])) for number, status in enumerate(history)
    ]
    written(storage, *tables)
    row = read(storage).to_pylist()[1]
    wins = max(i for i, status in enumerate(history) if status == ("s" if "s" in history else "f"))
    assert (row["id"], row["own"]) == ("x", wins)


def test_later_runs_win_over_earlier_ones_and_parts_are_in_order(storage):
    written(storage, *(rows("x", failed=True, own=pa.array([number])) for number in range(12)), run="20260101T000000-f")
    written(storage, rows("x", failed=True, own=pa.array([99])), run="20260102T000000-0")
    assert read(storage)["own"].to_pylist() == [99]


def test_the_view_keeps_the_order_of_first_appearance(storage):
    written(storage, rows("c", "a", failed=True), rows("b"), rows("a", "c", "d"))
    assert list(statuses(storage).items()) == [(row_id, "succeeded") for row_id in "cabd"]


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


@pytest.mark.parametrize("together", [True, False], ids=["one part", "two parts"])
@pytest.mark.parametrize(("one", "other"), [*itertools.combinations(KINDS, 2)], ids=str)
def test_own_columns_of_one_name_may_differ_in_type(tmp_path, one, other, together):
    storage = Storage(str(tmp_path))
    arrays = [
        pa.array([value]).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array([value], kind)
        for kind, value in (one, other)
    ]
    writer = LedgerWriter(storage, "r", 10**9, NEVER)
    for row_id, array in zip("ab", arrays, strict=True):
        writer.append(rows(row_id, own=array, kept=pa.array([7])))
        if not together:
            writer.flush()
    writer.flush()
    view = read(storage)
    assert view["id"].to_pylist() == ["a", "b"]
    assert view["kept"].to_pylist() == [7, 7]
    values = [array.to_pylist()[0] for array in arrays]
    for found, value in zip(view["own"].to_pylist(), values, strict=True):
        assert found == value or found == str(value) or isinstance(value, dict)


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


@pytest.mark.parametrize("data", [b"", b"junk", b"PAR1" + bytes(100) + b"PAR1"])
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
    heartbeat.write("broken", "why")
    [run] = read_runs(storage)
    assert (run["state"], run["error"]) == ("broken", "why")
    assert run["started_at"] <= run["at"]


def test_runs_are_read_in_order_of_time(storage):
    for run in ("20260102T000000-b", "20260101T000000-a"):
        Heartbeat(storage, run, total=0).write("finished")
    assert [run["run"] for run in read_runs(storage)] == ["20260101T000000-a", "20260102T000000-b"]
