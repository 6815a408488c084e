"""The schedule: equal to the recorded one, and its renoise step keeps mean and variance."""

import dataclasses
import re
from itertools import pairwise

import numpy as np
import pytest
import torch

from pyramid_flow import InvalidValueError, PyramidSchedule
from pyramid_flow.sampling.schedule import MAX_STEPS
from tests.pyramid_flow.goldens import parameters, randn

GOLDEN = parameters("schedule")
SCHEDULES = [
    PyramidSchedule(),
    PyramidSchedule(shift=3.0),
    PyramidSchedule(stage_range=(0, 0.5, 1)),
    PyramidSchedule(gamma=0.1),
    PyramidSchedule(shift=2.0, stage_range=[0, 0.2, 0.5, 0.9, 1], gamma=0.25),
]
LATER_LEVELS = [(schedule.gamma, level) for schedule in SCHEDULES for level in schedule.levels[1:]]


def recorded(name: str) -> PyramidSchedule:
    config = GOLDEN[name]["config"]
    return PyramidSchedule(
        num_train_timesteps=config["num_train_timesteps"],
        shift=config["shift"],
        stage_range=config["stage_range"],
        gamma=config["gamma"],
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_levels_match_golden(name):
    golden, levels = GOLDEN[name], recorded(name).levels
    assert len(levels) == golden["config"]["stages"]
    for key, level in enumerate(levels):
        assert level.index == key
        assert level.start == pytest.approx(golden["start_sigmas"][str(key)], rel=1e-12)
        assert level.end == golden["end_sigmas"][str(key)]
        assert level.original_start == golden["ori_start_sigmas"][str(key)]
        assert level.timestep_ratios == pytest.approx(golden["timestep_ratios"][str(key)], rel=1e-12)


@pytest.mark.parametrize(("name", "case"), [(name, case) for name in GOLDEN for case in GOLDEN[name]["schedules"]])
def test_steps_match_golden(name, case):
    count, index = map(int, re.fullmatch(r"steps(\d+)_stage(\d+)", case).groups())
    expected = GOLDEN[name]["schedules"][case]
    timesteps, deltas = zip(*recorded(name).levels[index].steps(count), strict=True)
    assert list(timesteps) == expected["timesteps"]
    assert list(deltas) == np.diff(expected["sigmas"]).tolist()


def test_defaults_are_the_published_ones():
    assert PyramidSchedule() == recorded("default")
    later = PyramidSchedule().levels[1:]
    assert [level.upsample_scale for level in later] == pytest.approx([0.5998800255, 0.7496251922], abs=1e-10)
    assert [level.noise_scale for level in later] == pytest.approx([0.6930281249, 0.4336618880], abs=1e-10)


@pytest.mark.parametrize(("gamma", "level"), LATER_LEVELS)
def test_renoising_reaches_the_start_of_the_level(gamma, level):
    """At the end of a level x = (1-e) data + e noise; entering the next, mean and covariance are those of its start."""
    alpha, beta, e = level.upsample_scale, level.noise_scale, level.original_start
    assert alpha * (1 - e) == pytest.approx(1 - level.start, abs=1e-12)
    assert alpha**2 * e**2 + beta**2 == pytest.approx(level.start**2, abs=1e-12)
    assert alpha**2 * e**2 - beta**2 * gamma == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_levels_cover_the_flow_without_gaps(schedule):
    assert schedule.levels[0].start == 1
    assert schedule.levels[-1].end == 0
    assert (schedule.levels[0].timestep_ratios[0], schedule.levels[-1].timestep_ratios[1]) == (0, 1)
    for before, after in pairwise(schedule.levels):
        assert before.end == after.original_start
        assert before.timestep_ratios[1] == after.timestep_ratios[0]
        assert before.last_timestep > after.first_timestep


@pytest.mark.parametrize("count", [1, 2, 7, MAX_STEPS])
@pytest.mark.parametrize("level", PyramidSchedule().levels)
def test_steps_go_down_and_cover_the_level(level, count):
    timesteps, deltas = zip(*level.steps(count), strict=True)
    assert len(timesteps) == count
    assert all(before > after for before, after in pairwise(timesteps))
    assert all(delta < 0 for delta in deltas)
    assert sum(deltas) == pytest.approx(-1)


@pytest.mark.parametrize("count", [2, 7, MAX_STEPS])
@pytest.mark.parametrize("level", PyramidSchedule().levels)
def test_the_step_before_a_skipped_last_one_goes_on_to_the_end(level, count):
    whole, short = level.steps(count), level.steps(count, skip_last=True)
    assert short[:-1] == whole[:-2]
    assert short[-1] == (whole[-2][0], pytest.approx(whole[-2][1] + whole[-1][1]))
    assert sum(delta for _, delta in short) == pytest.approx(-1)


@pytest.mark.parametrize("level", PyramidSchedule().levels)
def test_a_level_of_one_step_has_no_last_one_to_skip(level):
    assert level.steps(1, skip_last=True) == level.steps(1)


def test_enter_upsamples_and_renoises():
    level = PyramidSchedule().levels[1]
    latents, noise = randn(2, 3, 1, 2, 4), randn(2, 3, 1, 4, 8, seed=1)
    kept = latents.clone(), noise.clone()
    entered = level.enter(latents, noise)
    for y in range(4):
        for x in range(8):
            expected = level.upsample_scale * latents[..., y // 2, x // 2] + level.noise_scale * noise[..., y, x]
            assert torch.equal(entered[..., y, x], expected)
    assert torch.equal(latents, kept[0])
    assert torch.equal(noise, kept[1])


@pytest.mark.parametrize("count", [0, -1, MAX_STEPS + 1])
def test_step_counts_out_of_range_are_refused(count):
    with pytest.raises(InvalidValueError, match=f"num_inference_steps {count} is not between 1 and {MAX_STEPS}"):
        PyramidSchedule().levels[0].steps(count)


@pytest.mark.parametrize("gamma", [0, -0.1, 0.34, float("nan")])
def test_gamma_out_of_range_is_refused(gamma):
    with pytest.raises(InvalidValueError, match=r"gamma .* is not in \(0, 1/3\]"):
        PyramidSchedule(gamma=gamma)


@pytest.mark.parametrize(
    "stage_range",
    [(), (0,), (1,), (0, 0.5, 0.5, 1), (0, 0.7, 0.3, 1), (1, 0), (0.2, 0.5, 1), (0, 0.5), (-0.5, 0.5, 1), (0, 2)],
)
def test_stage_ranges_that_do_not_rise_from_0_to_1_are_refused(stage_range):
    with pytest.raises(InvalidValueError, match="stage_range"):
        PyramidSchedule(stage_range=stage_range)


def test_schedule_is_immutable():
    stage_range = [0, 0.5, 1]
    schedule = PyramidSchedule(stage_range=stage_range)
    levels = schedule.levels
    schedule.levels[0].steps(3).clear()
    stage_range[1] = 0.9
    assert schedule == PyramidSchedule(stage_range=(0, 0.5, 1))
    assert len(levels[0].steps(3)) == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.shift = 2.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        levels[0].start = 0.5
    with pytest.raises(TypeError):
        levels[0] = levels[1]
