"""From the table of videos to the stages: takes what waits, keeps it while it is made, and writes what came of it."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
from aiohttp import ClientError
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from pipeline.monitoring.logs import log_fields
from pipeline.monitoring.metrics import ServiceMetrics
from pipeline.request import ResolvedRequest
from pipeline.rows import Batch, Item, RenderRow, as_tensor
from pipeline.serving.http.files import remove_attempt, remove_files
from pipeline.serving.queue.records import Status, VideoRecord
from pipeline.serving.queue.store import Store
from pipeline.serving.queue.webhooks import Webhook, WebhookError
from pipeline.storage.storage import Storage
from pipeline.tables.batching import IMAGE

logger = logging.getLogger(__name__)

ANNOUNCED_AT_ONCE, EXPIRED_AT_ONCE = 20, 1000
ANNOUNCE_AGAIN_S, ANNOUNCE_MOST_S, ANNOUNCE_FOR_S = 30.0, 3600.0, 86400.0
"""When an end is told again: the wait doubles up to the most, until so long after the end."""

RESULT = (
    "uri",
    "thumbnail_uri",
    "media_type",
    "bytes",
    "sha256",
    "latents_sha256",
    "batch_size",
    "cached_levels",
    "device",
    "seconds",
)
"""What is kept of a finished video's metadata."""


class Stages(Protocol):
    """What renders batches of one shape."""

    async def render(self, batch: Batch) -> Batch:
        """Return the batch with its videos published; raises anything if what worked on it is gone."""
        ...

    async def capacity(self) -> int:
        """Return how many batches are worked on at once now; 0 if nothing runs."""
        ...


@dataclass(frozen=True)
class DispatchSettings:
    """How a dispatcher works.

    batch_size: jobs that are sampled together, at most; max_attempts: deaths of its workers after which a job fails.
    """

    batch_size: int = 4
    max_attempts: int = 3
    lease_s: float = 30.0
    poll_s: float = 0.2
    expire_s: float = 60.0


