"""Attention: prefixes equal the dense mask of the definition, and the rotary embedding its formula."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyramid_flow.sampling.pyramid import history_level
from pyramid_flow.transformer import attention as attention_module
from pyramid_flow.transformer.attention import MaskedAttention, PrefixAttention, attention, rotary_table
from pyramid_flow.transformer.tokens import prefix_layout
from tests.pyramid_flow.goldens import randn

AXES = (4, 6, 6)
HEADS, DIM = 2, sum(AXES)


def frame_shapes(unit: int, level: int) -> list[tuple[int, int, int]]:
    levels = [history_level(unit - j, level) for j in range(unit)] + [level]
    return [(1, 2 * 2**each, 4 * 2**each) for each in levels]


def dense_mask(shapes: list[tuple[int, int, int]], valid: list[int], text_length: int) -> Tensor:
    """bool [B,1,S,S]: i sees j if both are real or both padding, and j is not later; all text has time 0."""
    frames = [torch.full((height // 2 * (width // 2),), j) for j, (_, height, width) in enumerate(shapes)]
    time = torch.cat([torch.zeros(text_length, dtype=torch.long), *frames])
    segment = torch.ones(len(valid), len(time), dtype=torch.long)
    for row, count in enumerate(valid):
        segment[row, : text_length - count] = 0
    same = segment[:, :, None] == segment[:, None, :]
    return (same & (time[:, None] >= time[None, :]))[:, None]


def random_case(seed: int) -> tuple[list[tuple[int, int, int]], list[int]]:
    source = random.Random(seed)
    shapes = frame_shapes(unit=source.randrange(6), level=source.randrange(3))
    return shapes, [source.randrange(1, 20) for _ in range(3)]


def inputs(tokens: int, batch: int, seed: int) -> list[Tensor]:
    return [2 * randn(batch, HEADS, tokens, DIM, seed=3 * seed + i) for i in range(3)]


def key_mask(valid: list[int], text_length: int, tokens: int) -> Tensor:
    positions = torch.arange(tokens)
    return positions >= text_length - torch.tensor(valid)[:, None]


@pytest.fixture(params=[PrefixAttention, MaskedAttention])
def kind(request, monkeypatch):
    """Whether sequences count as short."""
    monkeypatch.setattr(attention_module, "SHORT", 0 if request.param is PrefixAttention else 10**6)
    return request.param


@pytest.mark.parametrize("seed", range(12))
def test_attention_equals_the_dense_mask(seed, kind):
    shapes, valid = random_case(seed)
    text_length = max(valid)
    layout = prefix_layout(shapes, text_length)
    q, k, v = inputs(layout.num_queries, len(valid), seed)
    mask = dense_mask(shapes, valid, text_length)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    keys = key_mask(valid, text_length, layout.num_queries)
    everything = attention(layout, [text_length - count for count in valid], q.device)
    assert isinstance(everything, kind)
    # nothing ever reads what comes out at a pad
    torch.testing.assert_close(everything(q, k, v)[keys], expected[keys], rtol=0, atol=1e-5)

    current = shapes[-1][1] // 2 * (shapes[-1][2] // 2)
    last = everything.last(current)
    assert (everything.num_queries, last.num_queries) == (layout.num_queries, current)
    torch.testing.assert_close(last(q[:, :, -current:], k, v), expected[:, -current:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_without_pads_no_mask_is_needed(seed, kind):
    shapes, _ = random_case(seed)
    layout = prefix_layout(shapes, 9)
    q, k, v = inputs(layout.num_queries, 2, seed)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(shapes, [9, 9], 9))
    actual = attention(layout, [0, 0], q.device)(q, k, v)
    torch.testing.assert_close(actual, expected.transpose(1, 2).flatten(2), rtol=0, atol=1e-5)


def test_text_is_not_rotated():
    x = randn(2, HEADS, 5, DIM)
    table = rotary_table(torch.zeros(5, 3, dtype=torch.float64), AXES, torch.device("cpu"))
    assert torch.equal(table.rotate(x), x)


def test_adjacent_pairs_turn_by_time_then_y_then_x():
    ids = torch.tensor([[3, 0.5, 1.5], [0, 2, 0], [31, 10, 79]], dtype=torch.float64)
    x = randn(1, 1, 3, DIM)
    rotated = rotary_table(ids, AXES, torch.device("cpu")).rotate(x)
    for token in range(3):
        pair = 0
        for axis, dim in enumerate(AXES):
            for m in range(dim // 2):
                turn = torch.exp(1j * ids[token, axis] * 10000 ** (-2 * m / dim))
                before, after = (torch.complex(*t[0, 0, token, 2 * pair : 2 * pair + 2].double()) for t in (x, rotated))
                assert abs(after - before * turn) < 1e-6
                pair += 1


def test_scores_depend_on_the_distance_of_positions_only():
    q, k = randn(1, 1, 1, DIM), randn(1, 1, 1, DIM, seed=1)

    def score(query: list[float], key: list[float]) -> float:
        ids = torch.tensor([query, key], dtype=torch.float64)
        rotated = rotary_table(ids, AXES, torch.device("cpu")).rotate(torch.cat([q, k], dim=2))[0, 0]
        return (rotated[0] @ rotated[1]).item()

    assert score([5, 2.5, 7], [3, 4, 1]) == pytest.approx(score([25, 12.5, 37], [23, 14, 31]), abs=1e-5)
    assert abs(score([5, 2.5, 7], [3, 4, 1]) - score([5, 2.5, 7], [4, 4, 1])) > 1e-3


def test_fewer_tokens_are_the_last_ones():
    ids = torch.arange(12, dtype=torch.float64).view(4, 3)
    table, x = rotary_table(ids, AXES, torch.device("cpu")), randn(1, HEADS, 4, DIM)
    assert torch.equal(table.rotate(x[:, :, -2:]), table.rotate(x)[:, :, -2:])


def test_bfloat16_is_rotated_in_float32():
    ids = torch.arange(12, dtype=torch.float64).view(4, 3)
    table, x = rotary_table(ids, AXES, torch.device("cpu")), randn(1, HEADS, 4, DIM).bfloat16()
    assert torch.equal(table.rotate(x), table.rotate(x.float()).bfloat16())
