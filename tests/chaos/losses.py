"""Which rows were rendered more than once, and which kills explain it."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from tests.chaos.monkey import Struck

DYING_S = 20.0
"""Workers outlive their node or driver for a moment."""


@dataclass(frozen=True)
class Render:
    """A row was about to be sampled."""

    row: str
    at: float
    process: str
    node: str


@dataclass(frozen=True)
class Loss:
    """What happened, and the rows that it may have cost a render."""

    what: str
    begin: float
    end: float
    rows: frozenset[str]


def renders_of(samples: Sequence[dict[str, object]]) -> dict[str, list[Render]]:
    """Return the renders of every row in order; samples: the sampler's log."""
    renders: dict[str, list[Render]] = defaultdict(list)
    for record in samples:
        for row in record["rows"]:
            renders[row].append(Render(row, record["at"], str(record["pid"]), record["node"]))
    return renders


@dataclass(frozen=True)
class Losses:
    """What can be lost: rows that were begun, until they have arrived at the driver, or in the ledger.

    arrived: when each row came to a driver; kept: rows in the ledger after each driver's death, by its process.
    """

    renders: dict[str, list[Render]]
    arrived: dict[str, list[float]]
    kept: dict[str, Collection[str]]

    def by_blow(self, struck: Struck) -> Loss:
        """Return what a blow put at stake."""
        if struck.target == "driver":
            begun = {row for row, renders in self.renders.items() if renders[0].at < struck.end + DYING_S}
            rows = frozenset(begun - set(self.kept[struck.victim]))
        else:
            rows = frozenset(row for row in self.renders if self._is_at_stake(row, struck))
        return Loss(f"{struck.target} {struck.victim[:8]}", struck.begin, struck.end + DYING_S, rows)

    def by_killer(self, row: str) -> list[Loss]:
        """Return what a row that kills its worker put at stake, each time it was rendered."""
        deaths = [Struck("worker", render.at, render.at, render.process) for render in self.renders[row]]
        losses = [self.by_blow(death) for death in deaths]
        return [replace(loss, what=f"{row} in {loss.what}") for loss in losses]

    def unexplained(self, losses: Sequence[Loss]) -> list[tuple[Render, Render]]:
        """Return the pairs of renders of one row between which nothing happened that could have lost the first."""
        return [
            (first, again)
            for row, renders in self.renders.items()
            for first, again in pairwise(renders)
            if not any(row in loss.rows and loss.begin <= again.at and first.at <= loss.end for loss in losses)
        ]

    def _is_at_stake(self, row: str, struck: Struck) -> bool:
        """Whether the last render before the blow was by the victim, and had not arrived."""
        before = [render for render in self.renders[row] if render.at <= struck.end + DYING_S]
        mine = [render for render in before if struck.victim in (render.process, render.node)]
        return bool(mine) and not any(mine[-1].at < at < struck.begin for at in self.arrived.get(row, ()))
