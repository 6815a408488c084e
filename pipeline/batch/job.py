"""One render job: the passes over what is missing, the rows only the driver writes, and the pictures at the end."""

import logging
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.batch import runner
from pipeline.batch.costs import Costs, Measured, write_measured
from pipeline.batch.planner import Plan
from pipeline.ledger import job_records, ledger
from pipeline.ledger.failed import write_failed
from pipeline.media.quality import Figures
from pipeline.reports.contact_sheet import GalleryEntry, gallery
from pipeline.reports.report import LiveReport
from pipeline.rows import LEDGER_SCHEMA, Batch, Item, RowError, ledger_table
from pipeline.storage.faults import StorageError, StorageFullError
from pipeline.storage.storage import Storage
from pipeline.tables.batching import read_rows
from pipeline.tables.worklist import RowRules, UnrenderedRow, Worklist
from pyramid_flow.errors import PyramidFlowError

logger = logging.getLogger(__name__)

MAX_PASSES = 3
MAX_FAILURES, MAX_FAILED_SHARE, SHARE_FROM_ROWS = 20, 0.05, 200
GRACE_S, IDLE_S = 60.0, 2.0
STALL_S, STALL_ASKED_S = 1800.0, 5.0
GALLERY_ROWS = 64

OnBatch = Callable[[Batch | None], None]
"""Told every finished batch, and None now and then while nothing finishes."""


class TooManyFailures(PyramidFlowError):
    """Failures that are not the rows' own fault keep coming: the machine, the storage or the model is to blame."""


class RowsMissing(PyramidFlowError):
    """Rows of the input never arrived at the ledger."""


class Stalled(PyramidFlowError):
    """Nothing has run for a long time: workers wait for resources that do not come."""


@dataclass
class StopRequest:
    """Whether somebody asked the job to stop; set by a signal handler."""

    requested: bool = False

    def ask(self) -> None:
        """Ask the job to stop; raises KeyboardInterrupt the second time, which stops it at once."""
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@dataclass
class Stopping:
    """A stop under way: over when its grace is, or when nothing has run for some time."""

    grace_s: float
    began: float = field(default_factory=time.monotonic)
    busy: float = field(default_factory=time.monotonic)

    def is_over(self, is_idle: Callable[[], bool]) -> bool:
        """Tell whether to wait no longer."""
        now = time.monotonic()
        if not is_idle():
            self.busy = now
        return now - self.began > self.grace_s or now - self.busy > IDLE_S


@dataclass
class Stall:
    """Time in which no stage ran any row; Ray Data itself would wait for ever."""

    limit_s: float
    busy: float = field(default_factory=time.monotonic)
    asked: float = field(default_factory=time.monotonic)

    def check(self, is_idle: Callable[[], bool]) -> None:
        """Raise Stalled if there was too much of it; asks every few seconds."""
        now = time.monotonic()
        if now - self.asked < STALL_ASKED_S:
            return
        self.asked = now
        if not is_idle():
            self.busy = now
        if now - self.busy > self.limit_s:
            raise Stalled(
                f"no row has been worked on for {self.limit_s:.0f} s: GPUs of the plan are missing, or models take "
                "longer to load (see --stall-s); a new start plans with the GPUs that are there"
            )


@dataclass
class Breaker:
    """Counts failures that are not the rows' own fault; too many in a row, too large a share, or a full store trip it.

    tripped: why the job should end, or empty.
    """

    max_in_a_row: int
    total: int = 0
    failed: int = 0
    in_a_row: int = 0
    tripped: str = ""

    def take(self, batch: Batch | None) -> None:
        """Count a finished batch."""
        for item in batch.items if batch else ():
            error = item.row.error
            self.total += 1
            if error is None:
                self.in_a_row = 0
            elif not error.is_own_fault:
                self.in_a_row += 1
                self.failed += 1
                self._check(error)

    def _check(self, error: RowError) -> None:
        too_many = self.total >= SHARE_FROM_ROWS and self.failed > MAX_FAILED_SHARE * self.total
        full = error.type == StorageFullError.__name__
        if full or too_many or self.in_a_row >= self.max_in_a_row:
            self.tripped = (
                f"{self.failed} of {self.total} rows failed through no fault of their own, {self.in_a_row} in a row; "
                f"the last in {error.stage}: {error.type}: {error.message}"
            )


