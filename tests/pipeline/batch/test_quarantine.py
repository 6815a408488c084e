from collections import Counter
from dataclasses import replace

import pytest

from pipeline.batch.job import TooManyFailures
from pipeline.batch.planner import StageSpec
from pipeline.batch.quarantine import WorkerMonitor
from pipeline.batch.runner import RetryLimits
from tests.pipeline.sample_tables import write_table
from tests.pipeline.simulated import Decode, simulated_job

SHAPE = {"height": 64, "width": 64, "num_frames": 9}


def watch(**options) -> WorkerMonitor:
    return WorkerMonitor(**({"is_alive": lambda node: node != "gone"} | options))


def test_rows_that_end_are_never_suspects():
    seen = watch()
    for process in ("a", "b"):
        assert not seen.begin("sample", ["x", "y"], process, "n").alone
        seen.end("sample", ["x", "y"], process)
    assert not seen.deaths


def test_after_a_death_the_rows_of_the_batch_run_alone():
    seen = watch()
    seen.begin("sample", ["x", "y"], "a", "n")
    assert seen.begin("sample", ["x", "y"], "b", "n").alone
    assert not seen.deaths  # dying in company counts against nobody
    assert not seen.begin("decode", ["x", "y"], "c", "n").alone  # nor in another stage


def test_only_deaths_of_a_row_that_runs_alone_count():
    seen = watch(max_attempts=2)
    seen.begin("sample", ["x", "y"], "p0", "n")
    for number in (1, 2):
        assert seen.begin("sample", ["x", "y"], f"p{number}", "n").alone
        verdict = seen.begin("sample", ["x"], f"p{number}", "n", alone=True)
        assert not verdict.lost
        assert not verdict.alone
    verdict = seen.begin("sample", ["x", "y"], "p3", "n")
    assert list(verdict.lost) == ["x"]
    assert "died 2 times" in verdict.lost["x"]


def test_a_batch_of_one_row_is_not_alone_as_long_as_its_process_does_something_else():
    seen = watch(max_attempts=1)
    seen.begin("decode", ["x"], "a", "n")
    verdict = seen.begin("decode", ["x"], "b", "n")
    assert verdict.alone
    assert not verdict.lost


def test_a_lost_node_counts_against_nobody():
    seen = watch(max_attempts=1)
    for number in range(5):
        assert not seen.begin("sample", ["x"], f"p{number}", "gone", alone=True).lost
    assert not seen.deaths


def test_the_same_process_may_announce_a_row_again():
    seen = watch(max_attempts=1)
    assert not seen.begin("sample", ["x"], "a", "n", alone=True).lost
    assert not seen.begin("sample", ["x"], "a", "n", alone=True).lost


def test_it_is_idle_when_nothing_runs():
    seen = watch()
    assert seen.is_idle()
    seen.begin("sample", ["x"], "a", "n")
    assert not seen.is_idle()
    seen.end("sample", ["x"], "a")
    assert seen.is_idle()


def test_rows_of_a_lost_node_do_not_run():
    seen = watch()
    seen.begin("sample", ["x"], "a", "gone")
    assert seen.is_idle()
    seen.begin("sample", ["y"], "b", "n")
    assert not seen.is_idle()


def test_a_process_that_was_taken_for_dead_ends_nothing_of_its_successor():
    seen = watch()
    seen.begin("sample", ["x"], "a", "n")
    seen.begin("sample", ["x"], "b", "n", alone=True)
    seen.end("sample", ["x"], "a")
    assert not seen.is_idle()
    seen.end("sample", ["x"], "b")
    assert seen.is_idle()


def test_deaths_on_a_node_that_is_found_dead_later_count_against_nobody():
    dead: set[str] = set()
    seen = watch(is_alive=lambda node: node not in dead, max_attempts=1)
    seen.begin("sample", ["x"], "a", "n", alone=True)
    assert seen.begin("sample", ["x"], "b", "m").lost  # its node is still listed
    dead.add("n")
    assert not seen.begin("sample", ["x"], "b", "m").lost


