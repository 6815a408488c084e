"""A plan for more GPUs than there are, on a cluster whose GPUs come and go: slower, and not stuck."""

import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager

import pytest

from pipeline import ledger
from pipeline.job import STALL_S
from pipeline.storage import Storage
from tests.chaos.cluster import ray_cluster
from tests.chaos.driver import TABLE, write_settings
from tests.chaos.scenario import Scenario, table_rows
from tests.chaos.stages import BRAKE, read_log
from tests.pipeline.tables import write_table

SCENARIO = Scenario(rows=150, samplers=3, batch_size=1, sample_s=(0.05, 0.2))
GPU_NODE = {"num_cpus": 4, "num_gpus": 1}
PATIENCE_S = 180


def rows_by_node(folder):
    return Counter(record["node"] for record in read_log(folder / "samples"))


def wait_until(condition, driver, what):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert driver.poll() is None, f"the driver has ended before {what}"
        assert time.monotonic() < deadline, f"stuck before {what}"
        time.sleep(0.2)


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a job whose sampler is slow until the brake is taken off."""
    write_table(tmp_path / TABLE, table_rows(SCENARIO, 0))
    for name in ("workers", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / BRAKE).touch()
    return tmp_path


@contextmanager
def cluster(folder, gpu_nodes):
    """Run a cluster with so many GPUs."""
    with ray_cluster(folder / "cluster.log", num_cpus=4) as nodes:
        for _ in range(gpu_nodes):
            nodes.add(**GPU_NODE)
        yield nodes


@contextmanager
def rendering(folder, nodes, planned_gpus=3, stall_s=STALL_S):
    """Run a driver that plans for so many GPUs."""
    write_settings(folder, nodes.address, str(folder / "out"), SCENARIO, planned_gpus, stall_s)
    command = [sys.executable, "-m", "tests.chaos.driver", str(folder)]
    with (
        (folder / "driver.log").open("a") as log,
        subprocess.Popen(command, env=nodes.environment, stdout=log, stderr=log) as driver,
    ):
        try:
            yield driver
        finally:
            driver.kill()


def finish(folder, driver):
    """Let the driver come to its end, and check what it leaves."""
    assert driver.wait(PATIENCE_S) == 0, (folder / "driver.log").read_text()[-3000:]
    view = ledger.read(Storage(str(folder / "out")), ["id", "status"])
    assert len(view) == len(set(view["id"].to_pylist())) == SCENARIO.rows
    assert set(view["status"].to_pylist()) == {"succeeded"}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_plan_for_three_gpus_runs_on_those_that_come_and_go(folder):
    with cluster(folder, gpu_nodes=1) as nodes, rendering(folder, nodes) as driver:
        [_, first] = nodes.ids
        wait_until(lambda: rows_by_node(folder)[first] >= 3, driver, "a row was sampled on the only GPU")
        later = [nodes.add(**GPU_NODE) for _ in range(2)]
        wait_until(lambda: all(rows_by_node(folder)[node] for node in later), driver, "later nodes sample")
        nodes.remove(first)
        (folder / BRAKE).unlink()
        finish(folder, driver)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_that_lost_all_gpus_and_got_one_back_goes_on(folder):
    with cluster(folder, gpu_nodes=3) as nodes, rendering(folder, nodes) as driver:
        lost = nodes.ids[1:]
        wait_until(lambda: all(rows_by_node(folder)[node] for node in lost), driver, "all nodes sample")
        for node in lost:
            nodes.remove(node)
        nodes.add(**GPU_NODE)
        (folder / BRAKE).unlink()
        finish(folder, driver)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_whose_gpus_never_come_back_ends_and_a_new_start_finishes_it(folder):
    with cluster(folder, gpu_nodes=1) as nodes:
        with rendering(folder, nodes, stall_s=30) as driver:
            [_, lost] = nodes.ids
            wait_until(lambda: rows_by_node(folder)[lost], driver, "the node samples")
            nodes.remove(lost)
            assert driver.wait(PATIENCE_S) != 0
        assert "Stalled" in (folder / "driver.log").read_text()
        nodes.add(**GPU_NODE)
        (folder / BRAKE).unlink()
        with rendering(folder, nodes, planned_gpus=1) as driver:
            finish(folder, driver)
