"""Rotary position embedding and the attention of both transformers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from pyramid_flow.memory.placement import to_device_async
from pyramid_flow.parallel.sampler import HeadExchange
from pyramid_flow.transformer.history_cache import BlockCache
from pyramid_flow.transformer.tokens import PrefixLayout

ROPE_BASE = 10000.0
SHORT = 128
"""Keys up to which `MaskedAttention` trains faster on a CPU; it also has one graph for all layouts when compiled."""


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines of every token's angles, float32 [S, head_dim / 2, 2]."""

    turns: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate adjacent pairs of the last S' tokens' features in float32: x [B,H,S',head_dim], S' <= S."""
        turns = self.turns[-x.shape[-2] :]
        pairs = x.float().unflatten(-1, (-1, 2))
        if torch.compiler.is_compiling():  # compilers fuse real arithmetic, and have no complex one
            (even, odd), (cos, sin) = pairs.unbind(-1), turns.unbind(-1)
            turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
        else:  # one pass instead of seven
            turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns))
        return turned.flatten(-2).to(x.dtype)


def rotary_table(ids: Tensor, axes_dims: Sequence[int], device: torch.device) -> RotaryTable:
    """Return the rotary table of `ids` [S, axes]: axis a rotates its `axes_dims[a]` features with base 10000."""
    angles = []
    for axis, dim in enumerate(axes_dims):
        frequencies = ROPE_BASE ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(ids[:, axis, None].double() * frequencies)
    table = torch.cat(angles, dim=-1)
    return RotaryTable(to_device_async(torch.stack((table.cos(), table.sin()), dim=-1).float(), device))


@dataclass(frozen=True)
class PrefixAttention:
    """Softmax attention in which every segment of queries sees a prefix of the keys, segment by segment.

    pads: how many of a row's first keys are padding, (number of rows, pads) for each run of rows with equal pads. No
    mask is needed: pads come first, so what a row may see is one slice of its keys, and the fused kernels run.
    """

    layout: PrefixLayout
    pads: tuple[tuple[int, int], ...]

    @property
    def num_queries(self) -> int:
        """Number of tokens that ask, counted from the end of the sequence."""
        return self.layout.num_queries

    def last(self, num_tokens: int) -> "PrefixAttention":
        """Return the attention in which only the last tokens ask; they see the whole sequence."""
        return PrefixAttention(self.layout.current_only(num_tokens), self.pads)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B,H,Q,D] with Q = num_queries; k, v [B,H,S,D] -> [B,Q,H*D]."""
        sizes, pads = zip(*self.pads, strict=True)
        runs = zip(q.split(sizes), k.split(sizes), v.split(sizes), pads, strict=True)
        return torch.cat([self._run(*run) for run in runs])

    def _run(self, q: Tensor, k: Tensor, v: Tensor, pads: int) -> Tensor:
        outputs = [  # transposed first, which is how kernels leave them
            F.scaled_dot_product_attention(queries, k[:, :, pads:end], v[:, :, pads:end]).transpose(1, 2)
            for queries, end in zip(q.split(self.layout.query_lengths, dim=2), self.layout.key_ends, strict=True)
        ]
        return torch.cat(outputs, dim=1).flatten(2)


@dataclass(frozen=True)
class MaskedAttention:
    """The same as two matrix products and a mask: seen, bool [B,1,Q,S], is False where a query must not look."""

    seen: Tensor

    @property
    def num_queries(self) -> int:
        """Number of tokens that ask, counted from the end of the sequence."""
        return self.seen.shape[2]

    def last(self, num_tokens: int) -> "MaskedAttention":
        """Return the attention in which only the last tokens ask."""
        return MaskedAttention(self.seen[:, :, -num_tokens:])

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B,H,Q,D] with Q = num_queries; k, v [B,H,S,D] -> [B,Q,H*D]."""
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        mixed: Tensor = scores.masked_fill(~self.seen, -torch.inf).softmax(dim=-1) @ v
        return mixed.transpose(1, 2).flatten(2)


Attention = PrefixAttention | MaskedAttention


def attention(layout: PrefixLayout, pads: Sequence[int], device: torch.device) -> Attention:
    """Return the attention for a layout: prefixes, but one mask where short sequences train on a CPU.

    pads: how many of each row's first keys are padding.
    """
    if device.type != "cpu" or layout.key_ends[-1] > SHORT or not torch.is_grad_enabled():
        return PrefixAttention(layout, tuple((len(list(run)), first) for first, run in groupby(pads)))
    keys = torch.arange(layout.key_ends[-1])
    ends = torch.tensor(layout.key_ends).repeat_interleave(torch.tensor(layout.query_lengths))
    seen = (keys < ends[:, None]) & (keys >= torch.tensor(pads)[:, None, None])
    return MaskedAttention(seen[:, None])


@dataclass(frozen=True)
class AttentionContext:
    """What a block's attention needs beside its tokens.

    cache: of keys and values that come before theirs; exchange: with the processes that hold the other tokens.
    """

    rotary: RotaryTable
    attention: Attention
    cache: BlockCache | None = None
    exchange: HeadExchange | None = None

    def last(self, num_tokens: int) -> "AttentionContext":
        """Return the context of a block in which only the last tokens ask, the current frame's."""
        exchange = None if self.exchange is None else self.exchange.last()
        return replace(self, attention=self.attention.last(num_tokens), exchange=exchange)

    def asking(self, tokens: Tensor) -> Tensor:
        """Return the last of some tokens [B,S,D], those that ask: [B,Q,D]."""
        count = self.attention.num_queries if self.exchange is None else self.exchange.num_queries
        return tokens[:, tokens.shape[1] - count :]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with the last Q of the S tokens that are evaluated: q [B,H,Q,D], k, v [B,H,S,D] -> [B,Q,H*D]."""
        if self.exchange is not None:
            q, k, v = self.exchange.to_heads(q, k, v)
        q, k = self.rotary.rotate(q), self.rotary.rotate(k)
        if self.cache is not None:
            k, v = self.cache.extend(k, v)
        mixed = self.attention(q, k, v)
        return mixed if self.exchange is None else self.exchange.to_tokens(mixed)
