"""The report: one HTML file beside the videos with a gallery, a timeline, histograms, failures and costs.

The page is `templates/report.html`; what it shows is embedded as JSON, column by column.
"""

import json
import logging
import time
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.ledger import job_records, ledger
from pipeline.ledger.compact import SILENCE
from pipeline.media.quality import Figures
from pipeline.request import ResolvedRequest
from pipeline.rows import LEDGER_SCHEMA
from pipeline.stages import PUBLISH, STAGES
from pipeline.storage.storage import Storage

logger = logging.getLogger(__name__)

REPORT = "report.html"
MAX_ROWS = 20_000
"""The page holds the latest so many rows; it says how many are not shown. Its totals are those of all rows."""
REFRESH_S = 30.0
COST_FACTOR = 100
"""Writing the report while a job runs takes at most one part in so many of the job's time."""

SETTINGS = tuple(
    name for name in LEDGER_SCHEMA.names if name in ResolvedRequest.model_fields and name not in ("id", "image_sha256")
)
"""Ledger columns that are fields of a request."""
FIGURES = tuple(field.name for field in fields(Figures))
OUTCOME = (
    "id",
    "status",
    "error_stage",
    "error_type",
    "error_message",
    "warnings",
    "position",
    "duplicate_of",
    "uri",
    "thumbnail_uri",
    "media_type",
    "bytes",
    "dtype",
    "device",
    "node",
    "model",
    "model_fingerprint",
    "software_version",
    "run",
    "started_at",
    "finished_at",
    "rerolls",
)
COUNTED = ("id", "status", "device", "run", "seconds", "started_at", "finished_at")
"""Columns that the totals need."""
FLAGS = "flags"
"""A column of lists of words that rows can be picked by; a ledger may have none."""

_TEMPLATE = Path(__file__).parent / "templates" / REPORT


@dataclass
class LiveReport:
    """The report of a job that runs: written again every 30 s, or less often where that would cost the job 1 %.

    A thread writes it, so that the job never waits for a store that fails. Whatever goes wrong with it is logged, and
    never ends the job.
    """

    storage: Storage
    gpu_hour_price: float | None = None
    _due: float = field(default_factory=lambda: time.monotonic() + REFRESH_S)
    _writing: Thread | None = None

    def tick(self) -> None:
        """Begin to write the report, if it is due."""
        if time.monotonic() >= self._due and not (self._writing and self._writing.is_alive()):
            self._writing = Thread(target=self._write, name="report", daemon=True)  # the job's end is not held up
            self._writing.start()

    def write(self) -> None:
        """Write the report now, and wait for it."""
        if self._writing:
            self._writing.join()
        self._write()

    def _write(self) -> None:
        began = time.monotonic()
        try:
            write_report(self.storage, self.gpu_hour_price)
        except Exception as error:  # noqa: BLE001 - recorded; the videos matter more
            logger.warning("%s was not written: %s: %s", REPORT, type(error).__name__, error)
        ended = time.monotonic()
        self._due = ended + max(REFRESH_S, COST_FACTOR * (ended - began))


def write_report(storage: Storage, gpu_hour_price: float | None = None) -> str:
    """Write report.html, which shows all of the ledger; returns its URL.

    Raises LedgerError if the ledger is damaged, and StorageError.
    """
    storage.put(REPORT, page(contents(storage, gpu_hour_price)).encode())
    return storage.url(REPORT)


