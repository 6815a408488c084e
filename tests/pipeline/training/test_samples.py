"""Streams: every row once per epoch, in an order of its own, and the same from wherever one begins."""

from collections import Counter
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.tables.readers import InputError, InputPart, list_parts
from pipeline.training.samples import WINDOW_PARTS, Stream, streams

ROWS, GROUP = 103, 4


@pytest.fixture
def parts(tmp_path: Path) -> list[InputPart]:
    numbers = range(ROWS)
    table = pa.table({"prompt": [f"p{number}" for number in numbers], "number": list(numbers)})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=GROUP)
    return list_parts([str(tmp_path / "in.parquet")])


def rows(stream: Stream, first: int, count: int) -> list[int]:
    return [row for window in stream.windows(first, count) for row in window.read(["number"])["number"].to_pylist()]


def test_every_row_comes_once_per_epoch(parts):
    [stream] = streams(parts, 1, seed=0)
    first, second = rows(stream, 0, ROWS), rows(stream, ROWS, ROWS)
    assert sorted(first) == sorted(second) == list(range(ROWS))
    assert first != second
    assert Counter(rows(stream, 0, 3 * ROWS)) == dict.fromkeys(range(ROWS), 3)


def test_streams_share_the_rows_without_overlap(parts):
    found = streams(parts, 3, seed=0)
    read = [rows(stream, 0, sum(part.num_rows for part in stream.parts)) for stream in found]
    assert sorted(row for own in read for row in own) == list(range(ROWS))


def test_a_stream_goes_on_from_any_row(parts):
    [stream] = streams(parts, 1, seed=0)
    whole = rows(stream, 0, 2 * ROWS)
    for first, count in ((0, 1), (5, 40), (31, 33), (ROWS - 1, 3), (ROWS + 7, 50)):
        assert rows(stream, first, count) == whole[first : first + count]


def test_rows_are_mixed_beyond_their_groups(parts):
    [stream] = streams(parts, 1, seed=0)
    window = next(stream.windows(0, ROWS))
    assert len(window.parts) == WINDOW_PARTS
    groups = [row // GROUP for row in islice(rows(stream, 0, ROWS), GROUP)]
    assert len(set(groups)) > 1


def test_seeds_give_other_orders_and_the_same_seed_the_same(parts):
    orders = [rows(streams(parts, 1, seed)[0], 0, ROWS) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_too_few_row_groups_are_an_error(parts):
    with pytest.raises(InputError, match="26 row groups of Parquet files are too few for 27 streams"):
        streams(parts, 27, seed=0)
