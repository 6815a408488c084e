import json
from dataclasses import replace
from itertools import count
from time import monotonic

import pyarrow as pa
import pytest

from pipeline.batch import job as job_module
from pipeline.batch.job import SHARE_FROM_ROWS, Breaker, RowsMissing, Stalled, Stopping, StopRequest
from pipeline.ledger import job_records, ledger
from pipeline.ledger.compact import compact
from pipeline.request import derived_seed
from pipeline.rows import Batch, Item, RenderRow, RowError
from pipeline.storage.storage import Storage
from pipeline.tables.batching import read_batches, read_rows
from tests.pipeline.sample_tables import write_table
from tests.pipeline.simulated import simulated_job

SHAPE = {"height": 64, "width": 64, "num_frames": 9}


def batch(*errors: str | None) -> Batch:
    """Return rows that succeeded (None) or failed with an error of the given type."""
    found = [RowError(stage="sample", type=name, message="why") if name else None for name in errors]
    rows = [RenderRow(id=f"r{i}", position="t:0", error=error) for i, error in enumerate(found)]
    return Batch(tuple(Item(row) for row in rows), pa.table({"x": list(range(len(rows)))}))


def test_failures_in_a_row_trip_the_breaker():
    breaker = Breaker(max_in_a_row=3)
    breaker.take(batch("OSError", "OSError"))
    assert not breaker.tripped
    breaker.take(batch("OSError"))
    assert "3 in a row; the last in sample: OSError: why" in breaker.tripped


def test_a_success_in_between_starts_the_count_again():
    breaker = Breaker(max_in_a_row=2)
    breaker.take(batch("OSError", None, "OSError", None))
    assert not breaker.tripped


def test_bad_rows_never_trip_the_breaker():
    breaker = Breaker(max_in_a_row=2)
    breaker.take(batch(*["RequestError"] * 500))
    assert not breaker.tripped


