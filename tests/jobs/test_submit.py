"""`ray job submit` on a real head node: a job that runs through, what it shows meanwhile, and one that is stopped."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.ledger import ledger
from pipeline.storage.storage import Storage
from tests.jobs.head import Head, head_node, until
from tests.pipeline.sample_tables import write_table

pytestmark = [pytest.mark.integration, pytest.mark.ray, pytest.mark.timeout(600)]

SHAPE = {"num_frames": 17, "num_inference_steps": 4, "video_num_inference_steps": 2}


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with head_node() as started:
        yield started


def flags(folder: Path, num_rows: int) -> list[str]:
    rows = [{"prompt": f"prompt {i}", **SHAPE} for i in range(num_rows)]
    table = write_table(folder / "in.parquet", rows)
    return ["--input", str(table), "--output", str(folder / "out"), "--model", "toy"]


def shows_metrics(counters: str) -> bool:
    """Tell whether workers of the last stage, and the driver, have exported what they count."""
    names = ("rows_total{", "batch_seconds_bucket", "busy_seconds_total", "published_bytes_total", "rows_left")
    return 'stage="publish"' in counters and all(f"ray_pyramid_{name}" in counters for name in names)


def test_a_submitted_job_runs_on_the_cluster_and_can_be_watched(head, tmp_path):
    head.submit("whole", *flags(tmp_path, 30))
    until(lambda: shows_metrics(head.counters()), 180)
    until(lambda: head.status("whole") == "SUCCEEDED", 240)
    assert "30 of 30 rows succeeded" in head.ray("logs", "whole")
    view = ledger.read(Storage(str(tmp_path / "out")))
    assert set(view["status"].to_pylist()) == {"succeeded"}
    logged = [record for record in head.log_records() if record.get("stage") == "sample"]
    assert {row for record in logged for row in record["rows"]} == set(view["id"].to_pylist())
    assert all(record["seconds"] > 0 and record["node"] for record in logged)


def test_auto_is_the_cluster_that_runs_on_this_machine(head, tmp_path):
    command = [sys.executable, "-m", "jobs.cli", "render", "--address", "auto", "--device", "cpu"]
    command += flags(tmp_path, 3)
    done = subprocess.run(command, env=head.env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ids = ledger.read(Storage(str(tmp_path / "out")), ["id"])["id"].to_pylist()
    logged = {row for record in head.log_records() if record.get("stage") == "sample" for row in record["rows"]}
    assert len(ids) == 3
    assert set(ids) <= logged


def test_a_stopped_job_keeps_what_is_done(head, tmp_path):
    head.submit("stopped", *flags(tmp_path, 500), "--ledger-rows", "1000", "--ledger-seconds", "1000")
    storage = Storage(str(tmp_path / "out"))
    until(lambda: len(storage.list("videos")) >= 5, 240)
    head.ray("stop", "stopped")
    until(lambda: head.status("stopped") == "STOPPED", 60)
    view = ledger.read(storage)
    assert 3 <= len(view) < 500
    assert all(storage.exists(uri) for uri in view["uri"].to_pylist())
