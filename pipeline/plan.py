"""How many workers of each stage, and what each takes of a machine: decided and checked before anything starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, floor, inf
from typing import Any, Literal

from pipeline.costs import Costs
from pipeline.stages import Decode, Encode, ModelConfig, Publish, Sample, Stage
from pyramid_flow.errors import PyramidFlowError
from pyramid_flow.fit import Memory, Tile

SAMPLER_SHARE, ENCODER_SHARE = 0.55, 0.2
"""What of a GPU a worker takes. Ray knows only fractions, and places whatever fits: two samplers never meet on a GPU,
and all encoders together leave room for one on any GPU, so that none that is free is closed to sampling."""

SMALLEST_SHARE = 1e-4  # that Ray tells from nothing

HEADROOM = 1.5
"""Other stages get this much more capacity than sampling needs from them, so that it alone decides the speed."""

CPUS_PER_WORKER = 4  # of one worker for all stages, without GPUs
MAX_ENCODER_THREADS = 4

Layout = Literal["auto", "staged", "fused"]


class PlanError(PyramidFlowError):
    """The plan cannot fit the target resources."""


@dataclass(frozen=True)
class Resources:
    """What a job may use: CPU cores and GPUs."""

    cpus: int
    gpus: int


@dataclass(frozen=True)
class StageSpec:
    """What a stage is: its class and the arguments of its constructor."""

    stage: type[Stage]
    arguments: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.stage.name


@dataclass(frozen=True)
class Pool:
    """Workers that run the same stages, and what each takes (logical CPUs and GPUs).

    overlap: whether a worker's stages run side by side, each on a batch of its own, instead of one after another.
    """

    stages: tuple[StageSpec, ...]
    workers: int
    cpus: float
    gpus: float
    overlap: bool = False

    @property
    def name(self) -> str:
        """The names of its stages."""
        return "+".join(spec.name for spec in self.stages)

    @property
    def batches_at_once(self) -> int:
        """How many batches a worker holds: with overlap one per stage, and one that is ready for the first to end."""
        return len(self.stages) + 1 if self.overlap else 1

    def seconds(self, costs: Costs) -> list[float]:
        """Return the seconds that a row takes in each of its stages."""
        return [costs.seconds.get(spec.name, 0.0) for spec in self.stages]

    def rate(self, costs: Costs) -> float:
        """Return the rows per second of its workers if nothing else held them up."""
        seconds = max(self.seconds(costs)) if self.overlap else sum(self.seconds(costs))
        return self.workers / seconds if seconds else inf


@dataclass(frozen=True)
class Job:
    """What a plan is made for.

    workers: pinned sizes of the pools that encode, sample and publish; gpu_shares: pinned shares of a GPU of the first
    two; encoder_threads: pinned threads of ffmpeg; tile: side of a VAE tile in pixels; memory: mode of the parts;
    cache_gib: of a sampler's history cache, None = half of the memory that is free; costs: None = unknown.
    """

    model_path: str
    variant: str | None
    device: str
    dtype: str
    output: str
    image_root: str
    decode_window: int
    tile: Tile
    batch_size: int
    lora: tuple[str, ...] = ()
    image_hosts: frozenset[str] = frozenset()
    workers: Mapping[str, int] = field(default_factory=dict)
    gpu_shares: Mapping[str, float] = field(default_factory=dict)
    encoder_threads: int | None = None
    layout: Layout = "auto"
    memory: Memory = "auto"
    cache_gib: float | None = None
    costs: Costs | None = None


@dataclass(frozen=True)
class Plan:
    """The pools in the order in which data flows, and the rows per sampling batch.

    devices: GPUs, or workers without one, of which each is busy with one row at a time; costs: None = unknown.
    """

    pools: tuple[Pool, ...]
    batch_size: int
    devices: int = 1
    costs: Costs | None = None

    def describe(self) -> str:
        """Return the plan as a small table."""
        width = max(len(pool.name) for pool in self.pools)
        lines = [f"{'stage':<{width}} {'workers':>7} {'CPUs each':>10} {'GPUs each':>10}"]
        lines += [f"{p.name:<{width}} {p.workers:>7} {p.cpus:>10.2f} {p.gpus:>10.2f}" for p in self.pools]
        return "\n".join(lines)

    @property
    def num_gpus(self) -> int:
        """Number of GPUs that the plan fills."""
        return self.devices if any(pool.gpus for pool in self.pools) else 0

    @property
    def rows_per_hour(self) -> float | None:
        """Expected rows per hour; None if no costs are known.

        Stages on one device exclude each other, so its rate is 1 / (the sum of their seconds); no pool is faster than
        its workers.
        """
        if self.costs is None or not (device_s := self.device_seconds(self.costs)):
            return None
        return 3600 * min(self.devices / device_s, *(pool.rate(self.costs) for pool in self.pools))

    def device_seconds(self, costs: Costs) -> float:
        """Return the seconds that a row takes of a device, all stages on it together."""
        return sum(sum(pool.seconds(costs)) for pool in self.pools if pool.gpus or not self.num_gpus)


def make_plan(job: Job, resources: Resources) -> Plan:
    """Plan the stages for the resources; raises PlanError if they cannot hold one worker of each stage.

    Staged: every GPU carries a worker that samples and, beside it, decodes what it sampled before; as many encoders
    and publishers are added as keep sampling the bottleneck. Any worker can run on any GPU, so a job that gets fewer
    GPUs than planned is slower. The only CPUs that are claimed are ffmpeg's: other time is the device's.

    Fused: one worker per device does everything, one batch after another. Where all stages share the same cores this
    is as fast, with fewer processes to start; so it is the choice without GPUs. On a GPU it would wait for ffmpeg and
    for storage, and every GPU would have to hold the text encoders.
    """
    if job.device != "cpu" and resources.gpus < 1:
        raise PlanError("the job wants GPUs and there are none: use --device cpu")
    fused = job.layout == "fused" or (job.layout == "auto" and job.device == "cpu" and not job.workers)
    plan = _fused(job, resources) if fused else _staged(job, resources)
    _check_fit(plan.pools, resources)
    return plan


def _fused(job: Job, resources: Resources) -> Plan:
    pinned = dict(job.workers)
    on_gpu = job.device != "cpu"
    workers = pinned.pop("sample", resources.gpus if on_gpu else max(1, resources.cpus // CPUS_PER_WORKER))
    if pinned or job.gpu_shares:
        raise PlanError("with one pool for all stages only --sample-workers can be pinned: use --layout staged")
    cpus, stages = _stages(job, resources, workers, together=True)
    pool = Pool(tuple(stages.values()), workers, cpus, 1.0 if on_gpu else 0.0)
    return Plan((pool,), job.batch_size, workers, job.costs)


def _staged(job: Job, resources: Resources) -> Plan:
    on_gpu = job.device != "cpu"
    devices = resources.gpus if on_gpu else job.workers.get("sample", 1)
    workers = _workers(job.costs, devices) | dict(job.workers)
    shares = _gpu_shares(job, workers["encode"]) if on_gpu else {}
    cpus, stages = _stages(job, resources, workers["sample"], together=False)
    pools = (
        Pool((stages["encode"],), workers["encode"], 0.0, shares.get("encode", 0.0)),
        Pool((stages["sample"], stages["decode"]), workers["sample"], cpus, shares.get("sample", 0.0), overlap=True),
        Pool((stages["publish"],), workers["publish"], 0.0, 0.0),
    )
    return Plan(pools, job.batch_size, devices, job.costs)


def _workers(costs: Costs | None, devices: int) -> dict[str, int]:
    """Return the pool sizes that make sampling the bottleneck, at most one worker of a pool per device."""
    sizes = {"encode": 1, "sample": devices, "publish": 1}
    if costs is None or not costs.seconds.get("sample"):
        return sizes
    needed = {name: HEADROOM * devices * costs.seconds.get(name, 0.0) / costs.seconds["sample"] for name in sizes}
    return {name: max(1, min(devices, ceil(needed[name]))) for name in sizes}


def _gpu_shares(job: Job, encoders: int) -> dict[str, float]:
    """Return what of a GPU a worker takes: all encoders together what a sampler leaves, in units that Ray knows."""
    sampler = job.gpu_shares.get("sample", SAMPLER_SHARE)
    left = floor((1 - sampler) / encoders / SMALLEST_SHARE) * SMALLEST_SHARE
    return {"encode": min(ENCODER_SHARE, left) or ENCODER_SHARE, "sample": sampler} | dict(job.gpu_shares)


def _stages(job: Job, resources: Resources, workers: int, *, together: bool) -> tuple[float, dict[str, StageSpec]]:
    """Return the logical CPUs of each of the workers that decode, which are their ffmpeg's, and the stages by name."""
    threads = max(1, resources.cpus // workers)
    cpus = job.encoder_threads or min(threads, MAX_ENCODER_THREADS, resources.cpus / (2 * workers))
    model = ModelConfig(
        job.model_path, job.variant, job.device, job.dtype, threads, job.lora, job.memory, together, job.cache_gib
    )
    decode = {"window": job.decode_window, "tile": job.tile, "encoder_threads": max(1, int(cpus))}
    stages = (
        StageSpec(Encode, {"model": model, "image_root": job.image_root, "image_hosts": job.image_hosts}),
        StageSpec(Sample, {"model": model}),
        StageSpec(Decode, {"model": model} | decode),
        StageSpec(Publish, {"output": job.output}),
    )
    return float(cpus), {spec.name: spec for spec in stages}


def _check_fit(pools: tuple[Pool, ...], resources: Resources) -> None:
    gpus = _gpus_for([pool.gpus for pool in pools for _ in range(pool.workers) if pool.gpus])
    if gpus > resources.gpus:
        wanted = ", ".join(f"{pool.workers} x {pool.gpus:g} for {pool.name}" for pool in pools if pool.gpus)
        raise PlanError(f"the plan needs {gpus} GPUs ({wanted}) and there are {resources.gpus}")
    cpus = sum(pool.workers * pool.cpus for pool in pools)
    if cpus > resources.cpus:
        wanted = ", ".join(f"{pool.workers} x {pool.cpus:g} for {pool.name}" for pool in pools if pool.cpus)
        raise PlanError(f"the plan needs {cpus:g} CPUs ({wanted}) and there are {resources.cpus}")


def _gpus_for(shares: Sequence[float]) -> int:
    """Return how many GPUs hold the shares, none of which can be split over two: the largest first, where it fits."""
    free: list[float] = []
    for share in sorted(shares, reverse=True):
        fitting = next((i for i, left in enumerate(free) if share <= left + 1e-6), None)
        if fitting is None:
            free.append(1.0 - share)
        else:
            free[fitting] -= share
    return len(free)
