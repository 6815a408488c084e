"""What is sampled: size, length, steps and guidance, and what they may be."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from pyramid_flow.errors import InvalidValueError
from pyramid_flow.sampling.schedule import MAX_STEPS, Level

if TYPE_CHECKING:
    from torch import Tensor

SPATIAL_FACTOR = 8
TEMPORAL_FACTOR = 8
SIZE_MULTIPLE = 64  # VAE 8 x two halvings 4 x patch 2
MAX_GUIDANCE = 30.0
MIN_GUIDANCE_SCALE = 2.0
"""What a guidance that decays does not fall below, unless something else is asked for."""

Steps = int | Sequence[int]
Share = float | Sequence[float]
Guidance = float | Sequence[float]
GuidanceDecay = float | None | Sequence[float | None]
T = TypeVar("T")

STEPS_FIELDS = ("num_inference_steps", "video_num_inference_steps")
GUIDANCE_FIELDS = ("guidance_scale", "video_guidance_scale", "min_guidance_scale")


class Step(NamedTuple):
    """One evaluation and what is made of it: x <- x + delta * velocity(x, timestep), with guidance or without."""

    timestep: float
    delta: float
    guided: bool


@dataclass(frozen=True)
class SamplingParams:
    """What is sampled: size in pixels, length in frames, steps and guidance; validated on construction.

    num_frames = 1 + 8k. Steps: one count for all levels or one per level. Guidance: one scale or one per row. The first
    unit of text-to-video uses `num_inference_steps` and `guidance_scale`, every other unit the `video_` ones. Guidance
    is on where `guidance_scale` > 0: on or off for the whole batch. guidance_decay: one for all rows or one per row;
    None = constant, else unit u uses max(guidance_scale - guidance_decay * u, min_guidance_scale) in place of both.

    Two choices save work at a price, and are off unless asked for. skip_last_step: leave out the last evaluation of a
    level with several, which covers 0.1 % of it. guided_share: the share of a level's steps, from its first one, that
    are guided, one for all levels or one per level; the others take the positive branch alone.
    """

    height: int
    width: int
    num_frames: int
    num_inference_steps: Steps = (20, 20, 20)
    video_num_inference_steps: Steps = (10, 10, 10)
    guidance_scale: Guidance = 7.0
    video_guidance_scale: Guidance = 5.0
    guidance_decay: GuidanceDecay = None
    min_guidance_scale: Guidance = MIN_GUIDANCE_SCALE
    skip_last_step: bool = False
    guided_share: Share = 1.0

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            check_size(name, getattr(self, name))
        check_num_frames(self.num_frames)
        for name in STEPS_FIELDS:
            check_steps(name, getattr(self, name))
        for name in GUIDANCE_FIELDS:
            check_guidance(name, getattr(self, name))
        for decay in _as_sequence(self.guidance_decay):
            if decay is not None:
                check_guidance("guidance_decay", decay)
        check_share("guided_share", self.guided_share)
        if not isinstance(self.skip_last_step, bool):
            raise InvalidValueError("skip_last_step", repr(self.skip_last_step), "is neither True nor False")
        for name in (*STEPS_FIELDS, *GUIDANCE_FIELDS, "guidance_decay", "guided_share"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, Sequence) else value)
        if len({scale > 0 for scale in _as_sequence(self.guidance_scale)}) > 1:
            raise InvalidValueError("guidance_scale", self.guidance_scale, "is on for some rows of the batch only")

    @property
    def num_units(self) -> int:
        """Number of latent frames."""
        return 1 + (self.num_frames - 1) // TEMPORAL_FACTOR

    @property
    def guided(self) -> bool:
        """Whether the negative branch is evaluated too."""
        return _as_sequence(self.guidance_scale)[0] > 0

    def latent_shape(self, batch: int, channels: int) -> tuple[int, int, int, int, int]:
        """Shape of the finished latents [B,C,T,H/8,W/8]."""
        return batch, channels, self.num_units, self.height // SPATIAL_FACTOR, self.width // SPATIAL_FACTOR

    def steps(self, unit: int, level: Level) -> list[Step]:
        """Return the evaluations of a unit at a level, in order."""
        counts = self.num_inference_steps if unit == 0 else self.video_num_inference_steps
        pairs = level.steps(_of_level(counts, level.index), skip_last=self.skip_last_step)
        share = _of_level(self.guided_share, level.index) if self.guided else 0.0
        num_guided = math.ceil(round(share * len(pairs), 9))  # 0.28 of 25 is 7
        return [Step(*pair, number < num_guided) for number, pair in enumerate(pairs)]

    def check(self, batch: int, num_levels: int) -> None:
        """Raise InvalidValueError unless there are as many steps as levels and as many scales as rows, or one."""
        for name in (*STEPS_FIELDS, "guided_share"):
            values = getattr(self, name)
            if isinstance(values, Sequence) and len(values) != num_levels:
                raise InvalidValueError(name, values, f"is neither one number nor one per {num_levels} levels")
        for name in (*GUIDANCE_FIELDS, "guidance_decay"):
            scales = getattr(self, name)
            if len(_as_sequence(scales)) not in (1, batch):
                raise InvalidValueError(name, scales, f"is neither one number nor one per {batch} rows")

    def scale(self, unit: int, batch: int) -> "Tensor":
        """Guidance scale of each row, float32 [B,1,1,1,1]."""
        import torch  # here, so that a request is validated without it

        first, least = _per_row(self.guidance_scale, batch), _per_row(self.min_guidance_scale, batch)
        scales = [*(first if unit == 0 else _per_row(self.video_guidance_scale, batch))]
        for row, decay in enumerate(_per_row(self.guidance_decay, batch)):
            if decay is not None:
                scales[row] = max(first[row] - decay * unit, least[row])
        return torch.tensor(scales, dtype=torch.float32).view(-1, 1, 1, 1, 1)


def check_size(name: str, value: int) -> None:
    """Raise InvalidValueError unless a height or width in pixels can be rendered."""
    _check_multiple(name, value, f"is not a multiple of {SIZE_MULTIPLE}", SIZE_MULTIPLE, SIZE_MULTIPLE)


def check_num_frames(value: int) -> None:
    """Raise InvalidValueError unless a length in frames is 1 + 8k."""
    _check_multiple("num_frames", value, f"is not 1 + {TEMPORAL_FACTOR}k", 1, TEMPORAL_FACTOR)


def check_steps(name: str, value: Steps) -> None:
    """Raise InvalidValueError unless every count of steps is sensible."""
    if not all(isinstance(count, Integral) for count in _as_sequence(value)):
        raise InvalidValueError(name, repr(value), "is not a whole number, or one per level")
    _check_range(name, value, 1, MAX_STEPS)


def check_share(name: str, value: Share) -> None:
    """Raise InvalidValueError unless every share is one."""
    _check_range(name, value, 0, 1)


def check_guidance(name: str, value: Guidance) -> None:
    """Raise InvalidValueError unless every guidance scale is sensible (NaN is not)."""
    _check_range(name, value, 0, MAX_GUIDANCE)


def _check_multiple(name: str, value: int, rule: str, least: int, step: int) -> None:
    """Raise InvalidValueError, which names the nearest good ones, unless a value is `least`, `least` + `step`, ..."""
    if not isinstance(value, Integral):
        raise InvalidValueError(name, repr(value), "is not a whole number")
    lower = value - (value - least) % step
    if value == lower >= least:
        return
    nearest = f"the nearest are {lower} and {lower + step}" if lower >= least else f"the least is {least}"
    raise InvalidValueError(name, value, f"{rule}: {nearest}")


def _check_range(name: str, value: Guidance, low: float, high: float) -> None:
    numbers = _as_sequence(value)
    if not numbers:
        raise InvalidValueError(name, value, "is empty")
    if not all(isinstance(number, Real) for number in numbers):
        raise InvalidValueError(name, repr(value), "is not a number")
    if not all(low <= number <= high for number in numbers):
        raise InvalidValueError(name, value, f"is not between {low:g} and {high:g}")


def _as_sequence(value: T | Sequence[T]) -> Sequence[T]:
    return value if isinstance(value, Sequence) else (value,)


def _of_level(value: T | Sequence[T], level: int) -> T:
    return value[level] if isinstance(value, Sequence) else value


def _per_row(value: T | Sequence[T], batch: int) -> Sequence[T]:
    values = _as_sequence(value)
    return values if len(values) == batch else [*values] * batch
