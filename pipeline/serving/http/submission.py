"""Asking for a video: the request is admitted, then read; one that was sent before is found again."""

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from anyio import CapacityLimiter, to_thread
from fastapi import Request
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from pipeline.request import hash_of
from pipeline.serving.http.access import Service, counted
from pipeline.serving.http.body import body_fields
from pipeline.serving.http.files import remove_files
from pipeline.serving.http.parsing import REFERENCES, NewVideo, Remix, new_video, remixed
from pipeline.serving.http.schemas import APIError
from pipeline.serving.queue.records import VideoRecord
from pipeline.serving.queue.store import BusyError

logger = logging.getLogger(__name__)

REPLAY_S = 60.0
MAX_REMIX_BYTES = 2**18
MAX_PICTURES = 4
"""Pictures of one owner that a replica reads at once."""

_with_picture = CapacityLimiter(8)
"""Requests with a picture that are read at once: a slow host takes a minute, which others do not wait."""


@dataclass(frozen=True)
class Sender:
    """Who sends a request, and what tells whether it was sent before."""

    owner: str
    headers: Mapping[str, str]

    @property
    def replay(self) -> str | None:
        """A mark of the idempotency key, if there is one."""
        key = self.headers.get("idempotency-key")
        return None if key is None else hashlib.sha256(key.encode()).hexdigest()

    @property
    def is_retry(self) -> bool:
        """Whether the client says that it has sent the request before."""
        return self.replay is None and self.headers.get("x-stainless-retry-count", "0") not in ("", "0")


async def ask_for_video(request: Request, service: Service, owner: str) -> tuple[VideoRecord, bool]:
    """Return the job that a request asks for, and whether it is new. Its body is read once it is admitted."""
    sender = Sender(owner, request.headers)
    known = await run_in_threadpool(_admit, service, sender)
    fields, upload = await body_fields(request)
    content = await run_in_threadpool(_content_of, fields, upload)
    known = known or await run_in_threadpool(_retried, service, sender, content)
    if known is not None:
        return _same(known, content), False
    read = partial(new_video, fields, upload, service.preset, service.model, service.images)
    if upload is None and not fields.keys() & REFERENCES:
        return await run_in_threadpool(_added, service, sender, content, read)
    if service.pictures[owner] >= MAX_PICTURES:
        raise BusyError("too_many_pictures", f"{MAX_PICTURES} of your pictures are being read", 5)
    with counted(service.pictures, owner):
        return await to_thread.run_sync(_added, service, sender, content, read, limiter=_with_picture)


async def ask_for_remix(request: Request, service: Service, job: VideoRecord) -> VideoRecord:
    """Return the job of a video with another prompt, the same seed and image."""
    sender = Sender(job.owner, request.headers)
    known = await run_in_threadpool(_admit, service, sender)
    fields, _ = await body_fields(request, MAX_REMIX_BYTES)
    try:
        prompt = Remix.model_validate(fields).prompt
    except ValidationError as error:
        raise APIError(400, "invalid_value", "a remix has a prompt and nothing else", "prompt") from error
    content = hash_of({"remix": job.id, "prompt": prompt})
    known = known or await run_in_threadpool(_retried, service, sender, content)
    if known is not None:
        return _same(known, content)

    def read() -> NewVideo:
        return remixed(job, prompt, service.storage.get(job.image) if job.image else None)

    return (await run_in_threadpool(_added, service, sender, content, read, remixed_from=job.id))[0]


def give_up(service: Service, job: VideoRecord, is_new: bool) -> None:
    """Cancel the job of a client that has gone, which may send the same request again."""
    if is_new:
        service.store.cancel(job.id, job.owner, forget=True)


def _content_of(fields: Mapping[str, object], upload: bytes | None) -> str:
    return hash_of({**fields, "input_reference": hashlib.sha256(upload or b"").hexdigest()})


def _admit(service: Service, sender: Sender) -> VideoRecord | None:
    """Count a request; returns the job that an earlier one with the same idempotency key asked for.

    Raises:
        BusyError: The sender has sent too many, or no further job can be added.
    """
    known = service.store.replayed(sender.owner, sender.replay) if sender.replay else None
    service.store.count_request(sender.owner, is_new=known is None and not sender.is_retry)
    return known


def _retried(service: Service, sender: Sender, content: str) -> VideoRecord | None:
    """Return the job of the same content, if the sender says that it sends the request again."""
    return service.store.asked_before(sender.owner, content, REPLAY_S) if sender.is_retry else None


def _same(job: VideoRecord, content: str) -> VideoRecord:
    """Return a job if it came of the same content; raises APIError otherwise."""
    if job.content != content:
        raise APIError(409, "idempotency_conflict", "the idempotency key was used for another request")
    return job


def _added(
    service: Service, sender: Sender, content: str, read: Callable[[], NewVideo], remixed_from: str | None = None
) -> tuple[VideoRecord, bool]:
    """Read what is asked for and let it wait, its picture stored first, unless the same was added meanwhile.

    Returns the job, and whether it is new.
    """
    if sender.is_retry:  # which was admitted without
        service.store.check_room(sender.owner)
    video = read()
    job = video.job(
        service.preset,
        owner=sender.owner,
        model=service.model,
        content=content,
        replay=sender.replay,
        created_at=service.store.clock(),
        remixed_from=remixed_from,
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
    return _same(added, content), added is job
