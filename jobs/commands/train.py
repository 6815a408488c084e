"""Train a part of a checkpoint on Ray Train (`pyramid-render train --config train.yaml`)."""

import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from itertools import chain, islice
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from jobs.settings import EXIT_BROKEN, EXIT_WRONG_JOB, PhaseSettings, TrainSettings
from jobs.signals import Signals
from pipeline.batch import runner
from pipeline.batch.planner import PlanError, Resources
from pipeline.storage.storage import Storage
from pipeline.tables.readers import list_parts, read_blocks
from pipeline.training.clips import clips, encoded, pixels_of
from pipeline.training.optimizer import OptimizerSettings
from pipeline.training.record import check_record
from pipeline.training.state import trained_weights
from pipeline.training.tasks import Phase, Task, TransformerSource, VAESource
from pipeline.training.trainer import Metrics, TrainJob, check_streams, fit
from pyramid_flow import CausalVideoVAE, Checkpoint
from pyramid_flow.checkpoints.checkpoint import write_preset
from pyramid_flow.checkpoints.layout import PRESET_FILE
from pyramid_flow.errors import PyramidFlowError
from pyramid_flow.sampling.params import TEMPORAL_FACTOR, check_num_frames
from pyramid_flow.training.lora import LoRA, check_lora, merge_lora
from pyramid_flow.training.step import Objective
from pyramid_flow.training.vae import VAEObjective, measure_statistics, whiten

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

STATISTICS_CLIPS = 128

logger = logging.getLogger("jobs.commands.train")


class TrainingError(PyramidFlowError):
    """A training cannot begin."""


