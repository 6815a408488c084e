"""Where a model's parts compute, and when their weights are there: the memory modes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import psutil
import torch
from torch import Tensor, nn

from pyramid_flow.errors import InvalidValueError
from pyramid_flow.memory.modes import MemoryMode

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Placement:
    """The device on which parts compute, and the mode in which their weights come there."""

    device: torch.device
    mode: MemoryMode = "full"

    def place(self, module: Module) -> Module:
        """Return a part that was loaded on the CPU, made ready for the mode; its `device` is where it computes."""
        if self.mode == "full":
            return module.to(self.device)
        if self.mode == "sequential":
            from accelerate.hooks import attach_align_device_hook  # here, because it is slow to import

            # Buffers move at once: they are few, and some are read outside of a forward pass.
            attach_align_device_hook(
                module, execution_device=self.device, offload=True, weights_map=module.state_dict()
            )
        return module

    @contextmanager
    def working(self, module: nn.Module) -> Iterator[None]:
        """Have a part's weights on the device meanwhile, if the mode is offload; in the others they come by themselves.

        The weights on the CPU are kept, so that nothing is copied back.
        """
        if self.mode != "offload":
            yield
            return
        tensors = [*module.parameters(), *module.buffers()]
        resting = [tensor.data for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = tensor.data.to(self.device)
            yield
        finally:
            for tensor, data in zip(tensors, resting, strict=True):
                tensor.data = data
            release_memory()


def set_up_process(threads: int) -> None:
    """Let this process compute with so many CPU threads, and in float32 where float32 is asked for."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # to which convolutions would round their inputs


def check_device(device: torch.device | str | int) -> torch.device:
    """Return a device that tensors can be brought to; raises InvalidValueError for one that is not there."""
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise InvalidValueError("device", device, f"cannot be used here: {reason}") from error


def execution_device(module: nn.Module) -> torch.device:
    """Return where a module computes: where its weights are, or where accelerate's hooks bring them for a layer."""
    layer = next(each for each in module.modules() if any(True for _ in each.parameters(recurse=False)))
    hook = getattr(layer, "_hf_hook", None)
    return next(layer.parameters()).device if hook is None else torch.device(hook.execution_device)


def to_device_async(tensor: Tensor, device: torch.device) -> Tensor:
    """Return what was made on the CPU on a device, without waiting for what the device is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def process_bytes(device: torch.device) -> int:
    """Return what this process can have of an accelerator's memory in all: what is free, and what it has taken."""
    free, _ = torch.accelerator.get_memory_info(device)
    return free + torch.accelerator.memory_reserved(device)


def free_bytes(device: torch.device) -> int:
    """Return what this process can still fill of a device's memory; the host's is for all processes."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    return process_bytes(device) - torch.accelerator.memory_allocated(device)


def release_memory() -> None:
    """Give cached device memory back, so that what is tried next finds all there is."""
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
