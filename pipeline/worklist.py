"""What the input asks for, row by row: render, already done, equal to an earlier row, or in conflict with one."""

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from pipeline.inputs import REQUEST_COLUMNS, InputPart, read_blocks, request_values
from pipeline.request import RenderRequest, RequestError, hash_of
from pipeline.rows import RenderRow, RowError
from pyramid_flow import Preset


@dataclass(frozen=True)
class RowRules:
    """What turns an input row into render rows, the same in the driver and in the read tasks."""

    preset: Preset
    allow_untrained: bool = False


@dataclass(frozen=True)
class Candidate:
    """A render row before the whole input is known, a hash of what it asks for, and its image."""

    row: RenderRow
    content: str
    image: bytes | None = None


def candidates(values: dict[str, object], position: str, rules: RowRules) -> list[Candidate]:
    """Return the render rows of one input row: one per copy, or one failed row if it cannot be understood."""
    try:
        request = RenderRequest.parse(values)
        base = request.id or request.content_hash
        copies = request.num_videos_per_prompt or 1
        rows = []
        for copy in range(copies):
            row_id = base if copies == 1 else f"{base}-{copy}"
            resolved = request.resolve(rules.preset, row_id, copy=copy, allow_untrained=rules.allow_untrained)
            row = RenderRow(id=row_id, position=position, request=resolved, warnings=tuple(resolved.warnings))
            image = request.image if isinstance(request.image, bytes) else None
            rows.append(Candidate(row, request.content_hash, image))
        return rows
    except RequestError as error:
        content = hash_of(values)
        failed = RenderRow(id=content, position=position, error=RowError.of("read", error))
        return [Candidate(failed, content)]


class Fate(IntEnum):
    """What happens to a candidate; a byte each, and never a zero byte, which some array types strip.

    RENDER goes through the pipeline, SKIP is in the ledger already, the others are written by the driver.
    """

    RENDER = 1
    SKIP = 2
    DUPLICATE = 3
    CONFLICT = 4


@dataclass(frozen=True)
class PartWork:
    """The fates of all candidates of one part, in reading order: a byte each."""

    part: InputPart
    fates: bytes

    @property
    def num_rows(self) -> int:
        """Number of rows to render."""
        return self.fates.count(Fate.RENDER)


@dataclass(frozen=True)
class Echo:
    """A row that is not rendered itself: a duplicate of an earlier row, or one of two that claim the same id."""

    id: str
    part: int
    index: int
    duplicate_of: str | None = None
    message: str | None = None


@dataclass(frozen=True)
class Worklist:
    """The whole input: the fates per part, the ids of what is rendered, and the rows that only the driver writes."""

    parts: tuple[PartWork, ...]
    ids: tuple[tuple[str, ...], ...]
    echoes: tuple[Echo, ...]

    @property
    def num_rows(self) -> int:
        """Number of rows to render."""
        return sum(work.num_rows for work in self.parts)

    def expected_ids(self) -> Iterator[str]:
        """Yield the id of every row that the ledger must hold at the end."""
        for ids in self.ids:
            yield from (row_id for row_id in ids if row_id)
        yield from (echo.id for echo in self.echoes)

    def remaining(self, done: Container[str]) -> "Worklist":
        """Return the worklist without the rows that are in the ledger."""
        parts = []
        for work, ids in zip(self.parts, self.ids, strict=True):
            fates = bytearray(work.fates)
            for index, row_id in enumerate(ids):
                if row_id and row_id in done:
                    fates[index] = Fate.SKIP
            parts.append(replace(work, fates=bytes(fates)))
        return replace(self, parts=tuple(parts), echoes=tuple(echo for echo in self.echoes if echo.id not in done))


def scan(parts: Sequence[InputPart], rules: RowRules) -> Worklist:
    """Read the request columns of the whole input once and decide every row's fate."""
    fates: list[bytearray] = []
    ids: list[list[str]] = []
    echoes: list[Echo] = []
    first_seen: dict[str, tuple[int, int, str, str]] = {}  # id -> part, index, content, position
    repeats: dict[str, int] = {}
    for number, part in enumerate(parts):
        fates.append(bytearray())
        ids.append([])
        for candidate in part_candidates(part, rules, REQUEST_COLUMNS):
            row_id, index = candidate.row.id, len(ids[number])
            earlier = first_seen.get(row_id)
            if earlier is None:
                first_seen[row_id] = (number, index, candidate.content, candidate.row.position)
                fates[number].append(Fate.RENDER)
                ids[number].append(row_id)
                continue
            repeats[row_id] = repeats.get(row_id, 0) + 1
            echo_id = f"{row_id}-dup{repeats[row_id]}"
            fates[number].append(Fate.DUPLICATE)
            ids[number].append("")
            if earlier[2] == candidate.content:
                echoes.append(Echo(echo_id, number, index, duplicate_of=row_id))
                continue
            fates[number][index] = Fate.CONFLICT
            message = f"id {row_id!r} has two contents, at {earlier[3]} and {candidate.row.position}"
            echoes.append(Echo(echo_id, number, index, message=message))
            if fates[earlier[0]][earlier[1]] == Fate.RENDER:
                fates[earlier[0]][earlier[1]] = Fate.CONFLICT
                ids[earlier[0]][earlier[1]] = ""
                echoes.append(Echo(row_id, earlier[0], earlier[1], message=message))
    works = tuple(PartWork(part, bytes(own)) for part, own in zip(parts, fates, strict=True))
    return Worklist(works, tuple(tuple(own) for own in ids), tuple(echoes))


def part_candidates(part: InputPart, rules: RowRules, columns: Iterable[str]) -> Iterator[Candidate]:
    """Yield the candidates of a part in reading order."""
    for start, table in read_blocks(part, tuple(columns)):
        for offset, values in enumerate(request_values(table)):
            yield from candidates(values, part.position(start + offset), rules)
