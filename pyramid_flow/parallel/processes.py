"""Processes of one machine, each with a device, that sample every batch together."""

import logging
import os
import signal
import tempfile
import threading
from collections.abc import Collection
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess, parent_process
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from pyramid_flow.checkpoints.checkpoint import Checkpoint
from pyramid_flow.errors import ParallelError, PyramidFlowError
from pyramid_flow.memory.placement import Placement, set_up_process
from pyramid_flow.parallel.config import ParallelConfig, parallel_config
from pyramid_flow.parallel.sampler import Parallel, join
from pyramid_flow.sampling.noise import NoiseSource
from pyramid_flow.sampling.params import SamplingParams
from pyramid_flow.sampling.sampler import OnStep, StepInfo, generate_latents
from pyramid_flow.sampling.schedule import PyramidSchedule
from pyramid_flow.text.embedding import TextEmbedding
from pyramid_flow.transformer.model import PyramidTransformer

CLOSE_S = 5.0

logger = logging.getLogger(__name__)


class ParallelSampler:
    """This process and `size - 1` children, each with its own copy of a checkpoint's transformer.

    Device r of the kind is that of process r; on a CPU they share the cores. A child that is lost ends this process:
    what the others wait for would never come. Children end with their parent, however it ends.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device_type: str, size: int, threads: int) -> None:
        """Start the children and wait until they are ready; threads: of each process.

        Raises InvalidValueError for a size that the model cannot be shared by, and ParallelError if a child fails.
        """
        config = parallel_config(size, checkpoint.num_attention_heads)
        context = mp.get_context("spawn")
        self._closed = threading.Event()
        self._folder = tempfile.TemporaryDirectory()  # where they meet; NCCL comes back to it later
        self._connections: list[Connection] = []
        self._children: list[BaseProcess] = []
        meeting = (Path(self._folder.name) / "meeting").as_uri()
        for rank in range(1, size):
            own, other = context.Pipe()
            arguments = (other, checkpoint, dtype, device_type, rank, config, meeting, threads)
            child = context.Process(target=_member, args=arguments, name=f"sampler {rank}", daemon=True)
            child.start()
            other.close()
            self._connections.append(own)
            self._children.append(child)
        self._await_children()
        threading.Thread(target=self._watch, name="sampler's children", daemon=True).start()
        self.parallel: Parallel = join(config, 0, _device(device_type, 0), meeting)

    def generate(
        self,
        transformer: PyramidTransformer,
        schedule: PyramidSchedule,
        text: TextEmbedding,
        negative: TextEmbedding | None,
        params: SamplingParams,
        noise: NoiseSource,
        *,
        image_latent: Tensor | None = None,
        cache: bool | Collection[int],
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Do what `generate_latents` does, together; the noise goes to the children as it is, by pickle.

        Raises ParallelError for anything but a wrong argument.
        """
        task: dict[str, Any] = {
            "schedule": schedule,
            "text": text,
            "negative": negative,
            "params": params,
            "noise": noise,
            "image_latent": image_latent,
            "cache": cache,
        }
        told = None if on_step is None else self._telling(on_step)
        for connection in self._connections:
            connection.send((task, on_step is not None))
        try:
            return generate_latents(transformer, **task, on_step=told, parallel=self.parallel)
        except PyramidFlowError:
            raise  # as in every child
        except Exception as error:
            raise ParallelError(f"sampling with {len(self._children)} other processes failed: {error}") from error

    def close(self) -> None:
        """End the children."""
        self._closed.set()
        for child in self._children:
            child.kill()
        for child in self._children:
            child.join(CLOSE_S)
        if dist.is_initialized():
            dist.destroy_process_group()
        self._folder.cleanup()

    def _await_children(self) -> None:
        """Wait until every child has loaded its model."""
        for child, connection in zip(self._children, self._connections, strict=True):
            try:
                connection.recv()
            except EOFError:
                child.join()
                self.close()
                message = f"{child.name} ended with exit code {child.exitcode} while it loaded the model"
                raise ParallelError(message) from None

    def _telling(self, on_step: OnStep) -> OnStep:
        """Return what asks `on_step` and tells the children its answer."""

        def told(info: StepInfo) -> Tensor | None:
            answer = on_step(info)
            for connection in self._connections:
                connection.send(answer)
            return answer

        return told

    def _watch(self) -> None:
        wait([child.sentinel for child in self._children])
        if not self._closed.is_set():
            lost = [f"{child.name} (exit code {child.exitcode})" for child in self._children if not child.is_alive()]
            logger.error("this process ends, as it lost %s", ", ".join(lost))
            os._exit(1)


def _member(
    connection: Connection,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device_type: str,
    rank: int,
    config: ParallelConfig,
    meeting: str,
    threads: int,
) -> None:
    """Be a child: sample what the parent samples until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    set_up_process(threads)
    device = _device(device_type, rank)
    transformer = Placement(device).place(checkpoint.load_transformer(dtype, "cpu"))
    connection.send(True)
    parallel = join(config, rank, device, meeting)
    while True:
        task, is_watched = connection.recv()
        on_step = (lambda _: connection.recv()) if is_watched else None
        try:
            generate_latents(transformer, **task, on_step=on_step, parallel=parallel)
        except PyramidFlowError as error:
            logger.info("the parent has failed with this too: %s", error)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
    os._exit(1)


def _device(device_type: str, rank: int) -> torch.device:
    """Return the device of a process, and make it the one that new tensors of its kind go to."""
    if device_type == "cpu":
        return torch.device("cpu")
    torch.accelerator.set_device_index(rank)
    return torch.device(device_type, rank)
