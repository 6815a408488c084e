from datetime import UTC, datetime, timedelta

import pytest

from jobs import cli
from jobs.commands import status
from pipeline.ledger.job_records import Heartbeat
from pipeline.storage.storage import Storage
from tests.pipeline.sample_tables import write_table
from tests.pipeline.simulated import AsRead, simulated_job

STARTED = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)


def run(state: str, done: int) -> dict[str, object]:
    at = STARTED + timedelta(minutes=10)
    rows = {"total": 100, "done": done, "failed": 1}
    return {"run": "r", "state": state, "started_at": STARTED.isoformat(), "at": at.isoformat(), "rows": rows}


def test_a_running_run_says_its_rate_the_time_left_and_its_last_sign_of_life():
    text = status.run_text(run("running", 20), STARTED + timedelta(minutes=10, seconds=7))
    assert text == (
        "run r running: 20 of 100 rows, 1 failed, 2.0 rows per minute, about 40 min left, last sign of life 7 s ago"
    )


def test_a_run_without_rows_has_no_rate():
    assert "per minute" not in status.run_text(run("running", 0), STARTED)


def test_an_ended_run_says_how_it_ended():
    assert status.run_text(run("finished", 100), STARTED).endswith(
        "finished: 100 of 100 rows, 1 failed, 10.0 rows per minute"
    )


def test_the_ledger_and_its_failures_are_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pipeline.batch.job.runner.Rendering", AsRead)
    table = write_table(tmp_path / "in.parquet", [{"prompt": "a", "height": 64}, {"prompt": "b", "height": 65}])
    simulated_job(table, tmp_path / "out").execute(lambda batch: None)
    assert cli.main(["status", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "2 rows in the ledger, 1 failed"
    assert printed[1] == "  failed, 1 x: height 65 is not a multiple of 64: the nearest are 64 and 128"
    assert "finished: 2 of 2 rows, 1 failed" in printed[2]


def test_a_place_without_jobs_exits_2(tmp_path, capsys):
    assert cli.main(["status", str(tmp_path)]) == 2
    assert "no job has written" in capsys.readouterr().err


@pytest.mark.parametrize("data", [b"{", b"[]", b"{}"])
def test_a_damaged_state_exits_2(data, tmp_path, capsys):
    Storage(str(tmp_path)).put("runs/r.json", data)
    assert cli.main(["status", str(tmp_path)]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_only_the_latest_runs_are_shown(tmp_path, capsys):
    for number in range(9):
        Heartbeat(Storage(str(tmp_path)), f"run{number}", total=0).write("finished")
    assert cli.main(["status", str(tmp_path)]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]] == [f"run{n}" for n in range(4, 9)]
