"""Compaction: the ledger's parts of ended runs become few; and the files that no row names."""

import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.ledger import job_records, ledger
from pipeline.storage.faults import StorageError
from pipeline.storage.storage import Storage
from pyramid_flow.errors import PyramidFlowError

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_ROWS = 100_000
MAX_BYTES = 16 * 2**20
"""A part that has grown to this size takes no more rows: whoever reads the ledger holds a few whole parts at a time."""
GROUP_BYTES = 8 * 2**20
"""Size of a row group in memory."""
SILENCE = timedelta(minutes=10)
"""A run that has shown no sign of life for so long is dead, whatever its state says."""
FILES = ("videos", "images", "thumbnails")
NAMED_IN = ("uri", "thumbnail_uri")
ORPHAN_AGE = timedelta(hours=24)
"""Younger files may belong to rows that are not in the ledger yet."""
LINE_SECONDS = 10.0


class Interfered(PyramidFlowError):
    """A part has vanished while it was compacted."""


@dataclass(frozen=True)
class Compaction:
    """What a compaction did.

    replaced, written: number of parts; left: for each run whose parts were left alone, a line that says why.
    """

    replaced: int
    written: int
    left: tuple[str, ...]


def compact(storage: Storage) -> Compaction:
    """Merge the parts of ended runs into few, which hold the view of what they replace.

    The new parts are written before the others are deleted: at any moment the ledger holds the same view, and an
    interrupted compaction can be run again. Raises Interfered if another compaction takes parts away meanwhile, and
    LedgerError if a part is damaged, before anything is deleted.
    """
    reasons = _reasons_to_stay(storage)  # first: a run that has ended by now has written its last part
    names = ledger.part_names(storage)
    runs = {name: _run_of(name) for name in names if not ledger.is_compacted(name)}
    left = Counter(run for run in runs.values() if reasons.get(run, NO_RECORD))
    parts = _read(storage, [name for name in names if runs.get(name) not in left])
    plan = _planned(parts)
    written = _write(storage, plan.groups, _new_names(names))
    obsolete = plan.replaced
    for _ in _told("replaced parts deleted", len(obsolete), ledger.prefetched(storage.delete, obsolete)):
        pass
    lines = (f"{number} of run {run}: {reasons.get(run, NO_RECORD)}" for run, number in left.items())
    return Compaction(len(obsolete), written, tuple(lines))


def find_orphans(storage: Storage) -> list[str]:
    """Return the files that no row of any part of the ledger names, sorted."""
    # listed before the ledger is read: what is committed meanwhile is no orphan
    files = {name for folder in FILES for name in storage.list(folder)}
    for rows in ledger.read_parts(storage, NAMED_IN):
        for column in rows.columns:
            files.difference_update(column.to_pylist())
    return sorted(files)


def delete_orphans(storage: Storage, names: Sequence[str]) -> tuple[int, int]:
    """Delete files that are older than 24 hours; returns how many were deleted, and how many were too young."""
    outcomes = _told("orphans looked at", len(names), ledger.prefetched(partial(_delete_if_old, storage), names))
    counts = Counter(outcomes)
    return counts[True], counts[False]


def _delete_if_old(storage: Storage, name: str) -> bool | None:
    """Tell whether the file was old enough and is deleted; None if it was gone already."""
    try:
        # looked at only now: a resumed run may have written the same name again
        age = datetime.now(UTC) - storage.modified(name)
    except StorageError:
        if storage.exists(name):
            raise
        return None
    if age > ORPHAN_AGE:
        storage.delete(name)
    return age > ORPHAN_AGE


NO_RECORD = "it has no record in runs/"
DAMAGED = "its record in runs/ is damaged"


def _reasons_to_stay(storage: Storage) -> dict[str, str]:
    """Return for each run with a record why its parts must be left alone; "" if it has ended."""
    names = [name for name in storage.list(job_records.RUNS) if name.endswith(".json")]
    reasons = ledger.prefetched(partial(_reason_to_stay, storage), names)
    runs = [name.removeprefix(f"{job_records.RUNS}/").removesuffix(".json") for name in names]
    return dict(zip(runs, reasons, strict=True))


