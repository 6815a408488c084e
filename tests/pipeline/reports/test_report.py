"""The report holds what the ledger says, whatever the ledger says, and costs a job next to nothing."""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from threading import Event

import pyarrow as pa
import pytest

from pipeline.ledger.job_records import claim
from pipeline.media.quality import Figures
from pipeline.reports import report as html_report
from pipeline.reports.report import COST_FACTOR, REFRESH_S, REPORT, LiveReport, contents, packed, page, write_report
from pipeline.storage.faults import StorageError
from pipeline.storage.storage import Storage
from tests.pipeline.sample_ledgers import recorded, recorded_rows, written

BEGAN = datetime(2026, 1, 1, 12, tzinfo=UTC)
SECONDS = [("encode", 0.5), ("sample", 60.0), ("decode", 11.5), ("publish", 3.0)]
HOSTILE = [
    "</script><script>document.title = 'taken'</script>",
    "<!--<script>",
    "<img src=x onerror=alert(1)>",
    "\"'`\\ \u2028 \u2029 \x00 {{contents}} $& é 狐",
]


def row(name: str, **values: object) -> dict[str, object]:
    """Return a row that took a GPU 72 seconds within two minutes."""
    rendered = {"device": "NVIDIA H200", "node": "n", "seconds": SECONDS, "started_at": BEGAN, "num_frames": 9}
    return {"id": name, **rendered, "finished_at": BEGAN + timedelta(minutes=2), **values}


def failure(name: str, message: str = "no") -> dict[str, object]:
    return {"id": name, "status": "failed", "error_stage": "read", "error_type": "ValueError", "error_message": message}


def embedded(html: str) -> dict[str, object]:
    """Return the data that a browser finds in a page: up to the first end of its script element."""
    [data] = re.findall(r'<script type="application/json" id="contents">(.*?)</script', html, re.DOTALL)
    return json.loads(data)


def values(shown: dict[str, object], name: str) -> Sequence[object]:
    """Return a column as the page unpacks it."""
    column = shown["columns"][name]
    if "all" in column:
        return [column["all"]] * shown["num_rows"]
    return [column["of"][place] for place in column["at"]] if "of" in column else column["each"]


@pytest.fixture
def storage(tmp_path):
    return Storage(str(tmp_path / "out"))


def test_no_text_ends_the_element_that_holds_it(storage):
    written(storage, recorded_rows(*(row(text, prompt=text) for text in HOSTILE), failure("f", HOSTILE[0])))
    write_report(storage)
    html = storage.get(REPORT).decode()
    assert values(embedded(html), "prompt") == [*HOSTILE, None]
    assert values(embedded(html), "id") == [*HOSTILE, "f"]
    empty = page(contents(Storage(f"{storage.root}-none")))
    assert [html.count(part) for part in ("<script", "</script", "<!--", "<img")] == [
        empty.count(part) for part in ("<script", "</script", "<!--", "<img")
    ]


def test_files_are_named_relative_to_the_output_and_nothing_comes_from_elsewhere(storage):
    files = {"uri": "videos/aa/a b#.mp4", "thumbnail_uri": "thumbnails/aa/a.webp"}
    written(storage, recorded_rows(row("a", **files, position=f"file://{storage.root}/in.parquet:7")))
    assert write_report(storage) == f"file://{storage.root}/report.html"
    html = storage.get(REPORT).decode()
    assert values(embedded(html), "uri") == ["videos/aa/a b#.mp4"]
    assert values(embedded(html), "position") == ["in.parquet:7"]
    assert storage.root not in html
    assert set(re.findall(r"\w+://[^\"]+", html)) == {"http://www.w3.org/2000/svg"}


def test_columns_that_no_row_has_are_nothing(storage):
    table = recorded_rows(row("a"), failure("f")).select(["id", "status", "run", "prompt"])
    written(storage, table)
    shown = contents(storage, gpu_hour_price=1.0)
    assert values(shown, "flags") == values(shown, "sample") == values(shown, "finished_at") == [None, None]
    assert shown["totals"] == {"rows": 2, "succeeded": 1, "per_hour": None, "gpu_seconds": None, "cost": None}


def test_flags_are_lists_of_words_and_nothing_else(storage):
    flags = pa.array([["dark", "still"], [], None], pa.list_(pa.string()))
    written(storage, recorded_rows(row("a"), row("b"), row("c"), flags=flags))
    assert values(contents(storage), "flags") == [("dark", "still"), None, None]
    assert html_report._flags(pa.chunked_array([["dark"], ["still"]])) == [None, None]
    assert html_report._flags(pa.chunked_array([[[1], [2]]])) == [None, None]


def test_seeds_keep_their_bits_and_what_is_not_finite_is_left_out(storage):
    written(storage, recorded_rows(row("a", seed=2**63 - 1, guidance_scale=float("nan"))))
    shown = embedded(page(contents(storage)))
    assert (values(shown, "seed"), values(shown, "guidance_scale")) == ([str(2**63 - 1)], [None])


def test_figures_and_rerolls_are_those_of_the_ledger(storage):
    figures = {"brightness": 0.25, "motion": 0.012345}
    written(storage, recorded_rows(row("a", rerolls=2, first_seed=2**63 - 2, **figures), row("b")))
    shown = embedded(page(contents(storage)))
    assert {name: values(shown, name)[0] for name in figures} == {"brightness": 0.25, "motion": 0.01235}
    assert shown["figures"] == [field.name for field in fields(Figures)]
    assert values(shown, "first_seed") == [str(2**63 - 2), None]
    assert values(shown, "rerolls") == [2, None]


