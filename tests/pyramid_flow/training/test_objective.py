"""The training construction equals the recorded one, and is the same flow that the sampler integrates."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pyramid_flow import InvalidValueError, PyramidSchedule
from pyramid_flow.sampling.pyramid import downsample, noise_pyramid
from pyramid_flow.training.draws import KeyedRandom
from pyramid_flow.training.objective import (
    TrainingSample,
    spatial_pyramid_sample,
    temporal_pyramid_sample,
    velocity_loss,
)
from tests.pyramid_flow.goldens import parameters, tensors

SCHEDULE = PyramidSchedule()
LEVELS = range(3)


class Recorded:
    """TrainingDraws that replay a golden run for the one sample of a level."""

    def __init__(self, normals: Sequence[Tensor], uniforms: Sequence[Tensor]) -> None:
        self.normals, self.uniforms = list(normals), list(uniforms)

    def uniform(self) -> Tensor:
        return self.uniforms.pop(0)

    def normal(self, shape: Sequence[int]) -> Tensor:
        noise = self.normals.pop(0)
        assert tuple(noise.shape) == (1, *shape)
        return noise

    def select(self, rows: Sequence[int]) -> "Recorded":
        raise NotImplementedError


def recorded(name: str, level: int, num_frames: int) -> Recorded:
    """Return the draws of a level: its rows of the common noise, then its own, past frames one by one."""
    data, kinds = tensors(name), [kind for kind, _ in parameters(name)["draws"]]
    draws = [data[f"draw.{number:02d}.{kind}"] for number, kind in enumerate(kinds)]
    starts = [*[number for number, kind in enumerate(kinds) if kind == "rand"][::2], len(draws)]
    own = draws[starts[level] : starts[level + 1]]
    past = [frame for clip in own[2:] for frame in reversed(clip.split(1, dim=2))]
    return Recorded([draws[0][level : level + 1, :, -num_frames:], *past], own[:2])


def check(sample: TrainingSample, data: dict[str, Tensor], name: str, num_clips: int) -> None:
    clips = [data[f"{name}.clip{number}"] for number in range(num_clips)]
    frames = [frame for clip in clips[:-1] for frame in clip.split(1, dim=2)]
    pairs = list(zip(sample.history, frames, strict=True))
    pairs += [(sample.noisy, clips[-1]), (sample.target, data[f"{name}.target"])]
    pairs += [(sample.timestep, data[f"{name}.timestep"]), (sample.ratio, data[f"{name}.ratio"].flatten())]
    for actual, expected in pairs:
        assert actual.shape == expected.shape
        assert (actual - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("level", LEVELS)
def test_the_temporal_pyramid_equals_the_recorded_one(level):
    data, clips = tensors("training_temporal"), parameters("training_temporal")["clips_per_stage"]
    draws = recorded("training_temporal", level, 1)
    sample = temporal_pyramid_sample(SCHEDULE, level, data["latents"][level : level + 1], draws)
    check(sample, data, f"stage{level}", clips[level])
    assert not draws.normals
    assert not draws.uniforms


@pytest.mark.parametrize("level", LEVELS)
def test_the_spatial_pyramid_equals_the_recorded_one(level):
    data = tensors("training_spatial")
    latents = data["latents"][level : level + 1]
    sample = spatial_pyramid_sample(SCHEDULE, level, latents, recorded("training_spatial", level, latents.shape[2]))
    check(sample, data, f"stage{level}", 1)


def latents(batch: int = 2, frames: int = 4) -> Tensor:
    return torch.randn(batch, 16, frames, 8, 16, generator=torch.Generator().manual_seed(5))


class Ends(KeyedRandom):
    """Draws at one end of a level."""

    def uniform(self) -> Tensor:
        return super().uniform() * 0


@pytest.mark.parametrize("level", LEVELS)
def test_at_ratio_1_the_model_sees_what_the_sampler_begins_a_level_with(level):
    """E[x] at the beginning: alpha up(x_end of the level below) has the clean part that training starts from."""
    clean = latents(frames=1)
    sample = spatial_pyramid_sample(SCHEDULE, level, clean, Ends(0, 0, [0, 1]))
    at = SCHEDULE.levels[level]
    assert torch.equal(sample.ratio, torch.ones(2))
    assert sample.timestep.tolist() == [at.first_timestep] * 2
    noise = noise_pyramid(Ends(0, 0, [0, 1]).normal(clean.shape[1:]), 3)
    if level == 0:
        assert torch.equal(sample.noisy, noise[0])
        return
    below = SCHEDULE.levels[level - 1]
    coarse = clean
    for _ in range(len(LEVELS) - level):
        coarse = downsample(coarse)
    entered = at.enter((1 - below.end) * coarse, torch.zeros_like(sample.noisy))
    torch.testing.assert_close(sample.noisy - at.start * noise[level], entered, atol=1e-6, rtol=1e-5)


def test_one_euler_step_of_the_target_leads_from_anywhere_to_the_clean_latents():
    clean = latents(frames=1)
    sample = spatial_pyramid_sample(SCHEDULE, 2, clean, KeyedRandom(0, 7, [0, 1]))
    ratio = sample.ratio.view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(sample.noisy - ratio * sample.target, clean, atol=1e-5, rtol=1e-5)


def test_the_history_of_a_first_frame_is_empty():
    sample = temporal_pyramid_sample(SCHEDULE, 1, latents(frames=1), KeyedRandom(0, 0, [0, 1]))
    assert sample.history == ()


def test_history_lies_as_the_sampler_has_it_and_is_corrupted_by_less_than_a_third():
    clean = latents(frames=4)
    sample = temporal_pyramid_sample(SCHEDULE, 2, clean, KeyedRandom(0, 0, [0, 1]))
    assert [tuple(clip.shape[3:]) for clip in sample.history] == [(2, 4), (4, 8), (8, 16)]
    share = 1 - (sample.history[-1] * clean[:, :, 2:3]).flatten(1).sum(1) / clean[:, :, 2].square().flatten(1).sum(1)
    assert (share < 1 / 3 + 0.1).all()
    assert not torch.equal(sample.history[-1], clean[:, :, 2:3])


def test_arguments_are_not_changed():
    clean = latents()
    before = clean.clone()
    temporal_pyramid_sample(SCHEDULE, 2, clean, KeyedRandom(0, 0, [0, 1]))
    assert torch.equal(clean, before)


def test_a_sample_is_drawn_alike_whatever_its_batch():
    clean = latents(batch=3)
    together = temporal_pyramid_sample(SCHEDULE, 1, clean, KeyedRandom(4, 9, [10, 11, 12]))
    alone = temporal_pyramid_sample(SCHEDULE, 1, clean[1:2], KeyedRandom(4, 9, [11]))
    chosen = temporal_pyramid_sample(SCHEDULE, 1, clean[1:2], KeyedRandom(4, 9, [10, 11, 12]).select([1]))
    for sample in (alone, chosen):
        assert torch.equal(together.noisy[1:2], sample.noisy)
        assert all(torch.equal(a[1:2], b) for a, b in zip(together.history, sample.history, strict=True))
    other = temporal_pyramid_sample(SCHEDULE, 1, clean[1:2], KeyedRandom(4, 10, [11]))
    assert not torch.equal(alone.noisy, other.noisy)


def test_a_level_that_is_not_there_is_refused():
    with pytest.raises(InvalidValueError, match="level 3 is not one of 3"):
        spatial_pyramid_sample(SCHEDULE, 3, latents(), KeyedRandom(0, 0, [0, 1]))


def test_the_loss_is_one_number_per_sample_in_float32():
    target = torch.zeros(2, 16, 1, 2, 2, dtype=torch.bfloat16)
    predicted = target + torch.tensor([1.0, 3.0]).view(-1, 1, 1, 1, 1)
    loss = velocity_loss(predicted, target)
    assert loss.tolist() == [1.0, 9.0]
    assert loss.dtype == torch.float32
