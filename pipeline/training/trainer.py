"""Training on Ray Train: several workers with equal shares of every batch, checkpoints, and resume."""

import logging
import signal
import tempfile
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.train
import torch
from diffusers.models.modeling_utils import ModelMixin
from ray.train.torch import TorchConfig, TorchTrainer, get_device, prepare_model
from ray.util.queue import Queue
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.media.video import VideoWriter
from pipeline.storage.storage import Storage
from pipeline.training.optimizer import OptimizerSettings, learning_rate, parameter_groups
from pipeline.training.samples import Stream, Window, streams
from pipeline.training.state import Training, on_first_worker, restore, save, trained_state
from pipeline.training.tasks import Phase, Task
from pyramid_flow.errors import PyramidFlowError
from pyramid_flow.training.step import optimizer_step

logger = logging.getLogger(__name__)

Metrics = dict[str, float]
"""Numbers to show, by name."""

EXAMPLE_FPS = 24

COMPILED_GRAPHS = 64
"""Graphs of a block at most: sizes of 1 are compiled apart from others, and so is each width of the last queries."""

MAX_FAILURES = 10
DATA_PARALLEL = {"find_unused_parameters": True}  # an MMDiT's last block never reads the weights of text queries
COLLECTIVE_TIMEOUT_S = 7200  # one worker makes examples while the others wait

READ_CPUS, READ_AHEAD = 0.1, 2  # of a task; windows per stream


class TrainingDivergedError(PyramidFlowError):
    """The training has come to numbers that are not finite."""


@dataclass(frozen=True)
class TrainJob:
    """A training that is checked.

    make_task: builds the task in a worker; num_streams: divides every batch, and is divided by the workers; seed: of
    data and draws.
    """

    name: str
    storage: str
    make_task: Callable[[], Task]
    phases: tuple[Phase, ...]
    optimizer: OptimizerSettings
    num_workers: int
    num_streams: int
    seed: int
    use_gpu: bool = False
    compile: bool = False
    shard: bool = False
    cpus_per_worker: float = 1.0
    checkpoint_steps: int = 500
    log_steps: int = 50
    example_steps: int | None = None
    example_count: int = 4
    max_restarts: int = 3

    @property
    def num_steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)


@dataclass
class Means:
    """Means of numbers since they were last taken."""

    totals: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    count: int = 0

    def add(self, **values: float) -> None:
        """Count the numbers of one step."""
        self.count += 1
        for name, value in values.items():
            self.totals[name] += value

    def take(self) -> Metrics:
        """Return the means and begin anew."""
        means = {name: total / self.count for name, total in self.totals.items()}
        self.totals.clear()
        self.count = 0
        return means


def check_streams(job: TrainJob) -> None:
    """Raise InputError if a table is too small for the streams."""
    for phase in job.phases:
        streams(phase.parts, job.num_streams, job.seed)


def fit(job: TrainJob, on_metrics: Callable[[Metrics], None] = lambda metrics: None) -> ray.train.Result:
    """Train on the connected Ray cluster; a run of the same name goes on from its last checkpoint.

    on_metrics is told means of the first worker's numbers, in a thread of its own.
    """
    told = Queue(actor_options={"num_cpus": 0})
    listener = threading.Thread(target=_listen, args=(told, on_metrics), daemon=True)
    listener.start()
    interrupted = signal.getsignal(signal.SIGINT)
    try:
        return _trainer(job, told).fit()
    except SystemExit:  # how Ray Train ends after Ctrl-C, as if all were well
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, interrupted)
        told.put(None)
        listener.join()
        told.shutdown()


def _listen(told: Queue, on_metrics: Callable[[Metrics], None]) -> None:
    while (metrics := told.get()) is not None:
        on_metrics(metrics)


