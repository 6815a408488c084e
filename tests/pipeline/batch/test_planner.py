"""The plan: every GPU carries one worker of each stage, pins are kept, and what cannot fit is said before a start."""

from collections.abc import Mapping

import pytest

from pipeline.batch.costs import Costs
from pipeline.batch.planner import Node, Plan, PlanError, PlanRequest, Pool, Resources, make_plan
from pipeline.media.quality import Thresholds

STAGES = ["encode", "sample", "decode", "publish"]
POOLS = ["encode", "sample+decode", "publish"]


def planned(device: str, resources: Resources, workers: Mapping[str, int] | None = None, **values: object) -> Plan:
    """Return a plan of the staged layout, if nothing else is said."""
    job = PlanRequest(
        model_path="model",
        variant=None,
        device=device,
        dtype="float32",
        output="out",
        image_root="images",
        decode_window=2,
        tile=256,
        batch_size=3,
        workers=workers or {},
        **{"layout": "staged", **values},
    )
    return make_plan(job, resources)


def pools(plan: Plan) -> dict[str, Pool]:
    return {pool.name: pool for pool in plan.pools}


def sizes(plan: Plan) -> dict[str, int]:
    return {pool.name: pool.workers for pool in plan.pools}


def arguments(plan: Plan) -> dict[str, dict[str, object]]:
    return {spec.name: dict(spec.arguments) for pool in plan.pools for spec in pool.stages}


def test_the_stages_are_in_the_order_of_the_data():
    plan = planned("cpu", Resources(8, 0))
    assert [pool.name for pool in plan.pools] == POOLS
    assert list(arguments(plan)) == STAGES
    assert plan.batch_size == 3
    assert all(name in plan.describe() for name in POOLS)


def test_the_budget_of_the_history_cache_reaches_the_sampler():
    for gib in (None, 0, 12.5):
        for layout in ("staged", "fused"):
            model = arguments(planned("cpu", Resources(8, 0), cache_gib=gib, layout=layout))["sample"]["model"]
            assert model.cache_gib == gib


def placed_as_ray_does(shares, gpus):
    """Place each share on the fullest GPU that still holds it; returns how many found a place."""
    free = [1.0] * gpus
    for number, share in enumerate(shares):
        fitting = [i for i, left in enumerate(free) if left >= share - 1e-6]
        if not fitting:
            return number
        free[min(fitting, key=lambda i: free[i])] -= share
    return len(shares)


@pytest.mark.parametrize("gpus", [1, 2, 3, 4, 7, 8, 64, 128])
def test_every_gpu_carries_a_sampler(gpus):
    encode, sample, publish = planned("cuda", Resources(16 * gpus, gpus)).pools
    assert [encode.workers, sample.workers, publish.workers] == [1, gpus, 1]
    shares = [pool.gpus for pool in (encode, sample) for _ in range(pool.workers)]
    assert placed_as_ray_does(shares, gpus) == len(shares)
    assert sample.gpus > 0.5  # two samplers never meet on one GPU
    assert publish.gpus == 0
    assert [pool.overlap for pool in (encode, sample, publish)] == [False, True, False]


@pytest.mark.parametrize("gpus", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("encoders", [1, 2, 3, 8, 64])
def test_encoders_leave_room_for_a_sampler_wherever_they_meet(gpus, encoders):
    encode, sample, _ = planned("cuda", Resources(16 * gpus, gpus), {"encode": encoders}).pools
    assert encode.workers * encode.gpus + sample.gpus <= 1 + 1e-9
    assert encode.gpus >= 1e-4  # the least that Ray knows


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 64])
@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_the_plan_leaves_cpus_for_everything_else(cpus, gpus):
    by_name = pools(planned("cuda" if gpus else "cpu", Resources(cpus, gpus)))
    assert [by_name[name].cpus for name in ("encode", "publish")] == [0, 0]
    decoding = by_name["sample+decode"]
    assert 0 < decoding.workers * decoding.cpus <= cpus / 2
    [_, spec] = decoding.stages
    assert spec.arguments["encoder_threads"] >= 1
    assert spec.arguments["model"].threads >= 1


def test_the_cpu_takes_one_worker_of_each_stage_and_ignores_gpus():
    by_name = pools(planned("cpu", Resources(4, 2)))
    assert [pool.workers for pool in by_name.values()] == [1, 1, 1]
    assert all(pool.gpus == 0 for pool in by_name.values())


def test_what_is_asked_for_reaches_the_stages():
    given = arguments(
        planned(
            "cpu",
            Resources(4, 0),
            image_hosts=frozenset({"host"}),
            encoder_threads=3,
            memory="offload",
            thresholds=Thresholds(black_below=0.5),
        )
    )
    assert given["decode"]["thresholds"] == Thresholds(black_below=0.5)
    assert (given["encode"]["image_root"], given["encode"]["image_hosts"]) == ("images", {"host"})
    assert (given["decode"]["window"], given["decode"]["tile"], given["decode"]["encoder_threads"]) == (2, 256, 3)
    assert given["publish"]["output"] == "out"
    assert (given["sample"]["model"].memory, given["sample"]["model"].together) == ("offload", False)
    assert len({id(given[name]["model"]) for name in STAGES[:3]}) == 1


