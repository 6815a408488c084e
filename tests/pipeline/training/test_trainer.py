"""Training on Ray Train: the same weights on any number of workers, and after a worker was killed."""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.tables.readers import list_parts, read_blocks
from pipeline.training.clips import ENCODED_SCHEMA, encoded_row
from pipeline.training.optimizer import OptimizerSettings
from pipeline.training.state import Training, restore, save, trained_state, trained_weights
from pipeline.training.tasks import Phase, TransformerSource, TransformerTask
from pipeline.training.trainer import DATA_PARALLEL, TrainingDivergedError, TrainJob, fit, train_step, write_examples
from pyramid_flow.training.lora import LoRA, merge_lora
from pyramid_flow.training.step import Objective
from tests.pipeline.mp4 import probe, read_tags
from tests.pyramid_flow.goldens import TINY_MINIFLUX, TINY_SD3, tiny_text_encoder

STEPS, KILLED_AT = 20, 14
SOURCE = TransformerSource(str(TINY_MINIFLUX), None, True, 3, Objective(), seed=0)


class Fatal(TransformerTask):
    """Kills its process once, at a step."""

    def forward(self, table, samples, step, phase):
        mark = Path(os.environ["FATAL_MARK"]) if "FATAL_MARK" in os.environ else None
        if mark and step == KILLED_AT and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(table, samples, step, phase)


@dataclass(frozen=True)
class FatalSource:
    """Makes a task whose process is killed once; mark: a file that says that it was."""

    mark: Path

    def __call__(self):
        os.environ["FATAL_MARK"] = str(self.mark)
        task = SOURCE()
        task.__class__ = Fatal
        return task


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Return the row groups of a table of encoded clips."""
    path = tmp_path_factory.mktemp("encoded") / "part.parquet"
    pq.write_table(encoded_clips(24), path, row_group_size=4)
    return tuple(list_parts([str(path)]))


def encoded_clips(count: int, family: str = "miniflux") -> pa.Table:
    encoder, generator = tiny_text_encoder(family), torch.Generator().manual_seed(0)
    rows = [
        encoded_row(
            f"clip {number}",
            torch.randn(16, 3, 8, 8, generator=generator),
            encoder([f"clip {number}"]),
            encoder([""]),
        )
        for number in range(count)
    ]
    return pa.Table.from_pylist(rows, ENCODED_SCHEMA)


def job(parts, storage, **values) -> TrainJob:
    return TrainJob(
        **{
            "name": "transformer",
            "storage": str(storage),
            "make_task": SOURCE,
            "phases": (Phase(parts, STEPS, 6),),
            "optimizer": OptimizerSettings(lr=1e-2, warmup_steps=5, ema_decay=0.9, bfloat16=False),
            "num_workers": 1,
            "num_streams": 2,
            "seed": 0,
            "cpus_per_worker": 0.5,
            "checkpoint_steps": 5,
            "log_steps": 5,
            **values,
        }
    )


def weights(training_job, on_metrics=lambda metrics: None) -> tuple[dict[str, Tensor], dict[str, float]]:
    result = fit(training_job, on_metrics)
    with result.checkpoint.as_directory() as folder:
        return trained_weights(Path(folder)), result.metrics


@pytest.fixture(scope="module")
def prompt_controller() -> Iterator[None]:
    """Have Ray Train look more often at what its workers do, so that a run ends as soon as they have."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        yield


@pytest.fixture(scope="module")
def alone(cluster, prompt_controller, parts, tmp_path_factory):
    """Return the weights that one worker trains, and its last numbers."""
    return weights(job(parts, tmp_path_factory.mktemp("alone")))


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    one, other = (torch.cat([tensors[name].flatten() for name in sorted(expected)]) for tensors in (found, expected))
    return float((one - other).norm() / other.norm())


def loss(tensors: dict[str, Tensor] | None, table: pa.Table) -> float:
    """Return the loss of weights, or of fresh ones, over the same draws at all levels."""
    task = SOURCE()
    if tensors is not None:
        task.model.load_state_dict(tensors)
    with torch.no_grad():
        losses = [task(table, range(len(table)), step, Phase((), STEPS, len(table))).total for step in range(6)]
    return float(sum(losses))


