"""What all stages share: an error fails a row and never a batch."""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from pipeline.rows import Batch, Item
from pipeline.storage.redaction import brief
from pyramid_flow.errors import ParallelError

logger = logging.getLogger(__name__)


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
        except Exception as caught:
            import torch  # here, so that workers whose stages need no model do not load it

            from pyramid_flow.memory.placement import release_memory

            if isinstance(caught, torch.AcceleratorError | ParallelError):
                raise  # a device-side assert, say: every later call would fail too
            error = caught.with_traceback(None)  # whose frames would keep the attempt's tensors while rows are retried
        if isinstance(error, torch.OutOfMemoryError):
            release_memory()
        rows, reason = [item.row.id for item in items], brief(str(error))
        if len(items) > 1:
            logger.warning("%s: a batch failed (%s), trying its rows alone", self.name, reason, extra={"rows": rows})
            return [self._attempt([item])[0] for item in items]
        logger.warning("%s: row %s failed: %s", self.name, rows[0], reason, extra={"stage": self.name, "rows": rows})
        return [items[0].failed(self.name, error)]

    @abstractmethod
    def process(self, items: Sequence[Item]) -> list[Item]:
        """Map items of one shape, one for one and in order; may raise for all of them."""


def _with_seconds(item: Item, stage: str, seconds: float) -> Item:
    return Item(item.row.updated(seconds=item.row.seconds | {stage: seconds}), item.tensors)
