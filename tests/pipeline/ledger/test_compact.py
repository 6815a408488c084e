"""Compaction changes how the ledger is stored, never what it says: whenever it dies and whoever else is at work."""

import itertools
import json
import logging
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from datetime import UTC, datetime, timedelta
from functools import cache

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.ledger import compact as compact_module
from pipeline.ledger.compact import Compaction, Interfered, compact, delete_orphans, find_orphans
from pipeline.ledger.ledger import LedgerError, LedgerWriter, read
from pipeline.storage.faults import StorageError
from pipeline.storage.storage import Storage
from tests.pipeline.sample_ledgers import contents, recorded, rows, written

pytest_plugins = ["tests.pipeline.s3_server"]

LONG_AGO = timedelta(days=2)


@pytest.fixture
def url(tmp_path):
    """Return a place in memory: whatever the backend, compaction lists, gets, puts and deletes whole files."""
    return f"memory://{tmp_path.name}/out"


@pytest.fixture
def storage(url):
    return Storage(url)


@pytest.fixture
def small(monkeypatch):
    """Make parts of at most 5 rows, in row groups of a few."""
    monkeypatch.setattr(compact_module, "MAX_ROWS", 5)
    monkeypatch.setattr(compact_module, "GROUP_BYTES", 2000)


def parts(storage: Storage) -> list[str]:
    return storage.list("metadata")


def run_of(storage: Storage, run: str, *tables: pa.Table, state: str = "finished", age: timedelta = LONG_AGO) -> None:
    """Write a run that ended so, and its parts."""
    recorded(storage, run, state, age)
    written(
        storage,
        *(table.set_column(table.column_names.index("run"), "run", [[run] * len(table)]) for table in tables),
        run=run,
    )


@cache
def history_files() -> tuple[dict[str, bytes], pa.Table]:
    """Return the files of two runs, the second of which tries failed rows again, and their view."""
    storage = Storage("memory://history")
    run_of(storage, "1", rows(*"abc", failed=True), rows(*"def"), rows(*"gh"))
    run_of(storage, "2", rows("a", "b"), rows("c", failed=True), rows("i", "j"), rows("k"))
    return {name: storage.get(name) for name in storage.list()}, read(storage)


def history(storage: Storage) -> pa.Table:
    """Put the two runs into a storage; return the view."""
    files, view = history_files()
    for name, data in files.items():
        storage.put(name, data)
    return view


@pytest.mark.parametrize("place", ["local", "memory"])
def test_parts_become_one_and_the_view_stays(tmp_path, place):
    storage = Storage(str(tmp_path) if place == "local" else f"memory://{tmp_path.name}")
    before = history(storage)
    assert read(storage).equals(before)
    assert compact(storage) == Compaction(replaced=7, written=1, left=())
    [part] = parts(storage)
    assert part.startswith("metadata/part-x-000001-")
    assert read(storage).equals(before)
    assert len(pq.read_table(pa.BufferReader(storage.get(part)))) == 11


def test_a_part_has_at_most_so_many_rows(storage, small):
    before = history(storage)
    assert compact(storage).written == 3
    sizes = [pq.read_metadata(pa.BufferReader(storage.get(part))).num_rows for part in parts(storage)]
    assert sizes == [5, 5, 1]
    assert read(storage).equals(before)


def test_a_part_does_not_grow_for_ever(storage, monkeypatch):
    monkeypatch.setattr(compact_module, "MAX_BYTES", 24_000)
    monkeypatch.setattr(compact_module, "GROUP_BYTES", 12_000)
    draw = random.Random(0)
    for number in range(30):
        run_of(storage, f"{number:02d}", rows(f"{number}", own=pa.array([draw.randbytes(3000).hex()])))
    before = read(storage)
    assert 3 < compact(storage).written < 15
    assert all(len(storage.get(part)) < 72_000 for part in parts(storage))
    assert read(storage).equals(before)
    assert compact(storage).replaced == 0


def test_what_is_compact_already_is_left_as_it_is(storage, small):
    history(storage)
    for _ in range(3):
        compact(storage)
        names = parts(storage)
        assert compact(storage) == Compaction(0, 0, ())
        assert parts(storage) == names
        run_of(storage, f"{3 + len(names)}", rows("only"), rows("another"))


def test_a_single_part_is_left_as_it_is(storage):
    run_of(storage, "1", rows("a", "a", failed=True))
    names = parts(storage)
    assert compact(storage) == Compaction(0, 0, ())
    assert parts(storage) == names


