"""What can be told of a video without a model: figures gathered while its frames stream by, and flags by thresholds."""

from dataclasses import dataclass
from functools import reduce
from math import atan2, degrees
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.media.video import Frames

Plane = npt.NDArray[np.floating[Any]]
"""Luma of a downscaled frame [h, w], 0 to 1."""

SMALLEST_SIDE = 64
"""Frames are halved while their shorter side stays at least so long: 384x640 and 768x1280 become 96x160."""

BLOCK, STILL = 8, 0.01
"""Squares of a downscaled frame of this side count for the direction if they change; by so much counts half."""

MIN_EXPLAINED = 0.02
"""A movement that explains a smaller share of what changes is none."""

LUMA = (54, 183, 19)
"""Rec. 709 weights of red, green and blue, of 256."""

FULL = 255 * sum(LUMA)


@dataclass(frozen=True)
class Figures:
    """What a video or a still looks like, by the luma of its frames, 0 to 1; all but `sharpness` of downscaled ones.

    brightness, contrast: mean and standard deviation over a frame, averaged over the frames; sharpness: variance of the
    Laplacian (4 neighbours) in the frames' own size, in levels of 0 to 255 squared, averaged likewise; motion,
    max_motion: mean absolute difference of consecutive frames, averaged over the pairs, and the greatest;
    motion_direction: where what is seen moves to, in degrees, 0 = to the right, 90 = up, None if nothing moves or
    movements cancel out; drift: mean absolute difference of the first and the last frame. These four are None for a
    still. text_similarity, aesthetics: see `ImageTextModel.scores`, None without such a model.
    """

    brightness: float
    contrast: float
    sharpness: float
    motion: float | None = None
    max_motion: float | None = None
    motion_direction: float | None = None
    drift: float | None = None
    text_similarity: float | None = None
    aesthetics: float | None = None


@dataclass(frozen=True)
class Thresholds:
    """When a figure raises a flag; the fields are named for flags, and a limit of 0 below or 1 above raises none."""

    black_below: float = 0.02
    white_above: float = 0.97
    flat_below: float = 0.01
    frozen_below: float = 0.0002
    jump_above: float = 0.15

    def flags(self, figures: Figures) -> list[str]:
        """Return the flags: black and white by brightness, flat by contrast, frozen by motion, jump by max_motion."""
        raised = {
            "black": figures.brightness < self.black_below,
            "white": figures.brightness > self.white_above,
            "flat": figures.contrast < self.flat_below,
            "frozen": figures.motion is not None and figures.motion < self.frozen_below,
            "jump": figures.max_motion is not None and figures.max_motion > self.jump_above,
        }
        return [name for name, is_raised in raised.items() if is_raised]


STANDARD = Thresholds()


class QualityMeter:
    """Gathers the figures of a video while chunks stream by; keeps two downscaled frames of it."""

    def __init__(self) -> None:
        self.num_seen = 0
        self._brightness = self._contrast = self._sharpness = self._motion = self._max_motion = 0.0
        self._normal = np.zeros((3, 3))
        self._first: Plane | None = None
        self._last: Plane | None = None

    def add(self, frames: Frames) -> None:
        """Take the next chunk: uint8 RGB, [n, height, width, 3], of one size for the whole video."""
        for frame in frames:
            luma = _luma(frame)
            small = _downscaled(luma)
            self._brightness += float(small.mean())
            self._contrast += float(small.std())
            self._sharpness += _sharpness(luma)
            if self._last is None:
                self._first = small
            else:
                self._compare(self._last, small)
            self._last = small
        self.num_seen += len(frames)

    def figures(self) -> Figures:
        """Return the figures of the frames so far, of which there must be one."""
        assert self._first is not None
        assert self._last is not None
        num = self.num_seen
        means = Figures(self._brightness / num, self._contrast / num, self._sharpness / num)
        if num == 1:
            return means
        return Figures(
            means.brightness,
            means.contrast,
            means.sharpness,
            motion=self._motion / (num - 1),
            max_motion=self._max_motion,
            motion_direction=self._direction(),
            drift=_difference(self._first, self._last),
        )

    def _compare(self, before: Plane, after: Plane) -> None:
        difference = _difference(before, after)
        self._motion += difference
        self._max_motion = max(self._max_motion, difference)
        self._normal += _normal_equations(before, after)

    def _direction(self) -> float | None:
        """Return the direction of the one movement that explains best how all frames change."""
        gradients, towards, changes = self._normal[:2, :2], self._normal[:2, 2], self._normal[2, 2]
        x, y = -np.linalg.pinv(gradients, rcond=1e-3, hermitian=True) @ towards
        explained = -(towards @ (x, y))
        if explained <= MIN_EXPLAINED * changes:
            return None
        return round(degrees(atan2(-y, x)), 1) % 360


def _luma(frame: Frames) -> npt.NDArray[np.uint16]:
    """Return the luma [H, W] of a frame, 0 to `FULL`."""
    red, green, blue = (np.multiply(frame[..., i], weight, dtype=np.uint16) for i, weight in enumerate(LUMA))
    return red + green + blue


def _downscaled(luma: npt.NDArray[np.uint16]) -> Plane:
    """Return the means over squares."""
    height, width = luma.shape
    side = 1 << max(0, (min(height, width) // SMALLEST_SIDE).bit_length() - 1)
    return _sums(luma.astype(np.float32), side) / np.float32(FULL * side**2)


def _sums(plane: Plane, side: int) -> Plane:
    """Return the sums over squares; what does not fill one at the right or the bottom is left out."""
    height, width = (length // side * side for length in plane.shape)
    rows: Plane = reduce(np.add, (plane[i:height:side, :width] for i in range(side)))  # faster than axes this short
    sums: Plane = reduce(np.add, (rows[:, i::side] for i in range(side)))
    return sums


def _sharpness(luma: npt.NDArray[np.uint16]) -> float:
    """Return the variance of the Laplacian."""
    fine = (luma >> 4).astype(np.int16)  # 16 steps per level, and sums still fit
    laplacian = fine[:-2, 1:-1] + fine[2:, 1:-1]
    laplacian += fine[1:-1, :-2]
    laplacian += fine[1:-1, 2:]
    laplacian -= fine[1:-1, 1:-1] * np.int16(4)
    return float(laplacian.astype(np.float32).var()) / 16**2


def _difference(one: Plane, other: Plane) -> float:
    return float(np.abs(one - other).mean())


def _normal_equations(before: Plane, after: Plane) -> Plane:
    """Return the sums of the products of gradient x, gradient y and change with each other, [3, 3].

    After Lucas and Kanade: where a movement is small, gradient . movement = -change. Squares that stay as they are
    would draw the movement to zero, and count little.
    """
    change = after - before
    changes = _sums(change**2, BLOCK)
    weights = (changes / (changes + (BLOCK * STILL) ** 2)).repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)
    height, width = weights.shape
    y, x = np.gradient((before + after) / 2)
    slopes = np.stack([x, y, change])[:, :height, :width].reshape(3, -1)
    products: Plane = (slopes * weights.ravel()) @ slopes.T
    return products
