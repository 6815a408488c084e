"""The model of a cluster: what it does in cases that can be worked out by hand."""

from collections.abc import Mapping

import pytest
import simpy

from benchmarks.pipeline_utilisation import planned
from benchmarks.simulated import Work, fused_plan, staged_plan
from benchmarks.simulated_cluster import Farm, Gpu, Nodes, Overhead, Shared, Station
from pipeline.batch.planner import Plan

WORKS = {"encode": Work(0.1), "sample": Work(1.0), "decode": Work(0.3, 0.2), "publish": Work(host_s=0.4)}
NONE, FREE, LASTING = Overhead(0.0, 0.0), Shared(), Nodes()


def farm(
    plan: Plan,
    num_batches: int,
    works: Mapping[str, Work] = WORKS,
    overhead: Overhead = NONE,
    shared: Shared = FREE,
    nodes: Nodes = LASTING,
    spread: float = 0.0,
) -> Farm:
    env = simpy.Environment()
    found = Farm(env, plan, works, [plan.batch_size] * num_batches, overhead, shared, nodes, spread)
    env.run(found.feed)
    return found


def test_a_station_serves_one_after_another():
    env, ends = simpy.Environment(), []
    station = Station(env)
    for seconds in (1.0, 2.0):
        station.serve(seconds).callbacks.append(lambda event: ends.append(env.now))
    env.run(2.0)
    assert station.busy_s == 2.0
    env.run()
    assert (ends, station.busy_s) == ([1.0, 3.0], 3.0)


def test_a_gpu_is_shared_evenly_by_all_who_work_on_it():
    env, ends = simpy.Environment(), {}
    gpu = Gpu(env)

    def work(begin_s: float, seconds: float):
        yield env.timeout(begin_s)
        yield gpu.work(seconds)
        ends[seconds] = env.now

    for begin_s, seconds in ((0.0, 1.0), (0.0, 2.0), (10.0, 0.5)):
        env.process(work(begin_s, seconds))
    env.run()
    assert ends == pytest.approx({1.0: 2.0, 2.0: 3.0, 0.5: 10.5})


def test_one_worker_for_everything_takes_all_seconds_in_turn():
    assert farm(fused_plan(1, 4), 10).env.now == pytest.approx(10 * 4 * 2.0)


def test_stages_on_one_gpu_overlap_with_what_is_done_beside_it():
    """The bound is what a row takes of a GPU; the last row's ffmpeg and upload come after it."""
    for gpus in (1, 2):
        seconds = farm(planned("staged", WORKS, gpus), 100 * gpus).env.now
        assert 100 * 1.4 < seconds < 1.03 * 100 * 1.4


def test_the_driver_takes_its_seconds_for_every_batch_and_pool():
    assert farm(staged_plan(1, 4), 50, {}, Overhead(0.1, 0.02)).env.now == pytest.approx(50 * 0.16)


@pytest.mark.parametrize(("rows_per_s", "parts"), [(100.0, 4), (1.0, 133)])
def test_a_ledger_part_is_written_every_1000_rows_or_30_seconds(rows_per_s, parts):
    found = farm(fused_plan(1, 1), 4000, works={"sample": Work(1 / rows_per_s)}, shared=Shared(part=0.5))
    assert found.num_parts == pytest.approx(parts, abs=2)
    assert found.busy_s()["ledger"] == pytest.approx(0.5 * found.num_parts, abs=0.5)


@pytest.mark.parametrize("kind", ["spot_per_h", "mtbf_h"])
def test_rows_on_lost_nodes_are_rendered_again_and_nothing_is_lost_for_good(kind):
    nodes = Nodes(gpus=2, **{kind: {"spot_per_h": 20.0, "mtbf_h": 0.05}[kind]})
    found, undisturbed = (farm(planned("staged", WORKS, 4), 1000, nodes=each) for each in (nodes, LASTING))
    assert sum(rows for _, rows in found.finished) == 1000
    assert found.lost_rows > 0 == undisturbed.lost_rows
    assert found.env.now > 1.2 * undisturbed.env.now
    assert found.wasted_s > 0
    assert found.gpu_s() == pytest.approx(1000 * 1.4) == undisturbed.gpu_s()


def test_nothing_depends_on_anything_but_the_seed():
    nodes = Nodes(gpus=2, spot_per_h=20.0, arrive_s=10.0)
    first, second = (farm(planned("staged", WORKS, 4), 500, nodes=nodes, spread=0.1).finished for _ in range(2))
    assert first == second


def test_workers_of_a_pool_are_in_use_while_they_work():
    found = farm(planned("staged", WORKS, 1), 50)
    assert found.in_use("publish", 0.0) == pytest.approx(50 * 0.4 / found.env.now)
