"""A plan for more GPUs than there are, on a cluster whose GPUs come and go: slower, and not stuck."""

from contextlib import contextmanager

import pytest

from tests.chaos.cluster import ray_cluster
from tests.chaos.driver import TABLE
from tests.chaos.jobs import PATIENCE_S, finish, rendering, rows_by_node, wait_until
from tests.chaos.scenario import Scenario, table_rows
from tests.chaos.stages import BRAKE
from tests.pipeline.sample_tables import write_table

SCENARIO = Scenario(rows=150, samplers=3, batch_size=1, sample_s=(0.05, 0.2))
GPU_NODE = {"num_cpus": 4, "num_gpus": 1}


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


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_plan_for_three_gpus_runs_on_those_that_come_and_go(folder):
    with cluster(folder, gpu_nodes=1) as nodes, rendering(folder, nodes, SCENARIO, planned_gpus=3) as driver:
        [_, first] = nodes.ids
        wait_until(lambda: rows_by_node(folder)[first] >= 3, driver, "a row was sampled on the only GPU")
        later = [nodes.add(**GPU_NODE) for _ in range(2)]
        wait_until(lambda: all(rows_by_node(folder)[node] for node in later), driver, "later nodes sample")
        nodes.remove(first)
        (folder / BRAKE).unlink()
        finish(folder, driver, SCENARIO)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_that_lost_all_gpus_and_got_one_back_goes_on(folder):
    with cluster(folder, gpu_nodes=3) as nodes, rendering(folder, nodes, SCENARIO, planned_gpus=3) as driver:
        lost = nodes.ids[1:]
        wait_until(lambda: all(rows_by_node(folder)[node] for node in lost), driver, "all nodes sample")
        for node in lost:
            nodes.remove(node)
        nodes.add(**GPU_NODE)
        (folder / BRAKE).unlink()
        finish(folder, driver, SCENARIO)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_whose_gpus_never_come_back_ends_and_a_new_start_finishes_it(folder):
    with cluster(folder, gpu_nodes=1) as nodes:
        with rendering(folder, nodes, SCENARIO, planned_gpus=3, stall_s=30) as driver:
            [_, lost] = nodes.ids
            wait_until(lambda: rows_by_node(folder)[lost], driver, "the node samples")
            nodes.remove(lost)
            assert driver.wait(PATIENCE_S) != 0
        assert "Stalled" in (folder / "driver.log").read_text()
        nodes.add(**GPU_NODE)
        (folder / BRAKE).unlink()
        with rendering(folder, nodes, SCENARIO, planned_gpus=1) as driver:
            finish(folder, driver, SCENARIO)