def _reason_to_stay(storage: Storage, name: str) -> str:
    try:
        record = job_records.read_run(storage, name)
        silence = datetime.now(UTC) - datetime.fromisoformat(record["at"])
    except (ledger.LedgerError, TypeError, ValueError):
        return DAMAGED
    if record["state"] == "running":
        return "" if silence > SILENCE else f"it is running, last sign of life {silence.total_seconds():.0f} s ago"
    return "" if record["state"] in ("finished", "interrupted", "broken") else DAMAGED


def _run_of(name: str) -> str:
    return name.removeprefix(f"{ledger.PARTS}/part-").rpartition("-")[0] or name


@dataclass(frozen=True)
class _Part:
    """A part without its heavy columns; keys: those that decide which rows the view holds."""

    name: str
    num_bytes: int
    schema: pa.Schema
    keys: pa.Table

    @property
    def is_full(self) -> bool:
        return len(self.keys) >= MAX_ROWS or self.num_bytes >= MAX_BYTES


def _read(storage: Storage, names: Sequence[str]) -> list[_Part]:
    parts = ledger.prefetched(partial(_read_part, storage), names)
    return list(_told("parts read", len(names), parts))


def _read_part(storage: Storage, name: str) -> _Part:
    data = _fetched(storage, name)
    with ledger.wrap_read_errors(storage, name):
        file = ledger.open_part(data)
        columns = ledger.key_columns(file.schema_arrow.names)
        keys = file.read(columns=columns, use_threads=False).select(columns)
        schema = ledger.decoded(file.schema_arrow.empty_table()).schema.remove_metadata()
    return _Part(name, len(data), schema, keys)


def _fetched(storage: Storage, name: str) -> bytes:
    data = ledger.fetch(storage, name)
    if data is None:
        raise Interfered(f"{storage.url(name)} has vanished, perhaps by another compaction")
    return data


@dataclass
class _Group:
    """Parts whose columns agree in type, so that their rows fit into one file as they are.

    Rows of other types stay apart: what the view makes of them depends on all of them, and the next run may bring more.
    kept: by the name of the part, which of its rows the view holds.
    """

    schema: pa.Schema
    kept: dict[str, NDArray[np.bool_]]

    def takes(self, part: _Part, mask: NDArray[np.bool_]) -> bool:
        """Take a part in, if its columns agree; it may lack some, or have only nulls in them."""
        try:
            self.schema = pa.unify_schemas([self.schema, part.schema])
        except pa.ArrowException:
            return False
        self.kept[part.name] = mask
        return True


@dataclass(frozen=True)
class _Plan:
    """What is to be done; useless: parts of which the view holds no row."""

    groups: list[_Group]
    useless: list[str]

    @property
    def replaced(self) -> list[str]:
        return [*(name for group in self.groups for name in group.kept), *self.useless]


def _planned(parts: Sequence[_Part]) -> _Plan:
    """Decide which rows are kept: those of the view, and those that count rerolls.

    Full parts of which all rows are kept stay, and so do those without a like.
    """
    plan = _Plan([], [])
    if not parts:
        return plan
    groups: list[_Group] = []
    keys = pa.concat_tables([part.keys for part in parts], promote_options="permissive")
    rows = np.union1d(ledger.latest_rows(keys), ledger.last_rerolls(keys))
    for part, mask in zip(parts, ledger.masks(rows, [len(part.keys) for part in parts]), strict=True):
        if not mask.any():
            plan.useless.append(part.name)
        elif not (part.is_full and mask.all()) and not any(group.takes(part, mask) for group in groups):
            groups.append(_Group(part.schema, {part.name: mask}))
    plan.groups.extend(group for group in groups if len(group.kept) > 1)
    return plan