def test_one_process_of_all_stages_is_told_so():
    given = arguments(planned("cuda", Resources(4, 1), layout="fused"))
    assert all(given[name]["model"].together for name in STAGES[:3])


def test_gpus_that_are_not_there_are_refused():
    with pytest.raises(PlanError, match="--device cpu"):
        planned("cuda", Resources(8, 0))


def test_pins_are_kept():
    assert list(sizes(planned("cpu", Resources(4, 0), {"sample": 3, "publish": 2})).values()) == [1, 3, 2]
    assert list(sizes(planned("cuda", Resources(4, 2), {"encode": 2, "sample": 1})).values()) == [2, 1, 1]


@pytest.mark.parametrize(
    ("gpus", "workers"),
    [
        (1, {"sample": 2}),
        # together they are 2.4 GPUs, but no GPU holds two samplers
        (3, {"sample": 4}),
    ],
)
def test_pins_that_cannot_be_placed_are_refused(gpus, workers):
    with pytest.raises(PlanError, match=f"there are {gpus}$") as caught:
        planned("cuda", Resources(16, gpus), workers)
    assert all(f"for {name}" in str(caught.value) for name in POOLS[:2])


COSTS = Costs({"encode": 0.1, "sample": 60.0, "decode": 6.0, "publish": 0.5}, measured=True)


def test_sampling_is_the_bottleneck_by_the_costs():
    plan = planned("cuda", Resources(256, 64), costs=COSTS)
    assert sizes(plan) == {"encode": 1, "sample+decode": 64, "publish": 1}
    slow = Costs({"encode": 8.0, "sample": 60.0, "decode": 100.0, "publish": 80.0}, measured=True)
    expected = {"encode": 2, "sample+decode": 8, "publish": 8}  # 1.5 x 8 x 8 / 60 = 1.6, and at most one per GPU
    assert sizes(planned("cuda", Resources(64, 8), costs=slow)) == expected


def test_the_expected_rate_is_that_of_the_devices_or_of_the_slowest_pool():
    assert planned("cuda", Resources(64, 8)).rows_per_hour is None
    plan = planned("cuda", Resources(64, 8), costs=COSTS)
    assert plan.rows_per_hour == pytest.approx(3600 * 8 / 66.1)
    slow = Costs({**COSTS.seconds, "publish": 60.0}, measured=True)
    assert planned("cuda", Resources(64, 8), {"publish": 2}, costs=slow).rows_per_hour == pytest.approx(120)
    host = Costs({"sample": 1.0, "decode": 3.0}, measured=True)
    assert planned("cpu", Resources(4, 0), {"sample": 2}, costs=host).rows_per_hour == pytest.approx(3600 * 2 / 4)
    fused = planned("cuda", Resources(64, 8), layout="fused", costs=COSTS)
    assert fused.rows_per_hour == pytest.approx(3600 * 8 / 66.6)
    assert (fused.num_gpus, planned("cpu", Resources(4, 0)).num_gpus) == (8, 0)


@pytest.mark.parametrize(
    ("device", "resources", "workers", "expected"),
    [
        ("cpu", Resources(2, 0), {}, {"encode+sample+decode+publish": 1}),
        ("cpu", Resources(64, 0), {}, {"encode+sample+decode+publish": 16}),
        ("cpu", Resources(2, 0), {"sample": 2}, {"encode": 1, "sample+decode": 2, "publish": 1}),
        ("cuda", Resources(16, 2), {}, {"encode": 1, "sample+decode": 2, "publish": 1}),
    ],
)
def test_one_pool_for_all_stages_is_the_choice_without_gpus(device, resources, workers, expected):
    plan = planned(device, resources, workers, layout="auto")
    assert sizes(plan) == expected
    assert list(arguments(plan)) == STAGES
    assert sum(pool.workers * pool.cpus for pool in plan.pools) <= resources.cpus / 2


def test_one_pool_for_all_stages_can_be_asked_for_on_gpus():
    [pool] = planned("cuda", Resources(16, 2), layout="fused").pools
    assert (pool.workers, pool.gpus) == (2, 1.0)
    assert sizes(planned("cpu", Resources(4, 0), {"sample": 3}, layout="fused")) == {"encode+sample+decode+publish": 3}
    with pytest.raises(PlanError, match="--layout staged"):
        planned("cuda", Resources(16, 2), {"encode": 1}, layout="fused")


