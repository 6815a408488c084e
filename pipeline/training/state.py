"""Where a training stands, and how that is kept: weights, their running mean and AdamW's state, sharded or not."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from pipeline.training.tasks import Task

WEIGHTS, STATE = "training.safetensors", "state.json"


@dataclass
class Training:
    """What a worker trains, and where it stands.

    ema: a running mean of the weights, or None; failures: steps in a row, up to now, whose gradient was not finite.
    """

    task: Task
    model: nn.Module
    optimizer: Optimizer
    ema: AveragedModel | None
    step: int = 0
    failures: int = 0

    @property
    def result(self) -> nn.Module:
        """The model as the training gives it: the running mean, if there is one."""
        return self.task.model if self.ema is None else self.ema.module


def trained_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that are trained, whole. If they are sharded, every worker must go through all of them."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, _whole(parameter.detach())


def state(training: Training) -> Iterator[tuple[str, Tensor]]:
    """Yield everything that a training goes on from, as `trained_state` does."""
    for name, tensor in trained_state(training.task.model):
        yield f"model.{name}", tensor
    if training.ema is not None:
        yield "ema.n_averaged", training.ema.n_averaged
        for name, tensor in trained_state(training.ema.module):
            yield f"ema.module.{name}", tensor
    for name, parameter in training.task.model.named_parameters():
        for key, value in training.optimizer.state.get(parameter, {}).items():
            yield f"optimizer.{key}.{name}", _whole(value)


def save(training: Training, folder: Path, rank: int = 0) -> None:
    """Write everything that a training goes on from, as safetensors and JSON; the first worker does."""
    tensors = dict(on_first_worker(state(training), rank))
    if rank == 0:
        save_file(tensors, folder / WEIGHTS)
        (folder / STATE).write_text(json.dumps({"step": training.step}))


@torch.no_grad()
def restore(training: Training, folder: Path) -> None:
    """Go on from what `save` wrote."""
    tensors = load_file(folder / WEIGHTS)
    models: dict[str, nn.Module] = {"model.": training.task.model}
    if training.ema is not None:
        training.ema.n_averaged.copy_(tensors["ema.n_averaged"])
        models["ema.module."] = training.ema.module
    for prefix, each in models.items():
        for name, parameter in each.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(_placed_as(parameter, tensors[prefix + name]))
    for name, parameter in training.task.model.named_parameters():
        keys = ("step", "exp_avg", "exp_avg_sq")
        found = {key: tensors.get(f"optimizer.{key}.{name}") for key in keys}
        training.optimizer.state[parameter] = {
            key: value.to(parameter.device) if key == "step" else _placed_as(parameter, value)
            for key, value in found.items()
            if value is not None
        }
    training.step = json.loads((folder / STATE).read_text())["step"]


def _whole(tensor: Tensor) -> Tensor:
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole


def _placed_as(parameter: Tensor, value: Tensor) -> Tensor:
    """Return a whole tensor where a parameter lies, and sharded if that is."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def on_first_worker(named: Iterator[tuple[str, Tensor]], rank: int) -> Iterator[tuple[str, Tensor]]:
    """Go through all, and yield them on the first worker, on the CPU."""
    for name, tensor in named:
        if rank == 0:
            yield name, tensor.detach().cpu().contiguous()


def trained_weights(folder: Path) -> dict[str, Tensor]:
    """Return what a training has made of the model's weights: their running mean if there is one."""
    tensors = load_file(folder / WEIGHTS)
    return _under("ema.module.", tensors) or _under("model.", tensors)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
