"""How many workers of each stage, and what each takes of a machine: decided and checked before anything starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, floor, inf
from typing import TYPE_CHECKING, Any

from pipeline.batch.costs import Costs
from pipeline.media.provenance import Signing
from pipeline.media.quality import STANDARD, Thresholds
from pipeline.stages import Layout
from pyramid_flow.errors import PyramidFlowError
from pyramid_flow.memory.modes import Memory
from pyramid_flow.vae.tile import Tile

if TYPE_CHECKING:
    from pipeline.stages.stage import Stage

SAMPLER_SHARE, ENCODER_SHARE = 0.55, 0.2
"""What of a GPU a worker takes. Ray knows only fractions, and places whatever fits: two samplers never meet on a GPU,
and all encoders together leave room for one on any GPU, so that none that is free is closed to sampling."""

SMALLEST_SHARE = 1e-4  # that Ray tells from nothing

HEADROOM = 1.5
"""Other stages get this much more capacity than sampling needs from them, so that it alone decides the speed."""

CPUS_PER_WORKER = 4  # of one worker for all stages, without GPUs
MAX_ENCODER_THREADS = 4

Labels = Mapping[str, str]
"""Of a node, as Ray has them; such as "ray.io/accelerator-type": "H100"."""


class PlanError(PyramidFlowError):
    """The plan cannot fit the target resources."""


@dataclass(frozen=True)
class Node:
    """What a node of the cluster offers."""

    cpus: int
    gpus: int
    labels: Labels = field(default_factory=dict)


@dataclass(frozen=True)
class Resources:
    """What a job may use: CPU cores and GPUs; nodes: where they are, () = unknown."""

    cpus: int
    gpus: int
    nodes: tuple[Node, ...] = ()

    def at(self, labels: Labels) -> "Resources":
        """Return what the nodes with these labels offer; everything, if nothing is known of nodes."""
        if not labels or not self.nodes:
            return self
        nodes = tuple(node for node in self.nodes if labels.items() <= node.labels.items())
        return Resources(sum(node.cpus for node in nodes), sum(node.gpus for node in nodes), nodes)

    def groups_of(self, gpus: int) -> int:
        """Return how many groups of so many GPUs there are, each on one node."""
        return sum(node.gpus // gpus for node in self.nodes) if self.nodes else self.gpus // gpus


@dataclass(frozen=True)
class StageSpec:
    """What a stage is: its class and the arguments of its constructor."""

    stage: "type[Stage]"
    arguments: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.stage.name


@dataclass(frozen=True)
class Pool:
    """Workers that run the same stages, and what each takes (logical CPUs and GPUs).

    overlap: whether a worker's stages run side by side, each on a batch of its own, instead of one after another;
    labels: of the nodes that they may run on.
    """

    stages: tuple[StageSpec, ...]
    workers: int
    cpus: float
    gpus: float
    overlap: bool = False
    labels: Labels = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The names of its stages."""
        return "+".join(spec.name for spec in self.stages)

    @property
    def place(self) -> str:
        """What its workers' nodes must be labelled, as text; empty if they may be any."""
        return ", ".join(f"{key}={value}" for key, value in self.labels.items())

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
class PlanRequest:
    """What a plan is made for.

    workers: pinned sizes of the pools that encode, sample and publish; gpu_shares: pinned shares of a GPU of the first
    two; encoder_threads: pinned threads of ffmpeg; tile: side of a VAE tile in pixels; memory: mode of the parts;
    cache_gib: of a sampler's history cache, None = half of the memory that is free; gpus_per_clip: GPUs of one node
    that share every batch of a sampler (without GPUs: processes); places: labels of the nodes of the pools that
    encode, sample and publish; thresholds: of the flags of what is decoded; image_text: folder of a CLIP
    model, for two figures more of it; fingerprint: the checkpoint's; signing: of what is published; costs: None =
    unknown.
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
    gpus_per_clip: int = 1
    places: Mapping[str, Labels] = field(default_factory=dict)
    thresholds: Thresholds = STANDARD
    image_text: str | None = None
    fingerprint: str = ""
    signing: Signing | None = None
    costs: Costs | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether the model runs on GPUs."""
        return self.device != "cpu"

    def place(self, pool: str) -> Labels:
        """Return the labels of the nodes that a pool may run on; none = any."""
        return self.places.get(pool, {})


