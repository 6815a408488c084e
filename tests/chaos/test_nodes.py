"""Clusters of several nodes: stages land where they are told to, nodes leave with notice, and come when asked for."""

import time
from collections import defaultdict

import pytest

from pipeline.ledger import ledger
from pipeline.storage.storage import Storage
from tests.chaos.cluster import Nodes, autoscaling_cluster, ray_cluster
from tests.chaos.driver import TABLE
from tests.chaos.jobs import finish, rendering, rows_by_node, wait_until
from tests.chaos.scenario import Scenario, table_rows
from tests.chaos.stages import read_log
from tests.pipeline.sample_tables import write_table

FEW = Scenario(rows=6, samplers=2, batch_size=1, sample_s=(0.05, 0.2))
MANY = Scenario(rows=60, samplers=2, batch_size=1, sample_s=(0.3, 0.5))
NOTICE_S = 5


def folder_of(path, scenario):
    write_table(path / TABLE, table_rows(scenario, 0))
    for name in ("workers", "out"):
        (path / name).mkdir()
    return path


def nodes_by_stage(folder):
    found = defaultdict(set)
    for file in (folder / "workers").iterdir():
        found[file.name.partition("-")[0]].add(file.read_text())
    return dict(found)


@pytest.mark.ray
@pytest.mark.integration
@pytest.mark.timeout(300)
def test_stages_land_on_the_nodes_that_their_labels_name(tmp_path):
    folder = folder_of(tmp_path, FEW)
    places = {"encode": {"kind": "small"}, "sample": {"kind": "large", "zone": "a"}, "publish": {"kind": "cheap"}}
    with ray_cluster(folder / "cluster.log", num_cpus=1, num_gpus=2) as nodes:
        small, large, other, cheap = (
            nodes.add(num_cpus=2, num_gpus=gpus, labels=labels)
            for gpus, labels in [
                (1, {"kind": "small"}),
                (2, {"kind": "large", "zone": "a"}),
                (2, {"kind": "large", "zone": "b"}),
                (0, {"kind": "cheap"}),
            ]
        )
        with rendering(folder, nodes, FEW, planned_gpus=2, places=places) as driver:
            finish(folder, driver, FEW)
    assert nodes_by_stage(folder) == {"encode": {small}, "sample": {large}, "decode": {large}}
    assert set(ledger.read(Storage(str(folder / "out")))["node"].to_pylist()) == {cheap}
    assert other not in rows_by_node(folder)


@pytest.mark.ray
@pytest.mark.integration
@pytest.mark.timeout(600)
def test_a_node_that_leaves_with_notice_costs_no_row_an_attempt(tmp_path):
    folder = folder_of(tmp_path, MANY)
    with (
        ray_cluster(folder / "cluster.log", num_cpus=4) as nodes,
        rendering(folder, nodes, MANY, planned_gpus=2) as driver,
    ):
        first, second = (nodes.add(num_cpus=4, num_gpus=1) for _ in range(2))
        wait_until(lambda: all(rows_by_node(folder)[node] for node in (first, second)), driver, "both nodes sample")
        nodes.drain(first, NOTICE_S)
        time.sleep(NOTICE_S)  # nothing new goes there, and what was there must come back from elsewhere
        nodes.remove(first)
        finish(folder, driver, MANY)
    assert set(ledger.read(Storage(str(folder / "out")))["attempts"].to_pylist()) <= {0, 1}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_autoscaler_brings_the_gpus_that_a_job_plans_for(tmp_path):
    folder = folder_of(tmp_path, MANY)
    with autoscaling_cluster(folder, {"CPU": 8, "GPU": 2}, most=1) as (address, environment):
        nodes = Nodes(None, environment, address)
        with rendering(folder, nodes, MANY, planned_gpus=2) as driver:
            finish(folder, driver, MANY)
    assert len({record["pid"] for record in read_log(folder / "samples")}) == 2
