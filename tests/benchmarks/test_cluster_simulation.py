"""Steady work, what limits it, and whole jobs."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from benchmarks.cluster_simulation import (
    LARGE,
    REMEDIES,
    SMALL,
    WORKLOADS,
    Assumptions,
    Steady,
    Workload,
    draw,
    job,
    reach,
    steady,
)
from benchmarks.report import RESULTS
from benchmarks.simulated_cluster import Nodes, Overhead, Shared

QUIET = Assumptions(nodes=Nodes(arrive_s=60.0))
LIGHT, HEAVY, FREE = Overhead(0.01, 0.01), Overhead(1.0, 1.0), Shared()


@pytest.fixture(scope="module")
def scale():
    return json.loads((RESULTS / "scale.json").read_text())["figures"]


def window(workload: Workload, gpus: int, overhead: Overhead = LIGHT, shared: Shared = FREE, **more: int) -> Steady:
    return steady(workload, gpus, overhead, shared, QUIET, batches=1600, **more)


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_where_nothing_is_in_the_way_gpus_are_the_limit_and_fully_used(workload, scale):
    found = window(workload, 8, shared=workload.shared(QUIET, scale))
    assert found.limit == "GPUs"
    assert found.utilisation == pytest.approx(1, abs=0.01)
    assert found.videos_per_hour == pytest.approx(3600 * 8 / workload.gpu_s(QUIET), rel=0.01)


def test_beyond_its_reach_the_driver_is_the_limit_and_shards_mend_it():
    workload = Workload(SMALL, 1)
    assert reach(workload, HEAVY, Shared(1, 1, 1, 1), QUIET)["driver"] == round(workload.gpu_s(QUIET) / 4)
    found = {shards: window(workload, 16, HEAVY, shards=shards) for shards in (1, 2, 4)}
    assert [row.limit for row in found.values()] == ["driver", "driver", "GPUs"]
    assert [found[shards].videos_per_hour for shards in (1, 2)] == pytest.approx([900, 1800], rel=0.03)


def test_shards_share_storage():
    """At first the GPUs work ahead of it, for as many batches as there may be on the way."""
    found = [window(Workload(SMALL, 1), 64, shared=Shared(storage=0.5), shards=shards) for shards in (1, 2)]
    assert {row.limit for row in found} == {"storage"}
    assert [row.videos_per_hour for row in found] == pytest.approx([7200, 7200], rel=0.1)


def test_too_few_encoders_are_the_limit():
    workload = Workload(replace(SMALL, encode_pflop=0.5), 4)
    assert [window(workload, 8, encoders=number).limit for number in (1, 8)] == ["encode", "GPUs"]


def test_interruptions_cost_gpu_time(scale):
    often = replace(QUIET, nodes=replace(QUIET.nodes, spot_per_h=1.0))
    found = [steady(Workload(LARGE, 4), 32, LIGHT, FREE, assumed, batches=1000) for assumed in (QUIET, often)]
    assert found[0].lost_rows == 0 < found[1].lost_rows
    assert found[1].utilisation < found[0].utilisation - 0.05


def test_a_job_costs_its_gpu_seconds_and_what_its_driver_does_around_them(scale):
    workload = Workload(SMALL, 4)
    found = replace(window(workload, 8), videos_per_hour=1000, parts_per_row=0.001)
    small, great = (job(found, prompts, scale, QUIET) for prompts in (10_000_000, 100_000_000))
    assert great["start_and_end_h"] == pytest.approx(10 * small["start_and_end_h"], abs=0.06)
    assert great["hours"] == pytest.approx(100_000 + great["start_and_end_h"], abs=0.1)
    assert great["cost_usd"] == pytest.approx(great["hours"] * 8 * 2.5, rel=1e-3)
    assert great["ledger_parts"] == 100_000


def test_the_picture_is_drawn(tmp_path):
    rows = [
        Steady(workload.name, gpus, shards, 1, 1000 * gpus * shards, 0.5 * shards, {"driver": 0.5}, 0.0, 0.001)
        for workload in WORKLOADS
        for gpus in (8, 64)
        for shards in (1, 2)
    ]
    draw(rows, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width > 800


def test_every_limit_has_a_remedy():
    assert window(Workload(SMALL, 4), 8).busy.keys() < REMEDIES.keys()