def test_rerolls_that_failed_are_not_forgotten(storage):
    def rerolled(table: pa.Table, *numbers: int | None) -> pa.Table:
        column = table.column_names.index("rerolls")
        return table.set_column(column, "rerolls", pa.array(numbers, table.schema.field(column).type))

    run_of(storage, "1", rows("a", "b", "c"))
    run_of(storage, "2", rerolled(rows("a", "b", failed=True), 1, 1), rerolled(rows("c"), 1))
    run_of(storage, "3", rerolled(rows("a", failed=True), 2))
    view = read(storage)
    compact(storage)
    assert read(storage).equals(view)
    [part] = parts(storage)
    kept = pq.read_table(pa.BufferReader(storage.get(part)), columns=["id", "status", "rerolls"]).to_pylist()
    told = sorted((row["id"], row["status"], row["rerolls"]) for row in kept if row["rerolls"])
    assert told == [("a", "failed", 2), ("b", "failed", 1), ("c", "succeeded", 1)]
    assert len(kept) == 5


def test_a_part_of_which_the_view_holds_nothing_is_just_deleted(storage):
    run_of(storage, "1", rows("a", failed=True))
    run_of(storage, "2", rows("a"))
    [_, kept] = parts(storage)
    assert compact(storage) == Compaction(1, 0, ())
    assert parts(storage) == [kept]


def test_full_parts_are_rewritten_only_when_rows_of_theirs_are_out_of_date(storage, small):
    run_of(storage, "1", rows(*"abcde"), rows(*"fghij", failed=True), rows("k"))
    compact(storage)
    untouched, *others = parts(storage)
    run_of(storage, "2", rows("f"))
    before = read(storage)
    assert compact(storage).replaced == len(others) + 1
    assert parts(storage)[0] == untouched
    assert read(storage).equals(before)


def test_a_compaction_of_a_compaction_sorts_later(storage, small):
    history(storage)
    seen = []
    for number in range(12):
        compact(storage)
        assert not seen or max(parts(storage)) >= max(seen)
        seen = parts(storage)
        run_of(storage, f"3{number:02d}", rows(f"m{number}"), rows(f"n{number}"))
    assert any(name.startswith("metadata/part-x-000012-") for name in seen)


@pytest.mark.parametrize("state", ["finished", "interrupted", "broken"])
def test_runs_that_have_ended_are_compacted_at_once(storage, state):
    run_of(storage, "1", rows("a"), rows("b"), state=state, age=timedelta())
    assert compact(storage) == Compaction(2, 1, ())


def test_a_run_that_fell_silent_is_dead(storage):
    run_of(storage, "1", rows("a"), rows("b"), state="running", age=timedelta(minutes=11))
    assert compact(storage) == Compaction(2, 1, ())


def test_parts_of_live_runs_are_left_alone(storage):
    run_of(storage, "1", rows("a"), rows("b"))
    run_of(storage, "2", rows("c"), rows("d"), state="running", age=timedelta(minutes=9))
    live = parts(storage)[2:]
    done = compact(storage)
    assert (done.replaced, done.written) == (2, 1)
    [line] = done.left
    assert line.startswith("2 of run 2: it is running, last sign of life 5")
    assert parts(storage)[:2] == live


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "it has no record in runs/"),
        (b"{", "its record in runs/ is damaged"),
        (b"{}", "its record in runs/ is damaged"),
        ({"state": "sleeping"}, "its record in runs/ is damaged"),
        ({"state": []}, "its record in runs/ is damaged"),
        ({"at": "yesterday"}, "its record in runs/ is damaged"),
        ({"at": "2026-01-01T00:00:00"}, "its record in runs/ is damaged"),
        ({"at": None}, "its record in runs/ is damaged"),
    ],
)
def test_parts_of_runs_that_nothing_is_known_of_are_left_alone(storage, record, reason):
    run_of(storage, "1", rows("a"), rows("b"))
    run_of(storage, "2", rows("c"), rows("d"))
    known = json.loads(storage.get("runs/2.json"))
    storage.delete("runs/2.json")
    if record is not None:
        storage.put("runs/2.json", record if isinstance(record, bytes) else json.dumps(known | record).encode())
    assert compact(storage) == Compaction(2, 1, (f"2 of run 2: {reason}",))
    assert len(parts(storage)) == 3


