"""Counters and histograms of the farm, exported on every node's metrics port as ray_pyramid_*."""

from collections import Counter

from ray.util import metrics

from pipeline.rows import Batch

BOUNDARIES_S = [0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000]
BOUNDARIES_ROWS = [1.0, 2, 4, 8, 16, 32]


class StageMetrics:
    """What a worker's stages do: rows by outcome, failures by reason, rows and seconds per batch, busy time,
    published bytes.

    Busy time is a counter of its own because the sum of Ray's histograms is an approximation.
    """

    def __init__(self) -> None:
        self.rows = metrics.Counter("pyramid_rows", "Rows that left a stage", ("stage", "status"))
        self.failures = metrics.Counter("pyramid_failures", "Rows that failed", ("stage", "reason"))
        self.sizes = metrics.Histogram("pyramid_batch_rows", "Rows per batch", BOUNDARIES_ROWS, ("stage",))
        self.seconds = metrics.Histogram("pyramid_batch_seconds", "Seconds per batch", BOUNDARIES_S, ("stage",))
        self.busy = metrics.Counter("pyramid_busy_seconds", "Seconds that workers of a stage were busy", ("stage",))
        self.bytes = metrics.Counter("pyramid_published_bytes", "Bytes of published videos")

    def count(self, stage: str, before: Batch, after: Batch) -> None:
        """Count a batch before and after a stage; rows that had failed before do not count."""
        changes = [(old.row, new.row) for old, new in zip(before.items, after.items, strict=True) if old.is_pending]
        rows = [new for _, new in changes]
        if rows:
            self.sizes.observe(len(rows), {"stage": stage})
        statuses = Counter("failed" if row.error else "skipped" if row.skipped else "succeeded" for row in rows)
        for status, number in statuses.items():
            self.rows.inc(number, {"stage": stage, "status": status})
        for reason, number in Counter(row.error.type for row in rows if row.error).items():
            self.failures.inc(number, {"stage": stage, "reason": reason})
        if seconds := sum(row.seconds.get(stage, 0.0) for row in rows):
            self.seconds.observe(seconds, {"stage": stage})
            self.busy.inc(seconds, {"stage": stage})
        if published := sum(new.bytes or 0 for old, new in changes if old.bytes is None):
            self.bytes.inc(published)


class QueueMetrics:
    """How many rows of a job are neither finished nor failed yet; kept by its driver."""

    def __init__(self, num_rows: int) -> None:
        self.left = num_rows
        self.gauge = metrics.Gauge("pyramid_rows_left", "Rows of the job that have not finished")
        self.gauge.set(self.left)

    def finished(self, num_rows: int) -> None:
        """Count rows that have finished, well or not."""
        self.left -= num_rows
        self.gauge.set(self.left)


class ServiceMetrics:
    """What becomes of videos that were asked for: how long they wait, when they begin to show, and how they end."""

    def __init__(self) -> None:
        self.waits = metrics.Histogram("pyramid_queue_seconds", "Seconds before a video was taken", BOUNDARIES_S)
        self.fragments = metrics.Histogram(
            "pyramid_first_fragment_seconds", "Seconds from the start of a video to its first fragment", BOUNDARIES_S
        )
        self.ends = metrics.Counter("pyramid_videos", "Videos that ended", ("status", "reason"))

    def queued(self, seconds: float) -> None:
        """Count a video that is taken for the first time, after so many seconds."""
        self.waits.observe(seconds)

    def first_fragment(self, seconds: float) -> None:
        """Count a video whose first fragment can be seen, so many seconds after it was begun."""
        self.fragments.observe(seconds)

    def ended(self, status: str, reason: str = "") -> None:
        """Count a video that has ended; reason: the code of its error."""
        self.ends.inc(1, {"status": status, "reason": reason})
