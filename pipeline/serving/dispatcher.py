"""From the table of videos to the stages: takes what waits, keeps it while it is made, and writes what came of it."""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
from starlette.concurrency import run_in_threadpool

from pipeline.batching import IMAGE
from pipeline.request import ResolvedRequest
from pipeline.rows import Batch, Item, RenderRow, as_tensor
from pipeline.serving.api import remove_files
from pipeline.serving.schemas import ID_PREFIX
from pipeline.serving.store import Claim, Job, Store
from pipeline.serving.webhooks import Webhook
from pipeline.storage import Storage

logger = logging.getLogger(__name__)

ANNOUNCED_AT_ONCE = 20

RESULT = ("uri", "thumbnail_uri", "media_type", "bytes", "sha256", "latents_sha256", "batch_size", "device", "seconds")
"""What is kept of a finished video's metadata."""


class WorkerLostError(Exception):
    """What worked on a batch is gone."""


class Stages(Protocol):
    """What renders batches of one shape."""

    async def render(self, batch: Batch, claims: Sequence[Claim]) -> Batch:
        """Return the batch with its videos published; raises WorkerLostError."""
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
    running: dict[asyncio.Task[None], Sequence[Job]] = field(default_factory=dict)

    async def run(self) -> None:
        """Dispatch until cancelled; then what is in the stages waits again at once."""
        renewed = expired = -float("inf")
        announcing = asyncio.create_task(self._announce(self.webhook)) if self.webhook else None
        try:
            while True:
                now = time.monotonic()
                if now - renewed >= self.settings.lease_s / 3:
                    await run_in_threadpool(self._keep)
                    renewed = now
                if now - expired >= self.settings.expire_s:
                    await run_in_threadpool(self._expire)
                    expired = now
                if not await self._dispatch():
                    await asyncio.sleep(self.settings.poll_s)
        finally:
            if announcing:
                announcing.cancel()
            for jobs in self.running.values():
                for job in jobs:
                    self.store.release(job.claim)

    async def _dispatch(self) -> bool:
        """Give the stages one batch if they have room; returns whether they got one."""
        if len(self.running) >= 2 * max(1, await self.stages.capacity()):
            return False
        jobs = await run_in_threadpool(self.store.claim, self.settings.batch_size, self.settings.lease_s)
        if not jobs:
            return False
        task = asyncio.create_task(self._render(jobs))
        self.running[task] = jobs
        task.add_done_callback(self.running.pop)
        return True

    async def _render(self, jobs: Sequence[Job]) -> None:
        claims = [job.claim for job in jobs]
        try:
            batch = await run_in_threadpool(self._batch, jobs)
            done = await self.stages.render(batch, claims)
            await run_in_threadpool(self._finish, jobs, done)
        except Exception as error:  # noqa: BLE001 - whatever it was, the jobs must not be forgotten
            logger.warning("a batch was lost: %s", error, extra={"rows": [job.id for job in jobs]})
            for claim in claims:
                await run_in_threadpool(self.store.lose, claim, self.settings.max_attempts)

    def _batch(self, jobs: Sequence[Job]) -> Batch:
        return Batch(tuple(self._item(job) for job in jobs), pa.table({"video": [job.id for job in jobs]}))

    def _item(self, job: Job) -> Item:
        name = row_id(job)
        request = ResolvedRequest.model_validate(job.request | {"id": name})
        row = RenderRow(id=name, position=job.id, prompt=request.prompt, request=request, attempts=job.attempts)
        return Item(row, {IMAGE: as_tensor(self.storage.get(job.image))} if job.image else {})

    def _finish(self, jobs: Sequence[Job], done: Batch) -> None:
        for job, item in zip(jobs, done.items, strict=True):
            row = item.row
            if row.error is not None:
                code = "invalid_request" if row.error.is_own_fault else "render_failed"
                self.store.fail(job.claim, code, f"{row.error.stage}: {row.error.message}")
            elif not row.skipped:
                self._complete(job, {name: getattr(row, name) for name in RESULT})

    def _complete(self, job: Job, result: dict[str, Any]) -> None:
        """Write down what was made; if nobody knows of the job any more, its files go."""
        if not self.store.complete(job.claim, result) and self.store.get(job.id, job.owner) is None:
            job.result = result
            remove_files(self.storage, job)

    async def _announce(self, webhook: Webhook) -> None:
        """Tell the ends of jobs one after another; what the receiver does not take is left, and said."""
        while True:
            jobs = await run_in_threadpool(self.store.unannounced, ANNOUNCED_AT_ONCE)
            for job in jobs:
                try:
                    await webhook.tell(job, int(time.time()))
                except Exception as error:  # noqa: BLE001 - one bad message must not stop the others
                    logger.warning("the end of %s was not told: %s", job.id, error)
                await run_in_threadpool(self.store.announce, job)
            if not jobs:
                await asyncio.sleep(self.settings.poll_s)

    def _keep(self) -> None:
        """Keep what is in the stages for longer, and let wait again what other dispatchers have lost."""
        for jobs in list(self.running.values()):
            for job in jobs:
                self.store.renew(job.claim, self.settings.lease_s)
        self.store.recover(self.settings.max_attempts)

    def _expire(self) -> None:
        for job in self.store.expire():
            remove_files(self.storage, job)


def row_id(job: Job) -> str:
    """Return the id of a job's row in the stages, and of its files."""
    return job.id.removeprefix(ID_PREFIX)
