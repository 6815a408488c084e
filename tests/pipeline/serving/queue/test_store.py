"""The table of videos: who gets a job, who may write about it, and what a crash leaves; on both databases."""

from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import pytest
from sqlalchemy import text

from pipeline.serving.queue.database import DatabaseError
from pipeline.serving.queue.records import Claim, Priority, Status, VideoRecord
from pipeline.serving.queue.store import MAX_LOST_LEASES, BusyError, QueueLimits, Store


def job(number: int, **values: object) -> VideoRecord:
    given = {"prompt": f"prompt {number}"}
    defaults = {"owner": "me", "model": "toy", "given": given, "request": given, "created_at": float(number)}
    return VideoRecord(id=f"video_{number:03d}", **{**defaults, **values})


def ids(jobs) -> list[int]:
    return [int(each.id[-3:]) for each in jobs]


def test_what_was_added_can_be_read_by_its_owner_only(store):
    store.add(job(1, image="uploads/a"))
    found = store.get("video_001", "me")
    assert (found.given, found.image, found.status, found.progress) == (
        {"prompt": "prompt 1"},
        "uploads/a",
        "queued",
        0,
    )
    assert store.get("video_001", "you") is None
    assert store.get("video_002", "me") is None


def test_a_request_that_comes_twice_is_one_job(store):
    first = store.add(job(1, replay="key"))
    assert store.add(job(2, replay="key")).id == first.id
    assert store.add(job(3, replay="key", owner="you")).id == "video_003"
    assert store.add(job(4)).id == "video_004"
    assert store.add(job(5)).id == "video_005"


def test_requests_are_counted_for_a_minute_whatever_comes_of_them(store, clock):
    store.limits = QueueLimits(max_per_minute=2)
    for _ in range(2):
        store.count_request("me")
    with pytest.raises(BusyError, match="within a minute") as caught:
        store.count_request("me")
    assert (caught.value.code, caught.value.retry_after_s) == ("rate_limited", 60)
    store.count_request("you")
    clock.now += 61
    store.count_request("me")


@pytest.mark.parametrize(
    ("limits", "code"),
    [(QueueLimits(3, 9, 9), "queue_full"), (QueueLimits(9, 3, 9), "quota_exceeded")],
)
def test_what_may_wait_is_limited(store, limits, code):
    store.limits = limits
    for number in range(3):
        store.add(job(number))
    for asks in (lambda: store.add(job(3)), lambda: store.check_room("me"), lambda: store.count_request("me")):
        with pytest.raises(BusyError) as caught:
            asks()
        assert caught.value.code == code
        assert caught.value.retry_after_s > 0
    if code != "queue_full":
        store.add(job(5, owner="you"))
    for taken in store.claim(9, 10):
        store.complete(taken.claim, {})
    store.count_request("me")
    store.add(job(6))


def test_equal_content_is_known_for_a_while(store, clock):
    store.add(job(1, content="fox", created_at=clock.now))
    assert store.asked_before("me", "fox", 60).id == "video_001"
    assert store.asked_before("you", "fox", 60) is None
    assert store.asked_before("me", "wolf", 60) is None
    clock.now += 61
    assert store.asked_before("me", "fox", 60) is None


