"""The plan: every GPU carries one worker of each stage, pins are kept, and what cannot fit is said before a start."""

from collections.abc import Mapping

import pytest

from pipeline.plan import GPU_SHARES, Job, Plan, PlanError, Resources, StageSpec, make_plan

STAGES = ["encode", "sample", "decode", "publish"]


def planned(device: str, resources: Resources, workers: Mapping[str, int] | None = None) -> Plan:
    job = Job(
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
    )
    return make_plan(job, resources)


def specs(plan: Plan) -> dict[str, StageSpec]:
    return {spec.name: spec for spec in plan.stages}


def test_the_stages_are_in_the_order_of_the_data():
    plan = planned("cpu", Resources(8, 0))
    assert [spec.name for spec in plan.stages] == STAGES
    assert plan.batch_size == 3
    assert all(name in plan.describe() for name in STAGES)


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
def test_every_gpu_carries_a_sampler_and_a_decoder(gpus):
    by_name = specs(planned("cuda", Resources(16 * gpus, gpus)))
    assert [by_name[name].workers for name in STAGES] == [1 + (gpus - 1) // 64, gpus, gpus, 1]
    shares = [by_name[name].gpus for name in STAGES[:3] for _ in range(by_name[name].workers)]
    assert placed_as_ray_does(shares, gpus) == len(shares)
    assert by_name["sample"].gpus > 0.5  # two samplers never meet on one GPU
    assert by_name["publish"].gpus == 0


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 64])
@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_the_plan_leaves_cpus_for_everything_else(cpus, gpus):
    by_name = specs(planned("cuda" if gpus else "cpu", Resources(cpus, gpus)))
    assert [by_name[name].cpus for name in ("encode", "sample", "publish")] == [0, 0, 0]
    decode = by_name["decode"]
    assert 0 < decode.workers * decode.cpus <= cpus / 2
    assert decode.arguments["encoder_threads"] >= 1
    assert decode.arguments["model"].threads >= 1


def test_the_cpu_takes_one_worker_of_each_stage_and_ignores_gpus():
    by_name = specs(planned("cpu", Resources(4, 2)))
    assert [spec.workers for spec in by_name.values()] == [1, 1, 1, 1]
    assert all(spec.gpus == 0 for spec in by_name.values())


def test_what_is_asked_for_reaches_the_stages():
    by_name = specs(planned("cpu", Resources(4, 0)))
    assert by_name["encode"].arguments["image_root"] == "images"
    assert (by_name["decode"].arguments["window"], by_name["decode"].arguments["tile"]) == (2, 256)
    assert by_name["publish"].arguments["output"] == "out"
    assert len({id(by_name[name].arguments["model"]) for name in STAGES[:3]}) == 1


def test_gpus_that_are_not_there_are_refused():
    with pytest.raises(PlanError, match="--device cpu"):
        planned("cuda", Resources(8, 0))


def test_pins_are_kept():
    by_name = specs(planned("cpu", Resources(4, 0), {"sample": 3, "publish": 2}))
    assert [by_name[name].workers for name in STAGES] == [1, 3, 1, 2]
    by_name = specs(planned("cuda", Resources(4, 2), {"encode": 1, "decode": 3, "sample": 1}))
    assert [by_name[name].workers for name in STAGES] == [1, 1, 3, 1]


@pytest.mark.parametrize(
    ("gpus", "workers"),
    [
        (1, {"sample": 2}),
        (1, {"encode": 3}),
        (1, {"decode": 2}),
        (2, {"sample": 3, "encode": 1, "decode": 1}),
        # together they are 2.55 GPUs, but no GPU holds two samplers
        (3, {"sample": 4, "encode": 1, "decode": 1}),
    ],
)
def test_pins_that_cannot_be_placed_are_refused(gpus, workers):
    with pytest.raises(PlanError, match=f"there are {gpus}$") as caught:
        planned("cuda", Resources(16, gpus), workers)
    assert all(f"for {name}" in str(caught.value) for name in GPU_SHARES)
