"""failed.parquet: the input's rows that failed, as they were given and with the reason, to be mended and run again."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.ledger.ledger import concat
from pipeline.storage.storage import Storage
from pipeline.tables.readers import InputPart, read_blocks
from pipeline.tables.worklist import Worklist

REASON = "render_error"
"""The column that says why; it replaces one of that name, which an earlier failed.parquet brought along."""


def write_failed(storage: Storage, name: str, worklist: Worklist, reasons: Mapping[str, str]) -> str | None:
    """Write the input rows of failed ids with all their columns; returns the file's URL.

    reasons: why each id failed. A row whose copies failed is written once. If nothing failed, a file of an earlier run
    is removed and None returned. Raises StorageError, and InputError if the input is no longer there.
    """
    parts = list(worklist.rows_of(pa.array(reasons, pa.string())))
    if not parts:
        storage.delete(name)
        return None
    nothing = concat([_with_reason(next(read_blocks(part))[1].slice(0, 0), []) for part, _ in parts])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "failed.parquet"
        with pq.ParquetWriter(path, nothing.schema) as writer:
            for part, rows in parts:
                for table in _failed(part, rows, reasons):
                    writer.write_table(concat([nothing, table]))
        storage.put(name, path)
    return storage.url(name)


def _failed(part: InputPart, rows: Mapping[int, str], reasons: Mapping[str, str]) -> Iterator[pa.Table]:
    for start, table in read_blocks(part):
        mine = [row for row in rows if start <= row < start + len(table)]
        if mine:
            yield _with_reason(table.take([row - start for row in mine]), [reasons[rows[row]] for row in mine])


def _with_reason(table: pa.Table, reasons: list[str]) -> pa.Table:
    if REASON in table.column_names:
        table = table.drop_columns([REASON])
    return table.append_column(REASON, pa.array(reasons, pa.string()))
