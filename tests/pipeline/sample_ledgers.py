"""Ledger rows and parts for tests."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pyarrow as pa

from pipeline.ledger.ledger import LedgerWriter, read
from pipeline.rows import LEDGER_SCHEMA, Batch, Item, RenderRow, RowError, ledger_table
from pipeline.storage.storage import Storage

NEVER = 1e9
ERROR = RowError(stage="sample", type="ValueError", message="no")


def rows(*ids: str, failed: bool = False, run: str = "r", uri: str | None = None, **columns: pa.Array) -> pa.Table:
    """Return ledger rows with columns of the user's own, by default one that counts."""
    error = ERROR if failed else None
    items = [Item(RenderRow(id=row_id, position="t:0", error=error, uri=uri)) for row_id in ids]
    own = columns or {"own": pa.array(list(range(len(ids))))}
    return ledger_table(Batch(tuple(items), pa.table(own)), {"run": run})


def written(storage: Storage, *tables: pa.Table, run: str = "r") -> None:
    """Write each table as a part of its own; run: the one that names the parts."""
    writer = LedgerWriter(storage, run, 10**9, NEVER)
    for table in tables:
        writer.append(table)
        writer.flush()


def recorded_rows(*records: dict[str, object], run: str = "r", **own: pa.Array) -> pa.Table:
    """Return ledger rows with the given values, succeeded unless they say otherwise; own: columns of the user's."""
    known = pa.Table.from_pylist([{"status": "succeeded", "run": run, **record} for record in records], LEDGER_SCHEMA)
    return pa.table({**dict(zip(known.column_names, known.columns, strict=True)), **own})


def recorded(storage: Storage, run: str, state: str, age: timedelta = timedelta(), **rows: int) -> None:
    """Write the state of a run as it was some time ago."""
    at = (datetime.now(UTC) - age).isoformat()
    record = {"run": run, "state": state, "started_at": at, "at": at, "rows": rows, "error": None}
    storage.put(f"runs/{run}.json", json.dumps(record).encode())


def statuses(storage: Storage) -> dict[str, str]:
    """Return the view as statuses by id."""
    view = read(storage)
    return dict(zip(view["id"].to_pylist(), view["status"].to_pylist(), strict=True))


def contents(view: pa.Table) -> list[tuple[dict[str, object], Sequence[str]]]:
    """Return what a view says, whatever the order of its rows and columns: its rows, with the names of the types."""
    types = sorted(f"{name}: {kind}" for name, kind in zip(view.column_names, view.schema.types, strict=True))
    return [(row, types) for row in sorted(view.to_pylist(), key=lambda row: row["id"])]
