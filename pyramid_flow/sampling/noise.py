"""Where every random number of a generation comes from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Protocol

import torch
from torch import Tensor

from pyramid_flow.errors import InvalidValueError
from pyramid_flow.sampling.pyramid import block_noise

MAX_SEED = 2**63 - 1


class NoiseSource(Protocol):
    """Draws float32 noise on the CPU; `shape` always begins with the batch size [B,C,T,h,w]."""

    def initial(self, shape: Sequence[int]) -> Tensor:
        """White noise at full latent resolution, before it is brought down to level 0."""
        ...

    def block(self, shape: Sequence[int]) -> Tensor:
        """Noise with block covariance, at the level that is about to be sampled."""
        ...

    def posterior(self, shape: Sequence[int]) -> Tensor:
        """White noise for sampling the latent of an input image."""
        ...


@dataclass(frozen=True)
class SeededNoise:
    """One generator per row, so that a row's noise does not depend on its batch.

    Order of the draws, per row: `posterior` if there is an input image, `initial`, then one `block` per unit and level
    above 0 in sampling order.
    """

    seeds: Sequence[int]
    gamma: float = 1 / 3
    generators: tuple[torch.Generator, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for seed in self.seeds:
            if not isinstance(seed, Integral):
                raise InvalidValueError("seed", repr(seed), "is not a whole number")
            if not 0 <= seed <= MAX_SEED:
                raise InvalidValueError("seed", seed, "is not between 0 and 2^63 - 1")
        object.__setattr__(self, "generators", tuple(torch.Generator().manual_seed(seed) for seed in self.seeds))

    def initial(self, shape: Sequence[int]) -> Tensor:
        """White noise at full latent resolution."""
        return self._white(shape)

    def block(self, shape: Sequence[int]) -> Tensor:
        """Noise whose 2x2 blocks have covariance -gamma."""
        return block_noise(self._white(shape), self.gamma)

    def posterior(self, shape: Sequence[int]) -> Tensor:
        """White noise for the latent of an input image."""
        return self._white(shape)

    def _white(self, shape: Sequence[int]) -> Tensor:
        if shape[0] != len(self.generators):
            raise InvalidValueError("batch size", shape[0], f"does not match the {len(self.generators)} seeds")
        return torch.stack([torch.randn(tuple(shape[1:]), generator=g, dtype=torch.float32) for g in self.generators])
