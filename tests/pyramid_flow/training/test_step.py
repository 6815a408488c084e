"""A training step: the same whatever the batch is split into, and it learns."""

from copy import deepcopy
from math import isfinite

import pytest
import torch
from torch import Tensor

from pyramid_flow import InvalidValueError, PyramidSchedule, PyramidTransformer, ShapeError
from pyramid_flow.training.draws import KeyedRandom
from pyramid_flow.training.step import (
    Losses,
    Objective,
    initialise_transformer,
    optimizer_step,
    transformer_losses,
    with_dropout,
)
from tests.pyramid_flow.goldens import TINY, tiny_text_encoder, tiny_transformer

SCHEDULE = PyramidSchedule()
PROMPTS = ["a cat", "a dog in the rain", "", "the sea", "a hill", "two birds"]


def trainable(family: str = "miniflux") -> PyramidTransformer:
    return deepcopy(tiny_transformer(family)).requires_grad_(True)


def latents() -> Tensor:
    return torch.randn(6, 16, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def losses(
    transformer: PyramidTransformer, rows: list[int], step: int = 0, family: str = "miniflux", **objective: object
) -> Losses:
    encoder = tiny_text_encoder(family)
    return transformer_losses(
        transformer,
        SCHEDULE,
        latents()[rows],
        encoder([PROMPTS[row] for row in rows]),
        encoder([""]),
        samples=rows,
        lengths=[4, 2, 1],
        draws=KeyedRandom(3, step, rows),
        objective=Objective(**objective),
    )


def gradient(transformer: PyramidTransformer) -> Tensor:
    return torch.cat([each.grad.flatten() for each in transformer.parameters() if each.grad is not None])


def test_a_batch_in_two_halves_has_the_same_losses_and_gradient():
    whole, split = trainable(), trainable()
    together = losses(whole, list(range(6)))
    together.total.backward()
    halves = [losses(split, [0, 1, 2]), losses(split, [3, 4, 5])]
    (sum(half.total for half in halves) / 2).backward()
    torch.testing.assert_close(torch.cat([half.values for half in halves]), together.values, rtol=1e-5, atol=1e-6)
    assert (gradient(split) - gradient(whole)).norm() <= 1e-5 * gradient(whole).norm()


def test_the_level_of_a_sample_is_that_of_its_index():
    found = losses(trainable(), [4, 2, 3])
    assert found.levels == (1, 2, 0)
    assert found.by_level() == pytest.approx(dict(zip(found.levels, found.values.tolist(), strict=True)))
    assert losses(trainable(), [0, 1, 2, 3], levels=(0, 1, 1)).levels == (0, 1, 1, 0)


def test_weights_are_those_of_the_levels():
    found = losses(trainable(), [0, 1, 2], level_weights=(3.0, 0.0, 1.0))
    expected = (3 * found.values[0] + found.values[2]) / 3
    assert found.total.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("family", TINY)
def test_gradient_checkpointing_changes_nothing(family):
    plain, checkpointed = trainable(family), trainable(family)
    checkpointed.enable_gradient_checkpointing()
    for transformer in (plain, checkpointed):
        losses(transformer, [0, 1, 2], family=family).total.backward()
    assert torch.equal(gradient(plain), gradient(checkpointed))


def test_it_learns():
    transformer = trainable()
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-2)
    totals = []
    for _ in range(15):
        found = losses(transformer, list(range(6)), text_dropout=0.0)
        totals.append(found.total.item())
        assert optimizer_step(transformer, optimizer, found.total, 1.0) > 0
    assert totals[-1] < 0.7 * totals[0]


@pytest.mark.parametrize("family", TINY)
def test_a_new_transformer_answers_nothing_at_first_and_learns(family):
    transformer = trainable(family)
    initialise_transformer(transformer)

    def total() -> Tensor:
        return losses(transformer, [0, 1, 2], family=family, text_dropout=0.0).total

    first = total()
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-2)
    for _ in range(8):
        optimizer_step(transformer, optimizer, total(), 1.0)
    assert total() < 0.9 * first
    with torch.no_grad():
        initialise_transformer(transformer)
        state = transformer.embed_text(tiny_text_encoder(family)(["a"]))
        history = transformer.embed_history([], (1, 16, 1, 4, 4), state)
        conditioning = transformer.condition(torch.ones(1), state)
        assert not transformer(torch.ones(1, 16, 1, 4, 4), conditioning, state, history).any()


