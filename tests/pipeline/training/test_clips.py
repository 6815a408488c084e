"""Clips and encoded clips survive their tables; what does not fit is said."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.training.clips import (
    CLIP_SCHEMA,
    ENCODED_SCHEMA,
    SampleError,
    clip_row,
    clips,
    encoded,
    encoded_row,
    pixels_of,
)
from tests.pyramid_flow.goldens import tiny_text_encoder


def clip(num_frames: int = 9) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_frames, 8, 16, 3), dtype=np.uint8)


def latents(num_frames: int) -> torch.Tensor:
    return torch.randn(16, num_frames, 4, 8, generator=torch.Generator().manual_seed(num_frames))


def test_clips_come_back_as_they_went():
    first, second = clip(9), clip(1)[:, :, ::-1]
    table = pa.Table.from_pylist([clip_row("a", first), clip_row("b", second)], CLIP_SCHEMA)
    back = clips(table)
    assert np.array_equal(back[0], first)
    assert np.array_equal(back[1], second)


def test_pixels_are_what_the_vae_takes():
    pixels = pixels_of(clip())
    assert pixels.shape == (3, 9, 8, 16)
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    assert pixels[2, 3, 4, 5].item() == pytest.approx(clip()[3, 4, 5, 2] / 127.5 - 1)


def test_encoded_clips_come_back_padded_to_the_longest_prompt():
    encoder, prompts = tiny_text_encoder(), ["a cat", "a dog in the rain at night"]
    rows = [encoded_row(prompt, latents(5), encoder([prompt]), encoder([""])) for prompt in prompts]
    back = encoded(pa.Table.from_pylist(rows, ENCODED_SCHEMA), num_frames=3)
    assert torch.equal(back.latents, torch.stack([latents(5)[:, :3]] * 2))
    expected = encoder(prompts).trimmed()
    assert torch.equal(back.text.mask, expected.mask)
    assert torch.equal(back.text.tokens[back.text.mask], expected.tokens[expected.mask])
    assert torch.equal(back.text.pooled, expected.pooled)
    empty = encoder([""]).trimmed()
    assert torch.equal(back.empty.tokens, empty.tokens)
    assert torch.equal(back.empty.pooled, empty.pooled)


def test_what_does_not_fit_is_refused():
    text = tiny_text_encoder()(["a"])
    short = pa.Table.from_pylist([encoded_row("a", latents(2), text, text)], ENCODED_SCHEMA)
    with pytest.raises(SampleError, match="has 2 latent frames, which is less than 3"):
        encoded(short, num_frames=3)
    wide = encoded_row("a", torch.zeros(16, 3, 4, 4), text, text)
    mixed = pa.Table.from_pylist([encoded_row("a", latents(3), text, text), wide], ENCODED_SCHEMA)
    with pytest.raises(SampleError, match="several sizes"):
        encoded(mixed, num_frames=3)
    broken = pa.Table.from_pylist([clip_row("a", clip()) | {"height": 9}], CLIP_SCHEMA)
    with pytest.raises(SampleError, match="cannot be"):
        clips(broken)
    with pytest.raises(SampleError, match="no pixels or no size"):
        clips(pa.Table.from_pylist([clip_row("a", clip()) | {"height": None}], CLIP_SCHEMA))
    with pytest.raises(SampleError, match="no column 'pixels'"):
        clips(pa.table({"prompt": ["a"], "num_frames": [1], "height": [8], "width": [8]}))