def test_a_part_of_a_foreign_name_is_left_alone(storage):
    run_of(storage, "1", rows("a"), rows("b"))
    storage.put("metadata/mine.parquet", storage.get(parts(storage)[0]))
    [line] = compact(storage).left
    assert "mine.parquet: it has no record" in line
    assert "metadata/mine.parquet" in parts(storage)


def test_a_live_run_between_two_dead_ones_keeps_its_place(storage):
    """Rows of the same id in each: whoever is latest wins, before, after, and when the live run has ended, too."""
    run_of(storage, "1", rows(*"abcd", failed=True), rows("s"))
    run_of(storage, "2", rows(*"abc", failed=True), rows("d"), rows("s", failed=True), state="running", age=timedelta())
    run_of(storage, "3", rows(*"ab", failed=True), rows("s", "a", failed=True))
    before = read(storage)
    runs = dict(zip(before["id"].to_pylist(), before["run"].to_pylist(), strict=True))
    assert runs == {"a": "3", "b": "3", "c": "2", "d": "2", "s": "1"}
    assert compact(storage).replaced == 4
    assert read(storage).equals(before)
    recorded(storage, "2", "finished")
    assert compact(storage).replaced == 4
    assert len(parts(storage)) == 1
    assert read(storage).equals(before)


KINDS = {
    "int": pa.array([1, None]),
    "small": pa.array([1, 2], pa.int8()),
    "float": pa.array([0.5, 2.0]),
    "text": pa.array(["x", None]),
    "null": pa.nulls(2),
    "bool": pa.array([True, None]),
    "list": pa.array([[1], None], pa.list_(pa.int32())),
    "struct": pa.array([{"a": 1}, {"a": None}]),
    "time": pa.array([0, 1], pa.timestamp("us")),
    "word": pa.array(["x", "y"]).dictionary_encode(),
}
PAIRS = [
    ("int", "small", "text"),
    ("int", "float", "none"),
    ("int", "text", "int"),
    ("int", "null", "text"),
    ("int", "null", "int"),
    ("small", "float", "null"),
    ("small", "bool", "none"),
    ("float", "list", "null"),
    ("text", "null", "int"),
    ("text", "struct", "null"),
    ("text", "word", "text"),
    ("text", "word", "null"),
    ("null", "list", "none"),
    ("null", "struct", "text"),
    ("null", "word", "int"),
    ("bool", "time", "text"),
    ("list", "struct", "none"),
    ("time", "word", "int"),
]
"""Types that agree, that one is the other's null or its dictionary, that widen, and that only texts can hold."""


@pytest.mark.parametrize(("one", "other", "last"), PAIRS)
def test_columns_of_the_users_may_differ_in_type(tmp_path, one, other, last):
    """What is compacted now and what a live run brings must give what they would have given together."""
    storage = Storage(str(tmp_path))
    run_of(storage, "1", rows("a", "b", own=KINDS[one]), rows("c", "d", own=KINDS[other], more=KINDS[one]))
    run_of(storage, "2", rows("e", "f", own=KINDS[one]), rows("g", "h", more=KINDS[other]))
    own = {"unlike": pa.array([1, 2])} if last == "none" else {"own": KINDS[last]}
    run_of(storage, "3", rows("y", "z", **own), state="running", age=timedelta())
    before = read(storage)
    compact(storage)
    assert len(parts(storage)) < 5
    assert contents(read(storage)) == contents(before)
    recorded(storage, "3", "finished")
    compact(storage)
    assert contents(read(storage)) == contents(before)


def test_categories_of_many_parts_may_be_more_than_their_indices_can_count(storage):
    small = pa.dictionary(pa.int8(), pa.string())
    for start in (0, 100, 200):
        table = rows(*(f"{number}" for number in range(start, start + 100)))
        words = table["id"].combine_chunks().dictionary_encode().cast(small)
        table = table.set_column(table.column_names.index("own"), "own", words)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        storage.put(f"metadata/part-r-{start:06d}.parquet", sink.getvalue().to_pybytes())
    recorded(storage, "r", "finished")
    before = read(storage)
    assert compact(storage).written == 1
    assert read(storage).equals(before)


def test_an_empty_part_is_no_trouble(storage):
    run_of(storage, "1", rows("a").slice(0, 0), rows("b").slice(0, 0), rows("a"))
    assert compact(storage) == Compaction(2, 0, ())
    run_of(storage, "2", rows("a").slice(0, 0))
    compact(storage)
    assert read(storage)["id"].to_pylist() == ["a"]


def test_an_empty_ledger_is_no_trouble(storage):
    assert compact(storage) == Compaction(0, 0, ())


