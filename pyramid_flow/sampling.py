"""The sampler: guidance, the loop over levels and the loop over units; text- and image-to-video are one loop."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from pyramid_flow.errors import InvalidValueError, ShapeError
from pyramid_flow.history_cache import CacheShape, HistoryCache, fitting_levels
from pyramid_flow.noise import NoiseSource
from pyramid_flow.placement import free_bytes
from pyramid_flow.pyramid import keep_rows, latent_pyramid, noise_pyramid, stack_frames
from pyramid_flow.schedule import MAX_STEPS, Level, PyramidSchedule
from pyramid_flow.text import TextEmbedding
from pyramid_flow.tokens import PATCH
from pyramid_flow.transformer import PyramidTransformer
from pyramid_flow.velocity import VelocityField

SPATIAL_FACTOR = 8
TEMPORAL_FACTOR = 8
SIZE_MULTIPLE = 64  # VAE 8 x two halvings 4 x patch 2
MAX_GUIDANCE = 30.0
MIN_GUIDANCE_SCALE = 2.0
"""What a guidance that decays does not fall below, unless something else is asked for."""

CACHE_SHARE = 0.5
"""Of free memory: what the history cache may take where no budget is given; the rest is for activations."""

Steps = int | Sequence[int]
Share = float | Sequence[float]
Cache = bool | Literal["auto"] | Collection[int]
"""Which levels keep a history cache: all, none, those that fit into a budget, or the given ones."""

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
        num_guided = math.ceil(_of_level(self.guided_share, level.index) * len(pairs)) if self.guided else 0
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

    def scale(self, unit: int, batch: int) -> Tensor:
        """Guidance scale of each row, float32 [B,1,1,1,1]."""
        first, least = _per_row(self.guidance_scale, batch), _per_row(self.min_guidance_scale, batch)
        scales = [*(first if unit == 0 else _per_row(self.video_guidance_scale, batch))]
        for row, decay in enumerate(_per_row(self.guidance_decay, batch)):
            if decay is not None:
                scales[row] = max(first[row] - decay * unit, least[row])
        return torch.tensor(scales, dtype=torch.float32).view(-1, 1, 1, 1, 1)


@dataclass(frozen=True)
class StepInfo:
    """Where the sampler is: told to `on_step` after every evaluation.

    latents [B',C,1,h,w]: the current frame at its level, of the rows that are still running; rows: their indices in
    the batch as it was given; finished: the frames before, at full size, oldest first.
    """

    unit: int
    num_units: int
    level: int
    step: int
    num_steps: int
    latents: Tensor
    rows: tuple[int, ...]
    finished: tuple[Tensor, ...]


OnStep = Callable[[StepInfo], Tensor | None]


@torch.no_grad()
def generate_latents(
    transformer: PyramidTransformer,
    schedule: PyramidSchedule,
    text: TextEmbedding,
    negative: TextEmbedding | None,
    params: SamplingParams,
    noise: NoiseSource,
    *,
    image_latent: Tensor | None = None,
    cache: Cache = "auto",
    cache_bytes: float | None = None,
    cache_dtype: torch.dtype | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Generate a latent video frame by frame, and each frame level by level.

    text, negative: one row per video (`negative` may have one row for all); image_latent: normalised [B,C,1,h,w], the
    finished first frame of image-to-video. cache: levels with a history cache, which saves work and changes nothing
    beyond rounding; cache_bytes: budget of "auto", None = half of the free memory; cache_dtype: of what is stored, None
    = the transformer's, in which it is exact. on_step may return a bool mask [B] over the rows as given: rows that are
    False leave at once, for good, and when none is left the sampler stops. Returns normalised float32 latents
    [B',C,T,H/8,W/8] of the rows that stayed, in order, on the transformer's device. Raises InvalidValueError and
    ShapeError.
    """
    batch, device, num_levels = len(text), transformer.device, len(schedule.levels)
    params.check(batch, num_levels)
    shape = params.latent_shape(batch, transformer.latent_channels)
    negative = _negative(text, negative, params)
    finished = _first_frames(image_latent, shape, num_levels, device)
    start_unit = len(finished)
    start = noise_pyramid(noise.initial(shape), num_levels)[0].to(device)

    held = history_cache(transformer, schedule, params, text, negative, cache, cache_bytes, cache_dtype)
    field = VelocityField(transformer, text, negative, held)
    rows = torch.arange(batch)
    for unit in range(start_unit, params.num_units):
        scale = params.scale(unit, batch)[rows].to(device)
        frame = start[rows.to(device), :, unit - start_unit : unit - start_unit + 1]
        for level in schedule.levels:
            if level.index:
                fresh = noise.block((batch, *frame.shape[1:3], 2 * frame.shape[3], 2 * frame.shape[4]))
                frame = level.enter(frame, fresh[rows].to(device))
            velocity = field.at(unit, level.index, finished, frame.shape, scale)
            steps = params.steps(unit, level)
            for number, (timestep, delta, is_guided) in enumerate(steps):
                frame = frame + delta * velocity(frame, number, timestep, is_guided)
                if on_step is None:
                    continue
                done = tuple(pyramid[-1] for pyramid in finished)
                indices = tuple(rows.tolist())
                info = StepInfo(unit, params.num_units, level.index, number, len(steps), frame, indices, done)
                stay = _staying(on_step(info), batch)[rows]
                if not stay.any():
                    return frame.new_empty((0, *shape[1:]))
                if not stay.all():
                    kept = stay.to(device)
                    rows, frame, scale, finished = rows[stay], frame[kept], scale[kept], keep_rows(finished, kept)
                    field.keep(stay)
                    velocity = field.at(unit, level.index, finished, frame.shape, scale)
        finished.append(latent_pyramid(frame, num_levels))
    return stack_frames(finished)


def history_cache(
    transformer: PyramidTransformer,
    schedule: PyramidSchedule,
    params: SamplingParams,
    text: TextEmbedding,
    negative: TextEmbedding | None,
    cache: Cache = "auto",
    cache_bytes: float | None = None,
    dtype: torch.dtype | None = None,
) -> HistoryCache:
    """Return the empty history cache of a batch; see `generate_latents`."""
    num_levels, prompts = len(schedule.levels), [text] if negative is None else [text, negative]
    scale = 2 ** (num_levels - 1) * PATCH
    _, _, num_units, height, width = params.latent_shape(len(text), transformer.latent_channels)
    shape = CacheShape(
        num_blocks=len(transformer.blocks),
        num_heads=transformer.config["num_attention_heads"],
        head_dim=transformer.config["attention_head_dim"],
        text_tokens=max(int(prompt.mask.sum(dim=1).max()) for prompt in prompts),
        frame_tokens=(height // scale) * (width // scale),
        num_units=num_units,
    )
    dtype, device = dtype or transformer.dtype, transformer.device
    if cache == "auto":
        rows = [len(text) * sum(1 + step.guided for step in params.steps(1, level)) for level in schedule.levels]
        budget = CACHE_SHARE * free_bytes(device) if cache_bytes is None else cache_bytes
        levels: Collection[int] = fitting_levels(shape, rows, dtype, budget)
    else:
        levels = (range(num_levels) if cache else ()) if isinstance(cache, bool) else cache
    if not set(levels) <= set(range(num_levels)):
        raise InvalidValueError("cache", repr(cache), f"is not auto, True, False or some of the {num_levels} levels")
    return HistoryCache(shape, frozenset(levels), dtype, device)


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


def _negative(text: TextEmbedding, negative: TextEmbedding | None, params: SamplingParams) -> TextEmbedding | None:
    """Return the negative prompts, one row per video; None if there is no guidance."""
    if not params.guided:
        return None
    if negative is None:
        raise InvalidValueError("negative", None, "is needed while guidance_scale is above 0")
    if len(negative) == 1:
        negative = negative.select(torch.zeros(len(text), dtype=torch.long))
    if len(negative) != len(text):
        raise ShapeError("negative text", f"[1 or {len(text)},L,D]", tuple(negative.tokens.shape))
    for name in ("tokens", "pooled"):
        features, given = getattr(text, name).shape[-1], tuple(getattr(negative, name).shape)
        if given[-1] != features:
            raise ShapeError(f"negative text {name}", f"[...,{features}]", given)
    return negative


def _first_frames(
    image_latent: Tensor | None, shape: Sequence[int], num_levels: int, device: torch.device
) -> list[tuple[Tensor, ...]]:
    """Return the pyramids of the frames that are given: none, or the input image."""
    if image_latent is None:
        return []
    expected = (*shape[:2], 1, *shape[3:])
    if tuple(image_latent.shape) != expected:
        raise ShapeError("image_latent", str(list(expected)), tuple(image_latent.shape))
    return [latent_pyramid(image_latent.to(device, torch.float32), num_levels)]


def _staying(answer: Tensor | None, batch: int) -> Tensor:
    """Return which of the rows as given stay, bool [B] on the CPU."""
    if answer is None:
        return torch.ones(batch, dtype=torch.bool)
    if not isinstance(answer, Tensor):
        raise InvalidValueError("on_step's answer", repr(answer), "is neither None nor a mask of the rows to keep")
    if answer.shape != (batch,):
        raise ShapeError("on_step's mask", str([batch]), tuple(answer.shape))
    return answer.bool().cpu()
