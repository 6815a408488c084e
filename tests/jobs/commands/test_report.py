"""The command that writes the report: where it says it is, and its exit codes; and the report of a job."""

import pytest

from jobs import cli
from pipeline.reports.report import REPORT
from pipeline.storage.storage import Storage
from tests.jobs.head import until
from tests.pipeline.sample_ledgers import recorded_rows, written
from tests.pipeline.sample_tables import write_table
from tests.pipeline.simulated import AsRead, simulated_job

ROW = {"id": "a", "prompt": "a fox", "device": "NVIDIA H200", "seconds": [("sample", 3600.0)]}


@pytest.fixture
def storage(tmp_path):
    storage = Storage(str(tmp_path / "out"))
    written(storage, recorded_rows(ROW))
    return storage


def test_it_writes_the_report_and_says_where(storage, capsys):
    assert cli.main(["report", storage.root]) == 0
    assert capsys.readouterr().out == f"{storage.url(REPORT)}\n"
    html = storage.get(REPORT).decode()
    assert "a fox" in html
    assert '"cost":null' in html


def test_with_a_price_it_holds_the_cost(storage):
    assert cli.main(["report", storage.root, "--gpu-hour-price", "2.5"]) == 0
    assert '"cost":2.5' in storage.get(REPORT).decode()


def test_a_place_without_a_ledger_exits_2(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"pyramid-render report: there is no ledger in file://{tmp_path}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_ledger_exits_2(storage, capsys):
    storage.put("metadata/part-z-000000.parquet", b"no")
    assert cli.main(["report", storage.root]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "part-z-000000.parquet cannot be read" in line


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.batch.job.runner.Rendering", AsRead)
    table = write_table(tmp_path / "in.parquet", [{"prompt": "a fox", "height": 64}, {"prompt": "a hen", "height": 65}])
    return simulated_job(table, tmp_path / "job")


def test_a_job_writes_it_at_its_end(job):
    job.execute(lambda batch: None)
    html = job.storage.get(REPORT).decode()
    assert "a fox" in html
    assert '"running":[]' in html


def test_a_job_writes_it_while_it_runs(job, monkeypatch):
    monkeypatch.setattr("pipeline.reports.report.REFRESH_S", -1)
    monkeypatch.setattr("pipeline.reports.report.COST_FACTOR", -1)
    pages = []

    def look(_batch):
        until(lambda: job.storage.exists(REPORT), 30)
        pages.append(job.storage.get(REPORT).decode())

    job.execute(look)
    assert f'"running":[{{"run":"{job.run}","done":0,"total":2}}]' in pages[0]


def test_a_job_that_breaks_writes_it_too(job):
    def broken(_batch):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        job.execute(broken)
    assert '"running":[]' in job.storage.get(REPORT).decode()