def _new_names(names: Sequence[str]) -> Iterator[str]:
    """Yield names for new parts, which sort after those of all earlier compactions; no clock needs to be right."""
    generations = [int(digits) for name in names for digits in re.findall(rf"^{ledger.COMPACTED}([0-9]+)-", name)]
    stem = f"{ledger.COMPACTED}{max(generations, default=0) + 1:06d}-{secrets.token_hex(4)}"
    return (f"{stem}-{number:06d}.parquet" for number in count())


def _write(storage: Storage, groups: Sequence[_Group], names: Iterator[str]) -> int:
    """Write the groups' rows as new parts; returns their number."""
    written = 0
    with TemporaryDirectory(prefix="pyramid-render-") as folder:
        for group in groups:
            writer = _PartWriter(storage, group.schema, names, Path(folder) / "part.parquet")
            for rows in _kept_rows(storage, group):
                writer.append(rows)
            writer.close()
            written += writer.written
    return written


def _kept_rows(storage: Storage, group: _Group) -> Iterator[pa.Table]:
    """Yield the rows of a group's parts that are kept, one row group at a time."""
    contents = ledger.prefetched(partial(_fetched, storage), group.kept)
    parts = zip(group.kept.items(), contents, strict=True)
    for (name, mask), data in _told("parts merged", len(group.kept), parts):
        with ledger.wrap_read_errors(storage, name):
            file = ledger.open_part(data)
            start = 0
            for number in range(file.num_row_groups):
                rows = file.read_row_group(number)
                yield ledger.decoded(rows.filter(pa.array(mask[start : start + len(rows)])))
                start += len(rows)


@dataclass
class _PartWriter:
    """Writes rows of one schema as parts of limited size, each by way of a local file."""

    storage: Storage
    schema: pa.Schema
    names: Iterator[str]
    path: Path
    written: int = 0
    _file: pq.ParquetWriter | None = None
    _num_rows: int = 0
    _group: list[pa.Table] = field(default_factory=list)
    _group_bytes: int = 0

    def append(self, rows: pa.Table) -> None:
        """Take rows over; they are in the ledger once their part is closed."""
        while len(rows):
            head = rows.slice(0, MAX_ROWS - self._num_rows)
            rows = rows.slice(len(head))
            self._num_rows += len(head)
            self._group.append(head)
            self._group_bytes += head.nbytes
            if self._group_bytes >= GROUP_BYTES:
                self._write_group()
            if self._num_rows == MAX_ROWS or (self._file and self.path.stat().st_size >= MAX_BYTES):
                self.close()

    def close(self) -> None:
        """Write what is open as a part."""
        if not self._num_rows:
            return
        self._write_group().close()
        name = next(self.names)
        with ledger.wrap_read_errors(self.storage, name):
            _check(self.path, self._num_rows)
        self.storage.put(name, self.path)
        self.written += 1
        self._file, self._num_rows = None, 0

    def _write_group(self) -> pq.ParquetWriter:
        if self._file is None:
            self._file = pq.ParquetWriter(self.path, self.schema)
        if self._group:
            # with the empty table, rows that lack a column get it
            rows = pa.concat_tables([self.schema.empty_table(), *self._group], promote_options="default")
            self._file.write_table(rows, row_group_size=len(rows))
            self._group, self._group_bytes = [], 0
        return self._file


def _check(path: Path, num_rows: int) -> None:
    """Read a part back before others are deleted for it."""
    file = pq.ParquetFile(path)
    found = sum(len(file.read_row_group(number)) for number in range(file.num_row_groups))
    if found != num_rows:
        raise pa.ArrowInvalid(f"{found} of {num_rows} rows could be read back")


def _told(what: str, total: int, items: Iterable[T]) -> Iterator[T]:
    """Yield the items, and log every 10 seconds how many there were."""
    line_at = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        if time.monotonic() - line_at >= LINE_SECONDS:
            line_at = time.monotonic()
            logger.info("%d of %d %s", number, total, what)
