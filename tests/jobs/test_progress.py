import logging
import sys

import pyarrow as pa

from jobs import progress
from jobs.progress import Progress
from pipeline.rows import Batch, Item, RenderRow, RowError


def batch(*, failed: int = 0, fine: int = 0) -> Batch:
    error = RowError(stage="sample", type="ValueError", message="no")
    rows = [RenderRow(id=f"f{i}", position="t:0", error=error) for i in range(failed)]
    rows += [RenderRow(id=f"s{i}", position="t:0") for i in range(fine)]
    return Batch(tuple(Item(row) for row in rows), pa.table({"x": list(range(len(rows)))}))


def test_lines_say_what_is_done_and_what_is_left(caplog, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    caplog.set_level(logging.INFO)
    with Progress(10) as shown:
        shown.update(None)
        shown.update(batch(failed=1, fine=3))
    assert "rendering 10 rows" in caplog.messages[0]
    assert caplog.messages[1].startswith("0 of 10 rows, 0 failed")
    assert caplog.messages[2].startswith("4 of 10 rows, 1 failed")
    assert "s left" in caplog.messages[2]


def test_nothing_to_do_says_nothing(caplog):
    caplog.set_level(logging.INFO)
    with Progress(0) as shown:
        shown.update(None)
    assert caplog.messages == []


def test_a_terminal_gets_a_bar(capsys, caplog, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    caplog.set_level(logging.INFO)
    with Progress(2) as shown:
        shown.update(batch(fine=1, failed=1))
    assert "2/2" in capsys.readouterr().err
    assert caplog.messages == []
