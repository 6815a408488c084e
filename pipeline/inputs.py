"""Input tables: which Parquet files and row groups there are, and reading them in blocks of light rows."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from pipeline.request import RenderRequest
from pyramid_flow.errors import PyramidFlowError

READ_ROWS = 4096
READ_BYTES = 128 * 2**20
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
    files: dict[str, None] = {}  # a file that is named twice is read once
    for url in urls:
        for file in _files(url):
            files[file] = None
    return [part for file in files for part in _row_groups(file)]


def full_url(url: str) -> str:
    """Return a path or URL in full, as a worker in another folder understands it."""
    fs, path = url_to_fs(url)
    return str(fs.unstrip_protocol(path))


def folder_of(url: str) -> str:
    """Return the full URL of an input's folder: of the folder itself, or the one a file lies in."""
    fs, path = url_to_fs(url)
    return str(fs.unstrip_protocol(path if fs.isdir(path) else fs._parent(path)))


def check_apart(urls: Sequence[str], output: str) -> None:
    """Raise InputError if the output lies in an input folder, where its ledger would be taken for input."""
    for url in urls:
        fs, path = url_to_fs(url)
        folder = str(fs.unstrip_protocol(path)).rstrip("/")
        if fs.isdir(path) and f"{output}/".startswith(f"{folder}/"):
            raise InputError(f"output {output} lies inside the input folder {url}")


def read_blocks(part: InputPart, columns: Sequence[str] | None = None) -> Iterator[tuple[int, pa.Table]]:
    """Yield blocks of at most 4096 rows and about 128 MiB as (number of the first row within the part, table)."""
    with _open(part.url) as file:
        names = [name for name in file.schema_arrow.names if columns is None or name in columns]
        start, size = 0, file.metadata.row_group(part.row_group).total_byte_size
        rows = max(1, min(READ_ROWS, READ_BYTES * part.num_rows // max(1, size)))
        try:
            for record_batch in file.iter_batches(rows, row_groups=[part.row_group], columns=names):
                yield start, _without_views(pa.Table.from_batches([record_batch]))
                start += record_batch.num_rows
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"input {part.url}, row group {part.row_group}, cannot be read: {error}") from error


def request_values(table: pa.Table) -> list[dict[str, object]]:
    """Return each row's request fields, without those that are null."""
    known = [name for name in table.column_names if name in REQUEST_COLUMNS]
    columns = [_values(table[name]) for name in known]
    rows = (dict(zip(known, values, strict=True)) for values in zip(*columns, strict=True))
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def own_columns(table: pa.Table) -> pa.Table:
    """Return the user's columns that are no request fields: they are carried through untouched."""
    return table.drop_columns([name for name in table.column_names if name in REQUEST_COLUMNS])


def _values(column: pa.ChunkedArray) -> list[object]:
    """Return a column's values; text that is not UTF-8 keeps its broken bytes as lone surrogates."""
    try:
        values: list[object] = column.to_pylist()
    except UnicodeDecodeError as error:
        try:
            data = column.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
        except pa.ArrowException:
            raise InputError(f"a column of type {column.type} holds text that is not UTF-8") from error
        values = [None if value is None else value.decode(errors="surrogateescape") for value in data]
    return values


def _without_views(table: pa.Table) -> pa.Table:
    """Return the table with its view types replaced, which Arrow cannot take rows of."""
    plain = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
    return table.cast(pa.schema([field.with_type(plain.get(field.type, field.type)) for field in table.schema]))


def _files(url: str) -> list[str]:
    """A file stands for itself, a folder for the .parquet files below it, sorted."""
    if not url:
        raise InputError("input '' is empty")
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
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"input {url} has several columns of one name: {', '.join(twice)}")
    return [InputPart(url, i, sum(counts[:i]), count) for i, count in enumerate(counts)]


@contextmanager
def _open(url: str) -> Iterator[pq.ParquetFile]:
    fs, path = url_to_fs(url)
    with fs.open(path, "rb") as source, pq.ParquetFile(source, pre_buffer=True) as file:
        yield file
