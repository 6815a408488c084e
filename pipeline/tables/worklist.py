"""What the input asks for, row by row: render, already done, equal to an earlier row, or in conflict with one."""

import logging
import time
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from hashlib import blake2b
from itertools import count, pairwise
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.request import (
    ID_PATTERN,
    RenderRequest,
    RequestError,
    ResolvedRequest,
    Shape,
    UntrainedError,
    hash_of,
)
from pipeline.rows import RenderRow, RowError, plain_text
from pipeline.tables.readers import REQUEST_COLUMNS, InputPart, read_blocks, request_values
from pyramid_flow import Preset

logger = logging.getLogger(__name__)

DIGEST_BYTES = 16
LOG_SECONDS = 10.0


@dataclass(frozen=True)
class RowRules:
    """What turns an input row into render rows, the same in the driver and in the read tasks.

    reroll: which other seed its rows get, from 1 on; 0 = their own.
    """

    preset: Preset
    allow_untrained: bool = False
    reroll: int = 0


@dataclass(frozen=True)
class Candidate:
    """A render row before the whole input is known, what tells it from others that claim its id, and its image."""

    row: RenderRow
    content: str
    image: bytes | None = None

    @property
    def digest(self) -> bytes:
        """A hash of the content, of 16 bytes."""
        return blake2b(self.content.encode(), digest_size=DIGEST_BYTES).digest()


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
    except UntrainedError as untrained:
        refused = RequestError(f"{untrained} (`render --allow-untrained` takes it)")
        ids = [base] if copies == 1 else [f"{base}-{number}" for number in range(copies)]
        failed = RenderRow(id=base, position=position, prompt=request.prompt, error=RowError.of("read", refused))
        return [Candidate(failed.updated(id=row_id), content) for row_id in ids]
    videos = [resolved] if copies == 1 else [resolved.copy_of(number) for number in range(copies)]
    warnings = tuple(resolved.warnings(rules.preset))
    return [_candidate(video, position, content, request.image, warnings, rules.reroll) for video in videos]


def _candidate(
    request: ResolvedRequest,
    position: str,
    content: str,
    image: bytes | str | None,
    warnings: tuple[str, ...],
    reroll: int,
) -> Candidate:
    row = RenderRow(
        id=request.id,
        position=position,
        prompt=request.prompt,
        image_source=image if isinstance(image, str) else None,
        request=request.rerolled(reroll),
        warnings=warnings,
        rerolls=reroll,
        first_seed=request.seed,
    )
    pixels = image if isinstance(image, bytes) else None
    return Candidate(row, f"{content}, seed {request.seed}", pixels)  # a copy and a row can claim the same id


def _not_understood(values: dict[str, object], position: str, error: RequestError) -> Candidate:
    content, own_id, prompt = hash_of(values), values.get("id"), values.get("prompt")
    row = RenderRow(
        id=own_id if isinstance(own_id, str) and ID_PATTERN.fullmatch(own_id) else content,
        position=position,
        prompt=plain_text(prompt) if isinstance(prompt, str) else None,
        error=RowError.of("read", error),
    )
    return Candidate(row, content)


class RowStatus(IntEnum):
    """What happens to a candidate; a byte each, and never a zero byte, which some array types strip.

    RENDER goes through the pipeline, SKIP is in the ledger already, ELSEWHERE lies outside of the shard or limit, the
    others are written by the driver.
    """

    RENDER = 1
    SKIP = 2
    DUPLICATE = 3
    CONFLICT = 4
    ELSEWHERE = 5


@dataclass(frozen=True)
class PartWork:
    """The fates of all candidates of one part, in reading order: a byte each."""

    part: InputPart
    fates: bytes

    @property
    def num_rows(self) -> int:
        """Number of rows to render."""
        return self.fates.count(RowStatus.RENDER)


@dataclass(frozen=True)
class UnrenderedRow:
    """A row that is not rendered itself: it repeats an earlier row, or claims the id of one that differs.

    id: of its own ledger row; claimed: the id that it claims; part, index: where it is read; conflict: what it is in
    conflict with, None if it is a duplicate of the row that it claims to be.
    """

    id: str
    claimed: str
    part: int
    index: int
    conflict: str | None = None

    @property
    def duplicate_of(self) -> str | None:
        """Id of the row that it repeats."""
        return self.claimed if self.conflict is None else None


