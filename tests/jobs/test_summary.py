from dataclasses import replace

import pyarrow as pa
import pytest

from jobs.summary import expectation, failures, flagged, plan_text, summary_text
from pipeline.batch.costs import Costs
from pipeline.batch.job import RenderJob
from pipeline.batch.planner import Plan, Pool, StageSpec
from pipeline.rows import LEDGER_SCHEMA
from pipeline.tables.batching import read_rows
from tests.pipeline.sample_tables import batch, write_table
from tests.pipeline.simulated import Sample, simulated_job


@pytest.fixture
def job(tmp_path) -> RenderJob:
    rows = [{"prompt": prompt, "height": 64, "width": 64, "num_frames": 9} for prompt in ("a", "b", "a")]
    return simulated_job(write_table(tmp_path / "in.parquet", rows), tmp_path / "out")


def ledger_of(*reasons: str | None) -> pa.Table:
    """Return rows that succeeded (None) or failed with the given reason."""
    rows = [
        {"id": f"r{i}", "status": "failed" if reason else "succeeded", "error_message": reason}
        for i, reason in enumerate(reasons)
    ]
    return pa.Table.from_pylist(rows, LEDGER_SCHEMA)


def measure(job: RenderJob, *seconds: dict[str, float]) -> None:
    request = next(iter(read_rows(job.worklist.parts[0], job.rules, [0])))[1].items[0]
    job.measured.take(batch(*(request.with_tensors({}, seconds=one, batch_size=2) for one in seconds)))


def test_the_summary_says_what_was_done_what_failed_and_where_the_time_went(job):
    measure(job, {"encode": 1.0, "sample": 4.0}, {"encode": 3.0, "sample": 6.0})
    text = summary_text(ledger_of(None, None, "no", "no", "why"), job, rendered=5, seconds=12.0)
    assert "2 of 5 rows succeeded; this run took 5 rows in 12.0 s" in text
    assert "failed, 2 x: no" in text
    assert "seconds per video: encode 2, sample 5; batches 50 % full" in text
    assert "planned by these costs: the same workers, 514.3 videos per hour" in text
    assert "GPU" not in text


def test_on_gpus_it_says_what_a_video_costs(job):
    pools = tuple(replace(pool, gpus=0.5) for pool in job.plan.pools)
    on_gpus = replace(job, plan=replace(job.plan, pools=pools))
    measure(on_gpus, {"encode": 1.0, "sample": 4.0}, {"encode": 3.0, "sample": 6.0})
    assert "GPU-seconds per video: 7" in summary_text(ledger_of(None), on_gpus, rendered=2, seconds=1.0)


def test_other_workers_are_proposed_if_the_costs_ask_for_them(job):
    better = Plan((replace(job.plan.pools[0], workers=3), job.plan.pools[1]), batch_size=4)
    advised = replace(job, plan_for=lambda costs: replace(better, costs=costs))
    measure(advised, {"encode": 1.0, "sample": 4.0})
    assert "planned by these costs: 3 x encode, 2 x sample" in summary_text(
        ledger_of(None), advised, rendered=1, seconds=1
    )


def test_a_run_that_rendered_nothing_measured_nothing(job):
    assert summary_text(ledger_of(None), job, rendered=0, seconds=1.0).count("\n") == 0


def test_only_the_commonest_failures_are_told():
    lines = failures(ledger_of("often", "often", *(f"reason {i}" for i in range(20))))
    assert lines[0] == "  failed, 2 x: often"
    assert len(lines) == 5


def test_flagged_rows_are_counted_by_flag():
    rows = [
        {"id": "a", "status": "succeeded", "flags": ["flat", "frozen"], "rerolls": 2},
        {"id": "b", "status": "succeeded", "flags": ["frozen"], "rerolls": 0},
        {"id": "c", "status": "succeeded", "flags": [], "rerolls": 1},
        {"id": "d", "status": "failed"},
    ]
    assert flagged(pa.Table.from_pylist(rows, LEDGER_SCHEMA)) == [
        "  flagged, 2 rows: 2 frozen, 1 flat",
        "  rendered again with another seed: 2 rows",
    ]


def test_the_plan_counts_rows_by_fate(job):
    text = plan_text(job, None)
    assert text.startswith("2 rows to render, 0 in the ledger already, 1 equal to an earlier row, 0 with a disputed id")
    assert "up to 4 rows of one shape in a batch" in text
    assert "expected" not in text  # nothing is known about costs
    shard = replace(job, worklist=job.worklist.shard(999, 1000))
    assert "outside of this shard or limit" in plan_text(shard, None)


def test_the_expected_speed_and_cost_are_told_with_their_source():
    costs = Costs({"sample": 36.0}, measured=False)
    spec = StageSpec(Sample, {})
    on_gpus = Plan((Pool((spec,), workers=4, cpus=0, gpus=0.5),), batch_size=4, devices=4, costs=costs)
    assert expectation(on_gpus, 800, 2.5) == [
        "expected: 400.0 videos per hour, 2.00 hours for 800 rows, 8.00 GPU-hours, cost 20.00",
        "seconds per video: sample 36 (assumed from FLOPs; --calibrate measures them)",
    ]
    measured = replace(on_gpus, costs=replace(costs, measured=True))
    assert "cost" not in expectation(measured, 800, None)[0]
    assert "measured by earlier runs" in expectation(measured, 800, None)[1]
    on_cpu = replace(on_gpus, pools=(Pool((spec,), workers=4, cpus=1, gpus=0),))
    assert "GPU" not in expectation(on_cpu, 800, 2.5)[0]
