"""What the input asks for, row by row: render, already done, equal to an earlier row, or in conflict with one."""

from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from pipeline.inputs import REQUEST_COLUMNS, InputPart, read_blocks, request_values
from pipeline.request import ID_PATTERN, RenderRequest, RequestError, hash_of
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
            row = RenderRow(
                id=row_id,
                position=position,
                prompt=request.prompt,
                request=resolved,
                warnings=tuple(resolved.warnings),
            )
            image = request.image if isinstance(request.image, bytes) else None
            rows.append(Candidate(row, request.content_hash, image))
        return rows
    except RequestError as error:
        content, own_id, prompt = hash_of(values), values.get("id"), values.get("prompt")
        row = RenderRow(
            id=own_id if isinstance(own_id, str) and ID_PATTERN.fullmatch(own_id) else content,
            position=position,
            prompt=prompt if isinstance(prompt, str) else None,
            error=RowError.of("read", error),
        )
        return [Candidate(row, content)]


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
    seen = _Seen()
    for part in parts:
        seen.begin(part)
        for start, table in read_blocks(part, REQUEST_COLUMNS):
            for offset, values in enumerate(request_values(table)):
                for candidate in candidates(values, part.position(start + offset), rules):
                    seen.take(candidate)
    return seen.worklist()


@dataclass(frozen=True)
class _First:
    """Where an id was met first."""

    part: int
    index: int
    content: str
    position: str


class _Seen:
    """What a scan knows so far."""

    def __init__(self) -> None:
        self.parts: list[InputPart] = []
        self.fates: list[bytearray] = []
        self.ids: list[list[str]] = []
        self.echoes: list[Echo] = []
        self.first: dict[str, _First] = {}
        self.repeats: Counter[str] = Counter()

    def begin(self, part: InputPart) -> None:
        self.parts.append(part)
        self.fates.append(bytearray())
        self.ids.append([])

    def take(self, candidate: Candidate) -> None:
        row, part = candidate.row, len(self.parts) - 1
        first = self.first.setdefault(row.id, _First(part, len(self.ids[part]), candidate.content, row.position))
        if first.position == row.position:
            self._add(Fate.RENDER, row.id)
            return
        self.repeats[row.id] += 1
        echo = Echo(f"{row.id}-dup{self.repeats[row.id]}", part, len(self.ids[part]))
        if first.content == candidate.content:
            self._add(Fate.DUPLICATE)
            self.echoes.append(replace(echo, duplicate_of=row.id))
            return
        message = f"id {row.id!r} has two contents, at {first.position} and {row.position}"
        self._add(Fate.CONFLICT)
        self.echoes.append(replace(echo, message=message))
        self._dispute(first, row.id, message)

    def _add(self, fate: Fate, row_id: str = "") -> None:
        self.fates[-1].append(fate)
        self.ids[-1].append(row_id)

    def _dispute(self, first: _First, row_id: str, message: str) -> None:
        """Take the first row with a disputed id out of the rendering, once."""
        if self.fates[first.part][first.index] == Fate.RENDER:
            self.fates[first.part][first.index] = Fate.CONFLICT
            self.ids[first.part][first.index] = ""
            self.echoes.append(Echo(row_id, first.part, first.index, message=message))

    def worklist(self) -> Worklist:
        parts = tuple(PartWork(part, bytes(fates)) for part, fates in zip(self.parts, self.fates, strict=True))
        return Worklist(parts, tuple(tuple(ids) for ids in self.ids), tuple(self.echoes))
