"""Asking for a video: one that was asked for before is found again, a new one is admitted, read and let wait."""

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from anyio import CapacityLimiter, to_thread
from fastapi import Request
from starlette.concurrency import run_in_threadpool

from pipeline.request import hash_of
from pipeline.serving.access import Service
from pipeline.serving.creation import NewVideo, new_video, remixed
from pipeline.serving.fields import body_fields
from pipeline.serving.files import remove_files
from pipeline.serving.schemas import APIError
from pipeline.serving.tables import Job

logger = logging.getLogger(__name__)

REPLAY_S = 60.0

_with_picture = CapacityLimiter(8)
"""Requests with a picture that are read at once: a slow host takes a minute, which others do not wait."""


@dataclass(frozen=True)
class Asked:
    """Who asks for a video, a hash of what is asked for, and what tells whether it was asked for before."""

    owner: str
    content: str
    headers: Mapping[str, str]
    remixed_from: str | None = None

    @property
    def replay(self) -> str | None:
        """A mark of the idempotency key, if there is one."""
        key = self.headers.get("idempotency-key")
        return None if key is None else hashlib.sha256(key.encode()).hexdigest()

    @property
    def is_retry(self) -> bool:
        """Whether the client says that it has sent the request before."""
        return self.replay is None and self.headers.get("x-stainless-retry-count", "0") not in ("", "0")

    def checked(self, job: Job) -> Job:
        """Return the job that came of the same request; raises APIError if it came of another one."""
        if job.content != self.content:
            raise APIError(409, "idempotency_conflict", "the idempotency key was used for another request")
        return job


async def ask_for_video(request: Request, service: Service, owner: str) -> tuple[Job, bool]:
    """Return the job that a request asks for, and whether it is new."""
    fields, upload = await body_fields(request)
    content = hash_of({**fields, "input_reference": hashlib.sha256(upload or b"").hexdigest()})
    ask = Asked(owner, content, request.headers)
    known = await run_in_threadpool(_known, service, ask)
    if known is not None:
        return known, False
    read = partial(new_video, fields, upload, service.preset, service.model, service.images)
    limiter = _with_picture if upload is not None or "image_reference" in fields else None
    return await to_thread.run_sync(_added, service, ask, read, limiter=limiter)


def ask_for_remix(service: Service, job: Job, prompt: str, headers: Mapping[str, str]) -> Job:
    """Return the job of a video with another prompt, the same seed and image."""

    def read() -> NewVideo:
        return remixed(job, prompt, service.storage.get(job.image) if job.image else None)

    ask = Asked(job.owner, hash_of({"remix": job.id, "prompt": prompt}), headers, remixed_from=job.id)
    return _known(service, ask) or _added(service, ask, read)[0]


def give_up(service: Service, job: Job, is_new: bool) -> None:
    """Cancel the job of a client that has gone, which may send the same request again."""
    if is_new:
        service.store.cancel(job.id, job.owner, forget=True)


def _known(service: Service, ask: Asked) -> Job | None:
    """Return the job of a request that came before; else admit the request, which is counted whatever comes of it."""
    known = service.store.replayed(ask.owner, ask.replay)
    if ask.is_retry:
        known = service.store.asked_before(ask.owner, ask.content, REPLAY_S)
    if known is None:
        service.store.admit(ask.owner)
        return None
    return ask.checked(known)


def _added(service: Service, ask: Asked, read: Callable[[], NewVideo]) -> tuple[Job, bool]:
    """Read what is asked for and let it wait, its picture stored first, unless the same was added meanwhile.

    Returns the job, and whether it is new.
    """
    video = read()
    job = video.job(
        service.preset,
        owner=ask.owner,
        model=service.model,
        content=ask.content,
        replay=ask.replay,
        created_at=service.store.clock(),
        remixed_from=ask.remixed_from,
    )
    if isinstance(video.request.image, bytes):
        job.image = f"uploads/{job.id}"
        service.storage.put(job.image, video.request.image)
    try:
        added = service.store.add(job)
    except Exception:
        remove_files(service.storage, job)
        raise
    if added is job:
        logger.info("created", extra={"video": job.id})
    else:
        remove_files(service.storage, job)
    return ask.checked(added), added is job
