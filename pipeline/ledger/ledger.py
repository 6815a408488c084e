"""The ledger: append-only Parquet parts, read as a view that holds every row's best state."""

import io
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.rows import LEDGER_SCHEMA
from pipeline.storage.faults import StorageError
from pipeline.storage.storage import Storage
from pyramid_flow.errors import PyramidFlowError

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

PARTS = "metadata"
COMPACTED = f"{PARTS}/part-x-"
"""Compacted parts begin so and sort after all others: a listing that misses a part that was deleted meanwhile has not
passed its replacement yet."""
KEYS = ("id", "status", "run")
"""The columns that decide which rows the view holds, together with `REROLLS`."""
REROLLS = "rerolls"
"""Parts of earlier versions lack this column: none of their rows was rerolled."""
THREADS = 8
FLUSH_ROWS = 1000
FLUSH_SECONDS = 30.0


class LedgerError(PyramidFlowError):
    """The output belongs to another job."""


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
        pq.write_table(concat([decoded(table) for table in self._tables]), sink)
        self.storage.put(f"{PARTS}/part-{self.run}-{self._parts:06d}.parquet", sink.getvalue())
        self._parts += 1
        self._tables = []


def read(
    storage: Storage, columns: Sequence[str] | None = None, ids: Collection[str] | pa.StringArray | None = None
) -> pa.Table:
    """Return the ledger: per id the succeeded row if there is one, else the latest; by run, then as they appear.

    Of several that succeeded it is the one of the most rerolls, and of those the latest.
    columns: those that are wanted, None = all; one that no row has is null. ids: rows that are wanted, None = all.
    Raises LedgerError if a part is damaged.
    """
    wanted = None if columns is None else [*dict.fromkeys((*KEYS, REROLLS, *columns))]
    rows = _view(read_parts(storage, wanted, ids))
    if columns is None:
        return rows
    for name in set(columns) - set(rows.column_names):
        kind = LEDGER_SCHEMA.field(name).type if name in LEDGER_SCHEMA.names else pa.null()
        rows = rows.append_column(name, pa.nulls(len(rows), kind))
    return rows.select(list(columns))


def read_parts(
    storage: Storage, columns: Sequence[str] | None = None, ids: Collection[str] | pa.StringArray | None = None
) -> list[pa.Table]:
    """Return the rows of every part, in order of the parts' names; columns, ids: as for `read`.

    No row is missed while the ledger is compacted: a part that is gone before it is read has a replacement, which the
    next listing shows; listings go on until one shows no new compacted part.
    """
    if ids is not None:
        ids = frozenset(ids.to_pylist() if isinstance(ids, pa.Array) else ids)
    load = partial(_rows, storage, columns=columns, ids=ids)
    found: dict[str, pa.Table | None] = {}
    unread = part_names(storage)
    while unread:
        found.update(zip(unread, prefetched(load, unread), strict=True))
        unread = [name for name in part_names(storage) if is_compacted(name) and name not in found]
        if unread:
            logger.debug("%s was compacted while it was read, %d new parts", storage.url(PARTS), len(unread))
    return [table for _, table in sorted(found.items()) if table is not None]


def part_names(storage: Storage) -> list[str]:
    """Return the parts there are, sorted."""
    return [name for name in storage.list(PARTS) if name.endswith(".parquet")]


def is_compacted(name: str) -> bool:
    """Tell whether a part was written by a compaction."""
    return name.startswith(COMPACTED)


def fetch(storage: Storage, name: str) -> bytes | None:
    """Return the content of a part, or None if a compaction has replaced it meanwhile."""
    try:
        return storage.get(name)
    except StorageError:
        if storage.exists(name):
            raise
        logger.debug("ledger part %s is gone", storage.url(name))
        return None


@contextmanager
def wrap_read_errors(storage: Storage, name: str) -> Iterator[None]:
    """Raise what goes wrong while a part is decoded as a LedgerError that names it."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise LedgerError(f"ledger part {storage.url(name)} cannot be read: {error}") from error


def open_part(data: bytes) -> pq.ParquetFile:
    """Open the content of a part; raises ArrowInvalid if it is not one of a ledger."""
    file = pq.ParquetFile(pa.BufferReader(data))
    lacking = set(KEYS).difference(file.schema_arrow.names)
    if lacking:
        raise pa.ArrowInvalid(f"it has no column {min(lacking)}")
    return file


def key_columns(names: Sequence[str]) -> list[str]:
    """Return which of a part's columns decide which rows the view holds."""
    return [*KEYS, REROLLS] if REROLLS in names else [*KEYS]