@dataclass(frozen=True)
class RenderJob:
    """A job that is checked and planned.

    constants: ledger columns that are equal for all its rows; plan_for: the plan other costs would give; shard: which
    of several jobs on one input it is, such as 2-of-4; max_failures: see `Breaker`; grace_s: how long a stop waits for
    what is in flight; stall_s: see `Stall`; reroll: how often a flagged row is rendered again with another seed, at
    most; measured: what its rows cost; gpu_hour_price: of one GPU, for the report.
    """

    run: str
    storage: Storage
    worklist: Worklist
    rules: RowRules
    plan: Plan
    plan_for: Callable[[Costs], Plan]
    constants: Mapping[str, str]
    retry_failed: bool
    shard: str | None = None
    flush_rows: int = ledger.FLUSH_ROWS
    flush_seconds: float = ledger.FLUSH_SECONDS
    limits: runner.RetryLimits = field(default_factory=runner.RetryLimits)
    max_failures: int = MAX_FAILURES
    grace_s: float = GRACE_S
    stall_s: float = STALL_S
    reroll: int = 0
    measured: Measured = field(default_factory=Measured)
    gpu_hour_price: float | None = None

    def pending(self) -> Worklist:
        """Return what the ledger lacks, or what failed in another run if failed rows are to be tried again."""
        view = ledger.read(self.storage, ["id", "status", "run"])
        done = pc.or_(pc.equal(view["status"], "succeeded"), pc.equal(view["run"], self.run))
        settled = view.filter(done) if self.retry_failed else view
        return self.worklist.remaining(settled["id"].combine_chunks())

    def rerolls(self, numbers: Collection[int]) -> Worklist:
        """Return the flagged rows whose next reroll is one of these, counted from 1.

        A reroll counts whatever became of it, so that no row is rendered for ever.
        """
        view = ledger.read(self.storage, ["id", "flags"])
        flagged = view.filter(pc.greater(pc.list_value_length(view["flags"]), 0))
        tried = dict.fromkeys(flagged["id"].to_pylist(), 0)
        for table in ledger.read_parts(self.storage, ["id", "rerolls"], tried) if tried else ():
            for row in table.to_pylist():
                tried[row["id"]] = max(tried[row["id"]], row.get("rerolls") or 0)
        due = [row_id for row_id, number in tried.items() if number + 1 in numbers]
        return self.worklist.only(pa.array(due, pa.string()))

    @property
    def num_due(self) -> int:
        """Number of rows to render: what the ledger lacks, and flagged ones that have rerolls left."""
        flagged = self.rerolls(range(1, self.reroll + 1)).num_rows if self.reroll else 0
        return self.pending().num_rows + flagged

    def execute(self, on_batch: OnBatch, stop: StopRequest | None = None) -> None:
        """Render until nothing of the input is missing in the ledger, in at most 3 passes, or until asked to stop.

        Then flagged rows are rerolled, in a pass for each time. However it ends, what has finished is in the ledger
        afterwards. Raises TooManyFailures, and what Ray raises.
        """
        stop = stop or StopRequest()
        writer = ledger.LedgerWriter(self.storage, self.run, self.flush_rows, self.flush_seconds)
        heartbeat = job_records.Heartbeat(self.storage, self.run, self.pending().num_rows)
        heartbeat.write("running")
        report = LiveReport(self.storage, self.gpu_hour_price)

        def take(batch: Batch | None) -> None:
            self._record(batch, writer)
            items = batch.items if batch else ()
            heartbeat.count(len(items), sum(item.row.error is not None for item in items))
            self.measured.take(batch)
            report.tick()
            on_batch(batch)

        try:
            for _ in range(MAX_PASSES):
                pending = self.pending()
                if pending.num_rows == 0 or stop.requested:
                    break
                self._render(pending, self.rules, writer, take, stop)
                writer.flush()
            if not stop.requested:
                self._check_complete()
            for number in range(1, self.reroll + 1):
                if stop.requested:
                    break
                flagged = self.rerolls([number])
                if flagged.num_rows:
                    heartbeat.total = heartbeat.done + flagged.num_rows
                    self._render(flagged, replace(self.rules, reroll=number), writer, take, stop)
                    writer.flush()
            if not stop.requested:
                for batch in self._echoes():
                    self._record(batch, writer)
            writer.flush()
            write_measured(self.storage, self.measured)
            heartbeat.write("interrupted" if stop.requested else "finished")
            report.write()
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            with _logged("finished rows may be missing in the ledger, and will be rendered again"):
                writer.flush()
            with _logged("the state of the run could not be written"):
                heartbeat.write(
                    "interrupted" if interrupted else "broken", None if interrupted else traceback.format_exc()
                )
            if not interrupted:
                report.write()
            raise

    def _check_complete(self) -> None:
        """See that the ledger holds every row of the input, but for those that only the driver writes."""
        missing = self.pending().num_rows
        if missing:
            raise RowsMissing(f"{missing} rows are still missing after {MAX_PASSES} passes")

    def _render(
        self, rows: Worklist, rules: RowRules, writer: ledger.LedgerWriter, take: OnBatch, stop: StopRequest
    ) -> None:
        """Make one pass. A stop writes the open ledger part first, then waits for what is in flight."""
        rendering = runner.Rendering(rows, self.plan, rules, self.limits)
        breaker = Breaker(self.max_failures)
        stopping: Stopping | None = None
        stall = Stall(self.stall_s)
        for arrived in rendering:
            if arrived is None:
                stall.check(rendering.is_idle)
            batch = arrived.without_skipped() if arrived else None
            take(batch)
            breaker.take(batch)
            if stopping is None and (stop.requested or breaker.tripped):
                writer.flush()
                rendering.stop()
                stopping = Stopping(self.grace_s)
                logger.info("stopping: waiting at most %.0f s for rows in flight", self.grace_s)
            if stopping is not None and stopping.is_over(rendering.is_idle):
                break
        if breaker.tripped:
            raise TooManyFailures(breaker.tripped)

    def view(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the ledger's rows of this job's input; columns: those that are wanted, None = all."""
        return ledger.read(self.storage, columns, self.worklist.expected_ids())

    def write_failed(self) -> str | None:
        """Write failed.parquet, the input's rows that failed; returns its URL, or None if there are none."""
        view = self.view(["id", "status", "error_message"])
        failed = view.filter(pc.equal(view["status"], "failed"))
        reasons = dict(zip(failed["id"].to_pylist(), failed["error_message"].to_pylist(), strict=True))
        return write_failed(self.storage, self._named("failed", "parquet"), self.worklist, reasons)

    def write_gallery(self) -> str:
        """Write gallery.png, a contact sheet of the first 64 rows; returns its URL."""
        name = self._named("gallery", "png")
        rows = ledger.read(self.storage, ids=self.worklist.expected_ids().slice(0, GALLERY_ROWS))
        self.storage.put(name, gallery([self._gallery_entry(row) for row in rows.to_pylist()]))
        return self.storage.url(name)

    def _named(self, stem: str, suffix: str) -> str:
        return f"{stem}.{suffix}" if self.shard is None else f"{stem}-{self.shard}.{suffix}"

    def _record(self, batch: Batch | None, writer: ledger.LedgerWriter) -> None:
        if batch is None or not batch.items:
            writer.tick()
        else:
            writer.append(ledger_table(batch, {**self.constants, "run": self.run}))

    def _echoes(self) -> Iterator[Batch]:
        """Yield the ledger rows of duplicates and conflicts that are not in the ledger yet, or lag behind a reroll."""
        by_part: dict[int, dict[int, UnrenderedRow]] = defaultdict(dict)
        for echo in (*self.pending().echoes, *self._outdated()):
            by_part[echo.part][echo.index] = echo
        if not by_part:
            return
        wanted = {echo.duplicate_of for echoes in by_part.values() for echo in echoes.values() if echo.duplicate_of}
        view = ledger.read(self.storage, LEDGER_SCHEMA.names, wanted)
        originals = {row["id"]: row for row in view.to_pylist()}
        for part, echoes in by_part.items():
            for index, batch in read_rows(self.worklist.parts[part], self.rules, list(echoes)):
                yield batch.with_items([_echoed(batch.items[0], echoes[index], originals)])

    def _outdated(self) -> list[UnrenderedRow]:
        """Return the duplicates in the ledger whose original was rerolled since."""
        duplicates = [echo for echo in self.worklist.echoes if echo.duplicate_of]
        if not duplicates:
            return []
        ids = {row_id for echo in duplicates for row_id in (echo.id, echo.claimed)}
        view = ledger.read(self.storage, ["id", "rerolls"], ids)
        rerolls = dict(zip(view["id"].to_pylist(), view["rerolls"].fill_null(0).to_pylist(), strict=True))
        return [echo for echo in duplicates if echo.id in rerolls and rerolls[echo.id] < rerolls[echo.claimed]]

    def _gallery_entry(self, row: dict[str, Any]) -> GalleryEntry:
        length = "still" if row["num_frames"] == 1 else f"{row['num_frames']} frames"
        size = f"{row['width']}x{row['height']}, {length}, seed {row['seed']}"
        detail = f"{row['id']}  {size}" if row["height"] else f"{row['id']}  {row['position']}"
        return GalleryEntry(
            caption=row["prompt"] or "(no prompt)",
            detail=detail,
            thumbnail=self._thumbnail(row["thumbnail_uri"]),
            error=row["error_message"],
        )

    def _thumbnail(self, path: str | None) -> bytes | None:
        try:
            return self.storage.get(path) if path else None
        except StorageError as error:
            logger.warning("gallery: %s", error)
            return None


COPIED = (
    "uri",
    "thumbnail_uri",
    "media_type",
    "bytes",
    "sha256",
    "latents_sha256",
    "frames",
    "batch_size",
    "cached_levels",
    "tiling",
    "rerolls",
    "flags",
    "signed",
    *(figure.name for figure in fields(Figures)),
)
"""What a duplicate's ledger row takes from the row it repeats, beside its fate."""


@contextmanager
def _logged(consequence: str) -> Iterator[None]:
    """Log a StorageError instead of raising it: another error is on its way already."""
    try:
        yield
    except StorageError as error:
        logger.error("%s; %s", error, consequence)


def _echoed(item: Item, echo: UnrenderedRow, originals: Mapping[str, dict[str, Any]]) -> Item:
    row = item.row.updated(id=echo.id, duplicate_of=echo.duplicate_of)
    if echo.duplicate_of is None:
        return Item(row.updated(error=RowError(stage="read", type="RequestError", message=str(echo.conflict))))
    original = originals[echo.duplicate_of]
    if original["status"] == "failed":
        reason = {name: original[f"error_{name}"] for name in ("stage", "type", "message")}
        return Item(row.updated(error=RowError(**reason)))
    copied = (*COPIED, "dtype", "device", "node", "prompt_truncated", "started_at", "finished_at")
    request = item.request.model_copy(update={"seed": original["seed"]})
    return Item(row.updated(request=request, **{name: original[name] for name in copied}))
