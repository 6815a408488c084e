from collections import Counter
from dataclasses import replace

import pytest

from pipeline.job import TooManyFailures
from pipeline.plan import StageSpec
from pipeline.quarantine import Watch
from pipeline.runner import Limits
from tests.pipeline.simulated import Decode, simulated_job
from tests.pipeline.tables import write_table

SHAPE = {"height": 64, "width": 64, "num_frames": 9}


def watch(**options) -> Watch:
    return Watch(**({"is_alive": lambda node: node != "gone"} | options))


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


@pytest.mark.ray
@pytest.mark.integration
def test_a_row_that_kills_its_worker_fails_alone(cluster, tmp_path):
    prompts = [f"fine {i}" for i in range(6)]
    prompts.insert(2, "kill me")
    table = write_table(
        tmp_path / "in.parquet", [{"prompt": prompt, "id": f"r{i}", **SHAPE} for i, prompt in enumerate(prompts)]
    )
    job = simulated_job(table, tmp_path / "out", limits=Limits(max_attempts=2))
    job.execute(lambda batch: None)
    rows = {row["id"]: row for row in job.view().to_pylist()}
    assert len(rows) == 7
    assert [row_id for row_id, row in rows.items() if row["status"] == "failed"] == ["r2"]
    assert rows["r2"]["error_type"] == "WorkerDied"
    assert "died 2 times while it ran alone" in rows["r2"]["error_message"]
    calls = (tmp_path / "out" / "calls").read_text().split("\n")
    assert Counter(calls)["r2"] == 2  # beside once in a batch
    assert all(row["batch_size"] in (1, 3, 4) for row in rows.values() if row["status"] == "succeeded")


@pytest.mark.ray
@pytest.mark.integration
def test_what_runs_beside_a_row_that_kills_its_worker_is_not_to_blame(cluster, tmp_path):
    prompts = [f"fine {i}" for i in range(8)]
    prompts[4:4] = ["kill me", "kill me too"]
    rows = [{"prompt": prompt, "id": f"r{i}", **SHAPE} for i, prompt in enumerate(prompts)]
    job = simulated_job(
        write_table(tmp_path / "in.parquet", rows), tmp_path / "out", batch_size=1, limits=Limits(max_attempts=1)
    )
    encode, sample = job.plan.pools
    beside = replace(sample, stages=(*sample.stages, StageSpec(Decode, {"seconds": 0.5})), workers=1, overlap=True)
    replace(job, plan=replace(job.plan, pools=(encode, beside))).execute(lambda batch: None)
    assert {row["id"] for row in job.view().to_pylist() if row["status"] == "failed"} == {"r4", "r5"}
    calls = Counter((tmp_path / "out" / "calls").read_text().split())
    assert sum(calls.values()) > len(prompts) + 2  # some were being decoded, and are sampled again


@pytest.mark.ray
@pytest.mark.integration
def test_a_row_that_hangs_or_poisons_its_worker_fails_alone(cluster, tmp_path):
    prompts = ["hang", "poison", "fine"]
    table = write_table(tmp_path / "in.parquet", [{"prompt": prompt, "id": prompt, **SHAPE} for prompt in prompts])
    limits = Limits(max_attempts=1, row_timeout_s=1.0)
    job = simulated_job(table, tmp_path / "out", batch_size=1, limits=limits)
    job.execute(lambda batch: None)
    rows = {row["id"]: row for row in job.view().to_pylist()}
    assert rows["fine"]["status"] == "succeeded"
    assert "sample took more than 1 s" in rows["hang"]["error_message"]
    assert "device-side assert" in rows["poison"]["error_message"]


@pytest.mark.ray
@pytest.mark.integration
def test_failures_of_the_machine_end_the_job(cluster, tmp_path):
    rows = [{"prompt": "disk", "seed": i, **SHAPE} for i in range(40)]
    job = simulated_job(write_table(tmp_path / "in.parquet", rows), tmp_path / "out", max_failures=5)
    with pytest.raises(TooManyFailures, match=r"in a row; the last in sample: OSError: no space left on device"):
        job.execute(lambda batch: None)
    assert len(job.view()) >= 5  # what has failed so far is in the ledger
    assert len(job.view()) < 40