@pytest.mark.parametrize("family", TINY)
def test_no_first_weight_is_one_of_the_checkpoint(family):
    transformer, trained = trainable(family), tiny_transformer(family).state_dict()
    initialise_transformer(transformer)
    matrices = {name: weight for name, weight in transformer.named_parameters() if weight.ndim > 1}
    assert not any(torch.equal(weight, trained[name]) for name, weight in matrices.items())


def test_clipping_bounds_the_gradient():
    transformer = trainable()
    found = losses(transformer, [0, 1, 2])
    norm = optimizer_step(transformer, torch.optim.SGD(transformer.parameters(), lr=0.0), found.total, 0.01)
    assert norm > 0.01
    assert gradient(transformer).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_dropped_prompts_are_the_empty_one_really_encoded():
    encoder = tiny_text_encoder()
    text = with_dropout(encoder(["a cat", "a dog"]), encoder([""]), torch.tensor([False, True]))
    for row, prompt in enumerate(["a cat", ""]):
        expected = encoder([prompt])
        assert torch.equal(text.pooled[row], expected.pooled[0])
        assert torch.equal(text.mask[row], expected.mask[0])
    assert text.mask[1].any()
    with pytest.raises(ShapeError, match="empty prompt"):
        with_dropout(text, text, torch.tensor([False, True]))


def test_prompts_are_dropped_as_often_as_told():
    whole = losses(trainable(), [0, 1, 2], text_dropout=0.0)
    none = losses(trainable(), [0, 1, 2], text_dropout=1.0)
    assert (whole.values[:2] != none.values[:2]).all()
    assert whole.values[2].item() == pytest.approx(none.values[2].item())  # its prompt is empty


def test_unit_lengths_are_uniform_or_favour_the_first_frame():
    def lengths(num_units: int, **objective: object) -> Tensor:
        levels = range(4000)
        found = Objective(tuple(levels), **objective).unit_lengths(num_units, KeyedRandom(0, 0, levels))
        return torch.bincount(torch.tensor(found), minlength=num_units + 1)[1:] / 4000

    assert (lengths(5) - 0.2).abs().max() < 0.03
    assert (lengths(5, first_frame_share=0.6) - torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1])).abs().max() < 0.03
    assert lengths(1).tolist() == [1.0]
    assert lengths(1, first_frame_share=0.0).tolist() == [1.0]


def test_batches_that_do_not_fit_are_refused():
    encoder = tiny_text_encoder()
    text, empty = encoder(["a"]), encoder([""])
    arguments = {"samples": [0], "lengths": [1, 1, 1], "draws": KeyedRandom(0, 0, [0]), "objective": Objective()}
    with pytest.raises(ShapeError, match="samples"):
        transformer_losses(trainable(), SCHEDULE, latents(), text, empty, **arguments)
    with pytest.raises(InvalidValueError, match="one per entry of levels"):
        transformer_losses(trainable(), SCHEDULE, latents()[:1], text, empty, **{**arguments, "lengths": [1]})


def test_autocast_keeps_weights_and_losses_in_float32():
    transformer = trainable()
    with torch.autocast("cpu", torch.bfloat16):
        found = losses(transformer, [0, 1, 2])
    assert found.values.dtype == torch.float32
    found.total.backward()
    assert gradient(transformer).dtype == torch.float32
    exact = losses(trainable(), [0, 1, 2])
    assert (found.values - exact.values).abs().max() < 0.05 * exact.values.max()


def test_a_gradient_that_is_not_finite_changes_nothing():
    transformer = trainable()
    before = [parameter.detach().clone() for parameter in transformer.parameters()]
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1.0)
    loss = losses(transformer, [0, 1, 2]).total
    assert not isfinite(optimizer_step(transformer, optimizer, loss * torch.nan, max_grad_norm=1.0))
    assert all(torch.equal(old, new) for old, new in zip(before, transformer.parameters(), strict=True))
    assert isfinite(optimizer_step(transformer, optimizer, losses(transformer, [0, 1, 2]).total, max_grad_norm=1.0))
