"""Input tables: which files and row groups there are, and reading them in blocks of light rows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from pyarrow import csv, json

from pipeline.request import RenderRequest
from pipeline.storage.faults import presentable
from pipeline.storage.redaction import recorded, redacted
from pyramid_flow.errors import PyramidFlowError

READ_ROWS = 4096
READ_BYTES = 128 * 2**20
TEXT_BLOCK = 16 * 2**20
REQUEST_COLUMNS = tuple(RenderRequest.model_fields)
TEXT_COLUMNS = [(name, pa.string()) for name in ("id", "prompt", "negative_prompt", "image")]
"""Columns of text files that are never taken for numbers or dates."""


Columns = Sequence[str] | None
"""Names of the columns that are wanted; None = all."""


class InputError(PyramidFlowError):
    """The input cannot be used as a whole: nothing there, not a table, no prompt column; the message has no secrets."""

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


@dataclass(frozen=True)
class InputPart:
    """One row group of a Parquet file, or a whole text file: the unit that a read task takes.

    first_row: number of the group's first row in its file, from 0; num_rows: 0 for a text file.
    """

    url: str
    row_group: int
    first_row: int
    num_rows: int

    def position(self, row: int) -> str:
        """Name the `row`-th row of this part for people: file, without what signs its URL, and row number, from 0."""
        return f"{recorded(self.url)}:{self.first_row + row}"


def list_parts(urls: Sequence[str]) -> list[InputPart]:
    """List the parts of Parquet, CSV and JSON-lines files and folders (local or fsspec URLs) in a fixed order.

    Raises InputError if a file is missing or unreadable, or has no prompt column.
    """
    files: dict[str, None] = {}  # a file that is named twice is read once
    for url in urls:
        for file in _files(url):
            files[file] = None
    return [part for file in files for part in _parts(file)]


def full_url(url: str) -> str:
    """Return a path or URL in full, as a worker in another folder understands it; raises InputError for none."""
    try:
        fs, path = url_to_fs(url)
    except (ImportError, ValueError, OSError) as error:
        raise InputError(f"cannot use {url}: {error}") from presentable(error)
    return str(fs.unstrip_protocol(path))


def folder_of(url: str) -> str:
    """Return the full URL of an input's folder: of the folder itself, or the one a file lies in."""
    fs, path = url_to_fs(url)
    if "http" in fs.protocol:
        return str(path.partition("?")[0].rpartition("/")[0])  # a signature may hold slashes
    return str(fs.unstrip_protocol(path if fs.isdir(path) else fs._parent(path)))


def check_apart(urls: Sequence[str], output: str) -> None:
    """Raise InputError if the output lies in an input folder, where its ledger would be taken for input."""
    for url in urls:
        fs, path = url_to_fs(url)
        folder = str(fs.unstrip_protocol(path)).rstrip("/")
        if fs.isdir(path) and f"{output}/".startswith(f"{folder}/"):
            raise InputError(f"output {output} lies inside the input folder {url}")


def read_blocks(part: InputPart, columns: Columns = None) -> Iterator[tuple[int, pa.Table]]:
    """Yield blocks of at most 4096 rows and about 128 MiB as (number of the first row within the part, table)."""
    start = 0
    try:
        for table in FORMATS[_suffix(part.url)](part, columns):
            names = [name for name in table.column_names if columns is None or name in columns]
            yield start, _without_views(table.select(names))
            start += len(table)
    except (OSError, pa.ArrowException) as error:
        place = f"input {part.url}, row group {part.row_group}"
        raise InputError(f"{place}, cannot be read: {error}") from presentable(error)


def request_values(table: pa.Table) -> list[dict[str, object]]:
    """Return each row's request fields, without those that are null."""
    known = [name for name in table.column_names if name in REQUEST_COLUMNS]
    columns = [_values(table[name]) for name in known]
    rows = (dict(zip(known, values, strict=True)) for values in zip(*columns, strict=True))
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def own_columns(table: pa.Table) -> pa.Table:
    """Return the user's columns that are no request fields: they are carried through untouched."""
    own = table.drop_columns([name for name in table.column_names if name in REQUEST_COLUMNS])
    return own.replace_schema_metadata(None)


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
    return table.cast(pa.schema([field.with_type(_plain(field.type)) for field in table.schema]))


def _plain(kind: pa.DataType) -> pa.DataType:
    if kind == pa.string_view():
        return pa.large_string()
    if kind == pa.binary_view():
        return pa.large_binary()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_plain(kind.key_type), _plain(kind.item_type), kind.keys_sorted)
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_plain(kind.value_type)))
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_plain(kind.value_type)))
    return kind