@dataclass(frozen=True)
class Plan:
    """The pools in the order in which data flows, and the rows per sampling batch.

    devices: groups of so many GPUs, or workers without one, of which each is busy with one row at a time; costs: None =
    unknown.
    """

    pools: tuple[Pool, ...]
    batch_size: int
    devices: int = 1
    costs: Costs | None = None
    gpus_per_clip: int = 1

    def describe(self) -> str:
        """Return the plan as a small table."""
        width = max(len(pool.name) for pool in self.pools)
        lines = [f"{'stage':<{width}} {'workers':>7} {'CPUs each':>10} {'GPUs each':>10}"]
        lines += [f"{p.name:<{width}} {p.workers:>7} {p.cpus:>10.2f} {p.gpus:>10.2f}  {p.place}" for p in self.pools]
        return "\n".join(line.rstrip() for line in lines)

    @property
    def num_gpus(self) -> int:
        """Number of GPUs that the plan fills."""
        return self.devices * self.gpus_per_clip if any(pool.gpus for pool in self.pools) else 0

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


def make_plan(job: PlanRequest, resources: Resources) -> Plan:
    """Plan the stages for the resources; raises PlanError if they cannot hold one worker of each stage.

    Staged: every GPU carries a worker that samples and, beside it, decodes what it sampled before; as many encoders
    and publishers are added as keep sampling the bottleneck. Any worker can run on any GPU, so a job that gets fewer
    GPUs than planned is slower. The only CPUs that are claimed are ffmpeg's: other time is the device's.

    Fused: one worker per device does everything, one batch after another. Where all stages share the same cores this
    is as fast, with fewer processes to start; so it is the choice without GPUs. On a GPU it would wait for ffmpeg and
    for storage, and every GPU would have to hold the text encoders.

    Several GPUs for a clip: a worker has them to itself, as Ray gives none of several in part; so what samples on them
    also encodes and decodes, side by side, on the first of them.
    """
    if job.on_gpu and resources.gpus < 1:
        raise PlanError("the job wants GPUs and there are none: use --device cpu")
    if job.on_gpu and not resources.at(job.place("sample")).groups_of(job.gpus_per_clip):
        raise PlanError(f"no node that may sample is known to have {job.gpus_per_clip} GPUs for a clip")
    fused = job.layout == "fused" or (job.layout == "auto" and not job.on_gpu and not job.workers)
    together = not fused and job.on_gpu and job.gpus_per_clip > 1
    plan = (_fused if fused else _together if together else _staged)(job, resources)
    _check_fit(plan.pools, resources)
    return replace(plan, gpus_per_clip=job.gpus_per_clip if job.on_gpu else 1)


def _devices(job: PlanRequest, resources: Resources) -> int:
    """Return how many samplers the GPUs are enough for."""
    return resources.at(job.place("sample")).groups_of(job.gpus_per_clip)