def test_too_large_a_share_trips_the_breaker_late():
    breaker = Breaker(max_in_a_row=1000)
    breaker.take(batch(*["OSError", *[None] * 9] * 10))
    assert not breaker.tripped  # 10 % of 100 rows: too early to tell
    breaker.take(batch(*["OSError", *[None] * 9] * (SHARE_FROM_ROWS // 10)))
    assert breaker.tripped


def test_a_stop_is_over_when_nothing_runs_or_its_grace_is_used_up(monkeypatch):
    now = 100.0
    monkeypatch.setattr(job_module.time, "monotonic", lambda: now)
    stopping = Stopping(grace_s=10.0, began=now, busy=now)
    assert not stopping.is_over(lambda: False)
    now = 101.0
    assert not stopping.is_over(lambda: True)
    now = 102.5
    assert stopping.is_over(lambda: True)
    assert not Stopping(10.0, began=now, busy=now).is_over(lambda: False)
    now = 120.0
    assert stopping.is_over(lambda: False)


def test_a_stop_keeps_what_is_done_and_writes_nothing_for_skipped_rows(tmp_path, monkeypatch):
    stop = StopRequest()

    class Half:
        """A Dataset that finishes its first row, and passes the second one through after a stop."""

        def __init__(self, worklist, _plan, rules, _limits):
            [work] = worklist.part_works()
            self.first, self.second = [one for _, one in read_rows(work.part, rules, [0, 1])]
            self.stopped = False

        def stop(self):
            self.stopped = True

        def is_idle(self):
            return False

        def __iter__(self):
            yield self.first
            stop.requested = True
            yield None
            assert self.stopped
            item = self.second.items[0]
            yield self.second.with_items([Item(item.row.updated(skipped=True))])

    monkeypatch.setattr(job_module.runner, "Rendering", Half)
    table = write_table(tmp_path / "in.parquet", [{"prompt": "a", **SHAPE}, {"prompt": "b", **SHAPE}])
    job = simulated_job(table, tmp_path / "out")
    job.execute(lambda batch: None, stop)
    assert job.view()["prompt"].to_pylist() == ["a"]
    assert len(list((tmp_path / "out" / "metadata").iterdir())) == 1
    assert job.pending().num_rows == 1
    assert json.loads((tmp_path / "out" / "runs" / f"{job.run}.json").read_text())["state"] == "interrupted"


def test_a_job_without_work_for_its_workers_ends(tmp_path, monkeypatch):
    class Waiting:
        """A Dataset whose workers find no place."""

        def __init__(self, *_):
            self.idle = iter([False, True, True, True, True])

        def is_idle(self):
            return next(self.idle)

        def __iter__(self):
            return iter([None] * 5)

    clock = count(monotonic(), 10)  # goes on from where the real one is
    monkeypatch.setattr(job_module.runner, "Rendering", Waiting)
    monkeypatch.setattr(job_module.time, "monotonic", lambda: next(clock))
    table = write_table(tmp_path / "in.parquet", [{"prompt": "a", **SHAPE}])
    job = simulated_job(table, tmp_path / "out", stall_s=25.0)
    with pytest.raises(Stalled, match="for 25 s: GPUs of the plan are missing"):
        job.execute(lambda batch: None)
    assert json.loads((tmp_path / "out" / "runs" / f"{job.run}.json").read_text())["state"] == "broken"


def test_rows_that_never_arrive_are_an_error(tmp_path, monkeypatch):
    class Nothing:
        """A Dataset that loses every row."""

        def __init__(self, *_):
            pass

        def __iter__(self):
            return iter(())

    monkeypatch.setattr(job_module.runner, "Rendering", Nothing)
    table = write_table(tmp_path / "in.parquet", [{"prompt": "a", **SHAPE}, {"prompt": "b", **SHAPE}])
    with pytest.raises(RowsMissing, match="2 rows are still missing after 3 passes"):
        simulated_job(table, tmp_path / "out").execute(lambda batch: None)


@pytest.fixture
def rendered(monkeypatch) -> list[tuple[str, int]]:
    """Renders without Ray; returns the ids and rerolls of what was rendered, in order.

    The prompt says how many of a row's first renderings are flagged, and which fail: "2" or "2, fail 1".
    """
    done: list[tuple[str, int]] = []

    def finished(item: Item) -> Item:
        row = item.row
        done.append((row.id, row.rerolls))
        flagged, _, failing = str(row.prompt).partition(", fail ")
        if failing == str(row.rerolls):
            return item.failed("sample", ValueError("no"))
        flags = ["frozen"] if row.rerolls < int(flagged) else []
        return item.with_tensors({}, flags=flags, motion=float(not flags), uri=f"{row.id}-{item.request.seed}")

    class Plain:
        def __init__(self, worklist, plan, rules, _limits):
            self.batches = list(read_batches(list(worklist.part_works()), rules, plan.batch_size))

        def __iter__(self):
            return (one.with_items([finished(item) for item in one.items]) for one in self.batches)

    monkeypatch.setattr(job_module.runner, "Rendering", Plain)
    return done


def rerolled(tmp_path, prompts: dict[str, str], reroll: int, **values: object) -> dict[str, dict[str, object]]:
    """Run a job over rows with these ids and prompts; returns the view by id."""
    table = write_table(
        tmp_path / "in.parquet", [{"id": i, "prompt": p, **SHAPE, **values} for i, p in prompts.items()]
    )
    job = simulated_job(table, tmp_path / "out", reroll=reroll)
    job.execute(lambda batch: None)
    assert job.num_due == 0
    return {row["id"]: row for row in job.view().to_pylist()}


def test_flagged_rows_are_rerolled_until_they_are_fine_or_their_rerolls_are_used_up(tmp_path, rendered):
    view = rerolled(tmp_path, {"fine": "0", "once": "1", "twice": "2", "never": "9"}, reroll=2, seed=5)
    assert {name: (row["rerolls"], row["flags"]) for name, row in view.items()} == {
        "fine": (0, []),
        "once": (1, []),
        "twice": (2, []),
        "never": (2, ["frozen"]),
    }
    assert {row["first_seed"] for row in view.values()} == {5}
    assert view["fine"]["seed"] == 5
    for name in ("once", "twice", "never"):
        number = view[name]["rerolls"]
        assert view[name]["seed"] == derived_seed(f"{name}, reroll {number}")
        assert view[name]["uri"] == f"{name}-{view[name]['seed']}"
    assert len(rendered) == 4 + 3 + 2


def test_the_same_command_rerolls_nothing_again_and_a_greater_number_goes_on(tmp_path, rendered):
    prompts = {"once": "1", "never": "9"}
    assert rerolled(tmp_path, prompts, reroll=0)["never"]["rerolls"] == 0
    for reroll, expected in ((1, [("once", 1), ("never", 1)]), (1, []), (3, [("never", 2), ("never", 3)]), (2, [])):
        rendered.clear()
        view = rerolled(tmp_path, prompts, reroll)
        assert rendered == expected
        compact(Storage(str(tmp_path / "out")))
    assert (view["never"]["rerolls"], view["once"]["rerolls"], len(view)) == (3, 1, 2)


def test_a_reroll_that_fails_counts_and_leaves_the_earlier_video(tmp_path, rendered):
    view = rerolled(tmp_path, {"a": "9, fail 1"}, reroll=1)
    assert (view["a"]["status"], view["a"]["rerolls"], view["a"]["flags"]) == ("succeeded", 0, ["frozen"])
    assert rerolled(tmp_path, {"a": "9, fail 1"}, reroll=1) == view
    assert rendered == [("a", 0), ("a", 1)]
    assert rerolled(tmp_path, {"a": "2, fail 1"}, reroll=2)["a"]["rerolls"] == 2


def test_failed_rows_are_not_rerolled(tmp_path, rendered):
    assert rerolled(tmp_path, {"a": "9, fail 0"}, reroll=2)["a"]["status"] == "failed"
    assert rendered == [("a", 0)]


def test_duplicates_follow_a_rerolled_row(tmp_path, rendered):
    table = write_table(tmp_path / "in.parquet", [{"id": "a", "prompt": "1", "seed": 5, **SHAPE}] * 2)
    for reroll, expected in ((0, 0), (1, 1)):
        job = simulated_job(table, tmp_path / "out", reroll=reroll)
        job.execute(lambda batch: None)
        original, duplicate = sorted(job.view().to_pylist(), key=lambda row: row["id"])
        assert duplicate["duplicate_of"] == original["id"]
        assert original["rerolls"] == expected
        for name in ("rerolls", "seed", "first_seed", "flags", "uri", "motion"):
            assert duplicate[name] == original[name]
    before = len(list((tmp_path / "out" / "metadata").iterdir()))
    simulated_job(table, tmp_path / "out", reroll=1).execute(lambda batch: None)
    assert len(list((tmp_path / "out" / "metadata").iterdir())) == before
    assert rendered == [("a", 0), ("a", 1)]


def test_signs_of_life_do_not_wait_for_the_ledger(tmp_path, rendered, monkeypatch):
    made, real = [], job_records.Heartbeat

    def heartbeat(*arguments, **options):
        made.append(real(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(job_records, "Heartbeat", heartbeat)
    table = write_table(tmp_path / "in.parquet", [{"id": "a", "prompt": "1", **SHAPE}])
    replace(simulated_job(table, tmp_path / "out"), flush_seconds=900.0).execute(lambda batch: None)
    assert [each.seconds for each in made] == [ledger.FLUSH_SECONDS]


def test_a_stop_ends_rerolls_too(tmp_path, rendered):
    stop = StopRequest()
    table = write_table(tmp_path / "in.parquet", [{"id": "a", "prompt": "9", **SHAPE}])
    job = simulated_job(table, tmp_path / "out", reroll=5)

    def stop_at_the_second(batch: Batch | None) -> None:
        stop.requested = len(rendered) == 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_module.runner.Rendering, "stop", lambda self: None, raising=False)
        patch.setattr(job_module.runner.Rendering, "is_idle", lambda self: True, raising=False)
        job.execute(stop_at_the_second, stop)
    assert rendered == [("a", 0), ("a", 1)]
    assert job.num_due == 1