def test_a_stop_is_told_to_everyone():
    seen = watch()
    seen.stop()
    assert seen.begin("encode", ["x"], "a", "n").stopping


@pytest.fixture(scope="module")
def survived(cluster, tmp_path_factory) -> tuple[dict[str, dict[str, object]], Counter[str]]:
    """Return the ledger's rows by id, and how often each was sampled, of a job with rows that end their worker."""
    folder = tmp_path_factory.mktemp("survived")
    names = ["fine0", "kill", *(f"fine{number}" for number in range(1, 7)), "hang", "poison"]
    table = write_table(folder / "in.parquet", [{"prompt": name, "id": name, **SHAPE} for name in names])
    limits = RetryLimits(max_attempts=1, row_timeout_s=1.0)
    job = simulated_job(table, folder / "out", batch_size=3, limits=limits)
    job.execute(lambda batch: None)
    rows = job.view().to_pylist()
    assert len(rows) == len(names)
    return {row["id"]: row for row in rows}, Counter((folder / "out" / "calls").read_text().split())


@pytest.mark.ray
@pytest.mark.integration
def test_only_the_rows_that_end_their_worker_fail(survived):
    rows, calls = survived
    failed = {row["id"]: row["error_type"] for row in rows.values() if row["status"] != "succeeded"}
    assert failed == dict.fromkeys(("kill", "hang", "poison"), "WorkerDied")
    assert [calls[row] for row in failed] == [2, 2, 2]  # in a batch, and alone
    assert {rows[f"fine{number}"]["batch_size"] for number in range(7)} == {1, 3}


@pytest.mark.ray
@pytest.mark.integration
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("kill", "died 1 times while it ran alone: killed from outside, out of memory, or crashed"),
        ("hang", "sample took more than 1 s"),
        ("poison", "device-side assert"),
    ],
)
def test_the_ledger_tells_why_a_worker_died(survived, row, reason):
    rows, _ = survived
    assert reason in rows[row]["error_message"]


@pytest.mark.ray
@pytest.mark.integration
def test_what_runs_beside_a_row_that_kills_its_worker_is_not_to_blame(cluster, tmp_path):
    prompts = ["fine", "fine", "fine", "kill me", "fine", "fine"]
    rows = [{"prompt": prompt, "id": f"r{i}", **SHAPE} for i, prompt in enumerate(prompts)]
    job = simulated_job(
        write_table(tmp_path / "in.parquet", rows), tmp_path / "out", batch_size=1, limits=RetryLimits(max_attempts=1)
    )
    encode, sample = job.plan.pools
    beside = replace(sample, stages=(*sample.stages, StageSpec(Decode, {"seconds": 0.5})), workers=1, overlap=True)
    replace(job, plan=replace(job.plan, pools=(encode, beside))).execute(lambda batch: None)
    assert {row["id"] for row in job.view().to_pylist() if row["status"] == "failed"} == {"r3"}
    calls = Counter((tmp_path / "out" / "calls").read_text().split())
    assert calls["r3"] == 2  # beside others, and alone
    assert sum(calls.values()) > len(prompts) + 1  # some were being decoded, and are sampled again


@pytest.mark.ray
@pytest.mark.integration
def test_failures_of_the_machine_end_the_job(cluster, tmp_path):
    rows = [{"prompt": "disk", "seed": i, **SHAPE} for i in range(40)]
    job = simulated_job(write_table(tmp_path / "in.parquet", rows), tmp_path / "out", max_failures=5)
    with pytest.raises(TooManyFailures, match=r"in a row; the last in sample: OSError: no space left on device"):
        job.execute(lambda batch: None)
    assert len(job.view()) >= 5  # what has failed so far is in the ledger
    assert len(job.view()) < 40
