from dataclasses import replace

import pyarrow as pa
import pytest

from jobs.summary import failures, plan_text, summary_text
from pipeline.job import RenderJob
from pipeline.rows import LEDGER_SCHEMA
from tests.pipeline.simulated import simulated_job
from tests.pipeline.tables import write_table


@pytest.fixture
def job(tmp_path) -> RenderJob:
    rows = [{"prompt": prompt, "height": 64, "width": 64, "num_frames": 9} for prompt in ("a", "b", "a")]
    return simulated_job(write_table(tmp_path / "in.parquet", rows), tmp_path / "out")


def ledger_of(job: RenderJob, *seconds: dict[str, float], reasons: tuple[str, ...] = ()) -> pa.Table:
    rows = [
        {"id": f"s{i}", "status": "succeeded", "run": job.run, "seconds": list(s.items())}
        for i, s in enumerate(seconds)
    ]
    rows += [{"id": f"f{i}", "status": "failed", "error_message": reason} for i, reason in enumerate(reasons)]
    return pa.Table.from_pylist(rows, LEDGER_SCHEMA)


def test_the_summary_says_what_was_done_what_failed_and_where_to_look(job):
    view = ledger_of(job, {"encode": 1.0, "sample": 4.0}, {"encode": 3.0, "sample": 6.0}, reasons=("no", "no", "why"))
    text = summary_text(view, job, "the gallery", rendered=5, seconds=12.0)
    assert "2 of 5 rows succeeded; this run took 5 rows in 12.0 s" in text
    assert "failed, 2 x: no" in text
    assert "seconds per video: encode 2.00, sample 5.00, decode 0.00, publish 0.00" in text
    assert job.storage.url("videos") in text
    assert "the gallery" in text
    assert "GPU" not in text


def test_on_gpus_it_says_what_a_video_costs(job):
    stages = tuple(replace(spec, gpus=share) for spec, share in zip(job.plan.stages, (0.1, 0.5), strict=True))
    on_gpus = replace(job, plan=replace(job.plan, stages=stages))
    view = ledger_of(on_gpus, {"encode": 1.0, "sample": 4.0}, {"encode": 3.0, "sample": 6.0})
    assert "GPU-seconds per video: 2.70" in summary_text(view, on_gpus, "g", rendered=2, seconds=1.0)


def test_only_the_commonest_failures_are_told(job):
    reasons = ("often", "often", *(f"reason {i}" for i in range(20)))
    lines = failures(ledger_of(job, reasons=reasons))
    assert lines[0] == "  failed, 2 x: often"
    assert len(lines) == 5


def test_the_plan_counts_rows_by_fate(job):
    text = plan_text(job)
    assert text.startswith("2 rows to render, 0 in the ledger already, 1 equal to an earlier row, 0 with a disputed id")
    assert "up to 4 rows of one shape in a batch" in text
