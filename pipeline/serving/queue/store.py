"""The table of videos that were asked for: where a job waits, who works on it, and what came of it.

A job that waits is claimed by a dispatcher for a while (its lease), and each claim raises the job's fence. Whoever
writes about a claimed job names the fence it was given: nobody who has lost a job can change it any more.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Select, case, delete, func, inspect, select, tuple_, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from pipeline.serving.queue.database import DatabaseError, connect
from pipeline.serving.queue.records import Base, Claim, RateLimitEvent, Status, VideoRecord
from pyramid_flow.errors import PyramidFlowError

MAX_LOST_LEASES = 10
"""Claims after which a job ends whose dispatcher is lost each time."""

MINUTE_S = 60.0
LIMITS_LOCK = 7_140_001
"""Number of the lock under which PostgreSQL counts jobs and adds one."""


class BusyError(PyramidFlowError):
    """No further job is taken now; retry_after_s: when it is worth asking again."""

    def __init__(self, code: str, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.code, self.retry_after_s = code, retry_after_s


@dataclass(frozen=True)
class QueueLimits:
    """How many jobs may wait in all; how many of one owner may be unfinished, asked for within a minute, and kept."""

    max_queued: int = 1000
    max_unfinished: int = 100
    max_per_minute: int = 60
    max_kept: int = 10_000


@dataclass(frozen=True)
class Census:
    """How many jobs there are of each status and priority, and for how many seconds the oldest has waited."""

    counts: dict[tuple[Status, int], int]
    oldest_wait_s: float


@dataclass(frozen=True)
class Page:
    """Jobs of a list, and whether more follow."""

    jobs: tuple[VideoRecord, ...]
    has_more: bool


class Store:
    """The table in a database: SQLite (one machine) or PostgreSQL. Safe to use from several threads and processes.

    url: as SQLAlchemy has it; retention_s: how long an ended job is kept; clock: gives the time. Raises DatabaseError
    for a database that cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        limits: QueueLimits = QueueLimits(),
        retention_s: float = 86400.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.limits, self.retention_s, self.clock = limits, retention_s, clock
        try:
            self.engine = connect(url)
            Base.metadata.create_all(self.engine)
            columns = {column["name"] for column in inspect(self.engine).get_columns(VideoRecord.__tablename__)}
        except (SQLAlchemyError, ImportError) as error:
            raise DatabaseError(f"the database cannot be used: {str(error).splitlines()[0]}") from error
        if columns != set(VideoRecord.__table__.columns.keys()):
            self.close()
            raise DatabaseError("the database was made by another version of this software: give a new one")
        self.writer = sessionmaker(self.engine, expire_on_commit=False)
        self.reader = sessionmaker(self.engine.execution_options(reads=True), expire_on_commit=False)

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    @contextmanager
    def counting(self) -> Iterator[Session]:
        """Begin a transaction that counts rows and adds one; no other such transaction runs meanwhile."""
        with self.writer.begin() as session:
            if self.engine.dialect.name == "postgresql":  # SQLite lets one transaction write at a time anyway
                session.execute(select(func.pg_advisory_xact_lock(LIMITS_LOCK)))
            yield session

    def count_request(self, owner: str, *, is_new: bool = True) -> None:
        """Count a request of an owner for a job, whatever comes of it; a new one requires room for a job.

        Raises:
            BusyError: The owner has sent too many within a minute, or no further job can be added.
        """
        now = self.clock()
        recent = select(func.count()).select_from(RateLimitEvent).where(RateLimitEvent.owner == owner)
        with self.counting() as session:
            session.execute(delete(RateLimitEvent).where(RateLimitEvent.asked_at <= now - MINUTE_S))
            if (session.scalar(recent) or 0) >= self.limits.max_per_minute:
                raise BusyError("rate_limited", f"{self.limits.max_per_minute} requests within a minute", 60)
            session.add(RateLimitEvent(owner=owner, asked_at=now))
            refusal = self._refusal(session, owner) if is_new else None
        if refusal is not None:
            raise refusal

    def check_room(self, owner: str) -> None:
        """Check that a further job of an owner can be added.

        Raises:
            BusyError: The queue is full, or the owner has too many unfinished jobs.
        """
        with self.reader() as session:
            refusal = self._refusal(session, owner)
        if refusal is not None:
            raise refusal

    def add(self, job: VideoRecord) -> VideoRecord:
        """Let a job wait; returns it, or the one that the same owner has asked for with the same replay mark before.

        Raises BusyError if no job can be taken.
        """
        try:
            with self.counting() as session:
                refusal = self._refusal(session, job.owner)
                if refusal is not None:
                    raise refusal
                session.add(job)
        except IntegrityError:  # the same request came before, or at the same moment
            winner = self.replayed(job.owner, job.replay)
            if winner is None:
                raise
            return winner
        return job

    def replayed(self, owner: str, replay: str | None) -> VideoRecord | None:
        """Return the job that an owner has asked for with a replay mark, or None."""
        return self._one(VideoRecord.owner == owner, VideoRecord.replay == replay, VideoRecord.replay.is_not(None))

    def asked_before(self, owner: str, content: str, within_s: float) -> VideoRecord | None:
        """Return the newest job of an owner with the same content that is no older than that, or None."""
        recent = VideoRecord.created_at >= self.clock() - within_s
        same = select(VideoRecord).where(VideoRecord.owner == owner, VideoRecord.content == content, recent)
        with self.reader() as session:
            return session.scalar(same.order_by(VideoRecord.created_at.desc()).limit(1))

    def get(self, job_id: str, owner: str | None = None) -> VideoRecord | None:
        """Return a job of an owner (None = whoever's), or None."""
        return self._one(VideoRecord.id == job_id, *([] if owner is None else [VideoRecord.owner == owner]))

    def list(self, owner: str, *, after: str | None = None, limit: int = 20, newest_first: bool = True) -> Page:
        """Return a page of an owner's jobs, from the one after job `after`."""
        keys = (VideoRecord.created_at, VideoRecord.id)
        query = select(VideoRecord).where(VideoRecord.owner == owner).limit(limit + 1)
        query = query.order_by(*(key.desc() if newest_first else key for key in keys))
        cursor = self.get(after, owner) if after is not None else None
        if cursor is not None:
            query = query.where(_beyond(cursor, newest_first=newest_first))
        with self.reader() as session:
            jobs = session.scalars(query).all()
        return Page(tuple(jobs[:limit]), len(jobs) > limit)

    def position(self, job: VideoRecord) -> int:
        """Return how many jobs are taken before this one."""
        older = (VideoRecord.priority == job.priority) & _beyond(job, newest_first=True)
        ahead = (VideoRecord.priority < job.priority) | older
        with self.reader() as session:
            return session.scalar(_count(_WAITS).where(ahead)) or 0

    def check(self) -> None:
        """Read one row; raises SQLAlchemyError if the database does not answer."""
        with self.reader() as session:
            session.scalar(select(VideoRecord.id).limit(1))

    def counts(self) -> dict[Status, int]:
        """Return how many jobs there are of each status."""
        found = self.census().counts.items()
        return {status: sum(count for (of, _), count in found if of == status) for status in Status}

    def census(self) -> Census:
        """Count all jobs."""
        kind = (VideoRecord.status, VideoRecord.priority)
        kinds = select(*kind, func.count()).group_by(*kind)
        with self.reader() as session:
            rows = session.execute(kinds).all()
            oldest = session.scalar(select(func.min(VideoRecord.created_at)).where(_WAITS))
        counts = {(Status(status), priority): int(count) for status, priority, count in rows}
        return Census(counts, 0.0 if oldest is None else self.clock() - oldest)

    def claim(self, limit: int, lease_s: float) -> Sequence[VideoRecord]:
        """Take the job that waits in front, by priority and then age, and others of its shape, as one batch.

        They are this caller's until the lease ends. A job that was claimed before, and lost, is taken alone: it may be
        what its worker died of.
        """
        order = (VideoRecord.priority, VideoRecord.created_at, VideoRecord.id)
        queue = select(VideoRecord).where(_WAITS).order_by(*order).with_for_update(skip_locked=True)
        with self.writer.begin() as session:
            jobs = list(session.scalars(queue.limit(1)))
            if jobs and not jobs[0].attempts:
                of_its_shape = queue.where(VideoRecord.shape == jobs[0].shape)
                mates = of_its_shape.where(VideoRecord.attempts == 0, VideoRecord.id != jobs[0].id)
                jobs += session.scalars(mates.limit(limit - 1))
            for job in jobs:
                job.status, job.progress, job.lease_until = Status.IN_PROGRESS, 0, self.clock() + lease_s
                job.fence += 1
                job.attempts += 1
        return jobs

    def renew(self, claim: Claim, lease_s: float) -> bool:
        """Keep a claimed job for longer; False if it is lost."""
        return self._write(claim, lease_until=self.clock() + lease_s)

    def report(self, claims: Sequence[Claim], progress: int) -> dict[Claim, bool]:
        """Say how far claimed jobs are, in percent; returns whether each is followed, of the claims that still hold."""
        statement = update(VideoRecord).where(_held(claims)).values(progress=progress)
        with self.writer.begin() as session:
            held = session.execute(statement.returning(VideoRecord.id, VideoRecord.fence, VideoRecord.followed)).all()
        return {Claim(job_id, fence): followed for job_id, fence, followed in held}

    def follow(self, job_id: str, owner: str) -> None:
        """Remember that someone wants to see a job's video while it is made."""
        with self.writer.begin() as session:
            own = update(VideoRecord).where(VideoRecord.id == job_id, VideoRecord.owner == owner)
            session.execute(own.values(followed=True))

    def followed(self, claims: Sequence[Claim]) -> set[Claim]:
        """Return the claims that still hold of jobs that are followed."""
        with self.reader() as session:
            ids = select(VideoRecord.id, VideoRecord.fence)
            held = session.execute(ids.where(_held(claims), VideoRecord.followed)).all()
        return {Claim(job_id, fence) for job_id, fence in held}

    def show(self, claim: Claim, fragments: int) -> bool:
        """Say that so many fragments of a claimed job can be seen; never fewer than before. False if it is lost."""
        most = case((VideoRecord.fragments < fragments, fragments), else_=VideoRecord.fragments)
        return self._write(claim, fragments=most)

    def complete(self, claim: Claim, result: dict[str, Any]) -> bool:
        """End a claimed job with its video; False if it is lost, and then the video counts for nothing."""
        return self._write(claim, **self._end(Status.COMPLETED), progress=100, result=result)

    def fail(self, claim: Claim, code: str, message: str) -> bool:
        """End a claimed job with an error; False if it is lost."""
        return self._write(claim, **self._end(Status.FAILED), error_code=code, error_message=message)

    def release(self, claim: Claim) -> bool:
        """Let a claimed job wait again, as if it had not been claimed; False if it is lost."""
        return self._write(claim, **_QUEUED, attempts=VideoRecord.attempts - 1)

    def cancel(self, job_id: str, owner: str, *, forget: bool = False) -> VideoRecord | None:
        """End a job of an owner that has not ended; returns it as it is then, or None if there is none.

        forget: the same request, sent again, is a new one.
        """
        unknown: dict[str, Any] = {"replay": None, "content": ""} if forget else {}
        with self.writer.begin() as session:
            session.execute(
                update(VideoRecord)
                .where(VideoRecord.id == job_id, VideoRecord.owner == owner, _GOES_ON)
                .values(**self._end(Status.CANCELLED), **unknown, fence=VideoRecord.fence + 1, fragments=0)
            )
        return self.get(job_id, owner)

    def delete(self, job_id: str, owner: str) -> None:
        """Forget a job of an owner, whatever it does."""
        with self.writer.begin() as session:
            session.execute(delete(VideoRecord).where(VideoRecord.id == job_id, VideoRecord.owner == owner))

    def expired(self, limit: int) -> Sequence[VideoRecord]:
        """Return jobs whose time is over, any of them: one that cannot be removed does not stand in front."""
        with self.reader() as session:
            return session.scalars(
                select(VideoRecord).where(VideoRecord.expires_at <= self.clock()).order_by(func.random()).limit(limit)
            ).all()

    def unannounced(self, limit: int) -> Sequence[VideoRecord]:
        """Return jobs that have ended and whose end is to be told now, oldest end first."""
        due = (VideoRecord.announced.is_(False), ~_GOES_ON, VideoRecord.announce_after <= self.clock())
        with self.reader() as session:
            jobs = select(VideoRecord).where(*due).order_by(VideoRecord.completed_at, VideoRecord.id)
            return session.scalars(jobs.limit(limit)).all()

    def announce(self, job: VideoRecord, *, again_in_s: float | None = None) -> None:
        """Remember that the end of a job was told, or is to be told again later."""
        told = {"announced": True} if again_in_s is None else {"announce_after": self.clock() + again_in_s}
        with self.writer.begin() as session:
            attempts = {"announce_attempts": VideoRecord.announce_attempts + 1}
            session.execute(update(VideoRecord).where(VideoRecord.id == job.id).values(**told, **attempts))

    def lose(self, claim: Claim, *, alone: bool, max_deaths: int, reason: str = "its worker was lost") -> Status | None:
        """Let a claimed job wait again whose worker died or failed; returns its status, None if the claim is lost.

        alone: whether it was the only job there, so that the fault may be its own; after `max_deaths` such losses it
        ends with the reason.
        """
        condition = (VideoRecord.id == claim.id) & (VideoRecord.fence == claim.fence)
        deaths = VideoRecord.deaths + int(alone)
        why = f"{reason} {max_deaths} times"
        failed, waiting = self._give_back(condition, deaths >= max_deaths, why, deaths=deaths)
        return Status.FAILED if failed else Status.QUEUED if waiting else None

    def recover(self) -> int:
        """Let jobs wait again whose lease has ended, since their dispatcher is gone; returns how many there were."""
        reason = f"its dispatcher was lost {MAX_LOST_LEASES} times"
        is_lost, is_over = VideoRecord.lease_until <= self.clock(), VideoRecord.attempts >= MAX_LOST_LEASES
        return sum(self._give_back(is_lost, is_over, reason))

    def _give_back(
        self,
        condition: ColumnElement[bool],
        is_over: ColumnElement[bool],
        why: str,
        **values: Any,  # noqa: ANN401 - columns
    ) -> tuple[int, int]:
        """Return how many jobs have failed, and how many wait again."""
        lost = (VideoRecord.status == Status.IN_PROGRESS) & condition
        given_up = {**self._end(Status.FAILED), "error_code": "worker_lost", "error_message": why}
        again = {**_QUEUED, "fence": VideoRecord.fence + 1, **values}
        with self.writer.begin() as session:
            ended = session.execute(update(VideoRecord).where(lost, is_over).values(**given_up))
            waiting = session.execute(update(VideoRecord).where(lost).values(**again))
        return ended.rowcount, waiting.rowcount  # type: ignore[attr-defined]

    def _refusal(self, session: Session, owner: str) -> BusyError | None:
        """Return why no further job of an owner can be added, if so."""
        is_own, limits = VideoRecord.owner == owner, self.limits
        for query, limit, code, message in (
            (_count(_WAITS), limits.max_queued, "queue_full", "videos wait already"),
            (_count(is_own & _GOES_ON), limits.max_unfinished, "quota_exceeded", "of your videos are not finished yet"),
            (_count(is_own), limits.max_kept, "quota_exceeded", "of your videos are kept: delete some"),
        ):
            if (session.scalar(query) or 0) >= limit:
                return BusyError(code, f"{limit} {message}", retry_after_s=30)
        return None

    def _write(self, claim: Claim, **values: Any) -> bool:  # noqa: ANN401 - columns
        with self.writer.begin() as session:
            done = session.execute(update(VideoRecord).where(_held([claim])).values(**values))
        return bool(done.rowcount)  # type: ignore[attr-defined]

    def _end(self, status: Status) -> dict[str, Any]:
        now = self.clock()
        return {"status": status, "completed_at": now, "expires_at": now + self.retention_s, "lease_until": None}

    def _one(self, *conditions: ColumnElement[bool]) -> VideoRecord | None:
        with self.reader() as session:
            return session.scalar(select(VideoRecord).where(*conditions))


_QUEUED = {"status": Status.QUEUED, "lease_until": None, "progress": 0, "fragments": 0}
"""What a job becomes that waits again."""

_WAITS = VideoRecord.status == Status.QUEUED
_GOES_ON = VideoRecord.status.in_((Status.QUEUED, Status.IN_PROGRESS))


def _held(claims: Sequence[Claim]) -> ColumnElement[bool]:
    own = tuple_(VideoRecord.id, VideoRecord.fence).in_([(claim.id, claim.fence) for claim in claims])
    return own & (VideoRecord.status == Status.IN_PROGRESS)


def _count(condition: ColumnElement[bool]) -> Select[Any]:
    return select(func.count()).select_from(VideoRecord).where(condition)


def _beyond(job: VideoRecord, *, newest_first: bool) -> ColumnElement[bool]:
    """Return the condition that a job comes after this one in a list: is older, or newer."""
    at_once = VideoRecord.created_at == job.created_at
    if newest_first:
        return (VideoRecord.created_at < job.created_at) | (at_once & (VideoRecord.id < job.id))
    return (VideoRecord.created_at > job.created_at) | (at_once & (VideoRecord.id > job.id))
