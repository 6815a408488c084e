"""The history cache: keys and values of text and of past frames at level 0, computed once and read by later units.

While level s of unit u is sampled, frames 0 ... u-s-1 are held at level 0. Text and such frames see only text and
earlier frames, whose times and positions stay what they are; so at an equal timestep, for an equal prompt, their hidden
states, keys and values are those of the unit before (model specification, section 6). Until frame 0 has reached level 0
that does not hold, since text sees frame 0: level s stores from unit s+1 on and reads from unit s+2 on.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


def frames_at_level_0(unit: int, level: int) -> int:
    """Return how many past frames are held at level 0 while a level of a unit is sampled; they are the oldest."""
    return max(unit - level, 0)


def cached_frames(unit: int, level: int) -> int:
    """Return of how many frames, and of text, a level finds keys and values: those at level 0 in the unit before."""
    return frames_at_level_0(unit - 1, level)


@dataclass(frozen=True)
class CacheShape:
    """What a cache holds per row (one video, one guidance branch), and of how many tokens.

    text_tokens: of the longest prompt; frame_tokens: of a frame at level 0; num_units: of the video.
    """

    num_blocks: int
    num_heads: int
    head_dim: int
    text_tokens: int
    frame_tokens: int
    num_units: int

    def tokens(self, num_frames: int) -> int:
        """Return the tokens of so many cached frames and the text; without frames text is not cached either."""
        return self.text_tokens + num_frames * self.frame_tokens if num_frames else 0

    def capacity(self, level: int) -> int:
        """Return how many tokens a level ever reads: those that the last unit finds."""
        return self.tokens(cached_frames(self.num_units - 1, level))

    def step(self, level: int, rows: int) -> tuple[int, ...]:
        """Return the shape of the keys and values of one evaluation: [N,2,B,H,S,D]."""
        return self.num_blocks, 2, rows, self.num_heads, self.capacity(level), self.head_dim

    def level_bytes(self, level: int, rows: int, dtype: torch.dtype) -> int:
        """Return the bytes of a level; rows: summed over its evaluations."""
        return torch.Size(self.step(level, rows)).numel() * dtype.itemsize


def fitting_levels(shape: CacheShape, rows: Sequence[int], dtype: torch.dtype, budget_bytes: float) -> frozenset[int]:
    """Return the levels whose keys and values fit together; rows: of each level, summed over its evaluations.

    The lowest come first: they gain most by the byte, as history is most of what they evaluate. A level for which the
    video is too short is none of them.
    """
    chosen = []
    for level, level_rows in enumerate(rows):
        size = shape.level_bytes(level, level_rows, dtype)
        if 0 < size <= budget_bytes:
            budget_bytes -= size
            chosen.append(level)
    return frozenset(chosen)


@dataclass(frozen=True)
class BlockCache:
    """Keys and values of one block in one evaluation: [2,B,H,S,D], of which the first num_read are there.

    The first num_kept of the tokens that are evaluated are appended to them, in place.
    """

    stored: Tensor
    num_read: int
    num_kept: int

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values that are there, followed by the new ones [B,H,S',D]."""
        for stored, new in zip(self.stored, (k, v), strict=True):
            stored[:, :, self.num_read : self.num_read + self.num_kept] = new[:, :, : self.num_kept]
        if not self.num_read:
            return k, v
        past_k, past_v = self.stored[:, :, :, : self.num_read].to(k.dtype)
        return torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)


@dataclass
class HistoryCache:
    """Keys and values of one batch of videos at some levels. Grows in place; a level's memory is taken once.

    levels: those that are cached; dtype: of what is stored.
    """

    shape: CacheShape
    levels: Collection[int]
    dtype: torch.dtype
    device: torch.device
    _stored: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def num_frames(self, unit: int, level: int) -> int:
        """Return how many of the oldest frames, with the text, need not be evaluated."""
        return cached_frames(unit, level) if level in self.levels else 0

    def step(self, unit: int, level: int, step: int, rows: int) -> tuple[BlockCache, ...] | None:
        """Return what each block reads and appends to in one evaluation; None if the level is not cached."""
        capacity = self.shape.capacity(level)
        if level not in self.levels or not capacity:
            return None
        num_read = self.shape.tokens(cached_frames(unit, level))
        present = min(self.shape.tokens(frames_at_level_0(unit, level)), capacity)  # the last unit leaves nothing
        if not present:
            return None
        if (level, step) not in self._stored:
            shape = self.shape.step(level, rows)
            self._stored[level, step] = torch.empty(shape, dtype=self.dtype, device=self.device)
        return tuple(BlockCache(block, num_read, present - num_read) for block in self._stored[level, step])

    def keep(self, videos: Tensor) -> None:
        """Keep only the videos for which a bool mask [B] is true, in every guidance branch."""
        for key, stored in self._stored.items():  # one after another, since each is copied
            self._stored[key] = stored[:, :, videos.repeat(stored.shape[2] // len(videos))]