def page(shown: dict[str, Any]) -> str:
    """Return the HTML page that shows some contents; no text in them can end the script element that holds them."""
    before, after = _TEMPLATE.read_text(encoding="utf-8").split("{{contents}}")
    data = json.dumps(shown, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return before + data.replace("<", "\\u003c") + after


def contents(storage: Storage, gpu_hour_price: float | None = None) -> dict[str, Any]:
    """Return what the page shows: the state of the job, totals of all rows, and columns of the latest ones."""
    now = datetime.now(UTC)
    counted = ledger.read(storage, COUNTED)
    latest = counted["id"].slice(len(counted) - MAX_ROWS).combine_chunks() if len(counted) > MAX_ROWS else None
    rows = ledger.read(storage, [*SETTINGS, *OUTCOME, *FIGURES, "first_seed", "seconds", FLAGS], latest)
    return {
        "name": storage.root.rpartition("/")[2],
        "written_at": _milliseconds(now),
        "running": _running(storage, now),
        "totals": _totals(counted, gpu_hour_price, _gpus_per_clip(storage)),
        "num_rows": len(rows),
        "hidden": max(0, len(counted) - len(rows)),
        "stages": STAGES,
        "settings": SETTINGS,
        "figures": FIGURES,
        "columns": {name: packed(column) for name, column in _columns(rows).items()},
    }


def packed(values: list[Any]) -> dict[str, Any]:
    """Return a column as one value that holds for all rows, as indices into few values, or as one value per row."""
    places = {value: place for place, value in enumerate(dict.fromkeys(values))}
    if len(places) == 1:
        return {"all": values[0]}
    if 4 * len(places) < len(values):
        return {"of": list(places), "at": [places[value] for value in values]}
    return {"each": values}


def _columns(rows: pa.Table) -> dict[str, list[Any]]:
    columns = {name: _plain(rows[name]) for name in (*SETTINGS, *OUTCOME)}
    columns["position"] = [position and position.rpartition("/")[2] for position in columns["position"]]
    for name in ("seed", "first_seed"):
        columns[name] = rows[name].cast(pa.string()).to_pylist()  # JavaScript's numbers have 53 bits
    columns |= {name: [_rounded(value) for value in _plain(rows[name])] for name in FIGURES}
    seconds = {stage: _seconds(rows, stage).to_pylist() for stage in STAGES}
    columns |= {stage: [_rounded(value) for value in values] for stage, values in seconds.items()}
    return columns | {FLAGS: _flags(rows[FLAGS])}


def _plain(column: pa.ChunkedArray) -> list[Any]:
    """Return values that JSON knows: times in milliseconds, lists as tuples, nothing for what is not finite."""
    if pa.types.is_timestamp(column.type):
        return [None if value is None else _milliseconds(value) for value in column.to_pylist()]
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_finite(column), column, None)
    return [tuple(value) if isinstance(value, list) else value for value in column.to_pylist()]


def _flags(column: pa.ChunkedArray) -> list[tuple[str, ...] | None]:
    """Return the flags of rows; a column of the user's own that has the name but holds no lists of words is none."""
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if not is_list or not pa.types.is_string(column.type.value_type):
        return [None] * len(column)
    return [tuple(flag for flag in flags or () if flag) or None for flags in column.to_pylist()]


def _seconds(rows: pa.Table, stage: str) -> pa.ChunkedArray:
    return pc.map_lookup(rows["seconds"], pa.scalar(stage), "first")


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _milliseconds(at: datetime) -> int:
    return round(1000 * at.timestamp())


def _running(storage: Storage, now: datetime) -> list[dict[str, Any]]:
    """Return how far each run is that runs."""
    return [
        {"run": run["run"], "done": run["rows"]["done"], "total": run["rows"]["total"]}
        for run in job_records.read_runs(storage)
        if run["state"] == "running" and now - datetime.fromisoformat(run["at"]) < SILENCE
    ]


def _gpus_per_clip(storage: Storage) -> int:
    record = job_records.job_record(storage) or {}
    return int(record.get("settings", {}).get("gpus_per_clip", 1))


def _totals(rows: pa.Table, gpu_hour_price: float | None, gpus_per_clip: int) -> dict[str, Any]:
    """Return figures of all rows; what failed rows took counts as a cost of those that succeeded."""
    succeeded: int = pc.sum(pc.equal(rows["status"], "succeeded")).as_py() or 0
    on_gpu = rows.filter(pc.not_equal(rows["device"], "cpu"))
    stages = [stage for stage in STAGES if stage != PUBLISH]
    gpu_s = gpus_per_clip * sum(pc.sum(_seconds(on_gpu, stage)).as_py() or 0.0 for stage in stages)
    hours = _worked_seconds(rows) / 3600
    cost = None if gpu_hour_price is None or not gpu_s else gpu_s / 3600 * gpu_hour_price
    return {
        "rows": len(rows),
        "succeeded": succeeded,
        "per_hour": succeeded / hours if hours else None,
        "gpu_seconds": gpu_s or None,
        "cost": cost,
    }


def _worked_seconds(rows: pa.Table) -> float:
    """Return the seconds in which at least one run had rows: between runs nothing was to be done."""
    spans = rows.group_by("run").aggregate([("started_at", "min"), ("finished_at", "max")]).to_pylist()
    known = [(span["started_at_min"], span["finished_at_max"]) for span in spans]
    total, until = timedelta(), datetime.min.replace(tzinfo=UTC)
    for start, end in sorted((start, end) for start, end in known if start and end):
        total += max(timedelta(), end - max(start, until))
        until = max(until, end)
    return total.total_seconds()
