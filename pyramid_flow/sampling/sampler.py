"""The sampler: the loop over units and the loop over levels; text- and image-to-video are one loop."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyramid_flow.errors import InvalidValueError, ShapeError
from pyramid_flow.memory.placement import free_bytes, to_device_async
from pyramid_flow.parallel.sampler import SINGLE_PROCESS, Parallel
from pyramid_flow.sampling.noise import NoiseSource
from pyramid_flow.sampling.params import SamplingParams, Step
from pyramid_flow.sampling.pyramid import keep_rows, latent_pyramid, noise_pyramid, stack_frames
from pyramid_flow.sampling.schedule import Level, PyramidSchedule
from pyramid_flow.sampling.velocity import Velocity, VelocityField
from pyramid_flow.text.embedding import TextEmbedding
from pyramid_flow.transformer.history_cache import CacheShape, HistoryCache, fitting_levels
from pyramid_flow.transformer.model import PyramidTransformer
from pyramid_flow.transformer.tokens import PATCH

CACHE_SHARE, CPU_CACHE_SHARE = 0.5, 0.1
"""Of free memory: what the history cache may take where no budget is given.

The rest is for activations and for what decodes beside it; a host's memory is for other processes too.
"""

Cache = bool | Literal["auto"] | Collection[int]
"""Which levels keep a history cache: all, none, those that fit into a budget, or the given ones."""


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


class _Videos:
    """The videos that still run, in lockstep, and what has been made of them.

    rows: their indices in the batch as it was given; frame: the current one, at its level; finished: the
    `latent_pyramid` of each frame before it.
    """

    def __init__(self, field: VelocityField, start: Tensor, finished: list[tuple[Tensor, ...]]) -> None:
        """start: of each frame that is to be made, at the lowest level, [B,C,T,h,w]; finished: the frames given."""
        self.rows, self.finished = torch.arange(len(start)), finished
        self._field, self._batch = field, len(start)
        self._starts: list[Tensor] = list(start.split(1, dim=2))
        self._velocity: tuple[tuple[int, int], Velocity] | None = None

    @property
    def seen(self) -> tuple[Tensor, tuple[int, ...], tuple[Tensor, ...]]:
        """What `on_step` is told of them: latents, rows and finished frames."""
        return self.frame, tuple(self.rows.tolist()), tuple(pyramid[-1] for pyramid in self.finished)

    def begin(self, scale: Tensor) -> None:
        """Begin the next frame; scale: its guidance [B',1,1,1,1]."""
        self.frame, self._scale = self._starts.pop(0), scale

    def enter(self, level: Level, noise: NoiseSource) -> None:
        """Bring the current frame to the next level; noise is drawn for all rows, those that have left, too."""
        _, channels, frames, height, width = self.frame.shape
        fresh = noise.block((self._batch, channels, frames, 2 * height, 2 * width))
        self.frame = level.enter(self.frame, to_device_async(fresh[self.rows], self.frame.device))

    def advance(self, unit: int, level: int, number: int, step: Step) -> None:
        """Take a step of a unit at a level."""
        if self._velocity is None or self._velocity[0] != (unit, level):
            self._velocity = (unit, level), self._field.at(unit, level, self.finished, self.frame.shape, self._scale)
        self.frame = self.frame + step.delta * self._velocity[1](self.frame, number, step.timestep, step.guided)

    def keep(self, stay: Tensor) -> None:
        """Keep only the rows for which a bool mask [B'] on the CPU is true."""
        if stay.all():
            return
        kept = stay.to(self.frame.device)
        self.rows, self.frame, self._scale = self.rows[stay], self.frame[kept], self._scale[kept]
        self._starts = [start[kept] for start in self._starts]
        self.finished = keep_rows(self.finished, kept)
        self._field.keep(stay)
        self._velocity = None


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
    parallel: Parallel = SINGLE_PROCESS,
) -> Tensor:
    """Generate a latent video frame by frame, and each frame level by level.

    text, negative: one row per video (`negative` may have one row for all); image_latent: normalised [B,C,1,h,w], the
    finished first frame of image-to-video. cache, cache_bytes, cache_dtype: see `plan_cache`. on_step may return a bool
    mask [B] over the rows as given: rows that are False leave at once, for good, and when none is left the sampler
    stops. parallel: this process' place among those that are called alike and share the work, see `ParallelSampler`.
    Returns normalised float32 latents [B',C,T,H/8,W/8] of the rows that stayed, in order, on the transformer's device.
    Raises InvalidValueError and ShapeError.
    """
    batch, device, num_levels = len(text), transformer.device, len(schedule.levels)
    params.check(batch, num_levels)
    shape = params.latent_shape(batch, transformer.latent_channels)
    negative = _negative(text, negative, params)
    finished = _first_frames(image_latent, shape, num_levels, device)
    planned = plan_cache(transformer, schedule, params, text, negative, cache, cache_bytes, cache_dtype, parallel)
    start = to_device_async(noise_pyramid(noise.initial(shape), num_levels)[0], device)
    videos = _Videos(VelocityField(transformer, text, negative, planned, parallel), start, finished)
    for unit in range(len(finished), params.num_units):
        videos.begin(to_device_async(params.scale(unit, batch)[videos.rows], device))
        for level in schedule.levels:
            if level.index:
                videos.enter(level, noise)
            steps = params.steps(unit, level)
            for number, step in enumerate(steps):
                videos.advance(unit, level.index, number, step)
                if on_step is None:
                    continue
                info = StepInfo(unit, params.num_units, level.index, number, len(steps), *videos.seen)
                stay = _staying(on_step(info), batch)[videos.rows]
                if not stay.any():
                    return videos.frame.new_empty((0, *shape[1:]))
                videos.keep(stay)
        videos.finished.append(latent_pyramid(videos.frame, num_levels))
    return stack_frames(videos.finished)


