"""Routes to what a video is made of: its files, signed links to them, its events, and the video while it is made."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Literal, get_args

from fastapi import APIRouter, Depends, Response
from fastapi.responses import RedirectResponse, StreamingResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from pipeline.media.fragments import padded
from pipeline.serving.http.access import Own, Readable, Served, Service, file_path
from pipeline.serving.http.files import MAX_DOWNLOADS, MAX_PER_LINK, VALID_S, FileAnswer, fragment_path, media_file
from pipeline.serving.http.openapi import errors, file
from pipeline.serving.http.schemas import APIError, FileLinks, Video
from pipeline.serving.http.waits import OpenWait
from pipeline.serving.queue.records import Status, VideoRecord
from pyramid_flow.sampling.params import TEMPORAL_FACTOR

MEDIA_TYPES = ("video/mp4", "image/png", "image/webp")
Variant = Literal["video", "thumbnail", "spritesheet"]

media = APIRouter(prefix="/v1/videos/{video_id}", responses=errors(400, 401, 403))


def video_of(service: Service, job: VideoRecord) -> Video:
    """Return a job as clients see it, with its place in the queue."""
    position = service.store.position(job) if job.status == Status.QUEUED else None
    return Video.of(job, service.fingerprint, position)


@media.post("/links", responses=errors(404))
def links(job: Own, service: Served) -> FileLinks:
    """Sign links to a video's files, which work without a key for some minutes."""
    now = service.store.clock()
    content, stream = file_path(job.id, "content"), file_path(job.id, "stream")
    variants = {name: service.links.signed(content, name, now) for name in get_args(Variant)}
    return FileLinks(stream=service.links.signed(stream, None, now), **variants)


@media.head("/content", include_in_schema=False)
@media.get("/content", response_class=Response, responses=file(*MEDIA_TYPES) | errors(404, 409, 416, 429))
async def content(job: Readable, service: Served, variant: Variant = "video", signature: str | None = None) -> Response:
    """Send a finished video or still, its first frame, or a strip of frames; answers Range and If-None-Match."""
    return await file_of(service, job, variant, signature)


async def file_of(service: Service, job: VideoRecord, variant: Variant = "video", link: str | None = None) -> Response:
    """Return the answer that sends a file of a finished job; raises APIError if there is none."""
    if job.result is None:
        raise APIError(409, "video_not_completed", f"the video is {job.status}")
    if service.redirects and variant == "video":
        url = await run_in_threadpool(service.storage.signed_url, job.result["uri"], VALID_S)
        if url is not None:
            return RedirectResponse(url, 307, {"Cache-Control": f"private, max-age={VALID_S // 2}"})
    limits = {f"key {job.owner}": MAX_DOWNLOADS} | ({f"link {link}": MAX_PER_LINK} if link else {})
    open_file = partial(media_file, service.storage, job, variant)
    return FileAnswer(open_file, service.storage, service.downloads, limits)


async def _waiting(job: Own, service: Served) -> tuple[VideoRecord, OpenWait]:
    return job, await OpenWait.begin(service.store, job.owner)


@media.get("/events", response_class=EventSourceResponse, responses=errors(404, 429))
async def events(
    waiting: Annotated[tuple[VideoRecord, OpenWait], Depends(_waiting)], service: Served
) -> AsyncIterator[ServerSentEvent]:
    """Send each change of a video, as server-sent events, until it has ended or is deleted."""
    first, wait = waiting
    async with wait:
        sent: Video | None = None
        job: VideoRecord | None = first
        while job is not None:
            video = await run_in_threadpool(video_of, service, job)
            if video != sent:
                sent = video
                yield ServerSentEvent(event=f"video.{video.status}", data=video)
            if video.status.is_end:
                return
            await asyncio.sleep(service.polling.events_s)
            job = await run_in_threadpool(service.store.get, job.id, job.owner)


@media.get("/stream", response_class=StreamingResponse, responses=file("video/mp4") | errors(404, 409, 429))
async def stream(job: Readable, service: Served) -> StreamingResponse:
    """Send a video while it is made: a fragmented mp4, from its start, each part as soon as there is one."""
    if Status(job.status) in (Status.FAILED, Status.CANCELLED):
        raise APIError(409, "video_not_completed", f"the video is {job.status}")
    if job.request.get("image_format"):
        raise APIError(409, "still_image", "a still has no stream; read its content when it is completed")
    wait = await OpenWait.begin(service.store, job.owner)
    if not job.followed:
        await run_in_threadpool(service.store.follow, job.id, job.owner)
    return StreamingResponse(_parts(service, job, wait), media_type="video/mp4", headers={"Cache-Control": "no-store"})


async def _parts(service: Service, first: VideoRecord, wait: OpenWait) -> AsyncIterator[bytes]:
    """Yield the fragments of a video, a new attempt's from where the one before was; its file if there are none."""
    async with wait:
        job: VideoRecord | None = first
        sent, units = 0, 1 + (first.request["num_frames"] - 1) // TEMPORAL_FACTOR
        while job is not None:
            if (
                job.result and not sent and job.fragments < units
            ):  # nobody followed it, or it could not be shown to its end
                whole = media_file(service.storage, job, "video")
                async for chunk in whole.chunks(service.storage):
                    yield chunk
                return
            if sent < job.fragments:
                yield padded(await run_in_threadpool(service.storage.get, fragment_path(job.claim, sent)))
                sent += 1
            elif job.has_ended:
                return
            else:
                await asyncio.sleep(service.polling.stream_s)
                job = await run_in_threadpool(service.store.get, job.id, job.owner)
