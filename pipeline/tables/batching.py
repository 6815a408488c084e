"""From rows of the input to batches: rows of one shape together, the failed ones apart."""

from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa

from pipeline.request import Shape
from pipeline.rows import Batch, Item, as_tensor
from pipeline.tables.readers import READ_ROWS, InputPart, own_columns, read_blocks, request_values
from pipeline.tables.worklist import Candidate, PartWork, RowRules, RowStatus, candidates

IMAGE = "image"

Key = tuple[Shape | None, pa.Schema]
"""Rows with equal keys can be in one batch: their shape (None = they cannot be rendered), and their own columns."""

Member = tuple[int, Candidate]
"""A candidate and the number of its row within its block."""


def read_units(works: Iterable[PartWork]) -> Iterator[list[PartWork]]:
    """Put parts together until they hold 4096 rows to render: many small files would give many unfilled batches."""
    unit: list[PartWork] = []
    num_rows = 0
    for work in works:
        unit.append(work)
        num_rows += work.num_rows
        if num_rows >= READ_ROWS:
            yield unit
            unit, num_rows = [], 0
    if unit:
        yield unit


def read_batches(works: Sequence[PartWork], rules: RowRules, batch_size: int) -> Iterator[Batch]:
    """Yield the batches of the parts of a unit; rows of one shape stay in input order.

    Only rows whose fate is `RENDER` are taken. Rows that do not fill a batch wait for more of their shape, 4096 of them
    at most. Rows that cannot be rendered do not wait.
    """
    waiting: dict[Key, Batch] = {}
    for key, rows in _groups(works, rules):
        shape, _ = key
        if shape is None:
            yield rows
            continue
        if key in waiting:
            rows = waiting.pop(key).joined(rows)
        filled = len(rows) - len(rows) % batch_size
        for start in range(0, filled, batch_size):
            yield rows.part(start, start + batch_size)
        if filled < len(rows):
            waiting[key] = rows.part(filled, len(rows))
        if sum(map(len, waiting.values())) > READ_ROWS:
            yield from waiting.values()
            waiting = {}
    yield from waiting.values()


def read_rows(part: InputPart, rules: RowRules, indices: Sequence[int]) -> Iterator[tuple[int, Batch]]:
    """Yield single candidates of a part, by their number in reading order, each as a batch of one."""
    wanted = set(indices)
    for table, members in _blocks(part, rules):
        for index, member in members:
            if index in wanted:
                yield index, _batch([member], table)


def _groups(works: Sequence[PartWork], rules: RowRules) -> Iterator[tuple[Key, Batch]]:
    """Yield the rows to render of each block by their key."""
    for work in works:
        for table, members in _blocks(work.part, rules):
            groups: dict[Shape | None, list[Member]] = {}
            for index, member in members:
                if work.fates[index] == RowStatus.RENDER:
                    groups.setdefault(_shape(member[1]), []).append(member)
            for shape, group in groups.items():
                yield (shape, table.schema), _batch(group, table)


def _blocks(part: InputPart, rules: RowRules) -> Iterator[tuple[pa.Table, list[tuple[int, Member]]]]:
    """Yield each block's own columns and its candidates with their number within the part."""
    count = 0
    for start, table in read_blocks(part):
        members: list[tuple[int, Member]] = []
        for offset, values in enumerate(request_values(table)):
            for candidate in candidates(values, part.position(start + offset), rules):
                members.append((count, (offset, candidate)))
                count += 1
        yield own_columns(table), members


def _shape(candidate: Candidate) -> Shape | None:
    request = candidate.row.request
    return None if candidate.row.error or request is None else request.shape


def _batch(members: Sequence[Member], columns: pa.Table) -> Batch:
    items = []
    for _, candidate in members:
        tensors = {} if candidate.image is None else {IMAGE: as_tensor(candidate.image)}
        items.append(Item(candidate.row, tensors))
    return Batch(tuple(items), columns.take([offset for offset, _ in members]))
