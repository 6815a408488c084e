"""From rows of the input to batches: rows of one shape together, the failed ones apart."""

from collections.abc import Iterator, Sequence

import pyarrow as pa

from pipeline.inputs import InputPart, own_columns, read_blocks, request_values
from pipeline.rows import Batch, Item, as_tensor
from pipeline.worklist import Candidate, Fate, PartWork, RowRules, candidates

IMAGE = "image"

Member = tuple[int, Candidate]
"""A candidate and the number of its row within its block."""


def read_batches(work: PartWork, rules: RowRules, batch_size: int) -> Iterator[Batch]:
    """Yield the batches of a part: within each block of 4096 rows, rows of one batch key in input order.

    Only rows whose fate is `RENDER` are taken. Rows that cannot be rendered come as one batch of failed rows.
    """
    for table, members in _blocks(work.part, rules):
        groups: dict[object, list[Member]] = {}
        for index, member in members:
            if work.fates[index] == Fate.RENDER:
                groups.setdefault(_key(member[1]), []).append(member)
        for key, group in groups.items():
            size = len(group) if key is None else batch_size
            for i in range(0, len(group), size):
                yield _batch(group[i : i + size], table)


def read_rows(part: InputPart, rules: RowRules, indices: Sequence[int]) -> Iterator[tuple[int, Batch]]:
    """Yield single candidates of a part, by their number in reading order, each as a batch of one."""
    wanted = set(indices)
    for table, members in _blocks(part, rules):
        for index, member in members:
            if index in wanted:
                yield index, _batch([member], table)


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


def _key(candidate: Candidate) -> tuple[object, ...] | None:
    request = candidate.row.request
    return None if candidate.row.error or request is None else request.batch_key


def _batch(members: Sequence[Member], columns: pa.Table) -> Batch:
    items = []
    for _, candidate in members:
        tensors = {} if candidate.image is None else {IMAGE: as_tensor(candidate.image)}
        items.append(Item(candidate.row, tensors))
    return Batch(tuple(items), columns.take([offset for offset, _ in members]))
