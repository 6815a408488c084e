"""What a sampler tells the table of videos, and what it hears: which are followed, and which are not wanted."""

import logging
import time
from collections.abc import Callable, Sequence

import torch
from sqlalchemy.exc import SQLAlchemyError
from torch import Tensor

from pipeline.request import sampling_params
from pipeline.rows import Item
from pipeline.serving.queue.records import Claim
from pipeline.serving.queue.store import Store
from pyramid_flow import PyramidSchedule, StepInfo

logger = logging.getLogger(__name__)

REPORT_S = 0.25
BEFORE, SAMPLING = 5, 85
"""Percent of progress before the sampler, and of the sampler; the rest is for what comes after it."""


class ProgressReporter:
    """The sampler's `on_step` for a batch of claimed jobs; see `generate_latents`.

    The table is told at most every `report_s` seconds. Rows whose claim is lost, because they were cancelled or are
    someone else's by now, leave the batch. The finished units of rows that are followed are handed to `relay`.
    """

    def __init__(
        self,
        store: Store,
        relay: Callable[[Item, Sequence[Tensor]], None],
        items: Sequence[Item],
        *,
        report_s: float = REPORT_S,
    ) -> None:
        self.store, self.relay, self.items, self.report_s = store, relay, items, report_s
        self.claims = [Claim.of_row(item.row.id) for item in items]
        self.params = sampling_params([item.request for item in items])
        self.wanted = [True] * len(items)
        self.followed: set[Claim] = set()
        self.relayed = [0] * len(items)
        self.done, self.total = 0, 0
        self.told_at = -report_s

    def __call__(self, info: StepInfo) -> Tensor:
        """Count a step, and say which rows shall go on: bool [B]."""
        if not self.total:
            self.total = self._work_from(info.unit)
        self.done += _pixels(info.level)
        if time.monotonic() - self.told_at >= self.report_s or self.done == self.total:
            self._tell(BEFORE + SAMPLING * self.done // self.total)
            self.told_at = time.monotonic()
        self._relay(info)
        return torch.tensor(self.wanted)

    def _tell(self, progress: int) -> None:
        try:
            held = self.store.report(self.claims, progress)
        except SQLAlchemyError as error:  # a database that fails for a while must not cost the videos
            logger.warning("progress was not told: %s", type(error).__name__)
            return
        self.followed = {claim for claim, is_followed in held.items() if is_followed}
        self.wanted = [is_wanted and claim in held for is_wanted, claim in zip(self.wanted, self.claims, strict=True)]

    def _relay(self, info: StepInfo) -> None:
        for place, row in enumerate(info.rows):
            units = info.finished[self.relayed[row] :]
            if units and self.claims[row] in self.followed:
                self.relay(self.items[row], [unit[place : place + 1] for unit in units])
                self.relayed[row] = len(info.finished)

    def _work_from(self, first_unit: int) -> int:
        units = range(first_unit, self.params.num_units)
        levels = PyramidSchedule().levels
        return sum(len(self.params.steps(unit, level)) * _pixels(level.index) for unit in units for level in levels)


def _pixels(level: int) -> int:
    """Return what a step at a level counts: its pixels, in multiples of those of level 0."""
    return 1 << 2 * level