def plan_cache(
    transformer: PyramidTransformer,
    schedule: PyramidSchedule,
    params: SamplingParams,
    text: TextEmbedding,
    negative: TextEmbedding | None,
    cache: Cache = "auto",
    cache_bytes: float | None = None,
    dtype: torch.dtype | None = None,
    parallel: Parallel = SINGLE_PROCESS,
) -> HistoryCache:
    """Return the empty history cache of a batch, of this process' share; see `generate_latents`.

    cache: levels that have one, which saves work and changes nothing beyond rounding; cache_bytes: budget of "auto",
    None = half of the device's free memory (a tenth on a CPU); dtype: of what is stored, None = the transformer's, in
    which it is exact. Raises InvalidValueError.
    """
    num_levels, prompts = len(schedule.levels), [text] if negative is None else [text, negative]
    scale = 2 ** (num_levels - 1) * PATCH
    _, _, num_units, height, width = params.latent_shape(len(text), transformer.latent_channels)
    shape = CacheShape(
        num_blocks=len(transformer.blocks),
        num_heads=transformer.num_attention_heads // parallel.config.ulysses_degree,
        head_dim=transformer.attention_head_dim,
        text_tokens=max(int(prompt.mask.sum(dim=1).max()) for prompt in prompts),
        frame_tokens=(height // scale) * (width // scale),
        num_units=num_units,
    )
    dtype, device = dtype or transformer.dtype, transformer.device
    if cache == "auto":
        branches = 2 // parallel.config.cfg_degree  # of a guided step
        rows = [
            len(text) * sum(branches if step.guided else 1 for step in params.steps(1, level))
            for level in schedule.levels
        ]
        share = CPU_CACHE_SHARE if device.type == "cpu" else CACHE_SHARE
        budget = share * free_bytes(device) if cache_bytes is None else cache_bytes
        levels: Collection[int] = fitting_levels(shape, rows, dtype, budget)
    elif isinstance(cache, bool):
        levels = range(num_levels) if cache else ()
    elif isinstance(cache, Collection) and set(cache) <= set(range(num_levels)):
        levels = cache
    else:
        raise InvalidValueError("cache", repr(cache), f"is not auto, True, False or some of the {num_levels} levels")
    return HistoryCache(shape, frozenset(levels), dtype, device)


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
