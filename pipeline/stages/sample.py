"""Sample: text embeddings (and image posteriors) of one shape to latents, as one batch."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pipeline.request import sampling_params
from pipeline.rows import Item
from pipeline.stages import SAMPLE
from pipeline.stages.model import ModelConfig
from pipeline.stages.stage import Stage
from pyramid_flow import (
    Checkpoint,
    NonFiniteError,
    PyramidSchedule,
    SeededNoise,
    StepInfo,
    TextEmbedding,
    generate_latents,
)
from pyramid_flow.memory.placement import release_memory
from pyramid_flow.memory.usage import TRANSFORMER
from pyramid_flow.parallel.processes import ParallelSampler
from pyramid_flow.parallel.sampler import SINGLE_PROCESS
from pyramid_flow.pixels import image_latent
from pyramid_flow.sampling.sampler import plan_cache
from pyramid_flow.text.embedding import concatenate
from pyramid_flow.vae.model import LatentDistribution

logger = logging.getLogger(__name__)


class Watch(Protocol):
    """Follows a batch through the sampler; wanted: which of its rows shall be finished."""

    wanted: list[bool]

    def __call__(self, info: StepInfo) -> Tensor | None:
        """See `generate_latents`."""
        ...


class Sample(Stage):
    """Replaces a row's tensors by `latents`: normalised, float32 [1,16,T,h,w].

    watch: makes the sampler's `on_step` for the rows of a batch; rows that are not `wanted` at the end are skipped.
    """

    name = SAMPLE

    def __init__(self, model: ModelConfig, watch: Callable[[Sequence[Item]], Watch] | None = None) -> None:
        checkpoint = model.open()
        self.model, self.watch = model, watch
        self.statistics = checkpoint.preset.statistics
        self.placement = model.placement(checkpoint, (TRANSFORMER,))
        self.transformer = self.placement.place(checkpoint.load_transformer(model.torch_dtype, "cpu"))
        self.schedule = PyramidSchedule()
        self.team = _team(model, checkpoint) if model.gpus_per_clip > 1 else None

    def process(self, items: Sequence[Item]) -> list[Item]:
        """Sample the rows together; each has its own noise and guidance.

        In halves, if so more levels have a history cache: that saves more work than a larger batch. A row that is too
        large is sampled without one.
        """
        with self.placement.working(self.transformer):  # memory is counted where it computes
            return self._fitting(items)

    def _fitting(self, items: Sequence[Item]) -> list[Item]:
        budget, half = self.model.cache_bytes, len(items) // 2
        if half and len(self._cached_levels(items, budget)) < len(self._cached_levels(items[:1], budget)):
            return [*self._fitting(items[:half]), *self._fitting(items[half:])]
        try:
            return self._sampled_together(items, budget)
        except torch.OutOfMemoryError:
            if len(items) > 1 or budget == 0:
                raise  # its rows are tried alone
        logger.warning("sample: row %s does not fit into memory, trying without a history cache", items[0].row.id)
        release_memory()
        return self._sampled_together(items, 0)

    def _sampled_together(self, items: Sequence[Item], cache_bytes: float | None) -> list[Item]:
        params = sampling_params([item.request for item in items])
        noise = SeededNoise([item.request.seed for item in items], self.schedule.gamma)
        first = None
        if items[0].request.has_image:
            posterior = LatentDistribution(_stacked(items, "posterior.mean"), _stacked(items, "posterior.logvar"))
            first = image_latent(posterior, noise.posterior(posterior.mean.shape), self.statistics)
        watch = self.watch(items) if self.watch else None
        generate = self.team.generate if self.team else generate_latents
        cached = self._cached_levels(items, cache_bytes)
        latents = generate(
            self.transformer,
            self.schedule,
            *_embeddings(items),
            params,
            noise,
            image_latent=first,
            cache=cached,
            on_step=watch,
        ).cpu()
        release_memory()  # which the cache took; others may share the device
        how = {"batch_size": len(items), "cached_levels": sorted(cached)}
        made = iter(latents.split(1))
        wanted = watch.wanted if watch else [True] * len(items)
        return [
            self._sampled(item, next(made), how) if is_wanted else item.with_tensors({}, skipped=True)
            for item, is_wanted in zip(items, wanted, strict=True)
        ]

    def _cached_levels(self, items: Sequence[Item], cache_bytes: float | None) -> frozenset[int]:
        """Return the levels that have a history cache if some rows are sampled together."""
        params = sampling_params([item.request for item in items])
        text, negative = _embeddings(items)
        parallel = self.team.parallel if self.team else SINGLE_PROCESS
        planned = plan_cache(
            self.transformer, self.schedule, params, text, negative, cache_bytes=cache_bytes, parallel=parallel
        )
        return frozenset(planned.levels)

    def _sampled(self, item: Item, latents: Tensor, how: Mapping[str, object]) -> Item:
        if not latents.isfinite().all():
            return item.failed(self.name, NonFiniteError("the latents are not finite"))
        return item.with_tensors(
            {"latents": latents},
            latents_sha256=hashlib.sha256(latents.contiguous().numpy().data).hexdigest(),
            **how,
            dtype=self.model.dtype,
            device=_device_name(self.placement.device),
        )


def _team(model: ModelConfig, checkpoint: Checkpoint) -> ParallelSampler:
    threads = max(1, model.threads // model.gpus_per_clip)
    torch.set_num_threads(threads)
    return ParallelSampler(checkpoint, model.torch_dtype, torch.device(model.device).type, model.gpus_per_clip, threads)


def _stacked(items: Sequence[Item], name: str) -> Tensor:
    return torch.cat([item.tensors[name] for item in items])


def _embeddings(items: Sequence[Item]) -> tuple[TextEmbedding, TextEmbedding | None]:
    """Return the rows' prompts, and the negative ones if they are guided."""
    return _embedding(items, "text"), _embedding(items, "negative") if items[0].request.guidance_scale > 0 else None


def _embedding(items: Sequence[Item], prefix: str) -> TextEmbedding:
    fields = ("tokens", "mask", "pooled")
    return concatenate([TextEmbedding(*(item.tensors[f"{prefix}.{name}"] for name in fields)) for item in items])


def _device_name(device: torch.device) -> str:
    return device.type if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
