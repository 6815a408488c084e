"""How many processes sample a batch together: by guidance branch, and by tokens and attention heads."""

from dataclasses import dataclass

from pyramid_flow.errors import InvalidValueError

BRANCHES = 2
"""Rows of a guided evaluation per video: the negative branch and the positive one."""


@dataclass(frozen=True)
class ParallelConfig:
    """How many processes share a batch."""

    cfg_degree: int = 1
    """Processes over which the guidance branches are split, 1 or 2."""
    ulysses_degree: int = 1
    """Processes over which tokens and attention heads are split (DeepSpeed-Ulysses)."""

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.cfg_degree * self.ulysses_degree


def possible_configs(num_heads: int) -> dict[int, ParallelConfig]:
    """Return how each possible number of processes works together; branches are split first, which costs least."""
    divisors = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
    configs = [ParallelConfig(degree, n) for degree in (1, BRANCHES) for n in divisors]
    return {each.size: each for each in sorted(configs, key=lambda each: each.size)}


def parallel_config(size: int, num_heads: int) -> ParallelConfig:
    """Return how so many processes work together; raises InvalidValueError with the numbers that are possible."""
    possible = possible_configs(num_heads)
    if size not in possible:
        rule = f"cannot share {num_heads} attention heads; possible are {', '.join(map(str, possible))}"
        raise InvalidValueError("gpus_per_clip", size, rule)
    return possible[size]
