"""The spatial and the temporal pyramid: down, up, block noise, and which past frame is held at which level."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def downsample(latents: Tensor) -> Tensor:
    """Halve height and width by the mean of each 2x2 block: [B,C,T,h,w] -> [B,C,T,h/2,w/2]."""
    return F.avg_pool3d(latents, (1, 2, 2))


def upsample(latents: Tensor) -> Tensor:
    """Double height and width by repetition: [B,C,T,h,w] -> [B,C,T,2h,2w]."""
    return latents.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)


def latent_pyramid(latents: Tensor, num_levels: int) -> tuple[Tensor, ...]:
    """Return clean latents at every level, lowest first; the last entry is `latents` itself."""
    levels = [latents]
    for _ in range(num_levels - 1):
        levels.append(downsample(levels[-1]))
    return tuple(reversed(levels))


def noise_pyramid(noise: Tensor, num_levels: int) -> tuple[Tensor, ...]:
    """Return white noise at every level, lowest first; 2 * mean of 4 keeps unit variance."""
    levels = [noise]
    for _ in range(num_levels - 1):
        levels.append(2 * downsample(levels[-1]))
    return tuple(reversed(levels))


def block_noise(white: Tensor, gamma: float) -> Tensor:
    """Colour white noise so that each 2x2 block has unit variances and covariances -gamma.

    white [...,h,w] with even h and w. With block mean m: sqrt(1+gamma) (z - m) + sqrt(1-3 gamma) m, for
    0 < gamma <= 1/3 (at 1/3 every block sums to zero).
    """
    blocks = rearrange(white, "... (h p1) (w p2) -> ... h w p1 p2", p1=2, p2=2)
    mean = blocks.mean(dim=(-2, -1), keepdim=True)
    coloured = math.sqrt(1 + gamma) * (blocks - mean) + math.sqrt(max(0.0, 1 - 3 * gamma)) * mean
    return rearrange(coloured, "... h w p1 p2 -> ... (h p1) (w p2)")


def history_level(age: int, level: int) -> int:
    """Return the level at which a frame `age` units old is held while `level` is sampled: max(level - age + 1, 0)."""
    return max(level - age + 1, 0)


def history_clips(frames: Sequence[tuple[Tensor, ...]], level: int) -> list[Tensor]:
    """Return the conditioning frames for the next unit at `level`, oldest first, each [B,C,1,h,w] at its level.

    frames: the `latent_pyramid` of every finished latent frame, oldest first.
    """
    unit = len(frames)
    return [pyramid[history_level(unit - j, level)] for j, pyramid in enumerate(frames)]


def keep_rows(pyramids: Sequence[tuple[Tensor, ...]], rows: Tensor) -> list[tuple[Tensor, ...]]:
    """Return the same pyramids with only the given batch rows."""
    return [tuple(level[rows] for level in pyramid) for pyramid in pyramids]


def stack_frames(pyramids: Sequence[tuple[Tensor, ...]]) -> Tensor:
    """Return the full-resolution frames of the pyramids as one latent video [B,C,T,h,w]."""
    return torch.cat([pyramid[-1] for pyramid in pyramids], dim=2)
