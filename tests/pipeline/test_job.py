import json
from itertools import count
from time import monotonic

import pyarrow as pa
import pytest

from pipeline import job as job_module
from pipeline.batching import read_rows
from pipeline.job import SHARE_FROM_ROWS, Breaker, RowsMissing, Stalled, Stopping, StopRequest
from pipeline.rows import Batch, Item, RenderRow, RowError
from tests.pipeline.simulated import simulated_job
from tests.pipeline.tables import write_table

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