def test_a_damaged_part_ends_it_before_anything_is_deleted(storage):
    history(storage)
    storage.put("metadata/part-2-000009.parquet", b"junk")
    names = parts(storage)
    with pytest.raises(LedgerError, match=r"part-2-000009\.parquet cannot be read"):
        compact(storage)
    assert parts(storage) == names


def test_a_new_part_that_cannot_be_read_back_ends_it_before_anything_is_deleted(storage, monkeypatch):
    before = history(storage)
    monkeypatch.setattr(compact_module.pq.ParquetWriter, "write_table", lambda *_, **__: None)
    names = parts(storage)
    with pytest.raises(LedgerError, match="0 of 11 rows"):
        compact(storage)
    assert parts(storage) == names
    assert read(storage).equals(before)


class Hooked(Storage):
    """A place that counts what is done to it, and calls a hook before each deed."""

    def __init__(self, url, before):
        super().__init__(url)
        self.before, self.deeds, self.lock = before, 0, threading.Lock()

    def put(self, path, data):
        self._count("put")
        super().put(path, data)

    def delete(self, path):
        self._count("delete")
        super().delete(path)

    def get(self, path):
        self._count("get")
        return super().get(path)

    def list(self, prefix=""):
        self._count("list")
        return super().list(prefix)

    def _count(self, deed):
        with self.lock:
            self.before(deed, self.deeds)
            self.deeds += 1


class Killed(Exception):
    """Stands for the end of the process."""


def killed_after(url: str, number: int) -> Hooked:
    changes = itertools.count()

    def before(deed: str, _: int) -> None:
        if deed in ("put", "delete") and next(changes) >= number:
            raise Killed

    return Hooked(url, before)


@pytest.mark.parametrize("number", range(13))
def test_a_compaction_that_is_killed_loses_nothing_and_can_be_run_again(url, small, number):
    check_kill(url, number)


def test_a_compaction_of_local_files_that_is_killed_loses_nothing(tmp_path, small):
    check_kill(str(tmp_path), 6)  # all parts are written, some of the others deleted


def check_kill(url: str, number: int) -> None:
    """Compact until so many files are written or deleted; the ledger stays as it was, and is compact later."""
    storage = Storage(url)
    history(storage)
    run_of(storage, "3", rows("a", own=pa.array(["text"])), rows("l", own=pa.array(["text"])))
    run_of(storage, "4", rows("k", "x"), state="running", age=timedelta())
    before = read(storage)
    with suppress(Killed) if number < 12 else nullcontext():  # it writes 3 parts and deletes 9
        compact(killed_after(url, number))
        assert number == 12
    assert contents(read(storage)) == contents(before)
    compact(storage)
    assert contents(read(storage)) == contents(before)
    assert len(parts(storage)) == 4
    assert compact(storage).replaced == 0


def test_nothing_is_deleted_before_everything_is_written(url, small):
    deeds = []
    history(Storage(url))
    compact(Hooked(url, lambda deed, _: deeds.append(deed)))
    changes = [deed for deed in deeds if deed in ("put", "delete")]
    assert changes == ["put"] * 3 + ["delete"] * 7


def interleaved(url: str, number: int, act) -> Hooked:
    """Return a place where something else happens before one of the deeds."""
    return Hooked(url, lambda _, deeds: act() if deeds == number else None)


MOMENTS = 27
"""Deeds of one compaction of the history: 3 to read the runs, 15 to read the parts twice, 3 writes, 7 deletions."""


@pytest.mark.parametrize("number", range(0, MOMENTS, 2))
def test_two_compactions_at_once_lose_nothing(url, storage, small, number):
    before = history(storage)
    with suppress(Interfered):
        compact(interleaved(url, number, lambda: compact(storage)))
    assert contents(read(storage)) == contents(before)
    compact(storage)
    assert contents(read(storage)) == contents(before)


@pytest.mark.parametrize("number", range(0, MOMENTS, 5))
def test_a_compaction_during_one_that_is_killed_during_another_loses_nothing(url, storage, small, number):
    before = history(storage)

    def killed():
        with suppress(Killed):  # late, there is nothing left to do
            compact(killed_after(url, number % 9))

    with suppress(Interfered):
        compact(interleaved(url, number, killed))
    assert contents(read(storage)) == contents(before)