def prefetched(call: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield the results of a call for every item, in order; a few threads work ahead."""
    ahead: deque[Future[R]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for item in items:
                ahead.append(pool.submit(call, item))
                if len(ahead) > THREADS:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def latest_rows(keys: pa.Table) -> NDArray[np.int64]:
    """Return which rows the view holds, as indices in the order of the view; keys: the `key_columns` of all rows."""
    num_rows = len(keys)
    run = pc.fill_null(keys["run"], "")
    runs = pa.array(sorted(pc.unique(run).to_pylist()), pa.string())
    age = pc.index_in(run, value_set=runs).to_numpy().astype(np.int64)
    succeeded = pc.equal(keys["status"], "succeeded").to_numpy()
    rank = (succeeded * (1 + _rerolls(keys)) * len(runs) + age) * num_rows + np.arange(num_rows)
    in_order: NDArray[np.int64] = np.sort(_greatest(keys["id"], rank) % (len(runs) * num_rows)) % num_rows
    return in_order


def last_rerolls(keys: pa.Table) -> NDArray[np.int64]:
    """Return which rows are the last reroll of their id, as indices in any order; the view lacks those that failed."""
    rerolls = _rerolls(keys)
    rows = _greatest(keys["id"], rerolls * len(keys) + np.arange(len(keys))) % len(keys)
    return rows[rerolls[rows] > 0]


def _rerolls(keys: pa.Table) -> NDArray[np.int64]:
    if REROLLS not in keys.column_names:
        return np.zeros(len(keys), np.int64)
    rerolls: NDArray[np.int64] = pc.fill_null(keys[REROLLS], 0).to_numpy().astype(np.int64)
    return rerolls


def _greatest(ids: pa.ChunkedArray, rank: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the greatest rank of each id."""
    encoded = ids.dictionary_encode().combine_chunks()
    greatest = np.zeros(len(encoded.dictionary), np.int64)
    np.maximum.at(greatest, encoded.indices.to_numpy(), rank)
    return greatest


def masks(rows: NDArray[np.int64], lengths: Sequence[int]) -> list[NDArray[np.bool_]]:
    """Return for each of some tables which of its rows are meant; rows: indices into all tables, one after another."""
    mask = np.zeros(sum(lengths), np.bool_)
    mask[rows] = True
    return np.split(mask, np.cumsum(lengths)[:-1])


def decoded(table: pa.Table) -> pa.Table:
    """Return the table without dictionary columns: indices of theirs overflow when dictionaries are joined."""
    for index, column in enumerate(table.schema):
        if pa.types.is_dictionary(column.type):
            table = table.set_column(index, column.name, table[column.name].cast(column.type.value_type))
    return table


def _rows(storage: Storage, name: str, *, columns: Sequence[str] | None, ids: frozenset[str] | None) -> pa.Table | None:
    """Return a part's rows; None if it is gone."""
    data = fetch(storage, name)
    if data is None:
        return None
    with wrap_read_errors(storage, name):
        file = open_part(data)
        there = file.schema_arrow.names
        present = there if columns is None else [column for column in columns if column in there]
        none = file.schema_arrow.empty_table().select(present)
        return decoded(pa.concat_tables([none, *_row_groups(file, present, ids)], promote_options="default"))


def _row_groups(file: pq.ParquetFile, columns: list[str], ids: frozenset[str] | None) -> Iterator[pa.Table]:
    """Yield the rows with the given ids; row groups that have none are not decoded."""
    for number in range(file.num_row_groups):
        mask = None
        if ids is not None:
            found = file.read_row_group(number, ["id"], use_threads=False)["id"]
            mine = ids.intersection(found.to_pylist())
            if not mine:
                continue
            mask = pc.is_in(found, value_set=pa.array(mine, pa.string()))
        rows = file.read_row_group(number, columns, use_threads=False).select(columns)  # "a" finds "a.b", too
        yield rows if mask is None else rows.filter(mask)


def _view(tables: Sequence[pa.Table]) -> pa.Table:
    """Return the chosen rows of all tables; only these have a say in the types of columns."""
    tables = [table for table in tables if len(table)]
    if not tables:
        return LEDGER_SCHEMA.empty_table()
    keys = [table.select(key_columns(table.column_names)) for table in tables]
    rows = latest_rows(pa.concat_tables(keys, promote_options="permissive"))
    kept = [
        table if mask.all() else table.filter(pa.array(mask))
        for table, mask in zip(tables, masks(rows, [len(table) for table in tables]), strict=True)
        if mask.any()
    ]
    in_place = np.sort(rows)
    view = concat(kept)
    return view if np.array_equal(rows, in_place) else view.take(pa.array(np.searchsorted(in_place, rows)))


def concat(tables: list[pa.Table]) -> pa.Table:
    """Join tables whose columns may differ; a column whose types cannot be brought together becomes text."""
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
