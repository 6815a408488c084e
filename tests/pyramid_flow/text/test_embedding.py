"""Text embeddings: how they are joined, selected, trimmed and moved."""

import pytest
import torch

from pyramid_flow import ShapeError, TextEmbedding
from pyramid_flow.text.embedding import concatenate
from tests.pyramid_flow.goldens import randn, random_text, rows


def test_trimming_drops_only_what_is_padding_in_every_row():
    text = random_text([2, 5, 3])
    padded = TextEmbedding(
        torch.cat([text.tokens, randn(3, 4, 32)], dim=1),
        torch.cat([text.mask, torch.zeros(3, 4, dtype=torch.bool)], dim=1),
        text.pooled,
    )
    trimmed = padded.trimmed()
    assert torch.equal(trimmed.tokens, text.tokens)
    assert torch.equal(trimmed.mask, text.mask)
    gap = TextEmbedding(randn(1, 3, 32), torch.tensor([[False, True, False]]), randn(1, 16))
    assert gap.trimmed().mask.tolist() == [[False, True]]
    none = TextEmbedding(randn(1, 3, 32), torch.zeros(1, 3), randn(1, 16))
    assert none.trimmed().tokens.shape == (1, 0, 32)


def test_joining_pads_to_the_longest_and_selecting_undoes_it():
    short, long = random_text([2, 3]), random_text([7], seed=5)
    joined = concatenate([short, long])
    assert joined.tokens.shape == (3, 7, 32)
    assert joined.mask.sum(dim=1).tolist() == [2, 3, 7]
    for part, expected in ((rows(joined, 0, 1).trimmed(), short), (rows(joined, 2), long)):
        assert torch.equal(part.tokens, expected.tokens)
        assert torch.equal(part.mask, expected.mask)
        assert torch.equal(part.pooled, expected.pooled)
    assert torch.equal(rows(joined, 2, 0).pooled, joined.pooled[[2, 0]])


def test_moving_to_a_dtype_leaves_the_mask_boolean():
    moved = random_text([2, 4]).to(torch.device("cpu"), torch.bfloat16)
    assert (moved.tokens.dtype, moved.pooled.dtype, moved.mask.dtype) == (torch.bfloat16, torch.bfloat16, torch.bool)
    assert len(moved) == 2


@pytest.mark.parametrize(
    ("tokens", "mask", "pooled", "message"),
    [
        ((2, 5, 8), (2, 4), (2, 3), r"text mask must have shape \[2, 5\].*, got \[2, 4\]"),
        ((2, 5), (2, 5), (2, 3), "text"),
        ((2, 5, 8), (2, 5), (1, 3), r"pooled text must have shape \[2,P\], got \[1, 3\]"),
        ((2, 5, 8), (2, 5), (2,), r"pooled text must have shape \[2,P\], got \[2\]"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tokens, mask, pooled, message):
    with pytest.raises(ShapeError, match=message):
        TextEmbedding(torch.zeros(tokens), torch.ones(mask), torch.zeros(pooled))