@pytest.mark.parametrize("number", range(9))  # it lists, reads 7 parts, and lists again
def test_a_reader_sees_the_same_while_the_ledger_is_compacted(url, storage, small, number):
    before = history(storage)
    assert contents(read(interleaved(url, number, lambda: compact(storage)))) == contents(before)


def test_a_reader_sees_the_same_at_any_moment_of_a_compaction(url, storage, small):
    before, seen = contents(history(storage)), []
    compact(Hooked(url, lambda *_: seen.append(contents(read(storage)))))
    assert seen == [before] * MOMENTS


def test_a_run_that_ends_meanwhile_keeps_the_order_of_its_rows(tmp_path):
    """Its last part, which holds a row once more, must not be left behind an earlier one that was compacted."""
    for number in range(12):
        url = f"memory://{tmp_path.name}/{number}"
        storage = Storage(url)
        run_of(storage, "1", rows("a"), rows("b"))
        run_of(storage, "5", rows("x", failed=True, own=pa.array([1])), state="running", age=timedelta())
        ended = []

        def end(storage=storage, ended=ended):
            writer = LedgerWriter(storage, "5", _parts=1)
            writer.append(rows("x", failed=True, run="5", own=pa.array([2])))
            writer.flush()
            recorded(storage, "5", "finished")
            ended.append(True)

        compact(interleaved(url, number, end))
        assert ended or number == 11  # it reads 2 runs, lists, reads 2 parts twice, writes one and deletes two
        if ended:
            assert read(storage, ["own"], ["x"]).to_pylist() == [{"own": 2}]
            compact(storage)
            assert read(storage, ["own"], ["x"]).to_pylist() == [{"own": 2}]


@pytest.mark.parametrize("number", [4, 11], ids=["first reading", "second reading"])
def test_a_vanished_part_ends_it_before_anything_is_deleted(url, storage, number):
    history(storage)
    *others, last = parts(storage)
    with pytest.raises(Interfered, match=r"metadata/part-2-000003\.parquet has vanished"):
        compact(interleaved(url, number, lambda: storage.delete(last)))
    assert parts(storage) == others


def test_readers_writers_and_compactions_in_threads(tmp_path):
    """In each round a run is added while two compactions go on: a reader finds all that was written before."""
    storage, together, ended = Storage(str(tmp_path)), threading.Barrier(5), [0]
    history(storage)

    def again(act):
        try:
            for number in range(12):
                together.wait(30)
                act(number)
        except BaseException:
            together.abort()
            raise

    def add(number):
        run_of(storage, f"{100 + number}", rows(f"row{number}", "a"), rows("b", failed=True))
        ended[0] = number + 1

    def merge(_):
        with suppress(Interfered):
            compact(Storage(str(tmp_path)))

    def look(_):
        expected = ended[0]
        view = read(Storage(str(tmp_path)), ["id", "status"])
        found = set(view["id"].to_pylist())
        assert {f"row{number}" for number in range(expected)} | set("abcdefghijk") <= found
        assert len(found) == len(view)

    with ThreadPoolExecutor(5) as pool:
        threads = [pool.submit(again, act) for act in (add, merge, merge, look, look)]
    assert [thread.exception() for thread in threads] == [None] * 5
    assert len(read(storage)) == 23


@pytest.mark.parametrize("seed", range(4))
def test_any_history_is_compacted_to_the_same_view(tmp_path, small, seed):
    draw = random.Random(seed)
    storage = Storage(str(tmp_path))
    kinds = [KINDS[name] for name in ("int", "text", "float", "null")]
    for number in range(6):
        tables = [
            rows(*draw.choices("abcdefghijklmnopq", k=2), failed=draw.random() < 0.6, own=draw.choice(kinds))
            for _ in range(draw.randrange(1, 6))
        ]
        state = draw.choice(["finished", "broken", "running"])
        run_of(storage, f"{number}", *tables, state=state, age=draw.choice([timedelta(), LONG_AGO]))
        before = contents(read(storage))
        if draw.random() < 0.5:
            compact(storage)
            assert contents(read(storage)) == before
    for number in range(6):
        recorded(storage, f"{number}", "finished")
    before = contents(read(storage))
    compact(storage)
    assert contents(read(storage)) == before
    assert compact(storage).replaced == 0


def test_long_work_says_how_far_it_is(storage, monkeypatch, caplog):
    history(storage)
    monkeypatch.setattr(compact_module, "LINE_SECONDS", 0)
    with caplog.at_level(logging.INFO):
        compact(storage)
    assert {"7 of 7 parts read", "6 of 6 parts merged", "7 of 7 replaced parts deleted"} <= set(caplog.messages)


