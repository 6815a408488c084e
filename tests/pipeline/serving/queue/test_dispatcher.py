"""The dispatcher and stages in this process: videos are made, cancelled, lost with a worker, and expire."""

import threading

import pytest
from sqlalchemy.exc import OperationalError

from pipeline.serving.http.files import fragment_path, remove_files
from pipeline.serving.queue.records import Status
from pipeline.serving.queue.store import Store
from pipeline.serving.streaming.progress import BEFORE, SAMPLING
from pipeline.storage.faults import StorageError
from tests.pipeline.mp4 import probe
from tests.pipeline.serving.farm import LEASE_S
from tests.pipeline.serving.running import until


@pytest.fixture
def reported(rendering_farm, monkeypatch) -> list[int]:
    """Return the progress of each report to the table."""
    progress, report = [], rendering_farm.store.report

    def counted(claims, percent):
        progress.append(percent)
        return report(claims, percent)

    monkeypatch.setattr(rendering_farm.store, "report", counted)
    return progress


def test_videos_of_one_shape_are_made_together(rendering_farm):
    farm = rendering_farm
    ids = [farm.ask(f"prompt {number}", seed=number) for number in range(4)] + [farm.ask("longer", num_frames=17)]
    farm.run_all()
    assert sorted(farm.local.sizes) == [1, 1, 3]
    for video_id in ids:
        job = farm.job(video_id)
        assert (job.status, job.progress, job.attempts) == (Status.COMPLETED, 100, 1)
        assert job.result["sha256"]
        assert set(job.result["seconds"]) == {"encode", "sample", "decode", "publish"}
    assert probe(farm.storage.url(farm.job(ids[4]).result["uri"]).removeprefix("file://")).frames == 17


