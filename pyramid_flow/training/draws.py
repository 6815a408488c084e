"""Where every random number of a training step comes from: keyed, so that neither workers nor batches change a run."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class TrainingDraws(Protocol):
    """Draws float32 numbers on the CPU for a fixed number of samples."""

    def uniform(self) -> Tensor:
        """One number in [0, 1) per sample: [B]."""
        ...

    def normal(self, shape: Sequence[int]) -> Tensor:
        """White noise; `shape` is that of one sample, and [B, *shape] comes."""
        ...

    def select(self, rows: Sequence[int]) -> "TrainingDraws":
        """Return the draws of some of the samples."""
        ...


@dataclass(frozen=True)
class KeyedRandom:
    """One generator per sample, keyed by (seed, step, index of the sample in the global batch)."""

    seed: int
    step: int
    samples: Sequence[int]
    generators: tuple[torch.Generator, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not self.generators:
            keys = [_key(self.seed, self.step, sample) for sample in self.samples]
            object.__setattr__(self, "generators", tuple(torch.Generator().manual_seed(key) for key in keys))

    def uniform(self) -> Tensor:
        """One number in [0, 1) per sample: [B]."""
        return torch.cat([torch.rand(1, generator=generator) for generator in self.generators])

    def normal(self, shape: Sequence[int]) -> Tensor:
        """White noise [B, *shape]."""
        return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in self.generators])

    def select(self, rows: Sequence[int]) -> "KeyedRandom":
        """Return the draws of some of the samples; they go on where those of the whole were."""
        generators = tuple(self.generators[row] for row in rows)
        return KeyedRandom(self.seed, self.step, [self.samples[row] for row in rows], generators)


def _key(seed: int, step: int, sample: int) -> int:
    digest = hashlib.sha256(f"{seed} {step} {sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # generators take 63 bits