def _fused(job: PlanRequest, resources: Resources) -> Plan:
    pinned = dict(job.workers)
    there = resources.at(job.place("sample"))
    workers = pinned.pop("sample", _devices(job, resources) if job.on_gpu else max(1, there.cpus // CPUS_PER_WORKER))
    if pinned or job.gpu_shares or job.places.keys() - {"sample"}:
        raise PlanError("with one pool for all stages only that of sample can be pinned or placed: use --layout staged")
    cpus, stages = _stages(job, there, workers, together=True)
    gpus = float(job.gpus_per_clip) if job.on_gpu else 0.0
    pool = Pool(tuple(stages.values()), workers, cpus, gpus, labels=job.place("sample"))
    return Plan((pool,), job.batch_size, workers, job.costs)


def _together(job: PlanRequest, resources: Resources) -> Plan:
    pinned = job.workers.keys() | job.places.keys()
    if "encode" in pinned or job.gpu_shares:
        raise PlanError("with several GPUs per clip, what samples also encodes, on whole GPUs: neither can be pinned")
    devices = _devices(job, resources)
    workers = _workers(job.costs, devices) | dict(job.workers)
    cpus, stages = _stages(job, resources.at(job.place("sample")), workers["sample"], together=True)
    publish = stages.pop("publish")
    pools = (
        Pool(tuple(stages.values()), workers["sample"], cpus, job.gpus_per_clip, True, job.place("sample")),
        Pool((publish,), workers["publish"], 0.0, 0.0, labels=job.place("publish")),
    )
    return Plan(pools, job.batch_size, devices, job.costs)


def _staged(job: PlanRequest, resources: Resources) -> Plan:
    devices = _devices(job, resources) if job.on_gpu else job.workers.get("sample", 1)
    places = {name: job.place(name) for name in ("encode", "sample", "publish")}
    workers = _workers(job.costs, devices) | dict(job.workers)
    shares = _gpu_shares(job, workers["encode"]) if job.on_gpu else {}
    cpus, stages = _stages(job, resources.at(places["sample"]), workers["sample"], together=False)
    pools = (
        Pool((stages["encode"],), workers["encode"], 0.0, shares.get("encode", 0.0), labels=places["encode"]),
        Pool(
            (stages["sample"], stages["decode"]),
            workers["sample"],
            cpus,
            shares.get("sample", 0.0),
            overlap=True,
            labels=places["sample"],
        ),
        Pool((stages["publish"],), workers["publish"], 0.0, 0.0, labels=places["publish"]),
    )
    return Plan(pools, job.batch_size, devices, job.costs)


def _workers(costs: Costs | None, devices: int) -> dict[str, int]:
    """Return the pool sizes that make sampling the bottleneck, at most one worker of a pool per device."""
    sizes = {"encode": 1, "sample": devices, "publish": 1}
    if costs is None or not costs.seconds.get("sample"):
        return sizes
    needed = {name: HEADROOM * devices * costs.seconds.get(name, 0.0) / costs.seconds["sample"] for name in sizes}
    return {name: max(1, min(devices, ceil(needed[name]))) for name in sizes}


def _gpu_shares(job: PlanRequest, encoders: int) -> dict[str, float]:
    """Return what of a GPU a worker takes: all encoders together what a sampler leaves, in units that Ray knows."""
    sampler = job.gpu_shares.get("sample", SAMPLER_SHARE)
    apart = job.place("encode") != job.place("sample")
    left = ENCODER_SHARE if apart else floor((1 - sampler) / encoders / SMALLEST_SHARE) * SMALLEST_SHARE
    return {"encode": min(ENCODER_SHARE, left) or ENCODER_SHARE, "sample": sampler} | dict(job.gpu_shares)


def _stages(
    job: PlanRequest, resources: Resources, workers: int, *, together: bool
) -> tuple[float, dict[str, StageSpec]]:
    """Return the logical CPUs of each of the workers that decode, which are their ffmpeg's, and the stages by name."""
    # here, so that workers of other stages load neither torch nor the model
    from pipeline.stages.decode import Decode
    from pipeline.stages.encode import Encode
    from pipeline.stages.model import ModelConfig
    from pipeline.stages.publish import Publish
    from pipeline.stages.sample import Sample

    threads = max(1, resources.cpus // workers)
    cpus = job.encoder_threads or min(threads, MAX_ENCODER_THREADS, resources.cpus / (2 * workers))
    model = ModelConfig(
        path=job.model_path,
        variant=job.variant,
        device=job.device,
        dtype=job.dtype,
        threads=threads,
        lora=job.lora,
        memory=job.memory,
        together=together,
        cache_gib=job.cache_gib,
        gpus_per_clip=job.gpus_per_clip,
        fingerprint=job.fingerprint,
    )
    frames = {"window": job.decode_window, "tile": job.tile, "encoder_threads": max(1, int(cpus))}
    stages = (
        StageSpec(Encode, {"model": model, "image_root": job.image_root, "image_hosts": job.image_hosts}),
        StageSpec(Sample, {"model": model}),
        StageSpec(Decode, {"model": model, "thresholds": job.thresholds, "image_text": job.image_text} | frames),
        StageSpec(Publish, {"output": job.output, "signing": job.signing}),
    )
    return float(cpus), {spec.name: spec for spec in stages}


def _check_fit(pools: tuple[Pool, ...], resources: Resources) -> None:
    """Compare what all pools take with all there is, and what those of one place take with what is there."""
    _check_room(pools, resources, "")
    for labels in {tuple(sorted(pool.labels.items())) for pool in pools if pool.labels}:
        own = tuple(pool for pool in pools if pool.labels == dict(labels))
        _check_room(own, resources.at(dict(labels)), f" with {own[0].place}")


def _check_room(pools: tuple[Pool, ...], resources: Resources, where: str) -> None:
    gpus = _gpus_for([pool.gpus for pool in pools for _ in range(pool.workers) if pool.gpus])
    if gpus > resources.gpus:
        wanted = ", ".join(f"{pool.workers} x {pool.gpus:g} for {pool.name}" for pool in pools if pool.gpus)
        raise PlanError(f"the plan needs {gpus} GPUs{where} ({wanted}) and there are {resources.gpus}")
    cpus = sum(pool.workers * pool.cpus for pool in pools)
    if cpus > resources.cpus:
        wanted = ", ".join(f"{pool.workers} x {pool.cpus:g} for {pool.name}" for pool in pools if pool.cpus)
        raise PlanError(f"the plan needs {cpus:g} CPUs{where} ({wanted}) and there are {resources.cpus}")


def _gpus_for(shares: Sequence[float]) -> int:
    """Return how many GPUs hold the shares, none of which can be split over two: the largest first, where it fits."""
    whole = sum(int(share) for share in shares if share >= 1)
    free: list[float] = []
    for share in sorted((share for share in shares if share < 1), reverse=True):
        fitting = next((i for i, left in enumerate(free) if share <= left + 1e-6), None)
        if fitting is None:
            free.append(1.0 - share)
        else:
            free[fitting] -= share
    return whole + len(free)
