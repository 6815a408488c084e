"""What a sampler is told of its rows, and what it tells: claims, followers, progress, finished units."""

import pytest
import torch
from sqlalchemy.exc import OperationalError

from pipeline.rows import Item, RenderRow
from pipeline.serving.http.parsing import new_video
from pipeline.serving.streaming.progress import BEFORE, SAMPLING, ProgressReporter
from pyramid_flow import Checkpoint, StepInfo

PRESET = Checkpoint.open("toy").preset
FIELDS = {"num_frames": 17, "num_inference_steps": 2, "video_num_inference_steps": 1}
STEPS = [(0, 0), (0, 0), (0, 1), (0, 1), (0, 2), (0, 2), *((unit, level) for unit in (1, 2) for level in range(3))]
"""Unit and level of each step of such a video."""


@pytest.fixture
def batch(store, clock):
    """Return the claimed jobs of two videos, and their items."""
    for name in ("one", "two"):
        video = new_video({"prompt": name, **FIELDS}, None, PRESET, "toy")
        store.add(video.job(PRESET, owner="me", model="toy", created_at=clock.now))
        clock.now += 1
    jobs = store.claim(2, 60)
    requests = [new_video({"prompt": job.given["prompt"], **FIELDS}, None, PRESET, "toy").request for job in jobs]
    rows = [
        RenderRow(id=job.claim.row_id, position=job.id, request=request.resolve(PRESET, "x"))
        for job, request in zip(jobs, requests, strict=True)
    ]
    return jobs, [Item(row) for row in rows]


def step(unit=0, level=0, rows=(0, 1), finished=0):
    frame = torch.zeros(len(rows), 16, 1, 8, 8)
    return StepInfo(unit, 3, level, 0, 2, frame, tuple(rows), tuple(frame + unit for unit in range(finished)))


def relayed(calls):
    return lambda item, units: calls.append((item.row.position, [float(unit.mean()) for unit in units]))


def watching(store, items, calls=None):
    """Return a watch that reports at every step."""
    return ProgressReporter(store, relayed([] if calls is None else calls), items, report_s=0)


def test_a_row_that_is_cancelled_leaves_at_the_next_step(store, batch):
    jobs, items = batch
    seen = watching(store, items)
    assert seen(step()).tolist() == [True, True]
    store.cancel(jobs[0].id, "me")
    assert seen(step()).tolist() == [False, True]
    store.delete(jobs[1].id, "me")
    assert seen(step()).tolist() == [False, False]


def test_a_row_that_is_someone_elses_leaves_and_never_comes_back(store, batch):
    jobs, items = batch
    seen = watching(store, items)
    store.lose(jobs[0].claim, alone=True, max_deaths=3)
    assert seen(step()).tolist() == [False, True]
    store.claim(1, 60)
    assert seen(step()).tolist() == [False, True]


def test_progress_grows_with_the_pixels_of_the_steps(store, batch):
    jobs, items = batch
    seen = watching(store, items)
    told = []
    for unit, level in STEPS:
        seen(step(unit, level))
        told.append(store.get(jobs[0].id, "me").progress)
    assert told == sorted(told)
    assert told[0] == BEFORE + SAMPLING * 1 // 84
    assert told[5] == BEFORE + SAMPLING * 42 // 84
    assert told[-1] == BEFORE + SAMPLING


def test_finished_units_of_followed_rows_are_relayed_once(store, batch):
    jobs, items = batch
    calls = []
    seen = watching(store, items, calls)
    seen(step(1, finished=1))
    assert calls == []
    store.follow(jobs[1].id, "me")
    seen(step(1, finished=1))
    seen(step(1, 1, finished=1))
    seen(step(2, rows=(1,), finished=2))
    assert calls == [(jobs[1].id, [0.0]), (jobs[1].id, [1.0])]


def test_a_table_that_fails_changes_nothing(store, batch, monkeypatch):
    def failing(*_):
        raise OperationalError("UPDATE", {}, Exception("gone"))

    monkeypatch.setattr(store, "report", failing)
    assert watching(store, batch[1])(step()).tolist() == [True, True]


def test_the_table_is_told_at_an_interval_and_at_the_last_step(store, batch, monkeypatch):
    _, items = batch
    told, report = [], store.report

    def counted(claims, progress):
        told.append(progress)
        return report(claims, progress)

    monkeypatch.setattr(store, "report", counted)
    seen = ProgressReporter(store, relayed([]), items, report_s=1000)
    for unit, level in STEPS:
        seen(step(unit, level))
    assert told == [BEFORE + SAMPLING * 1 // 84, BEFORE + SAMPLING]
