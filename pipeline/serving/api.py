"""The service's HTTP interface: the Videos API dialect over the table of videos. It renders nothing itself."""

import asyncio
import logging
from collections.abc import AsyncIterator
from functools import partial
from pathlib import PurePath
from typing import Annotated, Literal, get_args

from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, RedirectResponse, StreamingResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from pipeline.fragments import padded
from pipeline.serving.access import Own, Owner, Readable, Served, Service, Told, check_room, file_path, found, opened
from pipeline.serving.asking import ask_for_remix, ask_for_video, give_up
from pipeline.serving.creation import Remix
from pipeline.serving.fields import MAX_BODY_BYTES, body_fields
from pipeline.serving.files import file_answer, first_of_strip, fragment_path, remove_files
from pipeline.serving.middleware import LOCAL_HOSTS, BodyLimit, OwnPagesOnly, RequestLog, SecurityHeaders
from pipeline.serving.openapi import POLLED, description, errors, file
from pipeline.serving.schemas import (
    APIError,
    Deleted,
    FileLinks,
    Model,
    ModelList,
    Video,
    VideoList,
)
from pipeline.serving.scrape import scraped
from pipeline.serving.store import BusyError
from pipeline.serving.tables import Job, Status
from pyramid_flow.params import TEMPORAL_FACTOR

logger = logging.getLogger(__name__)

UNMADE = {"cancelled": 409, "invalid_request": 400}
"""How a request that waits is answered whose video was not made, unless it is the service's fault."""
NEW = errors(404, 408, 409, 413, 429)
"""What may be wrong with a request for a video."""
PAGE_PREFIX = "/page"
MEDIA_TYPES = ("video/mp4", "image/png", "image/webp")
Variant = Literal["video", "thumbnail", "spritesheet"]


def create_app(service: Service) -> FastAPI:
    """Return the interface of a service; without keys it answers to names of this machine only."""
    app = FastAPI(title="pyramid-render", docs_url=None, redoc_url=None)
    app.state.service = service
    app.openapi = partial(description, app, service.preset, service.model)  # type: ignore[method-assign]
    app.include_router(_health)
    app.include_router(_videos)
    app.add_middleware(BodyLimit, max_bytes=MAX_BODY_BYTES)
    if service.keys is None:  # else any page in the user's browser could ask
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_HOSTS)
        app.add_middleware(OwnPagesOnly)
    app.add_middleware(RequestLog, names_requests=service.names_requests)
    app.add_middleware(SecurityHeaders)
    app.add_exception_handler(APIError, _api_error)
    app.add_exception_handler(BusyError, _busy)
    app.add_exception_handler(RequestValidationError, _not_valid)
    app.add_exception_handler(HTTPException, _http_error)
    return app


async def _api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body, error.status, headers)


async def _busy(request: Request, error: Exception) -> Response:
    assert isinstance(error, BusyError)
    return await _api_error(request, APIError(429, error.code, str(error), retry_after_s=error.retry_after_s))


async def _not_valid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    [first, *_] = error.errors()
    field = str(first["loc"][-1])
    return await _api_error(request, APIError(400, "invalid_value", f"{field}: {first['msg']}", field))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    answer = await _api_error(request, APIError(error.status_code, "http_error", str(error.detail)))
    answer.headers.update(error.headers or {})
    return answer


_health = APIRouter()
_videos = APIRouter(prefix="/v1", responses=errors(400, 401, 403))


@_health.get("/", response_class=RedirectResponse, include_in_schema=False)
async def start() -> str:
    """Lead people to the page."""
    return f".{PAGE_PREFIX}/"


@_health.get("/health")
async def health() -> dict[str, str]:
    """Say that the interface answers."""
    return {"status": "ok"}


@_health.get("/ready")
def ready(service: Served) -> dict[str, int]:
    """Say that the table of videos answers, with the number of videos of each status."""
    return {status.value: count for status, count in service.store.counts().items()}


