"""Rotary position embedding and the one attention function of both transformers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pyramid_flow.tokens import PrefixLayout

ROPE_BASE = 10000.0


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines of every token's angles, float32 [S, head_dim / 2]."""

    cos: Tensor
    sin: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate adjacent pairs of the last S' tokens' features in float32: x [B,H,S',head_dim], S' <= S."""
        tokens = x.shape[-2]
        cos, sin = self.cos[-tokens:], self.sin[-tokens:]
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def rotary_table(ids: Tensor, axes_dims: Sequence[int], device: torch.device) -> RotaryTable:
    """Return the rotary table of `ids` [S, axes]: axis a rotates its `axes_dims[a]` features with base 10000."""
    angles = []
    for axis, dim in enumerate(axes_dims):
        frequencies = ROPE_BASE ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(ids[:, axis, None].double() * frequencies)
    table = torch.cat(angles, dim=-1)
    return RotaryTable(table.cos().float().to(device), table.sin().float().to(device))


def attention(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, key_mask: Tensor | None) -> Tensor:
    """Softmax attention in which every segment of queries sees a prefix of the keys.

    q [B,H,Q,D] with Q = layout.num_queries; k, v [B,H,S,D]; key_mask bool [B,1,1,S], False for padding, or None when
    no key is padding, so that the fused kernels run without a mask. Returns [B,Q,H*D].
    """
    outputs = []
    for queries, end in zip(q.split(layout.query_lengths, dim=2), layout.key_ends, strict=True):
        mask = None if key_mask is None else key_mask[..., :end]
        outputs.append(F.scaled_dot_product_attention(queries, k[:, :, :end], v[:, :, :end], attn_mask=mask))
    return torch.cat(outputs, dim=2).transpose(1, 2).flatten(2)
