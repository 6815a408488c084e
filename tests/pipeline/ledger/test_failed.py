"""failed.parquet: the failed rows of the input as they were given, ready to be mended and rendered again."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.ledger.failed import REASON, write_failed
from pipeline.storage.storage import Storage
from pipeline.tables.readers import list_parts
from pipeline.tables.worklist import RowRules, Worklist, scan
from pyramid_flow import Preset
from tests.pipeline.sample_tables import write_table

RULES = RowRules(Preset())


def scanned(*files) -> Worklist:
    return scan(list_parts([str(file) for file in files]), RULES)


def written(folder, worklist: Worklist, reasons: dict[str, str]) -> pa.Table:
    storage = Storage(str(folder / "out"))
    assert write_failed(storage, "failed.parquet", worklist, reasons) == storage.url("failed.parquet")
    return pq.read_table(folder / "out" / "failed.parquet")


def test_failed_rows_keep_all_columns_and_types_and_get_a_reason(tmp_path):
    rows = [
        {"prompt": f"{i}", "id": f"r{i}", "image": bytes([i]), "own": {"a": [i]}, "height": 384, "width": 640}
        for i in range(6)
    ]
    source = write_table(tmp_path / "in.parquet", rows, row_group_size=2)
    table = written(tmp_path, scanned(source), {"r1": "why", "r4": "because"})
    assert table.drop_columns([REASON]).equals(pq.read_table(source).take([1, 4]))
    assert table[REASON].to_pylist() == ["why", "because"]


def test_a_row_whose_copies_failed_is_there_once_and_duplicates_each(tmp_path):
    rows = [{"prompt": "a", "id": "x", "num_videos_per_prompt": 3}, {"prompt": "b"}, {"prompt": "b"}]
    worklist = scanned(write_table(tmp_path / "in.parquet", rows))
    ids = worklist.expected_ids().to_pylist()
    table = written(tmp_path, worklist, dict.fromkeys(ids, "why"))
    assert table["prompt"].to_pylist() == ["a", "b", "b"]


def test_files_of_all_formats_are_joined(tmp_path):
    (tmp_path / "1.csv").write_text("id,prompt,own\na,one,1\nb,two,2\n")
    (tmp_path / "2.jsonl").write_text('{"id": "c", "prompt": "three", "own": "x"}\n{"id": "d", "prompt": "four"}\n')
    write_table(tmp_path / "3.parquet", [{"id": "e", "prompt": "five", "more": 1.5}])
    table = written(tmp_path, scanned(tmp_path), dict.fromkeys("bcde", "why"))
    rows = table.select(["id", "prompt", "own", "more"]).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        ("b", "two", "2", None),
        ("c", "three", "x", None),
        ("d", "four", None, None),
        ("e", "five", None, 1.5),
    ]


def test_it_can_be_rendered_again_and_fail_again(tmp_path):
    source = write_table(tmp_path / "in.parquet", [{"prompt": "a", "height": 100, "width": 640}])
    worklist = scanned(source)
    first = written(tmp_path, worklist, dict.fromkeys(worklist.expected_ids().to_pylist(), "the first reason"))
    again = scanned(tmp_path / "out" / "failed.parquet")
    assert again.expected_ids() == worklist.expected_ids()
    second = written(tmp_path, again, dict.fromkeys(again.expected_ids().to_pylist(), "the second reason"))
    assert second.column_names == first.column_names
    assert second[REASON].to_pylist() == ["the second reason"]


def test_nothing_failed_leaves_no_file(tmp_path):
    worklist = scanned(write_table(tmp_path / "in.parquet", [{"prompt": "a", "id": "x"}]))
    written(tmp_path, worklist, {"x": "why"})
    assert write_failed(Storage(str(tmp_path / "out")), "failed.parquet", worklist, {}) is None
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("rows", [0, 3])
def test_ids_of_other_inputs_do_not_matter(tmp_path, rows):
    source = write_table(
        tmp_path / "in.parquet", [{"prompt": f"{i}", "id": f"r{i}"} for i in range(rows)] or [{"prompt": "a"}]
    )
    assert write_failed(Storage(str(tmp_path / "out")), "failed.parquet", scanned(source), {"other": "why"}) is None
