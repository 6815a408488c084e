"""One render job: the passes over what is missing, the rows only the driver writes, and the pictures at the end."""

import logging
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import ledger, runner
from pipeline.batching import read_rows
from pipeline.plan import Plan
from pipeline.report import GalleryEntry, gallery
from pipeline.rows import Batch, Item, RowError, ledger_table
from pipeline.storage import Storage, StorageError
from pipeline.worklist import Echo, RowRules, Worklist

logger = logging.getLogger(__name__)

MAX_PASSES = 3
GALLERY_FILE = "gallery.png"
GALLERY_ROWS = 64

OnBatch = Callable[[Batch | None], None]
"""Told every finished batch, and None now and then while nothing finishes."""


@dataclass(frozen=True)
class RenderJob:
    """A job that is checked and planned. constants: ledger columns that are equal for all its rows."""

    run: str
    storage: Storage
    worklist: Worklist
    rules: RowRules
    plan: Plan
    constants: Mapping[str, str]
    retry_failed: bool
    flush_rows: int = ledger.FLUSH_ROWS
    flush_seconds: float = ledger.FLUSH_SECONDS

    def pending(self) -> Worklist:
        """Return what the ledger lacks, or what failed in another run if failed rows are to be tried again."""
        view = ledger.read(self.storage)
        done = pc.or_(pc.equal(view["status"], "succeeded"), pc.equal(view["run"], self.run))
        settled = view.filter(done) if self.retry_failed else view
        return self.worklist.remaining(frozenset(settled["id"].to_pylist()))

    def execute(self, on_batch: OnBatch) -> None:
        """Render until nothing of the input is missing in the ledger, in at most 3 passes.

        However it ends, what has finished is in the ledger afterwards.
        """
        writer = ledger.LedgerWriter(self.storage, self.run, self.flush_rows, self.flush_seconds)
        state: dict[str, Any] = {"state": "running"}
        ledger.write_run(self.storage, self.run, state)
        try:
            for _ in range(MAX_PASSES):
                pending = self.pending()
                if pending.num_rows == 0:
                    break
                for batch in runner.run(pending, self.plan, self.rules):
                    self._record(batch, writer)
                    on_batch(batch)
                writer.flush()
            for batch in self._echoes():
                self._record(batch, writer)
                on_batch(batch)
            state = {"state": "finished"}
        except KeyboardInterrupt:
            state = {"state": "interrupted"}
            raise
        except Exception:
            state = {"state": "broken", "error": traceback.format_exc()}
            raise
        finally:
            writer.flush()
            ledger.write_run(self.storage, self.run, state)

    def view(self) -> pa.Table:
        """Return the ledger's rows of this job's input."""
        rows = ledger.read(self.storage)
        return rows.filter(pc.is_in(rows["id"], pa.array(self.worklist.expected_ids(), pa.string())))

    def write_gallery(self) -> str:
        """Write gallery.png, a contact sheet of the first 64 rows; returns its URL."""
        rows = self.view()
        entries = [self._gallery_entry(row) for row in rows.slice(0, GALLERY_ROWS).to_pylist()]
        self.storage.put(GALLERY_FILE, gallery(entries))
        return self.storage.url(GALLERY_FILE)

    def _record(self, batch: Batch | None, writer: ledger.LedgerWriter) -> None:
        if batch is None:
            writer.tick()
        else:
            writer.append(ledger_table(batch, {**self.constants, "run": self.run}))

    def _echoes(self) -> Iterator[Batch]:
        """Yield the ledger rows of duplicates and conflicts that are not in the ledger yet."""
        by_part: dict[int, dict[int, Echo]] = defaultdict(dict)
        for echo in self.pending().echoes:
            by_part[echo.part][echo.index] = echo
        if not by_part:
            return
        view = ledger.read(self.storage)
        originals = {row["id"]: row for row in view.to_pylist()}
        for part, echoes in by_part.items():
            for index, batch in read_rows(self.worklist.parts[part].part, self.rules, list(echoes)):
                yield batch.with_items([_echoed(batch.items[0], echoes[index], originals)])

    def _gallery_entry(self, row: dict[str, Any]) -> GalleryEntry:
        size = f"{row['width']}x{row['height']}, {row['num_frames']} frames, seed {row['seed']}"
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


COPIED = ("uri", "thumbnail_uri", "media_type", "bytes", "sha256", "latents_sha256", "frames", "batch_size", "tiling")
"""What a duplicate's ledger row takes from the row it repeats, beside its fate."""


def _echoed(item: Item, echo: Echo, originals: Mapping[str, dict[str, Any]]) -> Item:
    row = item.row.updated(id=echo.id, duplicate_of=echo.duplicate_of)
    if echo.duplicate_of is None:
        return Item(row.updated(error=RowError(stage="read", type="RequestError", message=str(echo.message))))
    original = originals[echo.duplicate_of]
    if original["status"] == "failed":
        fields = {name: original[f"error_{name}"] for name in ("stage", "type", "message")}
        return Item(row.updated(error=RowError(**fields)))
    copied = (*COPIED, "dtype", "device", "node", "prompt_truncated", "started_at", "finished_at")
    return Item(row.updated(**{name: original[name] for name in copied}))
