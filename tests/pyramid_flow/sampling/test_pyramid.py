"""The pyramid: exact covariances of its noises, and at which level each past frame is held."""

import pytest
import torch

from pyramid_flow.sampling.pyramid import (
    block_noise,
    downsample,
    history_clips,
    history_level,
    keep_rows,
    latent_pyramid,
    noise_pyramid,
    stack_frames,
    upsample,
)
from tests.pyramid_flow.goldens import randn

HISTORY = {
    0: ([], [], []),
    1: ([0], [1], [2]),
    2: ([0, 0], [0, 1], [1, 2]),
    3: ([0, 0, 0], [0, 0, 1], [0, 1, 2]),
    4: ([0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 2]),
    5: ([0, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 1, 2]),
    6: ([0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 2]),
}


@pytest.mark.parametrize("gamma", [0.01, 0.1, 0.2, 0.3, 1 / 3])
def test_block_noise_has_unit_variance_and_covariance_minus_gamma(gamma):
    """The map is linear, so its matrix A follows from the unit vectors, and A A^T is the covariance."""
    matrix = block_noise(torch.eye(4).view(4, 2, 2), gamma).flatten(1).T
    expected = (1 + gamma) * torch.eye(4) - gamma
    torch.testing.assert_close(matrix @ matrix.T, expected, rtol=0, atol=1e-6)


def test_at_one_third_every_block_sums_to_zero():
    coloured = block_noise(randn(2, 3, 1, 8, 6), 1 / 3)
    assert downsample(coloured).abs().max() < 1e-6
    assert coloured.std() > 0.9


def test_blocks_are_independent_of_each_other():
    white = randn(1, 2, 1, 6, 8)
    changed = white.clone()
    changed[0, 1, 0, 2:4, 4:6] += randn(2, 2, seed=1)
    differs = block_noise(white, 0.2) != block_noise(changed, 0.2)
    assert differs[0, 1, 0, 2:4, 4:6].all()
    assert differs.sum() == 4


@pytest.mark.parametrize("num_levels", [1, 2, 3])
def test_the_lowest_noise_keeps_unit_variance_and_independence(num_levels):
    side = 2 ** (num_levels - 1)
    pixels = 2 * side * side
    matrix = noise_pyramid(torch.eye(pixels).view(pixels, 1, 1, side, 2 * side), num_levels)[0].flatten(1).T
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(2), rtol=0, atol=1e-6)


def test_down_and_up():
    latents = randn(2, 3, 2, 4, 6)
    lower, higher = downsample(latents), upsample(latents)
    assert lower.shape == (2, 3, 2, 2, 3)
    assert higher.shape == (2, 3, 2, 8, 12)
    for y in range(2):
        for x in range(3):
            block = latents[..., 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
            torch.testing.assert_close(lower[..., y, x], block.mean(dim=(-2, -1)))
    for y in range(8):
        for x in range(12):
            assert torch.equal(higher[..., y, x], latents[..., y // 2, x // 2])
    torch.testing.assert_close(downsample(higher), latents)


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("unit", HISTORY)
def test_history_layout(unit, level):
    frames = [randn(1, 2, 1, 8, 16, seed=j) for j in range(unit)]
    levels = HISTORY[unit][level]
    clips = history_clips([latent_pyramid(frame, 3) for frame in frames], level)
    assert [history_level(unit - j, level) for j in range(unit)] == levels
    assert len(clips) == unit
    for clip, frame, held in zip(clips, frames, levels, strict=True):
        for _ in range(2 - held):
            frame = downsample(frame)
        assert torch.equal(clip, frame)


def test_pyramid_begins_at_the_lowest_level():
    latents = randn(1, 2, 1, 8, 4)
    lowest, middle, highest = latent_pyramid(latents, 3)
    assert torch.equal(highest, latents)
    assert torch.equal(middle, downsample(latents))
    assert torch.equal(lowest, downsample(middle))


def test_rows_and_frames_of_pyramids():
    frames = [randn(3, 2, 1, 4, 4, seed=j) for j in range(2)]
    pyramids = [latent_pyramid(frame, 2) for frame in frames]
    assert torch.equal(stack_frames(pyramids), torch.cat(frames, dim=2))
    kept = keep_rows(pyramids, torch.tensor([True, False, True]))
    assert torch.equal(stack_frames(kept), torch.cat(frames, dim=2)[[0, 2]])
    assert torch.equal(kept[1][0], downsample(frames[1])[[0, 2]])


def test_inputs_are_never_modified():
    latents = randn(1, 2, 1, 8, 8)
    kept = latents.clone()
    downsample(latents)
    upsample(latents)
    block_noise(latents, 0.2)
    noise_pyramid(latents, 3)
    latent_pyramid(latents, 3)
    assert torch.equal(latents, kept)