@pytest.mark.parametrize("newest_first", [True, False])
def test_lists_come_in_pages_without_gaps(store, newest_first):
    for number in (3, 1, 2, 5, 4):
        store.add(job(number, created_at=float(number // 2)))
    store.add(job(9, owner="you"))
    seen, after, more = [], None, True
    while more:
        page = store.list("me", after=after, limit=2, newest_first=newest_first)
        seen += ids(page.jobs)
        after, more = page.jobs[-1].id, page.has_more
    assert seen == ([5, 4, 3, 2, 1] if newest_first else [1, 2, 3, 4, 5])


def test_claims_go_by_priority_and_then_age(store):
    for number, priority in (
        (1, Priority.BATCH),
        (2, Priority.INTERACTIVE),
        (3, Priority.BATCH),
        (4, Priority.INTERACTIVE),
    ):
        store.add(job(number, priority=priority))
    assert [store.position(store.get(f"video_{number:03d}", "me")) for number in (2, 4, 1, 3)] == [0, 1, 2, 3]
    assert ids(store.claim(3, 10)) == [2, 4, 1]
    assert store.position(store.get("video_003", "me")) == 0
    assert ids(store.claim(3, 10)) == [3]
    assert store.claim(3, 10) == []


def test_two_dispatchers_never_get_the_same_job(database, store):
    for number in range(20):
        store.add(job(number))
    other = Store(database)
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda one: ids(one.claim(3, 10)), [store, other] * 5))
    other.close()
    assert sorted(chain.from_iterable(taken)) == list(range(20))


def test_a_finished_job_keeps_its_result_until_it_expires(store, clock):
    store.add(job(1))
    [taken] = store.claim(1, 10)
    assert store.report([taken.claim, Claim("other", 1)], 40) == {taken.claim: False}
    assert store.get("video_001", "me").progress == 40
    assert store.complete(taken.claim, {"uri": "videos/a.mp4"})
    done = store.get("video_001", "me")
    assert (done.status, done.progress, done.result) == ("completed", 100, {"uri": "videos/a.mp4"})
    assert (done.completed_at, done.expires_at) == (1000, 1100)
    assert store.expired(9) == []
    clock.now = 1100
    assert ids(store.expired(9)) == [1]


def test_who_lost_a_job_cannot_write_about_it(store, clock):
    store.add(job(1))
    [first] = store.claim(1, 10)
    clock.now += 11
    assert store.recover() == 1
    assert store.get("video_001", "me").status == Status.QUEUED
    assert not store.renew(first.claim, 10)
    [second] = store.claim(1, 10)
    for write in (lambda claim: store.complete(claim, {}), lambda claim: store.fail(claim, "a", "b"), store.release):
        assert not write(first.claim)
    assert store.renew(second.claim, 100)
    clock.now += 50
    assert store.recover() == 0
    assert store.complete(second.claim, {})
    assert not store.complete(second.claim, {})


def test_a_job_whose_worker_dies_while_it_is_alone_fails_in_the_end(store):
    for number in (1, 2):
        store.add(job(number))
    for taken in store.claim(2, 10):
        assert store.lose(taken.claim, alone=False, max_deaths=2)
    for left in ([2], []):
        [taken] = store.claim(2, 10)
        assert store.lose(taken.claim, alone=True, max_deaths=2)
        assert not store.lose(taken.claim, alone=True, max_deaths=2)
        assert store.counts()[Status.FAILED] == 1 - len(left)
    failed = store.get("video_001", "me")
    assert (failed.status, failed.error_code) == (Status.FAILED, "worker_lost")
    assert failed.error_message == "its worker was lost 2 times"
    assert store.get("video_002", "me").status == Status.QUEUED


def test_a_job_whose_dispatchers_are_lost_is_given_up_late(store, clock):
    store.add(job(1))
    for _ in range(MAX_LOST_LEASES):
        assert store.get("video_001", "me").status == Status.QUEUED
        store.claim(1, 10)
        clock.now += 11
        assert store.recover() == 1
    assert store.get("video_001", "me").status == Status.FAILED


def test_ends_are_announced_once_or_again_later(store, clock):
    for number in (1, 2):
        store.add(job(number))
    assert store.unannounced(9) == []
    store.cancel("video_001", "me")
    [ended] = store.unannounced(9)
    store.announce(ended, again_in_s=30)
    assert store.unannounced(9) == []
    clock.now += 30
    [again] = store.unannounced(9)
    assert again.announce_attempts == 1
    store.announce(again)
    assert store.unannounced(9) == []


def test_a_released_job_waits_as_if_nothing_had_happened(store):
    store.add(job(1))
    for _ in range(5):
        [taken] = store.claim(1, 10)
        assert (taken.attempts, taken.status) == (1, Status.IN_PROGRESS)
        assert store.release(taken.claim)


def test_cancelling_ends_a_job_and_stops_its_worker(store):
    store.add(job(1))
    store.add(job(2))
    [taken] = store.claim(1, 10)
    assert store.cancel("video_001", "you") is None
    assert store.cancel("video_001", "me").status == Status.CANCELLED
    assert store.cancel("video_002", "me").status == Status.CANCELLED
    assert store.report([taken.claim], 50) == {}
    assert store.claim(1, 10) == []
    assert store.cancel("video_003", "me") is None


def test_an_end_is_not_cancelled(store):
    store.add(job(1))
    [taken] = store.claim(1, 10)
    store.complete(taken.claim, {})
    assert store.cancel("video_001", "me").status == Status.COMPLETED


def test_deleting_forgets_a_job_whatever_it_does(store):
    store.add(job(1))
    [taken] = store.claim(1, 10)
    store.delete("video_001", "you")
    assert store.get("video_001", "me") is not None
    store.delete("video_001", "me")
    assert store.get("video_001", "me") is None
    assert not store.renew(taken.claim, 10)


def test_what_is_there_is_counted(store):
    for number in range(3):
        store.add(job(number))
    store.claim(1, 10)
    assert store.counts() == {"queued": 2, "in_progress": 1, "completed": 0, "failed": 0, "cancelled": 0}


def test_a_new_process_finds_what_an_old_one_left(database, store):
    store.add(job(1))
    store.close()
    again = Store(database)
    assert again.get("video_001", "me").given == {"prompt": "prompt 1"}
    again.close()


def test_a_claim_is_of_one_fence(store):
    store.add(job(1))
    [taken] = store.claim(1, 10)
    assert taken.claim == Claim("video_001", 1)


@pytest.mark.parametrize("url", ["nonsense", "sqlite://", "sqlite:///:memory:", "mysql://a/b"])
def test_databases_that_will_not_do(url):
    with pytest.raises(DatabaseError):
        Store(url)


def test_a_batch_is_of_one_shape(store):
    for number, shape in enumerate(["wide", "tall", "wide", "wide", "tall"]):
        store.add(job(number, shape=shape))
    assert [ids(store.claim(2, 10)) for _ in range(4)] == [[0, 2], [1, 4], [3], []]


def test_a_job_that_was_lost_is_taken_alone(store):
    for number in range(4):
        store.add(job(number))
    taken = store.claim(2, 10)
    assert all(store.lose(each.claim, alone=False, max_deaths=3) for each in taken)
    assert [ids(store.claim(4, 10)) for _ in range(3)] == [[0], [1], [2, 3]]


def test_what_is_followed_and_seen_is_of_one_claim(store):
    store.add(job(1))
    store.follow("video_001", "you")
    [taken] = store.claim(1, 10)
    assert store.followed([taken.claim]) == set()
    store.follow("video_001", "me")
    assert store.followed([taken.claim]) == {taken.claim}
    assert store.show(taken.claim, 2)
    assert store.show(taken.claim, 1)
    assert store.get("video_001", "me").fragments == 2
    store.lose(taken.claim, alone=True, max_deaths=3)
    assert store.followed([taken.claim]) == set()
    assert not store.show(taken.claim, 3)
    [again] = store.claim(1, 10)
    assert (again.fragments, again.followed) == (0, True)
    store.show(again.claim, 1)
    assert store.cancel("video_001", "me").fragments == 0


@pytest.mark.parametrize(
    ("limits", "ask"),
    [
        (QueueLimits(max_queued=3), lambda store, number: store.add(job(number))),
        (QueueLimits(max_per_minute=3), lambda store, number: store.count_request("me")),
    ],
)
def test_limits_hold_when_many_ask_at_once(database, limits, ask):
    store = Store(database, limits=limits)

    def is_taken(number: int) -> bool:
        try:
            ask(store, number)
        except BusyError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(is_taken, range(24))) == 3
    store.close()


def test_connections_keep_few_pages(tmp_path):
    store = Store(f"sqlite:///{tmp_path}/videos.db")
    with store.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA cache_size").scalar() == -256
    store.close()


def test_a_database_of_another_version_is_refused(store, database):
    with store.engine.begin() as connection:
        connection.execute(text("ALTER TABLE videos DROP COLUMN fragments"))
    with pytest.raises(DatabaseError, match="another version"):
        Store(database)
