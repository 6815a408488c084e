"""How many workers of each stage, and what each takes of a machine: decided and checked before anything starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Literal

from pipeline.costs import Costs
from pipeline.stages import Decode, Encode, ModelConfig, Publish, Sample, Stage
from pyramid_flow.errors import PyramidFlowError

GPU_SHARES = {"encode": 0.1, "sample": 0.55, "decode": 0.25}
"""Ray packs fractions onto one GPU in the order of the stages: so two samplers never share one, and beside a sampler
there is room for a decoder and two encoders."""

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
    """Workers that run the same stages one after another, and what each takes (logical CPUs and GPUs)."""

    stages: tuple[StageSpec, ...]
    workers: int
    cpus: float
    gpus: float

    @property
    def name(self) -> str:
        """The names of its stages."""
        return "+".join(spec.name for spec in self.stages)

    def seconds(self, costs: Costs) -> float:
        """Return the seconds that a row takes in this pool."""
        return sum(costs.seconds.get(spec.name, 0.0) for spec in self.stages)


@dataclass(frozen=True)
class Job:
    """What a plan is made for.

    workers: pinned pool sizes by stage; gpu_shares: pinned shares of a GPU by stage; encoder_threads: pinned threads of
    ffmpeg; tile: side of a VAE tile in pixels; layout: one pool per stage, or one for all; costs: None = unknown.
    """

    model_path: str
    variant: str | None
    device: str
    dtype: str
    output: str
    image_root: str
    decode_window: int
    tile: int | None
    batch_size: int
    image_hosts: frozenset[str] = frozenset()
    workers: Mapping[str, int] = field(default_factory=dict)
    gpu_shares: Mapping[str, float] = field(default_factory=dict)
    encoder_threads: int | None = None
    layout: Layout = "auto"
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
        workers / seconds.
        """
        if self.costs is None:
            return None
        on_device = [pool for pool in self.pools if pool.gpus or not self.num_gpus]
        device_s = sum(pool.seconds(self.costs) for pool in on_device)
        rates = [pool.workers / s for pool in self.pools if (s := pool.seconds(self.costs))]
        return 3600 * min([self.devices / device_s, *rates]) if device_s else None


def make_plan(job: Job, resources: Resources) -> Plan:
    """Plan the stages for the resources; raises PlanError if they cannot hold one worker of each stage.

    Staged: every GPU carries a sampler, and as many decoders and encoders are placed beside the samplers as keep
    sampling the bottleneck. Any of them can run on any GPU, so a job that gets fewer GPUs than planned is slower.
    Encode and sample take no CPUs: their time is the device's.

    Fused: one worker per device does everything. Where all stages share the same cores this is as fast, with fewer
    processes to start; so it is the choice without GPUs. On a GPU it would wait for ffmpeg and for storage, and every
    GPU would have to hold the text encoders.
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
    threads = max(1, resources.cpus // workers)
    cpus, encoder_threads = _decode_cpus(job, resources, workers)
    stages = _stages(job, threads, encoder_threads)
    pool = Pool(tuple(stages.values()), workers, cpus, 1.0 if on_gpu else 0.0)
    return Plan((pool,), job.batch_size, workers, job.costs)


def _staged(job: Job, resources: Resources) -> Plan:
    on_gpu = job.device != "cpu"
    pinned = dict(job.workers)
    devices = resources.gpus if on_gpu else pinned.get("sample", 1)
    workers = _workers(job.costs, devices) | pinned
    shares = GPU_SHARES | dict(job.gpu_shares) if on_gpu else {}
    threads = max(1, resources.cpus // max(workers["sample"], workers["decode"]))
    decode_cpus, encoder_threads = _decode_cpus(job, resources, workers["decode"])
    cpus = {"decode": decode_cpus}
    pools = tuple(
        Pool((spec,), workers[name], cpus.get(name, 0.0), shares.get(name, 0.0))
        for name, spec in _stages(job, threads, encoder_threads).items()
    )
    return Plan(pools, job.batch_size, devices, job.costs)


def _workers(costs: Costs | None, devices: int) -> dict[str, int]:
    """Return the pool sizes that make sampling the bottleneck, at most one worker of a stage per device."""
    if costs is None or not costs.seconds.get("sample"):
        return {"encode": 1, "sample": devices, "decode": devices, "publish": 1}
    needed = {name: HEADROOM * devices * s / costs.seconds["sample"] for name, s in costs.seconds.items()}
    sizes = {name: max(1, min(devices, ceil(needed.get(name, 0)))) for name in ("encode", "decode", "publish")}
    return sizes | {"sample": devices}


def _decode_cpus(job: Job, resources: Resources, workers: int) -> tuple[float, int]:
    """Return the logical CPUs of a worker that decodes, and the threads of its ffmpeg."""
    if job.encoder_threads is not None:
        return float(job.encoder_threads), job.encoder_threads
    cpus = min(max(1, resources.cpus // workers), MAX_ENCODER_THREADS, resources.cpus / (2 * workers))
    return cpus, max(1, int(cpus))


def _stages(job: Job, threads: int, encoder_threads: int) -> dict[str, StageSpec]:
    model = ModelConfig(job.model_path, job.variant, job.device, job.dtype, threads)
    stages = (
        StageSpec(Encode, {"model": model, "image_root": job.image_root, "image_hosts": job.image_hosts}),
        StageSpec(Sample, {"model": model}),
        StageSpec(
            Decode,
            {"model": model, "window": job.decode_window, "tile": job.tile, "encoder_threads": encoder_threads},
        ),
        StageSpec(Publish, {"output": job.output}),
    )
    return {spec.name: spec for spec in stages}


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