@pytest.mark.ray
@pytest.mark.integration
def test_two_workers_train_the_same_weights_as_one(alone, parts, table, tmp_path):
    expected, metrics = alone
    assert metrics["step"] == STEPS
    told = []
    found, _ = weights(job(parts, tmp_path, num_workers=2), told.append)
    assert distance(found, expected) <= 1e-4
    assert [each["step"] for each in told] == [5, 10, 15, 20]
    assert loss(found, table) < 0.9 * loss(None, table)


@pytest.mark.ray
@pytest.mark.integration
def test_sharded_weights_train_and_resume_to_the_same_weights(alone, parts, tmp_path):
    expected, _ = alone
    sharded = job(parts, tmp_path, num_workers=2, shard=True, phases=(Phase(parts, STEPS // 2, 6),))
    first, metrics = weights(sharded)
    assert metrics["step"] == STEPS // 2
    found, metrics = weights(replace(sharded, phases=(Phase(parts, STEPS, 6),)))  # goes on where the first ended
    assert metrics["step"] == STEPS
    assert distance(found, expected) <= 1e-4
    assert 0 < distance(found, first) < 1


@pytest.mark.ray
@pytest.mark.integration
def test_adapters_of_sharded_weights_train_as_alone(cluster, prompt_controller, parts, tmp_path):
    task = replace(SOURCE, fresh=False, lora=LoRA(rank=2, alpha=4), gradient_checkpointing=True)
    expected, _ = weights(job(parts, tmp_path / "alone", make_task=task))
    found, _ = weights(job(parts, tmp_path / "sharded", make_task=task, num_workers=2, shard=True))
    assert distance(found, expected) <= 1e-4


@pytest.mark.ray
@pytest.mark.integration
def test_a_killed_worker_goes_on_from_its_checkpoint(alone, parts, tmp_path):
    expected, _ = alone
    mark = tmp_path / "killed"
    found, metrics = weights(job(parts, tmp_path, make_task=FatalSource(mark)))
    assert mark.exists()
    assert metrics["step"] == STEPS
    assert distance(found, expected) <= 1e-6


@pytest.mark.ray
@pytest.mark.integration
def test_a_finished_training_run_again_goes_on_where_it_ended(cluster, prompt_controller, parts, tmp_path):
    short = job(parts, tmp_path, phases=(Phase(parts, 5, 6),))
    first, metrics = weights(short)
    assert metrics["step"] == 5
    longer, metrics = weights(replace(short, phases=(Phase(parts, 10, 6),)))
    assert metrics["step"] == 10
    assert 0 < distance(longer, first) < 1


@pytest.fixture
def table(parts):
    return pa.concat_tables([table for part in parts for _, table in read_blocks(part)])


ADAPTERS = replace(SOURCE, fresh=False, lora=LoRA(rank=2, alpha=4))


@pytest.mark.parametrize("source", [SOURCE, ADAPTERS, replace(SOURCE, gradient_checkpointing=True)])
def test_a_restored_training_goes_on_as_if_nothing_had_happened(parts, table, tmp_path, source):
    own = job(parts, tmp_path)

    def begun() -> Training:
        torch.manual_seed(0)
        task = source()
        ema = AveragedModel(task.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        return Training(task, task, torch.optim.AdamW(task.model.parameters()), ema)

    def step(training: Training) -> None:
        start = 6 * training.step
        train_step(own, training, own.phases[0], table.slice(start % 24, 6), range(6))

    first, second = begun(), begun()
    for _ in range(3):
        step(first)
    save(first, tmp_path)
    restore(second, tmp_path)
    assert second.step == 3
    for training in (first, second):
        step(training)
    for name, tensor in first.ema.state_dict().items():
        assert torch.equal(tensor, second.ema.state_dict()[name]), name


def test_adapters_alone_are_trained_kept_and_merged(parts, table, tmp_path):
    task = ADAPTERS()
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    own = job(parts, tmp_path)
    trainable = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    training = Training(task, task, torch.optim.AdamW(trainable, lr=1e-2), None)
    for _ in range(2):
        train_step(own, training, own.phases[0], table.slice(0, 6), range(6))
    changed = {name for name, tensor in task.model.state_dict().items() if not torch.equal(tensor, before[name])}
    weights = dict(trained_state(task.model))
    assert changed == set(weights)
    assert all("lora_" in name for name in weights)

    bare = replace(ADAPTERS, lora=None)().model
    names = bare.state_dict().keys()
    merged = merge_lora(bare, ADAPTERS.lora, weights, tmp_path / "lora")
    assert merged.state_dict().keys() == names
    assert {path.name for path in (tmp_path / "lora").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    phase, rows = own.phases[0], table.slice(0, 6)
    expected = task(rows, range(6), 0, phase).total
    task.transformer = merged
    torch.testing.assert_close(task(rows, range(6), 0, phase).total, expected)


def test_examples_are_videos_of_the_rows_prompts(parts, table, tmp_path):
    model = SOURCE().model
    write_examples(job(parts, tmp_path), 7, dict(trained_state(model)), table.slice(0, 2))
    folder = tmp_path / "examples" / "transformer-000007"
    assert sorted(path.name for path in folder.iterdir()) == ["0.mp4", "1.mp4"]
    info = probe(folder / "1.mp4")
    assert (info.width, info.height, info.frames) == (64, 64, 17)
    assert read_tags(folder / "1.mp4")["prompt"] == table["prompt"][1].as_py()


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:The .grad attribute:UserWarning")  # torch's
def test_compiled_blocks_train_the_same_weights(parts, table, tmp_path):
    tasks = [SOURCE(), SOURCE()]
    tasks[1].model.load_state_dict(tasks[0].model.state_dict())
    tasks[1].model.compile_repeated_blocks(dynamic=True)
    own = job(parts, tmp_path)
    for task in tasks:
        training = Training(task, task, torch.optim.AdamW(task.model.parameters(), lr=1e-2), None)
        for _ in range(3):
            train_step(own, training, own.phases[0], table.slice(0, 6), range(6))
    one, other = ({name: weight.detach() for name, weight in task.model.named_parameters()} for task in tasks)
    assert distance(other, one) <= 1e-3


def test_every_row_of_a_batch_trains_every_level(table):
    task = SOURCE()
    seen = [task(table.slice(0, 2), range(2), step, Phase((), 1, 2)).metrics for step in range(3)]
    assert [sorted(metrics) for metrics in seen] == [["level0", "level1"], ["level1", "level2"], ["level0", "level2"]]


@pytest.fixture
def only_worker(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("lora", [None, ADAPTERS.lora])
def test_weights_that_are_never_read_do_not_keep_workers_waiting(only_worker, lora):
    task = TransformerSource(str(TINY_SD3), None, False, 3, Objective(), seed=0, lora=lora)()
    model, table = DistributedDataParallel(task, **DATA_PARALLEL), encoded_clips(3, "sd3")
    for step in range(2):
        model(table, range(3), step, Phase((), 1, 3)).total.backward()
    unread = [name for name, each in task.model.named_parameters() if each.requires_grad and each.grad is None]
    assert unread
    assert all(name.startswith("transformer_blocks.2.attn") for name in unread)


def test_a_training_that_diverges_ends(parts, table, tmp_path):
    own = job(parts, tmp_path)
    task = SOURCE()
    torch.nn.init.constant_(task.model.proj_out.bias, torch.nan)
    training = Training(task, task, torch.optim.AdamW(task.model.parameters()), None)
    for _ in range(9):
        train_step(own, training, own.phases[0], table.slice(0, 6), range(6))
    with pytest.raises(TrainingDivergedError, match="10 steps in a row"):
        train_step(own, training, own.phases[0], table.slice(0, 6), range(6))
    assert training.step == 10