def _suffix(url: str) -> str:
    """Return the ending that names a file's format; Parquet if it has none that is known."""
    return next((suffix for suffix in FORMATS if url.lower().endswith(suffix)), PARQUET)


def _files(url: str) -> list[str]:
    """A file stands for itself, a folder for the tables below it, sorted."""
    if not url:
        raise InputError("input '' is empty")
    try:
        fs, path = url_to_fs(url)
        if fs.isfile(path):
            return [fs.unstrip_protocol(path)]
        found = sorted(name for name in fs.find(path) if name.lower().endswith(tuple(FORMATS)))
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"input {url} cannot be listed: {error}") from presentable(error)
    if not found:
        raise InputError(f"input {url} is neither a file nor a folder with {', '.join(FORMATS)} files")
    return [fs.unstrip_protocol(name) for name in found]


def _parts(url: str) -> list[InputPart]:
    """List the parts of a file: a Parquet file's row groups, or a text file as one part of unknown length."""
    try:
        names, counts = _parquet_layout(url) if _suffix(url) == PARQUET else _text_layout(url)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"input {url} is not a readable {_suffix(url)} file: {error}") from presentable(error)
    if "prompt" not in names:
        raise InputError(f"input {url} has no column 'prompt', it has: {', '.join(names)}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"input {url} has several columns of one name: {', '.join(twice)}")
    return [InputPart(url, i, sum(counts[:i]), count) for i, count in enumerate(counts)]


def _parquet_layout(url: str) -> tuple[list[str], list[int]]:
    with _open(url) as source, pq.ParquetFile(source) as file:
        return file.schema_arrow.names, [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]


def _text_layout(url: str) -> tuple[list[str], list[int]]:
    first = next(FORMATS[_suffix(url)](InputPart(url, 0, 0, 0), None))
    return first.column_names, [0]


def _parquet_tables(part: InputPart, columns: Columns) -> Iterator[pa.Table]:
    with _open(part.url) as source, pq.ParquetFile(source, pre_buffer=True) as file:
        size = file.metadata.row_group(part.row_group).total_byte_size
        rows = max(1, min(READ_ROWS, READ_BYTES * part.num_rows // max(1, size)))
        names = [name for name in file.schema_arrow.names if columns is None or name in columns]
        for record_batch in file.iter_batches(rows, row_groups=[part.row_group], columns=names):
            yield pa.Table.from_batches([record_batch])


def _csv_tables(part: InputPart, _columns: Columns) -> Iterator[pa.Table]:
    """Read a CSV file with a header; an empty cell is null, and types are those of the first 16 MiB."""
    convert = csv.ConvertOptions(column_types=dict(TEXT_COLUMNS), null_values=[""], strings_can_be_null=True)
    with _open(part.url) as source:
        reader = csv.open_csv(
            source,
            read_options=csv.ReadOptions(block_size=TEXT_BLOCK),
            parse_options=csv.ParseOptions(newlines_in_values=True),
            convert_options=convert,
        )
        yield reader.schema.empty_table()
        for record_batch in reader:
            yield from _slices(pa.Table.from_batches([record_batch]))


def _jsonl_tables(part: InputPart, _columns: Columns) -> Iterator[pa.Table]:
    """Read a file of one JSON object per line, as a whole."""
    with _open(part.url) as source:
        table = json.read_json(
            source,
            read_options=json.ReadOptions(block_size=TEXT_BLOCK),
            parse_options=json.ParseOptions(explicit_schema=pa.schema(TEXT_COLUMNS), unexpected_field_behavior="infer"),
        )
    yield table.schema.empty_table()
    yield from _slices(table)


def _slices(table: pa.Table) -> Iterator[pa.Table]:
    for start in range(0, len(table), READ_ROWS):
        yield table.slice(start, READ_ROWS)


@contextmanager
def _open(url: str) -> Iterator[BinaryIO]:
    fs, path = url_to_fs(url)
    with fs.open(path, "rb") as source:
        yield source


PARQUET = ".parquet"
FORMATS: dict[str, Callable[[InputPart, Columns], Iterator[pa.Table]]] = {
    PARQUET: _parquet_tables,
    ".csv": _csv_tables,
    ".jsonl": _jsonl_tables,
    ".ndjson": _jsonl_tables,
}
"""Readers of tables by the ending of their file."""
