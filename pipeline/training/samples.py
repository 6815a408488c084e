"""Training samples from tables: endless, shuffled streams of rows, the same however many workers share them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import pyarrow as pa

from pipeline.tables.readers import Columns, InputError, InputPart, read_blocks

WINDOW_PARTS = 16
"""Row groups whose rows are mixed with one another."""


@dataclass(frozen=True)
class Window:
    """Some row groups that are read together, and the order in which their rows come."""

    parts: tuple[InputPart, ...]
    order: tuple[int, ...]

    def read(self, columns: Columns = None) -> pa.Table:
        """Read the rows, in order."""
        blocks = [table for part in self.parts for _, table in read_blocks(part, columns)]
        return pa.concat_tables(blocks, promote_options="permissive").take(pa.array(self.order))


@dataclass(frozen=True)
class Stream:
    """One of several streams over a table, each with row groups of its own; all rows come once per epoch.

    Sample i of a global batch comes from stream i % num_streams. So workers that share the streams evenly draw the same
    batches as one alone would, and read nothing twice.
    """

    parts: tuple[InputPart, ...]
    seed: int
    number: int

    def windows(self, first_row: int, num_rows: int) -> Iterator[Window]:
        """Yield windows that hold `num_rows` rows from row `first_row` of the stream on, the last one cut."""
        passed = 0
        for window in self._all_windows():
            begin, end = max(first_row - passed, 0), min(first_row + num_rows - passed, len(window.order))
            if begin < end:
                yield Window(window.parts, window.order[begin:end])
            passed += len(window.order)
            if passed >= first_row + num_rows:
                return

    def _all_windows(self) -> Iterator[Window]:
        epoch = 0
        while True:
            rng = Random(f"{self.seed} {self.number} {epoch}")
            parts = rng.sample(self.parts, len(self.parts))
            for start in range(0, len(parts), WINDOW_PARTS):
                chosen = tuple(parts[start : start + WINDOW_PARTS])
                count = sum(part.num_rows for part in chosen)
                yield Window(chosen, tuple(rng.sample(range(count), count)))
            epoch += 1


def streams(parts: Sequence[InputPart], num_streams: int, seed: int) -> list[Stream]:
    """Deal the row groups of Parquet files out to streams; raises InputError if there are too few.

    The order in which they are dealt out is shuffled too, so that streams do not differ by where their rows lie.
    """
    filled = [part for part in parts if part.num_rows]
    if len(filled) < num_streams:
        raise InputError(
            f"{len(filled)} row groups of Parquet files are too few for {num_streams} streams: "
            "write the table with smaller row groups, or use fewer streams"
        )
    dealt = Random(f"{seed}").sample(filled, len(filled))
    return [Stream(tuple(dealt[number::num_streams]), seed, number) for number in range(num_streams)]