@_health.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: Served) -> Response:
    """Tell Prometheus what waits, and what the farm does."""
    census = await run_in_threadpool(service.store.census)
    nodes = await run_in_threadpool(service.nodes)
    return Response(await scraped(census, nodes), media_type=CONTENT_TYPE_PLAIN_0_0_4)


@_videos.get("/models")
async def models(service: Served, _owner: Owner) -> ModelList:
    """List the model."""
    return ModelList(data=[Model.of(service.preset, id=service.model, fingerprint=service.fingerprint)])


@_videos.post("/videos", responses=POLLED | NEW)
async def create(request: Request, response: Response, service: Served, owner: Owner) -> Video:
    """Ask for a video."""
    job, _ = await ask_for_video(request, service, owner)
    return await run_in_threadpool(_shown, service, job, response)


@_videos.post("/videos/sync", response_class=FileResponse, responses=file(*MEDIA_TYPES) | NEW | errors(500))
async def create_and_wait(request: Request, service: Served, owner: Owner) -> Response:
    """Ask for a video and wait for its file; a client that goes away cancels it, unless it was asked for before."""
    creating = asyncio.ensure_future(ask_for_video(request, service, owner))
    try:
        asked, _ = await asyncio.shield(creating)
        while not await request.is_disconnected():
            job = found(await run_in_threadpool(service.store.get, asked.id, owner), asked.id)
            if job.status == Status.COMPLETED:
                return await run_in_threadpool(content, job, service)
            if job.has_ended:
                code = job.error_code or job.status
                raise APIError(UNMADE.get(code, 500), code, job.error_message or f"the video was {job.status}")
            await asyncio.sleep(service.polling.events_s)
    except asyncio.CancelledError:  # how Ray Serve tells that the client has gone
        give_up(service, *(await creating))
        raise
    await run_in_threadpool(give_up, service, *(await creating))
    raise APIError(499, "client_closed_request", "the client has gone")