def run(settings: TrainSettings) -> int:
    """Train; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        checkpoint, job = prepare(settings)
    except PyramidFlowError as error:
        logger.error("pyramid-render train: %s", error)
        return EXIT_WRONG_JOB
    from torch.utils.tensorboard import SummaryWriter  # an extra

    own = settings.own_cluster
    cpus = ceil(settings.workers * settings.cpus_per_worker) + 1  # one for what reads and controls
    resources = Resources(cpus, settings.workers if settings.use_gpu else 0)
    signals = Signals()
    try:
        with (
            runner.session(None if own else settings.address, resources if own else None) as offered,
            SummaryWriter(f"{job.storage}/tensorboard/{job.name}") as board,
        ):
            signals.install()
            _check_gpus(job, offered, own=own)
            trained = fit(job, partial(_show, board)).checkpoint
            assert trained is not None, "the last step keeps a checkpoint"
            with trained.as_directory() as folder:
                write_model(settings, checkpoint, job, trained_weights(Path(folder)))
    except (TrainingError, PlanError) as error:
        logger.error("pyramid-render train: %s", error)
        return EXIT_WRONG_JOB
    except KeyboardInterrupt:
        logger.error("interrupted: run the same command again to go on from the last checkpoint")
        return signals.exit_code
    except Exception as error:  # noqa: BLE001 - whatever it was, the workers' logs have the traceback
        logger.error("the training broke: %s: %s; run it again to resume", type(error).__name__, error)
        return EXIT_BROKEN
    return 0


def _show(board: "SummaryWriter", metrics: Metrics) -> None:
    """Log numbers, and draw them."""
    step = int(metrics["step"])
    numbers = {name: value for name, value in metrics.items() if name != "step"}
    logger.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
    for name, value in numbers.items():
        board.add_scalar(name, value, step)


def prepare(settings: TrainSettings) -> tuple[Checkpoint, TrainJob]:
    """Check what can be checked before a cluster is used; raises a PyramidFlowError if the job is wrong."""
    if find_spec("tensorboard") is None:
        raise TrainingError("training needs TensorBoard: pip install 'pyramid-render[train]'")
    checkpoint = Checkpoint.open(settings.model, settings.variant)
    checkpoint.check()
    streams = settings.streams or settings.workers
    storage = Storage(settings.output)
    job = TrainJob(
        name=settings.task,
        storage=storage.uri.removeprefix("file://"),
        make_task=_source(settings, checkpoint),
        phases=tuple(_phase(phase) for phase in settings.phases),
        optimizer=OptimizerSettings(
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            warmup_steps=settings.warmup_steps,
            decay=settings.decay,
            max_grad_norm=settings.max_grad_norm,
            ema_decay=settings.ema_decay,
            bfloat16=settings.dtype == "bfloat16",
        ),
        num_workers=settings.workers,
        num_streams=streams,
        seed=settings.seed,
        use_gpu=settings.use_gpu,
        compile=settings.compile,
        shard=settings.shard,
        cpus_per_worker=settings.cpus_per_worker,
        checkpoint_steps=settings.checkpoint_steps,
        log_steps=settings.log_steps,
        example_steps=settings.example_steps,
        example_count=settings.example_count,
        max_restarts=settings.max_restarts,
    )
    check_streams(job)
    _check_tables(settings, job, checkpoint)
    lora = _lora(settings)
    if lora:
        check_lora(checkpoint.empty_transformer(), lora)
    storage.probe()
    values = {
        "model_fingerprint": checkpoint.fingerprint,
        "fresh": settings.fresh,
        "lora": asdict(lora) if lora else None,
        "running_mean": settings.ema_decay is not None,
    }
    check_record(storage, f"{job.name}.json", values)
    return checkpoint, job


def _check_gpus(job: TrainJob, offered: Resources, *, own: bool) -> None:
    gpus = torch.cuda.device_count() if own else offered.gpus
    if job.use_gpu and gpus < job.num_workers:
        raise TrainingError(f"{job.num_workers} workers need a GPU each, and there are {gpus}")


def _check_tables(settings: TrainSettings, job: TrainJob, checkpoint: Checkpoint) -> None:
    """Read the first row of each phase as the task does."""
    for phase in job.phases:
        table = next(table for part in phase.parts if part.num_rows for _, table in read_blocks(part)).slice(0, 1)
        if settings.task == "vae":
            clips(table)
        else:
            encoded(table, _num_units(settings, checkpoint))


def _phase(settings: PhaseSettings) -> Phase:
    parts = tuple(list_parts(settings.data))
    return Phase(parts, settings.steps, settings.batch_size, settings.num_frames, settings.crop)


def _source(settings: TrainSettings, checkpoint: Checkpoint) -> Callable[[], Task]:
    path = checkpoint.path
    if settings.task == "vae":
        terms = VAEObjective(settings.mse_weight, settings.kl_weight, settings.foreground_weight)
        return VAESource(path, settings.fresh, terms, settings.seed)
    objective = Objective(
        tuple(settings.levels), tuple(settings.level_weights), settings.text_dropout, settings.first_frame_share
    )
    return TransformerSource(
        path,
        checkpoint.variant,
        settings.fresh,
        _num_units(settings, checkpoint),
        objective,
        settings.seed,
        _lora(settings),
        settings.gradient_checkpointing,
    )


def _num_units(settings: TrainSettings, checkpoint: Checkpoint) -> int:
    num_frames = settings.num_frames or checkpoint.preset.max_num_frames
    check_num_frames(num_frames)
    return 1 + (num_frames - 1) // TEMPORAL_FACTOR


def _lora(settings: TrainSettings) -> LoRA | None:
    if settings.lora_rank is None:
        return None
    return LoRA(settings.lora_rank, settings.lora_alpha or settings.lora_rank, tuple(settings.lora_targets))


def write_model(settings: TrainSettings, checkpoint: Checkpoint, job: TrainJob, weights: Mapping[str, Tensor]) -> None:
    """Write the checkpoint with the trained part in its place to OUTPUT/model, and adapters to OUTPUT/lora as well.

    The latents of a VAE that was fresh get even scale, and their statistics go into pyramid.json.
    """
    storage, lora = Storage(settings.output), _lora(settings)
    part = checkpoint.transformer_folder.name
    preset = checkpoint.root / PRESET_FILE
    values = json.loads(preset.read_text()) if preset.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        model: ModelMixin
        if lora:
            model = merge_lora(checkpoint.load_transformer(torch.float32, "cpu"), lora, weights, made / "lora")
        else:
            model = job.make_task().model
            model.load_state_dict(dict(weights), strict=False)  # what is never trained stays
        if isinstance(model, CausalVideoVAE):
            part = "causal_video_vae"
            if settings.fresh:  # a transformer that was trained on a VAE's latents needs them as they are
                whiten(model, _latents(model, job))
                values["statistics"] = asdict(measure_statistics(_latents(model, job)))
        model.save_pretrained(made / "model" / part)
        if values:
            write_preset(made / "model", values)
        others = [path for path in checkpoint.root.iterdir() if path.name not in (part, PRESET_FILE)]
        _put(storage, checkpoint.root, others, "model/")
        _put(storage, made, made.iterdir(), "")
    logger.info("wrote %s", storage.url("model"))


def _put(storage: Storage, root: Path, paths: Iterable[Path], prefix: str) -> None:
    """Store files, and those below folders, by their names below `root`."""
    for path in sorted(paths):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                storage.put(prefix + file.relative_to(root).as_posix(), file)


@torch.no_grad()
def _latents(vae: CausalVideoVAE, job: TrainJob) -> list[Tensor]:
    """Return the latents of the first clips that are trained on last."""
    rows = chain.from_iterable(clips(table) for part in job.phases[-1].parts for _, table in read_blocks(part))
    return [vae.encode_moments(pixels_of(clip)[None]).mean for clip in islice(rows, STATISTICS_CLIPS)]
