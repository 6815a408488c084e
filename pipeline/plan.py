"""How many workers of each stage, and what each takes of a machine: decided and checked before anything starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.stages import Decode, Encode, ModelConfig, Publish, Sample, Stage
from pyramid_flow.errors import PyramidFlowError

GPU_SHARES = {"encode": 0.1, "sample": 0.55, "decode": 0.25}
"""Ray packs fractions onto one GPU in the order of the stages: so two samplers never share one, and beside a sampler
there is room for a decoder and two encoders."""

GPUS_PER_ENCODER = 64  # encoding a prompt costs less than a thousandth of sampling it
MAX_ENCODER_THREADS = 4


class PlanError(PyramidFlowError):
    """The plan cannot fit the target resources."""


@dataclass(frozen=True)
class Resources:
    """What a job may use: CPU cores and GPUs."""

    cpus: int
    gpus: int


@dataclass(frozen=True)
class StageSpec:
    """What a stage is, how many workers run it, and what each takes (logical CPUs and GPUs)."""

    stage: type[Stage]
    arguments: Mapping[str, Any]
    workers: int
    cpus: float
    gpus: float

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.stage.name


@dataclass(frozen=True)
class Job:
    """What a plan is made for. workers: pinned pool sizes by stage name; tile: side of a VAE tile in pixels."""

    model_path: str
    variant: str | None
    device: str
    dtype: str
    output: str
    image_root: str
    decode_window: int
    tile: int | None
    batch_size: int
    workers: Mapping[str, int]


@dataclass(frozen=True)
class Plan:
    """The stages in the order in which data flows, and the rows per sampling batch."""

    stages: tuple[StageSpec, ...]
    batch_size: int

    def describe(self) -> str:
        """Return the plan as a small table."""
        lines = [f"{'stage':<8} {'workers':>7} {'CPUs each':>10} {'GPUs each':>10}"]
        lines += [f"{s.name:<8} {s.workers:>7} {s.cpus:>10.2f} {s.gpus:>10.2f}" for s in self.stages]
        return "\n".join(lines)


def make_plan(job: Job, resources: Resources) -> Plan:
    """Plan the stages for the resources; raises PlanError if they cannot hold one worker of each stage.

    Every GPU carries a sampler and a decoder, and one of 64 an encoder; any of them can run on any GPU, so a job that
    gets fewer GPUs than planned is slower and never stuck. Without GPUs each stage has one worker. Encode and sample
    take no CPUs: their time is the device's.
    """
    on_gpu = job.device != "cpu"
    if on_gpu and resources.gpus < 1:
        raise PlanError("the job wants GPUs and there are none: use --device cpu")
    default = resources.gpus if on_gpu else 1
    encoders = 1 + (default - 1) // GPUS_PER_ENCODER
    workers = {"encode": encoders, "sample": default, "decode": default, "publish": 1} | dict(job.workers)
    threads = max(1, resources.cpus // max(workers["sample"], workers["decode"]))
    decode_cpus = min(threads, MAX_ENCODER_THREADS, resources.cpus / (2 * workers["decode"]))
    encoder_threads = max(1, int(decode_cpus))
    model = ModelConfig(job.model_path, job.variant, job.device, job.dtype, threads)
    shares = GPU_SHARES if on_gpu else {}

    def spec(stage: type[Stage], cpus: float, **arguments: Any) -> StageSpec:  # noqa: ANN401 - the stage's own
        return StageSpec(stage, arguments, workers[stage.name], cpus, shares.get(stage.name, 0.0))

    stages = (
        spec(Encode, 0, model=model, image_root=job.image_root),
        spec(Sample, 0, model=model),
        spec(
            Decode, decode_cpus, model=model, window=job.decode_window, tile=job.tile, encoder_threads=encoder_threads
        ),
        spec(Publish, 0, output=job.output),
    )
    _check_fit(stages, resources)
    return Plan(stages, job.batch_size)


def _check_fit(stages: tuple[StageSpec, ...], resources: Resources) -> None:
    gpus = _gpus_for([spec.gpus for spec in stages for _ in range(spec.workers) if spec.gpus])
    if gpus > resources.gpus:
        wanted = ", ".join(f"{spec.workers} x {spec.gpus:g} for {spec.name}" for spec in stages if spec.gpus)
        raise PlanError(f"the plan needs {gpus} GPUs ({wanted}) and there are {resources.gpus}")


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