@dataclass
class Dispatcher:
    """Keeps at most twice as many batches in the stages as they work on, so that some wait there while work waits.

    webhook: is told the end of every job, at least once; running: the jobs of each batch in the stages.
    """

    store: Store
    storage: Storage
    stages: Stages
    settings: DispatchSettings = DispatchSettings()
    webhook: Webhook | None = None
    metrics: ServiceMetrics = field(default_factory=ServiceMetrics)
    running: dict[asyncio.Task[None], Sequence[VideoRecord]] = field(default_factory=dict)

    async def run(self) -> None:
        """Dispatch until cancelled; then what is in the stages waits again at once."""
        chores = [self._every(self.settings.lease_s / 3, self._keep), self._every(self.settings.expire_s, self._expire)]
        if self.webhook:
            chores.append(self._announce(self.webhook))
        tasks = [asyncio.create_task(chore) for chore in chores]
        try:
            while True:
                try:
                    busy = await self._dispatch()
                except Exception:  # whatever it was, the next round may find it mended
                    logger.exception("nothing could be dispatched")
                    busy = False
                if not busy:
                    await asyncio.sleep(self.settings.poll_s)
        finally:
            for task in (*tasks, *self.running):
                task.cancel()
            for jobs in list(self.running.values()):
                for job in jobs:
                    with suppress(SQLAlchemyError):  # else its lease ends
                        self.store.release(job.claim)

    async def _every(self, seconds: float, chore: Callable[[], None]) -> None:
        while True:
            try:
                await run_in_threadpool(chore)
            except Exception:  # the next time may do better
                logger.exception("the dispatcher's %s failed", chore.__name__)
            await asyncio.sleep(seconds)

    async def _dispatch(self) -> bool:
        """Give the stages one batch if they have room; returns whether they got one."""
        if len(self.running) >= 2 * max(1, await self.stages.capacity()):
            return False
        jobs = await self._claim()
        if not jobs:
            return False
        for job in jobs:
            if job.attempts == 1:
                self.metrics.queued(self.store.clock() - job.created_at)
        task = asyncio.create_task(self._render(jobs))
        self.running[task] = jobs
        task.add_done_callback(self.running.pop)
        return True

    async def _claim(self) -> Sequence[VideoRecord]:
        """Claim a batch; if this is cancelled meanwhile, what was claimed waits again."""
        claim = asyncio.to_thread(self.store.claim, self.settings.batch_size, self.settings.lease_s)
        claiming = asyncio.ensure_future(claim)
        try:
            return await asyncio.shield(claiming)
        except asyncio.CancelledError:
            for job in await claiming:
                self.store.release(job.claim)
            raise

    async def _render(self, jobs: Sequence[VideoRecord]) -> None:
        with log_fields(videos=[job.id for job in jobs]):
            try:
                batch = await run_in_threadpool(self._batch, jobs)
                done = await self.stages.render(batch)
                await run_in_threadpool(self._finish, jobs, done)
            except Exception as error:  # noqa: BLE001 - whatever it was, the jobs must not be forgotten
                logger.warning("a batch was lost: %s", error)
                for job in jobs:
                    await run_in_threadpool(self._lose, job, alone=len(jobs) == 1)

    def _lose(self, job: VideoRecord, *, alone: bool, **reason: str) -> None:
        status = self.store.lose(job.claim, alone=alone, max_deaths=self.settings.max_attempts, **reason)
        if status == Status.FAILED:
            self._ended(job, status, "worker_lost")

    def _ended(self, job: VideoRecord, status: Status, reason: str = "") -> None:
        self.metrics.ended(status, reason)
        logger.info("%s", status, extra={"video": job.id, "reason": reason})

    def _batch(self, jobs: Sequence[VideoRecord]) -> Batch:
        return Batch(tuple(self._item(job) for job in jobs), pa.table({"video": [job.id for job in jobs]}))

    def _item(self, job: VideoRecord) -> Item:
        name = job.claim.row_id
        request = ResolvedRequest.model_validate(job.request | {"id": name})
        row = RenderRow(id=name, position=job.id, prompt=request.prompt, request=request, attempts=job.attempts)
        return Item(row, {IMAGE: as_tensor(self.storage.get(job.image))} if job.image else {})

    def _finish(self, jobs: Sequence[VideoRecord], done: Batch) -> None:
        for job, item in zip(jobs, done.items, strict=True):
            row = item.row
            if row.error is None and not row.skipped:
                self._complete(job, {name: getattr(row, name) for name in RESULT})
            elif row.error and row.error.is_own_fault:
                if self.store.fail(job.claim, "invalid_request", f"{row.error.stage}: {row.error.message}"):
                    self._ended(job, Status.FAILED, "invalid_request")
            elif row.error:  # what went wrong is for the log, not for the client
                logger.warning("%s failed: %s", row.error.stage, row.error.message, extra={"video": job.id})
                self._lose(job, alone=True, reason=f"{row.error.stage} failed ({row.error.type})")

    def _complete(self, job: VideoRecord, result: dict[str, Any]) -> None:
        """Write down what was made; if someone else has the job by now, or nobody wants it, it goes."""
        if self.store.complete(job.claim, result):
            self._ended(job, Status.COMPLETED)
        else:
            remove_attempt(self.storage, job.claim, result)

    async def _announce(self, webhook: Webhook) -> None:
        """Tell the ends of jobs one after another; what the receiver does not take is told again for a day."""
        while True:
            try:
                jobs = await run_in_threadpool(self.store.unannounced, ANNOUNCED_AT_ONCE)
                for job in jobs:
                    await self._tell(webhook, job)
            except Exception:  # the database, say
                logger.exception("the ends of videos cannot be told")
                jobs = ()
            if not jobs:
                await asyncio.sleep(self.settings.poll_s)

    async def _tell(self, webhook: Webhook, job: VideoRecord) -> None:
        try:
            await webhook.tell(job, int(time.time()))
            again_in_s = None
        except (WebhookError, ClientError, TimeoutError) as error:
            is_over = self.store.clock() - (job.completed_at or 0.0) > ANNOUNCE_FOR_S
            logger.warning("the end was not told: %s", error, extra={"video": job.id})
            again_in_s = None if is_over else min(ANNOUNCE_MOST_S, ANNOUNCE_AGAIN_S * 2**job.announce_attempts)
        await run_in_threadpool(self.store.announce, job, again_in_s=again_in_s)

    def _keep(self) -> None:
        """Keep what is in the stages for longer, and let wait again what other dispatchers have lost."""
        for jobs in list(self.running.values()):
            for job in jobs:
                self.store.renew(job.claim, self.settings.lease_s)
        self.store.recover()

    def _expire(self) -> None:
        """Remove what is kept no longer: files first, so that none is left that nobody knows."""
        for job in self.store.expired(EXPIRED_AT_ONCE):
            try:
                remove_files(self.storage, job)
                self.store.delete(job.id, job.owner)
            except Exception:  # one that cannot be removed must not keep the others
                logger.exception("an expired video cannot be removed", extra={"video": job.id})