@pytest.mark.integration
def test_it_works_in_an_object_store(s3, bucket, small):
    storage = Storage(f"s3://{bucket}/out")
    before = history(storage)
    storage.put("videos/aa/orphan.mp4", b"x")
    assert compact(storage) == Compaction(7, 3, ())
    assert len(parts(storage)) == 3
    assert read(storage).equals(before)
    assert find_orphans(storage) == ["videos/aa/orphan.mp4"]
    assert delete_orphans(storage, find_orphans(storage)) == (0, 1)
    assert storage.exists("videos/aa/orphan.mp4")
    assert s3.open_uploads(bucket) == []


def aged(storage: Storage, path: str, age: timedelta) -> None:
    """Have a local file last written some time ago."""
    then = (datetime.now(UTC) - age).timestamp()
    os.utime(f"{storage.root}/{path}", (then, then))


def named(number: int) -> str:
    return f"videos/aa/{number}.mp4"


def test_orphans_are_the_files_that_no_row_names(storage):
    """A row outside the view names its files, too, and so does one of a live run."""
    run_of(storage, "1", rows("a", uri=named(1)))
    run_of(storage, "2", rows("a", uri=named(2)), rows("b").drop_columns(["uri", "thumbnail_uri"]))
    run_of(storage, "3", rows("c", uri="images/c.png"), state="running", age=timedelta())
    table = rows("d", uri=named(4))
    thumbnail = table.set_column(table.column_names.index("thumbnail_uri"), "thumbnail_uri", [["thumbnails/d.webp"]])
    run_of(storage, "4", thumbnail)
    for path in (*map(named, range(1, 5)), "images/c.png", "thumbnails/d.webp", "thumbnails/e.webp", "gallery.png"):
        storage.put(path, b"x")
    assert find_orphans(storage) == ["thumbnails/e.webp", named(3)]


def test_a_file_that_is_committed_meanwhile_is_no_orphan(url):
    """First its file, then its row, between any two steps of the search."""
    for number in range(12):
        storage = Storage(f"{url}/{number}")
        history(storage)

        def commit(storage=storage):
            storage.put(named(1), b"x")
            run_of(storage, "5", rows("new", uri=named(1)), state="running", age=timedelta())

        assert find_orphans(interleaved(f"{url}/{number}", number, commit)) == []


def test_orphans_are_found_while_the_ledger_is_compacted(url, small):
    first = Storage(f"{url}/files")
    for name in "abcdefg":
        first.put(f"videos/{name}", b"x")
        run_of(first, name, rows(name, uri=f"videos/{name}"))
    first.put("videos/orphan", b"x")
    files = {name: first.get(name) for name in first.list()}
    for number in range(12):  # it lists 3 folders and the parts, reads 7 parts, and lists again
        storage = Storage(f"{url}/{number}")
        for name, data in files.items():
            storage.put(name, data)
        found = find_orphans(interleaved(f"{url}/{number}", number, lambda storage=storage: compact(storage)))
        assert found == ["videos/orphan"]
        assert len(parts(storage)) == 2


def test_only_old_orphans_are_deleted(tmp_path):
    storage = Storage(str(tmp_path))
    history(storage)
    for number, hours in enumerate((0, 23.9, 24.1, 100)):
        storage.put(named(number), b"x")
        aged(storage, named(number), timedelta(hours=hours))
    assert delete_orphans(storage, find_orphans(storage)) == (2, 2)
    assert storage.list("videos") == [named(0), named(1)]


def test_an_orphan_that_is_written_again_is_kept(tmp_path):
    storage = Storage(str(tmp_path))
    history(storage)
    storage.put(named(0), b"x")
    aged(storage, named(0), LONG_AGO)
    orphans = find_orphans(storage)
    storage.put(named(0), b"y")
    assert delete_orphans(storage, orphans) == (0, 1)
    assert storage.get(named(0)) == b"y"


def test_an_orphan_that_is_gone_already_counts_for_nothing(storage):
    assert delete_orphans(storage, [named(0)]) == (0, 0)


def test_an_age_that_cannot_be_told_is_an_error(storage, monkeypatch):
    storage.put(named(0), b"x")
    monkeypatch.setattr(Storage, "modified", lambda *_: (_ for _ in ()).throw(StorageError("no access")))
    with pytest.raises(StorageError, match="no access"):
        delete_orphans(storage, [named(0)])
    assert storage.exists(named(0))