def test_totals_count_what_failed_rows_took(storage):
    claim(storage, {"settings": {"gpus_per_clip": 2}}, {})
    lost = failure("lost") | {"device": "NVIDIA H200", "seconds": [("encode", 28.0)]}
    written(storage, recorded_rows(row("a"), row("b"), failure("f"), lost))
    totals = contents(storage, gpu_hour_price=9.0)["totals"]
    assert totals == {
        "rows": 4,
        "succeeded": 2,
        "per_hour": 60.0,
        "gpu_seconds": 2 * (72 + 72 + 28),
        "cost": pytest.approx(0.86),
    }


def test_a_job_on_a_cpu_has_no_seconds_of_gpus(storage):
    written(storage, recorded_rows(row("a", device="cpu")))
    totals = contents(storage, gpu_hour_price=9.0)["totals"]
    assert (totals["gpu_seconds"], totals["cost"]) == (None, None)


def test_pauses_between_runs_are_not_counted_and_runs_side_by_side_once(storage):
    later = {"started_at": BEGAN + timedelta(days=1), "finished_at": BEGAN + timedelta(days=1, minutes=2)}
    for run, times in (("1", {}), ("2", {}), ("3", later)):
        written(storage, recorded_rows(row(run, **times), run=run), run=run)
    assert contents(storage)["totals"]["per_hour"] == 3 / (4 / 60)


def test_only_runs_with_signs_of_life_are_running(storage):
    written(storage, recorded_rows(row("a")))
    recorded(storage, "1", "running", done=3, total=8)
    recorded(storage, "2", "running", timedelta(hours=1), done=3, total=8)
    recorded(storage, "3", "finished", done=8, total=8)
    assert contents(storage)["running"] == [{"run": "1", "done": 3, "total": 8}]


def test_of_many_rows_the_latest_are_shown_and_all_counted(storage, monkeypatch):
    monkeypatch.setattr(html_report, "MAX_ROWS", 3)
    written(storage, recorded_rows(*(row(f"a{i}") for i in range(4)), run="1"), run="1")
    written(storage, recorded_rows(*(row(f"b{i}") for i in range(2)), run="2"), run="2")
    shown = contents(storage)
    assert values(shown, "id") == ["a3", "b0", "b1"]
    assert (shown["hidden"], shown["totals"]["succeeded"]) == (3, 6)


def test_ten_thousand_rows_make_a_page_of_a_few_megabytes(storage):
    names = [f"{i:032x}" for i in range(10_000)]
    paths = {"uri": "videos/{0}/{1}-01234567.mp4", "thumbnail_uri": "thumbnails/{0}/{1}-01234567.webp"}
    prompt = "a red fox runs through deep snow at dawn, shallow depth of field, picture"
    table = recorded_rows(
        *(
            row(name, prompt=f"{prompt} {name}", **{key: path.format(name[:2], name) for key, path in paths.items()})
            for name in names
        )
    )
    written(storage, table)
    write_report(storage)
    html = storage.get(REPORT)
    assert values(embedded(html.decode()), "id") == names
    assert len(html) < 5 * 2**20


@pytest.mark.parametrize(
    ("column", "form"),
    [
        ([], "each"),
        ([1, 1], "all"),
        ([None], "all"),
        ([1, 2], "each"),
        ([(1,), None] * 8, "of"),
        (list("abcd"), "each"),
    ],
)
def test_columns_are_packed_by_how_many_values_they_have(column, form):
    assert form in packed(column)
    assert values({"columns": {"a": packed(column)}, "num_rows": len(column)}, "a") == column


def test_it_is_written_again_when_due_and_seldom_if_that_takes_long(storage, monkeypatch):
    now, took, calls = 0.0, 0.01, []

    def write(*_):
        nonlocal now
        calls.append(now)
        now += took

    monkeypatch.setattr(html_report.time, "monotonic", lambda: now)
    monkeypatch.setattr(html_report, "write_report", write)
    live = LiveReport(storage)

    def ticks(until: float) -> None:
        nonlocal now
        while now < until:
            live.tick()
            if live._writing:
                live._writing.join()
            now += 1

    ticks(95)
    assert calls == [30.0, pytest.approx(60, abs=1), pytest.approx(90, abs=1)]
    took = 2.0
    ticks(130)
    del calls[:]
    ticks(750)
    pauses = [after - before for before, after in pairwise(calls)]
    assert REFRESH_S < COST_FACTOR * took <= min(pauses)


def test_a_job_does_not_wait_for_it_until_its_end(storage, monkeypatch):
    may_end, calls = Event(), []

    def write(*_):
        calls.append(len(calls))
        assert may_end.wait(10)

    monkeypatch.setattr(html_report, "write_report", write)
    live = LiveReport(storage, _due=0.0)
    for _ in range(3):
        live.tick()
    assert calls == [0]
    may_end.set()
    live.write()
    assert calls == [0, 1]


def test_what_goes_wrong_is_logged_and_ends_nothing(storage, monkeypatch, caplog):
    def put(*_):
        raise StorageError("the bucket is full")

    monkeypatch.setattr(Storage, "put", put)
    with caplog.at_level(logging.WARNING):
        LiveReport(storage).write()
    assert "report.html was not written: StorageError: the bucket is full" in caplog.text
