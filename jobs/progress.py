"""Progress of a render on the terminal: a bar where there is one, plain lines elsewhere."""

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

from pipeline.rows import Batch

LINE_SECONDS = 10.0

logger = logging.getLogger("pyramid-render")


class Progress:
    """Counts finished rows; a bar on a terminal, else a line every 10 seconds."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.failed = total, 0, 0
        self.started = self.line_at = time.monotonic()
        self.bar = tqdm(total=total, unit="row", desc="rendering", disable=not (sys.stderr.isatty() and total))

    def __enter__(self) -> "Progress":
        if self.bar.disable and self.total:
            logger.info("rendering %d rows; loading models", self.total)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.close()

    def update(self, batch: Batch | None) -> None:
        """Take a finished batch, or nothing."""
        rows = [item.row for item in batch.items] if batch else []
        self.done += len(rows)
        self.total = max(self.total, self.done)  # rows that are flagged meanwhile may come once more
        self.failed += sum(row.error is not None for row in rows)
        self.bar.set_postfix(failed=self.failed, refresh=False)
        self.bar.update(len(rows))
        if self.bar.disable and self.total and time.monotonic() - self.line_at >= LINE_SECONDS:
            self._line()

    def _line(self) -> None:
        self.line_at = time.monotonic()
        elapsed = self.line_at - self.started
        left = f", about {elapsed / self.done * (self.total - self.done):.0f} s left" if self.done else ""
        logger.info("%d of %d rows, %d failed, %.0f s%s", self.done, self.total, self.failed, elapsed, left)
