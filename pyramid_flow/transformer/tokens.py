"""Latent clips as tokens: patches, position ids, and who may attend to whom in a mixed-resolution sequence."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from einops import rearrange
from torch import Tensor

PATCH = 2


def patchify(latents: Tensor) -> Tensor:
    """Cut 2x2 patches, channel fastest: [B,C,T,h,w] -> [B, T*h/2*w/2, 4C]."""
    return rearrange(latents, "b c t (h p1) (w p2) -> b (t h w) (p1 p2 c)", p1=PATCH, p2=PATCH)


def unpatchify(tokens: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `patchify` for one frame of `height` x `width` latent cells: [B,N,4C] -> [B,C,1,h,w]."""
    return rearrange(
        tokens, "b (h w) (p1 p2 c) -> b c 1 (h p1) (w p2)", h=height // PATCH, w=width // PATCH, p1=PATCH, p2=PATCH
    )


def interpolated_positions(count: int, current: int) -> Tensor:
    """Place `count` cells on an axis of `current` cells with half-pixel centres; float64 [count].

    Linear interpolation of 0 ... current-1 (align_corners False), clamped at both ends.
    """
    centres = (torch.arange(count, dtype=torch.float64) + 0.5) * (current / count) - 0.5
    return centres.clamp(0, current - 1)


def position_ids(clip_shapes: Sequence[tuple[int, int, int]], text_length: int) -> Tensor:
    """Return (time, y, x) of every token, float64 [text_length + tokens, 3]; text is (0, 0, 0).

    clip_shapes: (frames, h, w) of each clip in latent cells, oldest first, the current frame last. Time counts frames
    over the whole list; y and x lie on the grid of the current clip.
    """
    grid_h, grid_w = (side // PATCH for side in clip_shapes[-1][1:])
    parts = [torch.zeros(text_length, 3, dtype=torch.float64)]
    time = 0
    for frames, height, width in clip_shapes:
        axes = (
            torch.arange(time, time + frames, dtype=torch.float64),
            interpolated_positions(height // PATCH, grid_h),
            interpolated_positions(width // PATCH, grid_w),
        )
        parts.append(torch.cartesian_prod(*axes))
        time += frames
    return torch.cat(parts)


@dataclass(frozen=True)
class PrefixLayout:
    """Block-causal attention as prefixes: the queries of segment i attend to the first `key_ends[i]` keys.

    The first segment is the text with frame 0 (they see each other), then one segment per later frame. The queries are
    the last `num_queries` tokens of the sequence; the keys are the whole sequence.
    """

    query_lengths: tuple[int, ...]
    key_ends: tuple[int, ...]

    @property
    def num_queries(self) -> int:
        """Number of tokens that ask, counted from the end of the sequence."""
        return sum(self.query_lengths)

    def current_only(self, num_tokens: int) -> "PrefixLayout":
        """Return the layout in which only the last `num_tokens` tokens ask; they see the whole sequence."""
        return PrefixLayout((num_tokens,), self.key_ends[-1:])


def prefix_layout(clip_shapes: Sequence[tuple[int, int, int]], text_length: int, num_cached: int = 0) -> PrefixLayout:
    """Return who attends to whom for text followed by the clips (shapes as in `position_ids`).

    num_cached: how many of the first clips do not ask, nor does the text if there are any.
    """
    cached = text_length + sum(frame_tokens(clip_shapes[:num_cached])) if num_cached else 0
    first, *later = frame_tokens(clip_shapes[num_cached:])
    lengths = (first if num_cached else text_length + first, *later)
    return PrefixLayout(lengths, tuple(cached + end for end in accumulate(lengths)))


def frame_tokens(clip_shapes: Sequence[tuple[int, int, int]]) -> list[int]:
    """Return the number of tokens of each frame of the clips."""
    return [(height // PATCH) * (width // PATCH) for frames, height, width in clip_shapes for _ in range(frames)]
