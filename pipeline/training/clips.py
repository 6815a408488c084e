"""The tables that are trained on: clips with captions, and what a checkpoint's VAE and text encoders make of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor

from pyramid_flow import TextEmbedding
from pyramid_flow.errors import PyramidFlowError
from pyramid_flow.text.embedding import concatenate

Frames = NDArray[np.uint8]
"""A clip [N,H,W,3]."""

CLIP_SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("num_frames", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("pixels", pa.binary()),
    ]
)
"""A clip is its RGB bytes, frame by frame and row by row."""

ENCODED_SCHEMA = pa.schema([("prompt", pa.string()), ("tensors", pa.binary())])
"""An encoded clip is a safetensors file: latents [C,T,h,w], un-normalised, text.tokens [L,D] and text.pooled [P], and
empty.tokens and empty.pooled of the empty prompt, so that no text encoder is needed any more."""


class SampleError(PyramidFlowError):
    """A table does not hold what is to be trained on."""


@dataclass(frozen=True)
class Encoded:
    """Encoded clips: latents [B,C,T,h,w], un-normalised, their prompts, and the empty one (one row)."""

    latents: Tensor
    text: TextEmbedding
    empty: TextEmbedding


def clip_row(prompt: str, frames: Frames) -> dict[str, object]:
    """Return the row of a clip uint8 [N,H,W,3]."""
    num_frames, height, width, _ = frames.shape
    pixels = np.ascontiguousarray(frames, dtype=np.uint8).tobytes()
    return {"prompt": prompt, "num_frames": num_frames, "height": height, "width": width, "pixels": pixels}


def clips(table: pa.Table) -> list[Frames]:
    """Return the clips uint8 [N,H,W,3] of a table; raises SampleError if a row's bytes are not as many as it says."""
    return [_clip(row) for row in _rows(table, CLIP_SCHEMA)]


def pixels_of(clip: Frames) -> Tensor:
    """Return uint8 [N,H,W,3] as the VAE takes it: float32 [3,N,H,W] in [-1,1]."""
    return torch.from_numpy(np.array(clip)).permute(3, 0, 1, 2).float() / 127.5 - 1


def encoded_row(prompt: str, latents: Tensor, text: TextEmbedding, empty: TextEmbedding) -> dict[str, object]:
    """Return the row of latents [C,T,h,w], one prompt and the empty one."""
    tensors = {"latents": latents}
    for name, embedding in (("text", text.trimmed()), ("empty", empty.trimmed())):
        tensors |= {f"{name}.tokens": embedding.tokens[0], f"{name}.pooled": embedding.pooled[0]}
    return {
        "prompt": prompt,
        "tensors": save(
            {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        ),
    }


def encoded(table: pa.Table, num_frames: int) -> Encoded:
    """Return the encoded clips of a table, cut to `num_frames` latent frames; SampleError if one is shorter."""
    rows = [load(row["tensors"]) for row in _rows(table, ENCODED_SCHEMA)]
    latents = [row["latents"].float() for row in rows]
    shortest = min(clip.shape[1] for clip in latents)
    if shortest < num_frames:
        raise SampleError(f"a clip has {shortest} latent frames, which is less than {num_frames}")
    shapes = {tuple(clip.shape[2:]) for clip in latents}
    if len(shapes) > 1:
        raise SampleError(f"clips of one batch have several sizes: {sorted(shapes)}")
    return Encoded(
        latents=torch.stack([clip[:, :num_frames] for clip in latents]),
        text=concatenate([_text(row, "text") for row in rows]),
        empty=_text(rows[0], "empty"),
    )


def _text(row: Mapping[str, Tensor], name: str) -> TextEmbedding:
    tokens, pooled = (row[f"{name}.{part}"][None].float() for part in ("tokens", "pooled"))
    return TextEmbedding(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool), pooled)


def _rows(table: pa.Table, schema: pa.Schema) -> list[dict[str, Any]]:
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise SampleError(f"the table has no column {missing[0]!r}, it has: {', '.join(table.column_names)}")
    rows: list[dict[str, Any]] = table.select(schema.names).to_pylist()
    return rows


def _clip(row: Mapping[str, Any]) -> Frames:
    shape = (row["num_frames"], row["height"], row["width"], 3)
    if None in shape or row["pixels"] is None:
        raise SampleError("a clip has no pixels or no size")
    values: Frames = np.frombuffer(row["pixels"], np.uint8)
    if values.size != prod(shape):
        raise SampleError(f"a clip of {values.size} bytes cannot be {list(shape)}")
    return values.reshape(shape)
