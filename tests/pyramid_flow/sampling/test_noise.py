"""Seeded noise: a row's numbers depend on its seed alone and come in the documented order."""

import pytest
import torch

from pyramid_flow import InvalidValueError, SeededNoise
from pyramid_flow.sampling.noise import MAX_SEED
from pyramid_flow.sampling.pyramid import block_noise

FULL, LOW = (16, 3, 8, 8), (16, 1, 4, 4)


def draws(seeds: list[int]) -> list[torch.Tensor]:
    noise = SeededNoise(seeds)
    batch = len(seeds)
    return [noise.posterior((batch, *LOW)), noise.initial((batch, *FULL)), noise.block((batch, *LOW))]


def test_a_row_does_not_depend_on_its_batch():
    batch = draws([5, 7, 5])
    for row, seed in enumerate([5, 7, 5]):
        for together, alone in zip(batch, draws([seed]), strict=True):
            assert torch.equal(together[row], alone[0])
    assert not torch.equal(batch[1][0], batch[1][1])


@pytest.mark.parametrize("gamma", [0.2, 1 / 3])
@pytest.mark.parametrize("has_image", [False, True])
def test_order_of_the_draws(gamma, has_image):
    noise, generator = SeededNoise([3], gamma), torch.Generator().manual_seed(3)
    if has_image:
        assert torch.equal(noise.posterior((1, *LOW))[0], torch.randn(LOW, generator=generator))
    assert torch.equal(noise.initial((1, *FULL))[0], torch.randn(FULL, generator=generator))
    for _ in range(3):
        white = torch.randn(LOW, generator=generator)
        assert torch.equal(noise.block((1, *LOW))[0], block_noise(white, gamma))


def test_noise_is_float32_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    assert {draw.dtype for draw in draws([0, 1])} == {torch.float32}
    assert torch.equal(torch.get_rng_state(), state)


def test_the_default_dtype_of_torch_does_not_matter():
    expected = draws([4])
    torch.set_default_dtype(torch.bfloat16)
    try:
        actual = draws([4])
    finally:
        torch.set_default_dtype(torch.float32)
    for draw, again in zip(expected, actual, strict=True):
        assert draw.dtype == again.dtype
        assert torch.equal(draw, again)


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(InvalidValueError, match=rf"seed {seed} is not between 0 and 2\^63 - 1"):
        SeededNoise([0, seed])


def test_the_greatest_seed_works():
    assert SeededNoise([MAX_SEED]).initial((1, *LOW)).isfinite().all()


def test_one_seed_per_row():
    with pytest.raises(InvalidValueError, match="batch size 3 does not match the 2 seeds"):
        SeededNoise([0, 1]).initial((3, *FULL))
