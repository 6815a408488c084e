"""The noise schedule of pyramid flow matching: per level its times, step sizes and renoise coefficients."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from pyramid_flow.errors import InvalidValueError

if TYPE_CHECKING:
    from torch import Tensor

MAX_STEPS = 200
FINAL_RATIO = 1 - 0.999  # the last evaluation of a level moves from here to 0; the rounding is the published one's


@dataclass(frozen=True)
class Level:
    """One resolution of the pyramid, 0 = lowest, and the span of the flow that is sampled at it.

    start, end: noise level at which the level begins (after renoising) and ends.
    original_start: noise level at which the level below ended.
    first_timestep, last_timestep: conditioning of the first and the last evaluation, on the 0...1000 scale;
    final_timestep: that of the level's end, which no evaluation reaches.
    upsample_scale, noise_scale: alpha and beta of the renoise step.
    """

    index: int
    start: float
    end: float
    original_start: float
    timestep_ratios: tuple[float, float]
    first_timestep: float
    last_timestep: float
    final_timestep: float
    upsample_scale: float
    noise_scale: float

    def steps(self, num_steps: int, *, skip_last: bool = False) -> list[tuple[float, float]]:
        """Return the `(timestep, delta)` pairs of an Euler solver: x <- x + delta * velocity(x, timestep).

        The ratios run from 1 to 0.001 and then to 0, so that one step covers the whole level and the last of several
        covers 0.1 % of it, as in the published schedule. skip_last: the step before covers that too.
        """
        if not 1 <= num_steps <= MAX_STEPS:
            raise InvalidValueError("num_inference_steps", num_steps, f"is not between 1 and {MAX_STEPS}")
        timesteps = np.linspace(self.first_timestep, self.last_timestep, num_steps)
        ratios = np.append(np.linspace(1.0, FINAL_RATIO, num_steps), 0.0)
        if skip_last and num_steps > 1:
            timesteps, ratios = timesteps[:-1], np.delete(ratios, -2)
        return list(zip(timesteps.tolist(), np.diff(ratios).tolist(), strict=True))

    def enter(self, latents: "Tensor", noise: "Tensor") -> "Tensor":
        """Bring the latents of the level below to this level and renoise them: alpha * up(x) + beta * noise.

        latents [B,C,T,h/2,w/2]; noise [B,C,T,h,w] with block covariance; returns [B,C,T,h,w].
        """
        from pyramid_flow.sampling.pyramid import upsample  # here, because it imports torch

        return self.upsample_scale * upsample(latents) + self.noise_scale * noise


@dataclass(frozen=True)
class PyramidSchedule:
    """Immutable schedule over the levels of the pyramid; the defaults are the published ones.

    shift: timestep shift of the global grid. stage_range: the share of the grid that each level covers.
    gamma: negative correlation of the renoise inside a 2x2 block, 0 < gamma <= 1/3.
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0
    stage_range: Sequence[float] = (0.0, 1 / 3, 2 / 3, 1.0)
    gamma: float = 1 / 3
    levels: tuple[Level, ...] = field(init=False)

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1 / 3:
            raise InvalidValueError("gamma", self.gamma, "is not in (0, 1/3]")
        rises = all(low < high for low, high in pairwise(self.stage_range))
        if not rises or [*self.stage_range[:1], *self.stage_range[-1:]] != [0, 1]:
            raise InvalidValueError("stage_range", self.stage_range, "does not rise from 0 to 1")
        object.__setattr__(self, "stage_range", tuple(self.stage_range))
        object.__setattr__(self, "levels", self._levels())

    def _levels(self) -> tuple[Level, ...]:
        count = self.num_train_timesteps
        # The published grid is built in float32 throughout; its roundings are part of the schedule.
        sigmas = np.arange(count, 0, -1, dtype=np.float32) / np.float32(count)
        sigmas = np.float32(self.shift) * sigmas / (1 + np.float32(self.shift - 1) * sigmas)
        timesteps = sigmas * np.float32(count)
        bounds = [int(count * share) for share in self.stage_range]
        original = [float(sigmas[i]) for i in bounds[:-1]]
        ends = [*original[1:], 0.0]
        starts = [self._corrected_start(e) if i else e for i, e in enumerate(original)]
        ratios = _cumulative_ratios([start - end for start, end in zip(starts, ends, strict=True)])

        levels = []
        for index, (low, high) in enumerate(pairwise(ratios)):
            grid = np.linspace(timesteps[int(count * low)], timesteps[min(int(count * high), count - 1)], count + 1)
            alpha, beta = self._renoise(original[index]) if index else (1.0, 0.0)
            levels.append(
                Level(
                    index=index,
                    start=starts[index],
                    end=ends[index],
                    original_start=original[index],
                    timestep_ratios=(low, high),
                    first_timestep=float(grid[0]),
                    last_timestep=float(grid[-2]),
                    final_timestep=float(grid[-1]),
                    upsample_scale=alpha,
                    noise_scale=beta,
                )
            )
        return tuple(levels)

    def _corrected_start(self, original: float) -> float:
        """Noise level after renoising: 1 - start = (1-e) / (sqrt(1+1/gamma) e + 1-e)."""
        return 1 - (1 - original) / (math.sqrt(1 + 1 / self.gamma) * original + (1 - original))

    def _renoise(self, original: float) -> tuple[float, float]:
        """alpha = 1 / (sqrt(1+1/gamma) e + 1-e), beta = alpha e / sqrt(gamma)."""
        alpha = 1 / (math.sqrt(1 + 1 / self.gamma) * original + (1 - original))
        return alpha, alpha * original / math.sqrt(self.gamma)


def _cumulative_ratios(lengths: Sequence[float]) -> list[float]:
    """Share of the whole path that lies before each level, ending with exactly 1."""
    total = sum(lengths)
    before = [sum(lengths[:i]) / total for i in range(len(lengths))]
    return [*before, 1.0]
