"""Which model a stage loads, and how."""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from pipeline.storage.weights import open_checkpoint
from pyramid_flow import Checkpoint
from pyramid_flow.checkpoints.checkpoint import DTYPES
from pyramid_flow.memory.modes import Memory
from pyramid_flow.memory.placement import Placement, free_bytes, process_bytes, set_up_process
from pyramid_flow.memory.planner import SMALLER_TILES, choose_placement


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