def _trainer(job: TrainJob, told: Queue) -> TorchTrainer:
    return TorchTrainer(
        _work,
        train_loop_config={"job": job, "told": told},
        torch_config=TorchConfig(backend="nccl" if job.use_gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ray.train.ScalingConfig(
            num_workers=job.num_workers, use_gpu=job.use_gpu, resources_per_worker={"CPU": job.cpus_per_worker}
        ),
        run_config=ray.train.RunConfig(
            name=job.name,
            storage_path=job.storage,
            failure_config=ray.train.FailureConfig(max_failures=job.max_restarts),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )


def _work(config: dict[str, Any]) -> None:
    """Train as one of the workers."""
    job, told = config["job"], config["told"]
    context = ray.train.get_context()
    training = begin(job)
    rank, means, started = context.get_world_rank(), Means(), time.monotonic()
    for phase, table, samples in batches(job, training.task.columns, training.step, rank, context.get_world_size()):
        means.add(**train_step(job, training, phase, table, samples))
        is_last = training.step == job.num_steps
        keep = is_last or training.step % job.checkpoint_steps == 0
        if job.example_steps and (is_last or training.step % job.example_steps == 0):
            weights = dict(on_first_worker(trained_state(training.result), rank))
            if rank == 0:
                _try_examples(job, training.step, weights, table.slice(0, job.example_count))
        if keep or training.step % job.log_steps == 0:
            metrics = means.take() | {"step": training.step, "seconds": time.monotonic() - started}
            if rank == 0:
                told.put(metrics)
            _report(training if keep else None, metrics, rank)


def begin(job: TrainJob) -> Training:
    """Build what is trained, and go on from the last checkpoint if there is one."""
    torch.manual_seed(job.seed)
    task, settings = job.make_task(), job.optimizer
    model = task.model
    if job.compile:
        torch._dynamo.config.recompile_limit = COMPILED_GRAPHS
        model.compile_repeated_blocks(dynamic=True)
    device = get_device() if job.use_gpu else torch.device("cpu")
    task.to(device)
    decay = settings.ema_decay
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None
    if job.shard:
        mesh = init_device_mesh(device.type, (job.num_workers,))
        for module in (task, *([ema] if ema else [])):
            shard(module, mesh)
    training = Training(
        task=task,
        model=task if job.shard else prepare_model(task, move_to_device=False, parallel_strategy_kwargs=DATA_PARALLEL),
        optimizer=AdamW(parameter_groups(model, settings), lr=settings.lr, betas=settings.betas, fused=True),
        ema=ema,
    )
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            restore(training, Path(folder))
    return training


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Split the weights below a module between the workers (FSDP2): each repeated block for itself, then the rest."""
    for model in [each for each in module.modules() if isinstance(each, ModelMixin)]:
        for block in [each for each in model.modules() if type(each).__name__ in (model._repeated_blocks or ())]:
            fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def train_step(job: TrainJob, training: Training, phase: Phase, table: pa.Table, samples: Sequence[int]) -> Metrics:
    """Make one step; returns the numbers to show."""
    settings = job.optimizer
    for group in training.optimizer.param_groups:
        group["lr"] = learning_rate(settings, training.step, job.num_steps)
    device = next(training.model.parameters()).device.type
    with _precision(settings, device):
        loss = training.model(table, samples, training.step, phase)
    norm = optimizer_step(training.task.model, training.optimizer, loss.total, settings.max_grad_norm)
    training.step += 1
    training.failures = 0 if isfinite(norm) else training.failures + 1
    if training.failures >= MAX_FAILURES:
        raise TrainingDivergedError(f"the gradient is not finite, {MAX_FAILURES} steps in a row until {training.step}")
    if training.ema is not None and isfinite(norm):
        training.ema.update_parameters(training.task.model)
    return {"loss": float(loss.total.detach()), "grad_norm": norm, **loss.metrics}


def _precision(settings: OptimizerSettings, device: str) -> AbstractContextManager[object]:
    return torch.autocast(device, torch.bfloat16) if settings.bfloat16 else nullcontext()


def batches(
    job: TrainJob, columns: Sequence[str], first_step: int, rank: int, num_workers: int
) -> Iterator[tuple[Phase, pa.Table, list[int]]]:
    """Yield a worker's share of every batch from a step on: its phase, rows, and their indices in the global batch."""
    numbers = range(rank, job.num_streams, num_workers)
    for phase in job.phases:
        skipped, first_step = min(first_step, phase.steps), max(0, first_step - phase.steps)
        share = phase.batch_size // job.num_streams
        dealt = streams(phase.parts, job.num_streams, job.seed)
        first, count = share * skipped, share * (phase.steps - skipped)
        readers = [Reader(_tables(dealt[number], columns, first, count)) for number in numbers]
        samples = [index for number in numbers for index in range(number, phase.batch_size, job.num_streams)]
        for _ in range(skipped, phase.steps):
            yield phase, pa.concat_tables([reader.take(share) for reader in readers]), samples


@dataclass
class Reader:
    """Takes rows from tables that come one after another."""

    tables: Iterator[pa.Table]
    rest: pa.Table | None = None

    def take(self, rows: int) -> pa.Table:
        """Return the next rows."""
        while self.rest is None or len(self.rest) < rows:
            table = next(self.tables)
            self.rest = table if self.rest is None else pa.concat_tables([self.rest, table])
        taken, self.rest = self.rest.slice(0, rows), self.rest.slice(rows)
        return taken


def _tables(stream: Stream, columns: Sequence[str], first: int, count: int) -> Iterator[pa.Table]:
    """Yield so many rows of a stream from a row on, a window at a time; Ray tasks read the next ones meanwhile.

    Not by Ray Data, whose executor never rests while its output waits to be taken: it cost 4/5 of the speed on 2 cores.
    """
    read = ray.remote(num_cpus=READ_CPUS)(Window.read)
    ahead: deque[ray.ObjectRef[pa.Table]] = deque()
    for window in stream.windows(first, count):
        ahead.append(read.remote(window, columns))
        if len(ahead) > READ_AHEAD:
            yield ray.get(ahead.popleft())
    while ahead:
        yield ray.get(ahead.popleft())


def _try_examples(job: TrainJob, step: int, weights: Mapping[str, Tensor], table: pa.Table) -> None:
    """Write examples; if that fails, the training goes on all the same."""
    try:
        write_examples(job, step, weights, table)
    except Exception:
        logger.exception("no examples were written at step %d", step)


def write_examples(job: TrainJob, step: int, weights: Mapping[str, Tensor], table: pa.Table) -> None:
    """Write videos that show what weights have learned to STORAGE/examples; they are made by a model of its own."""
    task = job.make_task().to(get_device() if job.use_gpu else "cpu").eval()
    task.model.load_state_dict(weights, strict=False)
    storage = Storage(job.storage)
    with _precision(job.optimizer, task.model.device.type):
        videos = task.examples(table)
    for number, (frames, prompt) in enumerate(zip(videos, table["prompt"].to_pylist(), strict=True)):
        _, height, width, _ = frames.shape
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "example.mp4"
            with VideoWriter(path, width=width, height=height, fps=EXAMPLE_FPS, tags={"prompt": prompt}) as writer:
                writer.write(frames)
            storage.put(f"examples/{job.name}-{step:06d}/{number}.mp4", path)


def _report(training: Training | None, metrics: Metrics, rank: int) -> None:
    """Report to Ray Train, with a checkpoint of what is to be kept."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if training is not None:
            save(training, Path(folder), rank)
            if rank == 0:
                checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(metrics, checkpoint=checkpoint)