def test_progress_is_told_while_a_video_is_made(rendering_farm, reported):
    video_id = rendering_farm.ask("slowly")
    rendering_farm.local.before = lambda prompts: reported.append(rendering_farm.job(video_id).progress)
    rendering_farm.run_all()
    assert reported[:2] == [0, BEFORE + SAMPLING * 1 // 42]
    assert reported[-1] == BEFORE + SAMPLING
    assert reported == sorted(reported)
    assert rendering_farm.job(video_id).progress == 100


def test_a_cancelled_video_leaves_its_neighbours_unharmed(rendering_farm):
    farm = rendering_farm
    first, second = farm.ask("stays", seed=1), farm.ask("goes", seed=2)
    farm.local.before = lambda prompts: farm.store.cancel(second, "me")
    farm.run_all()
    assert farm.job(first).status == Status.COMPLETED
    assert farm.job(second).status == Status.CANCELLED
    assert len(farm.storage.list("videos")) == 1


def test_what_kills_its_worker_fails_and_its_neighbours_do_not(farm):
    ids = [farm.ask(prompt) for prompt in ("good", "poison", "fine")]

    def dies(prompts: list[str]) -> None:
        if "poison" in prompts:
            raise ConnectionError("the worker is gone")

    farm.local.before = dies
    farm.run_all()
    jobs = [farm.job(video_id) for video_id in ids]
    assert [job.status for job in jobs] == [Status.COMPLETED, Status.FAILED, Status.COMPLETED]
    assert [job.deaths for job in jobs] == [0, 2, 0]
    assert jobs[1].error_code == "worker_lost"


def test_waits_and_ends_are_counted_once(farm, monkeypatch):
    waits, ends = [], []
    monkeypatch.setattr(farm.dispatcher.metrics, "queued", waits.append)
    monkeypatch.setattr(farm.dispatcher.metrics, "ended", lambda *end: ends.append(end))
    for prompt in ("good", "poison"):
        farm.ask(prompt)

    def dies(prompts: list[str]) -> None:
        if "poison" in prompts:
            raise ConnectionError("the worker is gone")

    farm.local.before = dies
    farm.run_all()
    assert len(waits) == 2
    assert sorted(ends) == [("completed", ""), ("failed", "worker_lost")]


def test_a_fault_that_passes_costs_nothing_and_one_that_lasts_is_said_without_its_text(farm):
    ids = [farm.ask("once", seed=1), farm.ask("always", seed=2)]
    publish, calls = farm.local.stages[-1], []

    def failing(batch):
        items = []
        for item in batch.items:
            calls.append(item.request.prompt)
            fails = item.request.prompt == "always" or calls.count("once") == 1
            items.append(item.failed("publish", OSError("disk /secret is full")) if fails else item)
        return publish(batch.with_items(items))

    farm.local.stages = (*farm.local.stages[:-1], failing)
    farm.run_all()
    assert [farm.job(video_id).status for video_id in ids] == [Status.COMPLETED, Status.FAILED]
    assert farm.job(ids[1]).error_message == "publish failed (OSError) 3 times"


def test_a_database_that_fails_for_a_while_costs_no_video(rendering_farm, monkeypatch):
    farm = rendering_farm
    video_id = farm.ask("patient")
    report, calls = farm.store.report, []

    def failing(claims, progress):
        calls.append(progress)
        if len(calls) == 1:
            raise OperationalError("UPDATE", {}, Exception("gone"))
        return report(claims, progress)

    monkeypatch.setattr(farm.store, "report", failing)
    farm.run_all()
    assert len(calls) > 1
    assert farm.job(video_id).status == Status.COMPLETED


@pytest.mark.parametrize("forget", [False, True])
def test_files_of_a_lost_attempt_go_with_the_video(farm, forget):
    video_id = farm.ask("twice")
    publish, calls = farm.local.stages[-1], []

    def dies_after(batch):
        calls.append(publish(batch))
        if len(calls) == 1:
            raise ConnectionError("the worker is gone")
        return calls[-1]

    farm.local.stages = (*farm.local.stages[:-1], dies_after)
    farm.run_all()
    assert farm.job(video_id).status == Status.COMPLETED
    assert len(farm.storage.list("videos")) == 2
    if forget:
        remove_files(farm.storage, farm.job(video_id))
    else:
        now = farm.store.clock()
        farm.store.clock = lambda: now + 2000
        farm.run(lambda: farm.job(video_id) is None)
    assert farm.storage.list("videos") == farm.storage.list("thumbnails") == []


@pytest.mark.parametrize("fate", ["completed", "cancelled", "deleted"])
def test_who_has_lost_a_claim_removes_what_he_has_made_and_nothing_else(farm, fate):
    def made(job):
        stem = f"{job.claim.row_id}-12345678"
        result = {"uri": f"videos/{stem[:2]}/{stem}.mp4", "thumbnail_uri": f"thumbnails/{stem[:2]}/{stem}.webp"}
        for path in (*result.values(), fragment_path(job.claim, 0)):
            farm.storage.put(path, b"x")
        return result

    farm.store.follow(farm.ask("contested"), "me")
    [lost] = farm.store.claim(1, 60)
    result = made(lost)
    farm.store.lose(lost.claim, alone=True, max_deaths=3)
    [winner] = farm.store.claim(1, 60)
    won = made(winner)
    if fate == "completed":
        assert farm.store.complete(winner.claim, won)
    else:
        farm.store.cancel(winner.id, "me")
    if fate == "deleted":
        farm.store.delete(winner.id, "me")
    farm.dispatcher._complete(lost, result)
    assert sorted(farm.storage.list()) == sorted([*won.values(), fragment_path(winner.claim, 0)])
    if fate != "completed":
        farm.dispatcher._complete(winner, won)
        assert farm.storage.list() == []


def test_a_still_is_made_and_lost_attempts_at_it_leave_no_file(farm):
    video_id = farm.ask("a picture", num_frames=1, image_format="webp")
    publish, calls = farm.local.stages[-1], []

    def dies_after(batch):
        calls.append(publish(batch))
        if len(calls) == 1:
            raise ConnectionError("the worker is gone")
        return calls[-1]

    farm.local.stages = (*farm.local.stages[:-1], dies_after)
    farm.run_all()
    result = farm.job(video_id).result
    assert (result["media_type"], result["uri"].endswith(".webp")) == ("image/webp", True)
    assert len(farm.storage.list("images")) == 2
    remove_files(farm.storage, farm.job(video_id))
    assert farm.storage.list("images") == farm.storage.list("thumbnails") == []


def test_one_video_that_cannot_be_removed_keeps_no_other(farm, monkeypatch):
    ids = [farm.ask("first"), farm.ask("second")]
    farm.run_all()
    stuck, delete, now = farm.job(ids[0]).result["uri"], farm.storage.delete, farm.store.clock()

    def failing(path):
        if path == stuck:
            raise StorageError("no")
        delete(path)

    monkeypatch.setattr(farm.storage, "delete", failing)
    farm.store.clock = lambda: now + 2000
    farm.run(lambda: farm.job(ids[1]) is None)
    assert farm.job(ids[0]) is not None


def test_a_storage_that_fails_does_not_end_the_dispatcher(farm, monkeypatch):
    farm.ask("short-lived")
    farm.run_all()
    now, delete, failures = farm.store.clock(), farm.storage.delete, []
    farm.store.clock = lambda: now + 2000

    def failing(path):
        if not failures:
            failures.append(path)
            raise StorageError("no")
        delete(path)

    monkeypatch.setattr(farm.storage, "delete", failing)
    farm.run(lambda: failures and not farm.storage.list("videos"))


@pytest.mark.parametrize("end", [Store.cancel, Store.delete])
def test_a_video_that_nobody_wants_after_its_sampling_leaves_no_file(farm, end):
    video_id = farm.ask("unwanted")
    publish = farm.local.stages[-1]

    def too_late(batch):
        end(farm.store, video_id, "me")
        return publish(batch)

    farm.local.stages = (*farm.local.stages[:-1], too_late)
    farm.run_all()
    job = farm.job(video_id)
    assert job is None or job.status == Status.CANCELLED
    assert farm.storage.list("videos") == farm.storage.list("thumbnails") == []


def test_a_dispatcher_that_stops_gives_its_jobs_back(farm):
    video_id = farm.ask("later")
    entered = threading.Event()

    def hold(prompts: list[str]) -> None:
        if not entered.is_set():
            entered.set()
            until(lambda: farm.job(video_id).status == Status.QUEUED)

    farm.local.before = hold
    farm.run(entered.is_set)
    job = farm.job(video_id)
    assert (job.status, job.attempts) == (Status.QUEUED, 0)
    farm.run_all()
    assert farm.job(video_id).status == Status.COMPLETED


def test_what_is_in_the_stages_is_kept_and_what_others_have_lost_waits_again(farm):
    lost = farm.ask("lost")
    farm.store.claim(1, LEASE_S / 2)
    mine, now, leases = farm.ask("mine"), farm.store.clock(), []

    def keep(prompts: list[str]) -> None:
        if not leases:
            farm.store.clock = lambda: now + LEASE_S - 1
            farm.dispatcher._keep()
            leases.append(farm.job(mine).lease_until)

    farm.local.before = keep
    farm.run_all()
    assert leases == [now + LEASE_S - 1 + LEASE_S]
    for video_id, attempts in ((mine, 1), (lost, 2)):
        job = farm.job(video_id)
        assert (job.status, job.attempts) == (Status.COMPLETED, attempts)


def test_expired_videos_go_with_their_files(farm):
    video_id = farm.ask("short-lived")
    farm.run_all()
    assert farm.storage.list("videos")
    now = farm.store.clock()
    farm.store.clock = lambda: now + 2000
    farm.run(lambda: farm.job(video_id) is None and not farm.storage.list("videos"))
    assert farm.storage.list("thumbnails") == []
