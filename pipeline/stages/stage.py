"""What all stages share: which model they load, and that an error fails a row and never a batch."""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from pipeline.rows import Batch, Item
from pipeline.weights import open_checkpoint
from pyramid_flow import Checkpoint
from pyramid_flow.checkpoint import DTYPES
from pyramid_flow.fit import SMALLER_TILES, choose_placement
from pyramid_flow.memory_modes import Memory
from pyramid_flow.placement import Placement, free_bytes, process_bytes, release_memory, set_up_process
from pyramid_flow.team import TeamError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelConfig:
    """Which checkpoint a worker loads, and how: device ("cpu", "cuda") and dtype ("float32", "bfloat16").

    path: folder, name or URL; threads: CPU threads of the worker's tensor operations; lora: adapters, as
    `Checkpoint.open` takes them; memory: see `PyramidFlowPipeline.from_pretrained`; together: whether one process loads
    all stages; cache_gib: of the sampler's history cache, None = half of the memory that is free; gpus_per_clip:
    devices that share every batch of a sampler; fingerprint: the checkpoint's, to be told in files, empty = it is not.
    """

    path: str
    variant: str | None
    device: str
    dtype: str
    threads: int
    lora: tuple[str, ...] = ()
    memory: Memory = "auto"
    together: bool = False
    cache_gib: float | None = None
    gpus_per_clip: int = 1
    fingerprint: str = ""

    def open(self) -> Checkpoint:
        """Open the checkpoint, in a process that is set up for it."""
        set_up_process(self.threads)
        return open_checkpoint(self.path, self.variant, self.lora)

    def placement(self, checkpoint: Checkpoint, parts: Collection[str]) -> Placement:
        """Return where a stage's parts compute, and in which mode; together: as all parts of the process allow.

        Decoding counts in the smallest tiles, which are tried when it runs out of memory.
        """
        return choose_placement(
            checkpoint,
            self.torch_dtype,
            self.device,
            self.memory,
            parts=None if self.together else parts,
            tile=SMALLER_TILES[-1],
            available=process_bytes if self.together else free_bytes,
        )

    @property
    def cache_bytes(self) -> float | None:
        """Budget of the history cache in bytes."""
        return None if self.cache_gib is None else self.cache_gib * 2**30

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return DTYPES[self.dtype]


class Stage(ABC):
    """One step of the pipeline: maps the pending items of a batch, one for one."""

    name: ClassVar[str]

    def __call__(self, batch: Batch) -> Batch:
        """Process a batch. Failed rows pass through; a row that raises becomes a failed row with its reason.

        Raises only an error after which the device is of no use to this process.
        """
        pending = [item for item in batch.items if item.is_pending]
        if not pending:
            return batch
        started = time.perf_counter()
        done = self._attempt(pending)
        share = (time.perf_counter() - started) / len(pending)
        rows = [item.row.id for item in pending]
        logger.info("%s: %d rows", self.name, len(rows), extra={"stage": self.name, "rows": rows, "seconds": share})
        timed = iter(_with_seconds(item, self.name, share) for item in done)
        return batch.with_items([next(timed) if item.is_pending else item for item in batch.items])

    def _attempt(self, items: Sequence[Item]) -> list[Item]:
        try:
            return self.process(items)
        except (torch.AcceleratorError, TeamError):
            raise  # a device-side assert, say: every later call would fail too
        except Exception as caught:  # noqa: BLE001 - recorded in the row, or tried again row by row
            error = caught.with_traceback(None)  # whose frames would keep the attempt's tensors while rows are retried
        if isinstance(error, torch.OutOfMemoryError):
            release_memory()
        rows = [item.row.id for item in items]
        if len(items) > 1:
            logger.warning("%s: a batch failed (%s), trying its rows alone", self.name, error, extra={"rows": rows})
            return [self._attempt([item])[0] for item in items]
        logger.warning("%s: row %s failed: %s", self.name, rows[0], error, extra={"stage": self.name, "rows": rows})
        return [items[0].failed(self.name, error)]

    @abstractmethod
    def process(self, items: Sequence[Item]) -> list[Item]:
        """Map items of one shape, one for one and in order; may raise for all of them."""


def _with_seconds(item: Item, stage: str, seconds: float) -> Item:
    return Item(item.row.updated(seconds=item.row.seconds | {stage: seconds}), item.tensors)