@dataclass(frozen=True, eq=False)
class Worklist:
    """The whole input, as columns over all its candidates in reading order, and the rows that only the driver writes.

    starts: number of candidates before each part, and in all; ids: null for what is not rendered itself; rows: number
    of the candidate's row within its part; shape_of: index into shapes, where None stands for failed rows.
    """

    parts: tuple[InputPart, ...]
    starts: tuple[int, ...]
    ids: pa.StringArray
    fates: NDArray[np.uint8]
    rows: NDArray[np.uint32]
    shapes: tuple[Shape | None, ...]
    shape_of: NDArray[np.uint32]
    echoes: tuple[UnrenderedRow, ...]

    @property
    def num_rows(self) -> int:
        """Number of rows to render."""
        return int((self.fates == RowStatus.RENDER).sum())

    @property
    def num_rows_by_status(self) -> dict[RowStatus, int]:
        """Number of candidates of each fate."""
        return {fate: int((self.fates == fate).sum()) for fate in RowStatus}

    @property
    def num_rows_by_shape(self) -> Counter[Shape]:
        """Number of rows to render of each shape; rows that are known to fail are left out."""
        counts = np.bincount(self.shape_of[self.fates == RowStatus.RENDER], minlength=len(self.shapes))
        return Counter({shape: int(n) for shape, n in zip(self.shapes, counts, strict=True) if shape and n})

    def expected_ids(self) -> pa.StringArray:
        """Return the id of every row that the ledger must hold at the end."""
        echoed = pa.array((echo.id for echo in self.echoes), pa.string())
        return pa.concat_arrays([self.ids.drop_null(), echoed])

    def part_works(self) -> Iterator[PartWork]:
        """Yield the parts that hold rows to render."""
        for part, (start, stop) in zip(self.parts, pairwise(self.starts), strict=True):
            work = PartWork(part, self.fates[start:stop].tobytes())
            if work.num_rows:
                yield work

    def rows_of(self, ids: pa.StringArray) -> Iterator[tuple[InputPart, dict[int, str]]]:
        """Yield the parts that hold candidates with these ids: the numbers of their rows there, each with an id."""
        found = pc.fill_null(pc.is_in(self.ids, ids), False).to_numpy(zero_copy_only=False)
        by_number = dict(zip(np.flatnonzero(found).tolist(), self.ids.filter(pa.array(found)).to_pylist(), strict=True))
        wanted = frozenset(ids.to_pylist())
        by_number |= {self.starts[echo.part] + echo.index: echo.id for echo in self.echoes if echo.id in wanted}
        by_part: defaultdict[int, dict[int, str]] = defaultdict(dict)
        for number, row_id in sorted(by_number.items()):
            by_part[bisect_right(self.starts, number) - 1][int(self.rows[number])] = row_id
        for part, rows in by_part.items():
            yield self.parts[part], rows

    def remaining(self, done: pa.StringArray) -> "Worklist":
        """Return the worklist without the rows that are in the ledger."""
        found = pc.is_in(self.ids, done, skip_nulls=True).to_numpy(zero_copy_only=False)
        fates = np.where(found & (self.fates == RowStatus.RENDER), np.uint8(RowStatus.SKIP), self.fates)
        if not self.echoes:
            return replace(self, fates=fates)
        settled = frozenset(done.to_pylist())
        return replace(self, fates=fates, echoes=tuple(echo for echo in self.echoes if echo.id not in settled))

    def only(self, ids: pa.StringArray) -> "Worklist":
        """Return the worklist with only the rows to render that have these ids, and without echoes."""
        found = pc.is_in(self.ids, ids, skip_nulls=True).to_numpy(zero_copy_only=False)
        fates = np.where(found | (self.fates != RowStatus.RENDER), self.fates, np.uint8(RowStatus.SKIP))
        return replace(self, fates=fates, echoes=())

    def shard(self, number: int, count: int) -> "Worklist":
        """Return one of several parts of about equal size, numbered from 1: a row's id decides where it belongs.

        What is equal to a row, or in dispute with it, belongs to the same shard.
        """
        ids = self.ids.to_pylist()
        mine = np.fromiter((row_id is None or _shard_of(row_id, count) == number for row_id in ids), bool, len(ids))
        return self._keep(mine, (echo for echo in self.echoes if _shard_of(echo.claimed, count) == number))

    def head(self, num_rows: int) -> "Worklist":
        """Return the worklist with only the candidates of the input's first rows."""
        parts = np.repeat(np.arange(len(self.parts)), np.diff(self.starts))
        begins_row = np.ones(len(parts), bool)
        begins_row[1:] = (np.diff(parts) != 0) | (np.diff(np.asarray(self.rows, np.int64)) != 0)
        mine = np.cumsum(begins_row) <= num_rows
        return self._keep(mine, (echo for echo in self.echoes if mine[self.starts[echo.part] + echo.index]))

    def _keep(self, mine: np.ndarray, echoes: Iterable[UnrenderedRow]) -> "Worklist":
        return replace(
            self,
            ids=pc.if_else(pa.array(mine), self.ids, None),
            fates=np.where(mine, self.fates, np.uint8(RowStatus.ELSEWHERE)),
            echoes=tuple(echoes),
        )

    def first_of_each_shape(self, num_rows: int) -> "Worklist":
        """Return the worklist with only the first rows to render of each shape, and without echoes."""
        fates = np.where(self.fates == RowStatus.RENDER, np.uint8(RowStatus.ELSEWHERE), self.fates)
        for index, shape in enumerate(self.shapes):
            if shape:
                chosen = np.flatnonzero((self.fates == RowStatus.RENDER) & (self.shape_of == index))[:num_rows]
                fates[chosen] = RowStatus.RENDER
        ids = pc.if_else(pa.array(fates != RowStatus.ELSEWHERE), self.ids, None)
        return replace(self, ids=ids, fates=fates, echoes=())


