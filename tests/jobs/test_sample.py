"""The sample table: prompts that any machine can render, one picture, and exactly one bad row."""

import shutil

import pyarrow.parquet as pq
import pytest

from jobs.commands.demo import BAD_ROWS, SAMPLE_TABLE
from jobs.sample import write
from pipeline.tables.images import ImageRoot
from pipeline.tables.readers import REQUEST_COLUMNS, list_parts
from pipeline.tables.worklist import RowRules, candidates, scan
from pyramid_flow import Checkpoint
from pyramid_flow.images.decoding import open_image


@pytest.fixture(scope="module")
def rules():
    return RowRules(Checkpoint.open("toy").preset)


@pytest.fixture(scope="module")
def rows(rules):
    values = [
        {name: value for name, value in row.items() if value is not None}
        for row in pq.read_table(SAMPLE_TABLE).to_pylist()
    ]
    requests = [{name: value for name, value in row.items() if name in REQUEST_COLUMNS} for row in values]
    return [candidate.row for row in requests for candidate in candidates(row, "sample", rules)]


def test_there_are_enough_prompts_and_all_differ(rows):
    assert len(rows) >= 8
    assert len({row.prompt for row in rows}) == len({row.id for row in rows}) == len(rows)


def test_exactly_one_row_is_bad(rows):
    bad = [row for row in rows if row.error]
    assert len(bad) == BAD_ROWS == 1
    assert bad[0].error.message.startswith("height 700 ")


def test_all_other_rows_are_rendered_once(rules):
    worklist = scan(list_parts([str(SAMPLE_TABLE)]), rules)
    assert worklist.echoes == ()
    assert worklist.num_rows == len(worklist.expected_ids()) == pq.read_metadata(SAMPLE_TABLE).num_rows


def test_one_row_starts_from_the_picture_beside_the_table(rows):
    [row] = [row for row in rows if row.request and row.request.has_image]
    data = ImageRoot(str(SAMPLE_TABLE.parent)).read(row.request.image_uri)
    assert min(open_image(data).size) >= row.request.height


def test_there_is_more_than_one_shape_and_a_column_of_the_users_own(rows):
    assert len({row.request.shape for row in rows if row.request}) >= 3
    assert set(pq.read_schema(SAMPLE_TABLE).names) - set(REQUEST_COLUMNS)


def test_the_script_writes_the_committed_files(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "HERE", tmp_path)
    write.main()
    written, committed = tmp_path / "prompts.parquet", SAMPLE_TABLE
    assert pq.read_table(written).equals(pq.read_table(committed))
    assert pq.read_schema(written).equals(pq.read_schema(committed))
    pictures = [open_image((folder / "first_frame.png").read_bytes()) for folder in (tmp_path, committed.parent)]
    assert pictures[0].tobytes() == pictures[1].tobytes()


def test_the_table_can_be_used_from_anywhere(tmp_path, rules):
    shutil.copy(SAMPLE_TABLE, tmp_path / "elsewhere.parquet")
    here, there = (scan(list_parts([str(file)]), rules) for file in (SAMPLE_TABLE, tmp_path / "elsewhere.parquet"))
    assert here.ids.equals(there.ids)
