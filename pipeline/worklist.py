"""What the input asks for, row by row: render, already done, equal to an earlier row, or in conflict with one."""

from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import count

from pipeline.inputs import REQUEST_COLUMNS, InputPart, read_blocks, request_values
from pipeline.request import ID_PATTERN, RenderRequest, RequestError, ResolvedRequest, hash_of
from pipeline.rows import RenderRow, RowError, plain_text
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
    except RequestError as error:
        return [_not_understood(values, position, error)]
    content, copies = request.content_hash, request.num_videos_per_prompt or 1
    base = request.id or content
    try:
        resolved = request.resolve(rules.preset, base, allow_untrained=rules.allow_untrained)
    except RequestError as error:
        ids = [base] if copies == 1 else [f"{base}-{number}" for number in range(copies)]
        failed = RenderRow(id=base, position=position, prompt=request.prompt, error=RowError.of("read", error))
        return [Candidate(failed.updated(id=row_id), content) for row_id in ids]
    image = request.image if isinstance(request.image, bytes) else None
    videos = [resolved] if copies == 1 else [resolved.copy_of(number) for number in range(copies)]
    return [_candidate(video, position, content, image) for video in videos]


def _candidate(request: ResolvedRequest, position: str, content: str, image: bytes | None) -> Candidate:
    row = RenderRow(
        id=request.id,
        position=position,
        prompt=request.prompt,
        request=request,
        warnings=tuple(request.warnings),
    )
    return Candidate(row, f"{content}, seed {request.seed}", image)  # a copy and a row can claim the same id


def _not_understood(values: dict[str, object], position: str, error: RequestError) -> Candidate:
    content, own_id, prompt = hash_of(values), values.get("id"), values.get("prompt")
    row = RenderRow(
        id=own_id if isinstance(own_id, str) and ID_PATTERN.fullmatch(own_id) else content,
        position=position,
        prompt=plain_text(prompt) if isinstance(prompt, str) else None,
        error=RowError.of("read", error),
    )
    return Candidate(row, content)


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
class _Met:
    """Where an id was met."""

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
        self.first: dict[str, _Met] = {}
        self.repeats: defaultdict[str, list[_Met]] = defaultdict(list)

    def begin(self, part: InputPart) -> None:
        self.parts.append(part)
        self.fates.append(bytearray())
        self.ids.append([])

    def take(self, candidate: Candidate) -> None:
        row, part = candidate.row, len(self.parts) - 1
        met = _Met(part, len(self.ids[part]), candidate.content, row.position)
        first = self.first.setdefault(row.id, met)
        if first is met:
            self._add(Fate.RENDER, row.id)
        else:
            self._add(Fate.DUPLICATE)
            self.repeats[row.id].append(met)

    def _add(self, fate: Fate, row_id: str = "") -> None:
        self.fates[-1].append(fate)
        self.ids[-1].append(row_id)

    def worklist(self) -> Worklist:
        echoes = [echo for row_id, repeats in self.repeats.items() for echo in self._settled(row_id, repeats)]
        echoes.sort(key=lambda echo: (echo.part, echo.index))
        parts = tuple(PartWork(part, bytes(fates)) for part, fates in zip(self.parts, self.fates, strict=True))
        return Worklist(parts, tuple(tuple(ids) for ids in self.ids), tuple(echoes))

    def _settled(self, row_id: str, repeats: Sequence[_Met]) -> Iterator[Echo]:
        """Yield the repeats of an id as duplicates, or all rows that claim it as conflicts if one differs."""
        first, names = self.first[row_id], self._free_names(row_id)
        others = [repeat for repeat in repeats if repeat.content != first.content]
        if not others:
            for repeat, name in zip(repeats, names, strict=False):
                yield Echo(name, repeat.part, repeat.index, duplicate_of=row_id)
            return
        self.ids[first.part][first.index] = ""
        for met, name in [(first, row_id), *zip(repeats, names, strict=False)]:
            self.fates[met.part][met.index] = Fate.CONFLICT
            rival = others[0] if met.content == first.content else met
            message = f"id {row_id!r} has two contents, at {first.position} and {rival.position}"
            yield Echo(name, met.part, met.index, message=message)

    def _free_names(self, row_id: str) -> Iterator[str]:
        """Yield `<id>-dup1`, `<id>-dup2`, ... without those that are the ids of other rows."""
        names = (f"{row_id}-dup{number}" for number in count(1))
        return (name for name in names if name not in self.first)