def _shard_of(row_id: str, count: int) -> int:
    return 1 + crc32(row_id.encode()) % count


def scan(parts: Sequence[InputPart], rules: RowRules) -> Worklist:
    """Read the request columns of the whole input once and decide every row's fate; logs its progress."""
    seen, logged_at = _ScanState(), time.monotonic()
    for part in parts:
        seen.begin(part)
        for start, table in read_blocks(part, REQUEST_COLUMNS):
            if time.monotonic() - logged_at >= LOG_SECONDS:
                logged_at = time.monotonic()
                logger.info("%d rows of the input read", len(seen.fates))
            for row, values in enumerate(request_values(table), start):
                for candidate in candidates(values, part.position(row), rules):
                    seen.take(candidate, row)
    return seen.worklist()


class _ScanState:
    """What a scan knows so far; a candidate is known by its number in reading order.

    first: the first candidate of each id; repeats: the later ones, if there are any; contents: 16 bytes each.
    """

    def __init__(self) -> None:
        self.parts: list[InputPart] = []
        self.starts: list[int] = []
        self.ids: list[str | None] = []
        self.fates = bytearray()
        self.rows = array("I")
        self.shapes: dict[Shape | None, int] = {None: 0}
        self.shape_of = array("I")
        self.contents = bytearray()
        self.first: dict[str, int] = {}
        self.repeats: defaultdict[str, list[int]] = defaultdict(list)

    def begin(self, part: InputPart) -> None:
        self.parts.append(part)
        self.starts.append(len(self.fates))

    def take(self, candidate: Candidate, row_number: int) -> None:
        row, number = candidate.row, len(self.fates)
        shape = None if row.error or row.request is None else row.request.shape
        self.rows.append(row_number)
        self.shape_of.append(self.shapes.setdefault(shape, len(self.shapes)))
        self.contents += candidate.digest
        if self.first.setdefault(row.id, number) == number:
            self.fates.append(RowStatus.RENDER)
            self.ids.append(row.id)
        else:
            self.fates.append(RowStatus.DUPLICATE)
            self.ids.append(None)
            self.repeats[row.id].append(number)

    def worklist(self) -> Worklist:
        echoes = [echo for row_id, repeats in self.repeats.items() for echo in self._settled(row_id, repeats)]
        echoes.sort(key=lambda echo: (echo.part, echo.index))
        return Worklist(
            parts=tuple(self.parts),
            starts=(*self.starts, len(self.fates)),
            ids=pa.array(self.ids, pa.string()),
            fates=np.frombuffer(self.fates, np.uint8),
            rows=np.frombuffer(self.rows, np.uint32),
            shapes=tuple(self.shapes),
            shape_of=np.frombuffer(self.shape_of, np.uint32),
            echoes=tuple(echoes),
        )

    def _settled(self, row_id: str, repeats: Sequence[int]) -> Iterator[UnrenderedRow]:
        """Yield the repeats of an id as duplicates, or all rows that claim it as conflicts if one differs."""
        first, names = self.first[row_id], self._free_names(row_id)
        others = [repeat for repeat in repeats if self._content(repeat) != self._content(first)]
        if not others:
            for repeat, name in zip(repeats, names, strict=False):
                part, index = self._place(repeat)
                yield UnrenderedRow(name, row_id, part, index)
            return
        self.ids[first] = None
        for number, name in [(first, row_id), *zip(repeats, names, strict=False)]:
            self.fates[number] = RowStatus.CONFLICT
            rival = others[0] if self._content(number) == self._content(first) else number
            message = f"id {row_id!r} has two contents, at {self._position(first)} and {self._position(rival)}"
            part, index = self._place(number)
            yield UnrenderedRow(name, row_id, part, index, conflict=message)

    def _content(self, number: int) -> bytes:
        return bytes(self.contents[DIGEST_BYTES * number : DIGEST_BYTES * (number + 1)])

    def _place(self, number: int) -> tuple[int, int]:
        """Return the candidate's part, and its number within it."""
        part = bisect_right(self.starts, number) - 1
        return part, number - self.starts[part]

    def _position(self, number: int) -> str:
        part, _ = self._place(number)
        return self.parts[part].position(self.rows[number])

    def _free_names(self, row_id: str) -> Iterator[str]:
        """Yield `<id>-dup1`, `<id>-dup2`, ... without those that are the ids of other rows."""
        names = (f"{row_id}-dup{number}" for number in count(1))
        return (name for name in names if name not in self.first)