@_videos.get("/videos", responses=errors(404))
def list_videos(
    service: Served,
    owner: Owner,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> VideoList:
    """List one's own videos, page by page."""
    if after is not None:
        found(service.store.get(after, owner), after)
    page = service.store.list(owner, after=after, limit=limit, newest_first=order == "desc")
    data = [_video(service, job) for job in page.jobs]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return VideoList(data=data, has_more=page.has_more, first_id=first, last_id=last)


@_videos.get("/videos/{video_id}", responses=POLLED | errors(404))
def retrieve(job: Own, response: Response, service: Served) -> Video:
    """Say how far a video is."""
    return _shown(service, job, response)


@_videos.post("/videos/{video_id}/cancel", responses=errors(404))
def cancel(video_id: str, service: Served, owner: Owner) -> Video:
    """End a video that is not finished; nothing happens to one that has ended."""
    return _video(service, found(service.store.cancel(video_id, owner), video_id))


@_videos.delete("/videos/{video_id}", responses=errors(404))
def delete(video_id: str, service: Served, owner: Owner) -> Deleted:
    """Forget a video and remove its files; one that is being made is cancelled."""
    job = found(service.store.cancel(video_id, owner), video_id)
    remove_files(service.storage, job)  # before the row, so that no file is left that nobody knows
    service.store.delete(video_id, owner)
    return Deleted(id=video_id)


@_videos.post("/videos/{video_id}/remix", responses=POLLED | NEW)
async def remix(job: Own, request: Request, response: Response, service: Served) -> Video:
    """Ask for a video with another prompt, the same seed and image."""
    fields, _ = await body_fields(request)  # read after the key was checked, unlike a declared body
    try:
        body = Remix.model_validate(fields)
    except ValidationError as error:
        raise APIError(400, "invalid_value", "a remix has a prompt and nothing else", "prompt") from error
    asked = await run_in_threadpool(ask_for_remix, service, job, body.prompt, request.headers)
    return await run_in_threadpool(_shown, service, asked, response)


@_videos.post("/videos/{video_id}/links", responses=errors(404))
def links(job: Own, service: Served) -> FileLinks:
    """Sign links to a video's files, which work without a key for some minutes."""
    now = service.store.clock()
    content, stream = file_path(job.id, "content"), file_path(job.id, "stream")
    variants = {name: service.links.signed(content, name, now) for name in get_args(Variant)}
    return FileLinks(stream=service.links.signed(stream, None, now), **variants)


@_videos.get(
    "/videos/{video_id}/content",
    response_class=FileResponse,
    responses=file(*MEDIA_TYPES) | errors(404, 409),
)
def content(job: Readable, service: Served, variant: Variant = "video") -> Response:
    """Send a finished video or still, its first frame, or a strip of frames."""
    if job.result is None:
        raise APIError(409, "video_not_completed", f"the video is {job.status}")
    if variant == "video":
        uri, media_type = job.result["uri"], job.result["media_type"]
        data, name = service.storage.get(uri), f"{job.id}{PurePath(uri).suffix}"
    else:
        strip = service.storage.get(job.result["thumbnail_uri"])
        data = first_of_strip(strip, job.request["num_frames"]) if variant == "thumbnail" else strip
        media_type, name = "image/webp", f"{job.id}-{variant}.webp"
    return file_answer(data, media_type, name, job)


@_videos.get("/videos/{video_id}/events", response_class=EventSourceResponse, responses=errors(404))
async def events(first: Told, service: Served) -> AsyncIterator[ServerSentEvent]:
    """Tell each change of a video, as server-sent events, until it has ended or is deleted."""
    with opened(service, first):
        told: Video | None = None
        job: Job | None = first
        while job is not None:
            video = await run_in_threadpool(_video, service, job)
            if video != told:
                told = video
                yield ServerSentEvent(event=f"video.{video.status}", data=video)
            if video.status.is_end:
                return
            await asyncio.sleep(service.polling.events_s)
            job = await run_in_threadpool(service.store.get, job.id, job.owner)


@_videos.get(
    "/videos/{video_id}/stream", response_class=StreamingResponse, responses=file("video/mp4") | errors(404, 409)
)
def stream(job: Readable, service: Served) -> StreamingResponse:
    """Send a video while it is made: a fragmented mp4, from its start, each part as soon as there is one."""
    if Status(job.status) in (Status.FAILED, Status.CANCELLED):
        raise APIError(409, "video_not_completed", f"the video is {job.status}")
    if job.request.get("image_format"):
        raise APIError(409, "still_image", "a still is not made frame by frame: its content is there when it is done")
    check_room(service, job)
    if not job.followed:
        service.store.follow(job.id, job.owner)
    return StreamingResponse(_parts(service, job), media_type="video/mp4", headers={"Cache-Control": "no-store"})


async def _parts(service: Service, first: Job) -> AsyncIterator[bytes]:
    """Yield the fragments of a video, a new attempt's from where the one before was; its file if there are none."""
    with opened(service, first):
        job: Job | None = first
        sent, units = 0, 1 + (first.request["num_frames"] - 1) // TEMPORAL_FACTOR
        while job is not None:
            if (
                job.result and not sent and job.fragments < units
            ):  # nobody followed it, or it could not be shown to its end
                yield await run_in_threadpool(service.storage.get, job.result["uri"])
                return
            if sent < job.fragments:
                yield padded(await run_in_threadpool(service.storage.get, fragment_path(job.claim, sent)))
                sent += 1
            elif job.has_ended:
                return
            else:
                await asyncio.sleep(service.polling.stream_s)
                job = await run_in_threadpool(service.store.get, job.id, job.owner)


def _video(service: Service, job: Job) -> Video:
    position = service.store.position(job) if job.status == Status.QUEUED else None
    return Video.of(job, service.fingerprint, position)


def _shown(service: Service, job: Job, response: Response) -> Video:
    """Show a job, and say when to ask again: the later, the more wait before it."""
    video = _video(service, job)
    if not video.status.is_end:
        wait_s = min(service.polling.max_client_s, service.polling.client_s * (1 + (video.position or 0)))
        response.headers["openai-poll-after-ms"] = str(int(1000 * wait_s))
    return video
