"""Input tables: which Parquet files and row groups there are, and reading them in blocks of light rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from pipeline.request import RenderRequest
from pyramid_flow.errors import PyramidFlowError

READ_ROWS = 4096
REQUEST_COLUMNS = tuple(RenderRequest.model_fields)


class InputError(PyramidFlowError):
    """The input cannot be used as a whole: nothing there, not Parquet, no prompt column."""


@dataclass(frozen=True)
class InputPart:
    """One row group of one Parquet file: the unit that a read task takes.

    first_row: number of the group's first row in its file, from 0.
    """

    url: str
    row_group: int
    first_row: int
    num_rows: int

    def position(self, row: int) -> str:
        """Name the `row`-th row of this part for people: file and row number, from 0."""
        return f"{self.url}:{self.first_row + row}"


def list_parts(urls: Sequence[str]) -> list[InputPart]:
    """List the row groups of Parquet files and folders (local or fsspec URLs) in a fixed order.

    Raises InputError if a file is missing or unreadable, or has no prompt column.
    """
    parts = []
    for url in urls:
        for file in _files(url):
            parts.extend(_row_groups(file))
    return parts


def read_blocks(part: InputPart, columns: Sequence[str] | None = None) -> Iterator[tuple[int, pa.Table]]:
    """Yield blocks of at most 4096 rows as (number of the first row within the part, table)."""
    with _open(part.url) as file:
        names = [name for name in file.schema_arrow.names if columns is None or name in columns]
        start = 0
        for record_batch in file.iter_batches(READ_ROWS, row_groups=[part.row_group], columns=names):
            yield start, pa.Table.from_batches([record_batch])
            start += record_batch.num_rows


def request_values(table: pa.Table) -> list[dict[str, object]]:
    """Return each row's request fields, without those that are null."""
    known = [name for name in table.column_names if name in REQUEST_COLUMNS]
    rows = table.select(known).to_pylist()
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def own_columns(table: pa.Table) -> pa.Table:
    """Return the user's columns that are no request fields: they are carried through untouched."""
    return table.drop_columns([name for name in table.column_names if name in REQUEST_COLUMNS])


def _files(url: str) -> list[str]:
    """A file stands for itself, a folder for the .parquet files below it, sorted."""
    try:
        fs, path = url_to_fs(url)
        if fs.isfile(path):
            return [fs.unstrip_protocol(path)]
        found = sorted(name for name in fs.find(path) if name.endswith(".parquet"))
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"input {url} cannot be listed: {error}") from error
    if not found:
        raise InputError(f"input {url} is neither a file nor a folder with .parquet files")
    return [fs.unstrip_protocol(name) for name in found]


def _row_groups(url: str) -> list[InputPart]:
    try:
        with _open(url) as file:
            names, counts = (
                file.schema_arrow.names,
                [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)],
            )
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"input {url} is not a readable Parquet file: {error}") from error
    if "prompt" not in names:
        raise InputError(f"input {url} has no column 'prompt', it has: {', '.join(names)}")
    return [InputPart(url, i, sum(counts[:i]), count) for i, count in enumerate(counts)]


def _open(url: str) -> pq.ParquetFile:
    fs, path = url_to_fs(url)
    return pq.ParquetFile(fs.open(path, "rb"), pre_buffer=True)