def test_shares_and_threads_can_be_pinned_and_are_checked():
    plan = planned(
        "cuda", Resources(16, 4), {"sample": 3}, gpu_shares={"sample": 1.0, "encode": 0.1}, encoder_threads=2
    )
    assert [pool.gpus for pool in plan.pools] == [0.1, 1.0, 0]
    assert [pool.cpus for pool in plan.pools] == [0, 2, 0]
    with pytest.raises(PlanError, match="there are 4"):
        planned("cuda", Resources(16, 4), gpu_shares={"sample": 1.0})
    with pytest.raises(PlanError, match=r"needs 32 CPUs \(4 x 8 for sample\+decode\) and there are 16"):
        planned("cuda", Resources(16, 4), encoder_threads=8)


# Several GPUs for a clip, and places


def cluster(*gpus: int, **labels: str) -> Resources:
    """Nodes with so many GPUs and 16 CPUs each; labels: of the first one."""
    nodes = tuple(Node(16, count, {} if i else labels) for i, count in enumerate(gpus))
    return Resources(16 * len(gpus), sum(gpus), nodes)


@pytest.mark.parametrize(
    ("resources", "gpus_per_clip", "workers"),
    [
        (Resources(64, 8), 4, 2),
        (cluster(8, 8), 4, 4),
        (cluster(8, 3, 4), 4, 3),
        (cluster(6, 6), 4, 2),
        (cluster(2), 2, 1),
    ],
)
def test_a_worker_has_all_gpus_of_its_clips_on_one_node(resources, gpus_per_clip, workers):
    plan = planned("cuda", resources, gpus_per_clip=gpus_per_clip, layout="auto")
    assert sizes(plan) == {"encode+sample+decode": workers, "publish": 1}
    sampling = plan.pools[0]
    assert (sampling.gpus, sampling.overlap, plan.num_gpus) == (gpus_per_clip, True, workers * gpus_per_clip)
    model = arguments(plan)["sample"]["model"]
    assert (model.gpus_per_clip, model.together) == (gpus_per_clip, True)


def test_a_clip_cannot_have_the_gpus_of_two_nodes():
    with pytest.raises(PlanError, match="no node that may sample is known to have 4 GPUs for a clip"):
        planned("cuda", cluster(2, 2), gpus_per_clip=4)


@pytest.mark.parametrize("pinned", [{"workers": {"encode": 1}}, {"gpu_shares": {"sample": 0.5}}])
def test_with_several_gpus_per_clip_there_is_nothing_to_share(pinned):
    with pytest.raises(PlanError, match="neither can be pinned"):
        planned("cuda", cluster(4), gpus_per_clip=2, **pinned)


def test_without_gpus_a_clip_is_shared_by_processes_of_the_one_worker():
    plan = planned("cpu", Resources(4, 0), gpus_per_clip=2, layout="auto")
    assert sizes(plan) == {"+".join(STAGES): 1}
    assert arguments(plan)["sample"]["model"].gpus_per_clip == 2
    assert plan.num_gpus == 0


def test_a_clip_on_several_gpus_takes_that_share_of_the_time():
    costs = Costs({"encode": 0.1, "sample": 4.0, "decode": 0.9, "publish": 0.1}, measured=True)
    plan = planned("cuda", cluster(8), gpus_per_clip=4, costs=costs)
    assert plan.rows_per_hour == pytest.approx(2 * 3600 / 5.0)
    fused = planned("cuda", cluster(8), gpus_per_clip=4, layout="fused", costs=costs)
    assert [(pool.workers, pool.gpus) for pool in fused.pools] == [(2, 4.0)]


def test_stages_are_planned_for_the_nodes_they_may_run_on():
    resources = cluster(2, 8, kind="small")
    places = {"encode": {"kind": "small"}, "publish": {"kind": "small"}}
    plan = planned("cuda", resources, places=places)
    assert [pool.labels for pool in plan.pools] == [{"kind": "small"}, {}, {"kind": "small"}]
    plan = planned("cuda", resources, places={"sample": {"kind": "small"}})
    assert sizes(plan)["sample+decode"] == 2
    assert pools(plan)["sample+decode"].labels == {"kind": "small"}
    assert [line.endswith("  kind=small") for line in plan.describe().splitlines()[1:]] == [False, True, False]


def test_places_that_do_not_exist_or_are_too_small_are_said():
    with pytest.raises(PlanError, match="no node that may sample"):
        planned("cuda", cluster(2, kind="small"), places={"sample": {"kind": "large"}})
    with pytest.raises(PlanError, match=r"2 GPUs with kind=small .* and there are 1"):
        planned("cuda", cluster(1, 4, kind="small"), {"encode": 9}, places={"encode": {"kind": "small"}})
    with pytest.raises(PlanError, match="--layout staged"):
        planned("cpu", cluster(0, kind="small"), places={"publish": {"kind": "small"}}, layout="fused")


def test_unknown_nodes_are_trusted_to_come():
    plan = planned("cuda", Resources(0, 4), places={"sample": {"kind": "large"}}, gpus_per_clip=4)
    assert sizes(plan)["encode+sample+decode"] == 1
