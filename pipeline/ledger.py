"""The ledger: append-only Parquet parts, read as a view that holds every row's best state; and the job's record."""

import io
import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.rows import LEDGER_SCHEMA
from pipeline.storage import Storage
from pyramid_flow.errors import PyramidFlowError

PARTS = "metadata"
RUNS = "runs"
JOB_FILE = "job.json"
FLUSH_ROWS = 1000
FLUSH_SECONDS = 30.0


class LedgerError(PyramidFlowError):
    """The output belongs to another job."""


def new_run_id() -> str:
    """Return an id that sorts by time: 20260131T235959-1a2b3c."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


@dataclass
class LedgerWriter:
    """The one writer of a run: collects rows and writes a part every 1000 rows or 30 s, and when flushed."""

    storage: Storage
    run: str
    flush_rows: int = FLUSH_ROWS
    flush_seconds: float = FLUSH_SECONDS
    _tables: list[pa.Table] = field(default_factory=list)
    _parts: int = 0
    _written_at: float = field(default_factory=time.monotonic)

    def append(self, table: pa.Table) -> None:
        """Take rows over; they are durable once a part is written."""
        self._tables.append(table)
        self.tick()

    def tick(self) -> None:
        """Write a part if it is due; called while nothing arrives, too."""
        due = time.monotonic() - self._written_at >= self.flush_seconds
        if due or sum(map(len, self._tables)) >= self.flush_rows:
            self.flush()

    def flush(self) -> None:
        """Write what is open as one part."""
        self._written_at = time.monotonic()
        if not self._tables:
            return
        sink = io.BytesIO()
        pq.write_table(_joined(self._tables), sink)
        self.storage.put(f"{PARTS}/part-{self.run}-{self._parts:06d}.parquet", sink.getvalue())
        self._parts += 1
        self._tables = []


def read(storage: Storage) -> pa.Table:
    """Return the ledger: per id the succeeded row if there is one, else the latest; in order of first appearance."""
    names = [name for name in storage.list(PARTS) if name.endswith(".parquet")]
    if not names:
        return LEDGER_SCHEMA.empty_table()
    rows = _joined([_part(storage, name) for name in names])
    order = pa.array(range(len(rows)), pa.int64())
    succeeded = pc.cast(pc.equal(rows["status"], "succeeded"), pa.int64())
    rank = pc.add(pc.multiply(succeeded, len(rows)), order)
    groups = pa.table({"id": rows["id"], "rank": rank, "order": order}).group_by("id")
    best = groups.aggregate([("rank", "max"), ("order", "min")]).sort_by("order_min")
    chosen = [value % len(rows) for value in best["rank_max"].to_pylist()]
    return rows.take(pa.array(chosen, pa.int64()))


def claim(storage: Storage, record: Mapping[str, Any], pixel_settings: Mapping[str, Any]) -> None:
    """Write job.json, or check that the OUTPUT's own agrees in everything that changes pixels; raises LedgerError."""
    if storage.exists(JOB_FILE):
        earlier = _pixel_settings(storage)
        for name in {**pixel_settings, **earlier}:
            before, now = earlier.get(name), pixel_settings.get(name)
            if before != now:
                raise LedgerError(
                    f"{storage.url(JOB_FILE)} was rendered with {name} {before!r}, this job has {now!r}: "
                    "use another --output"
                )
        return
    text = json.dumps({**record, "pixels": dict(pixel_settings)}, indent=2, default=str)
    storage.put(JOB_FILE, text.encode())


@dataclass
class Heartbeat:
    """The state of a run in runs/<run>.json, rewritten every 30 s: what `pyramid-render status` reads.

    total: rows the run set out to render; done, failed: how many of them have arrived.
    """

    storage: Storage
    run: str
    total: int
    seconds: float = FLUSH_SECONDS
    done: int = 0
    failed: int = 0
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    _written_at: float = field(default_factory=time.monotonic)

    def count(self, done: int, failed: int) -> None:
        """Count rows that have arrived, and write the state if it is due."""
        self.done += done
        self.failed += failed
        if time.monotonic() - self._written_at >= self.seconds:
            self.write("running")

    def write(self, state: str, error: str | None = None) -> None:
        """Write the state: running, finished, interrupted or broken (with its traceback)."""
        self._written_at = time.monotonic()
        record = {
            "run": self.run,
            "state": state,
            "started_at": self.started_at.isoformat(),
            "at": datetime.now(UTC).isoformat(),
            "rows": {"total": self.total, "done": self.done, "failed": self.failed},
            "error": error,
        }
        self.storage.put(f"{RUNS}/{self.run}.json", json.dumps(record, indent=2).encode())


def read_runs(storage: Storage) -> list[dict[str, Any]]:
    """Return the states of all runs, the earliest first; raises LedgerError if one is damaged."""
    names = [name for name in storage.list(RUNS) if name.endswith(".json")]
    return [_run_state(storage, name) for name in names]


def _run_state(storage: Storage, name: str) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(storage.get(name))
        return {key: record[key] for key in ("run", "state", "started_at", "at", "rows", "error")}
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"{storage.url(name)} is damaged or of another version") from error


def _pixel_settings(storage: Storage) -> dict[str, Any]:
    try:
        pixels: dict[str, Any] = dict(json.loads(storage.get(JOB_FILE))["pixels"])
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"{storage.url(JOB_FILE)} is damaged: use another --output") from error
    return pixels


def _part(storage: Storage, name: str) -> pa.Table:
    try:
        return pq.read_table(io.BytesIO(storage.get(name)))
    except (OSError, pa.ArrowException) as error:
        raise LedgerError(f"ledger part {storage.url(name)} cannot be read: {error}") from error


def _joined(tables: list[pa.Table]) -> pa.Table:
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException:
        mixed = _mixed_columns(tables)
        return pa.concat_tables([_as_text(table, mixed) for table in tables], promote_options="permissive")


def _mixed_columns(tables: list[pa.Table]) -> list[str]:
    """Return the columns that cannot be joined: the user's, from input files that disagree about their types."""
    mixed = []
    for name in dict.fromkeys(name for table in tables for name in table.column_names):
        columns = [table.select([name]) for table in tables if name in table.column_names]
        try:
            pa.concat_tables(columns, promote_options="permissive")
        except pa.ArrowException:
            mixed.append(name)
    return mixed


def _as_text(table: pa.Table, names: list[str]) -> pa.Table:
    for name in set(names) & set(table.column_names):
        texts = [None if value is None else str(value) for value in table[name].to_pylist()]
        table = table.set_column(table.column_names.index(name), name, pa.array(texts, pa.string()))
    return table
