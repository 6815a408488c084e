"""The service's HTTP interface: the Videos API dialect over the table of videos. It renders nothing itself."""

import asyncio
from functools import cache, partial
from typing import Annotated, Literal

from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from pipeline.serving.http.access import LOCAL_OWNER, Own, Owner, Served, Service, SignedIn, found
from pipeline.serving.http.body import MAX_BODY_BYTES, body_fields
from pipeline.serving.http.files import remove_files
from pipeline.serving.http.media import MEDIA_TYPES, file_of, media, video_of
from pipeline.serving.http.middleware import LOCAL_HOSTS, OwnPagesOnly, RequestLimits, RequestLog, SecurityHeaders
from pipeline.serving.http.openapi import POLLED, description, errors, file
from pipeline.serving.http.schemas import APIError, Deleted, Model, ModelList, SessionState, Video, VideoList
from pipeline.serving.http.sessions import check_origin, session_of, set_cookie
from pipeline.serving.http.submission import ask_for_remix, ask_for_video, give_up
from pipeline.serving.http.waits import OpenWait
from pipeline.serving.http.web_page import add_page
from pipeline.serving.queue.records import Status, VideoRecord
from pipeline.serving.queue.store import BusyError

UNMADE = {"cancelled": 409, "invalid_request": 400}
"""How a request that waits is answered whose video was not made, unless it is the service's fault."""
NEW = errors(404, 408, 409, 413, 429)
"""What may be wrong with a request for a video."""
MAX_SIGN_IN_BYTES = 4096
METRICS_KEY = "metrics"
"""Name of the API key that reads `/metrics`."""


def create_app(service: Service) -> FastAPI:
    """Return the interface of a service; without keys it answers to names of this machine only."""
    app = FastAPI(title="pyramid-render", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    app.openapi = cache(partial(description, app, service.preset, service.model))  # type: ignore[method-assign]
    for router in (_health, _videos, media):
        app.include_router(router)
    add_page(app, service)
    app.add_middleware(RequestLimits, max_bytes=MAX_BODY_BYTES)
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
    return JSONResponse(error.body, error.status, error.headers)


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


@_health.get("/health")
async def health() -> dict[str, str]:
    """Say that the interface answers."""
    return {"status": "ok"}


@_health.get("/ready")
def ready(service: Served) -> dict[str, str]:
    """Say that the database answers."""
    service.store.check()
    return {"status": "ok"}


@_health.get("/metrics", response_class=PlainTextResponse, responses=errors(401, 403))
async def metrics(service: Served, owner: Owner) -> Response:
    """Return metrics for Prometheus; with API keys, only the key named `metrics` reads them."""
    if owner not in (METRICS_KEY, LOCAL_OWNER):
        raise APIError(403, "forbidden", f"only the API key named {METRICS_KEY!r} reads the metrics")
    return Response(await service.scrape.latest(service.store, service.nodes), media_type=CONTENT_TYPE_PLAIN_0_0_4)


@_videos.get("/session")
async def session(service: Served, owner: SignedIn) -> SessionState:
    """Return whether an API key is required, and who is signed in."""
    if service.keys is None:
        return SessionState(requires_key=False, signed_in=True, owner=LOCAL_OWNER)
    return SessionState(requires_key=True, signed_in=owner is not None, owner=owner)


@_videos.post("/session", responses=errors(408, 413))
async def sign_in(request: Request, response: Response, service: Served) -> SessionState:
    """Sign a browser in with an API key; a cookie holds the session."""
    if "origin" in request.headers:
        check_origin(request)
    if service.sessions is None:
        return await session(service, None)
    fields, _ = await body_fields(request, MAX_SIGN_IN_BYTES)
    key = fields.get("api_key")
    session_id = await run_in_threadpool(service.sessions.begin, key) if isinstance(key, str) else None
    if session_id is None:
        raise APIError(401, "invalid_api_key", "this API key is not known", "api_key")
    set_cookie(response, request, session_id)
    return await session(service, await run_in_threadpool(service.sessions.owner, session_id))


@_videos.delete("/session")
async def sign_out(request: Request, response: Response, service: Served) -> SessionState:
    """Sign a browser out."""
    session_id = session_of(request)
    if session_id is not None and service.sessions is not None:
        check_origin(request)
        await run_in_threadpool(service.sessions.end, session_id)
        set_cookie(response, request, None)
    return await session(service, None)


@_videos.get("/models")
async def models(service: Served, _owner: Owner) -> ModelList:
    """List the model."""
    return ModelList(data=[Model.of(service.preset, id=service.model, fingerprint=service.fingerprint)])


@_videos.get("/models/{model_id}", responses=errors(404))
async def model(model_id: str, service: Served, owner: Owner) -> Model:
    """Return a model."""
    [served] = (await models(service, owner)).data
    if model_id != served.id:
        raise APIError(
            404, "model_not_found", f"there is no model {model_id!r}; this service has {served.id!r}", "model"
        )
    return served


@_videos.post("/videos", responses=POLLED | NEW)
async def create(request: Request, response: Response, service: Served, owner: Owner) -> Video:
    """Ask for a video."""
    job, _ = await ask_for_video(request, service, owner)
    return await run_in_threadpool(_shown, service, job, response)


@_videos.post("/videos/sync", response_class=Response, responses=file(*MEDIA_TYPES) | NEW | errors(500))
async def create_and_wait(request: Request, service: Served, owner: Owner) -> Response:
    """Ask for a video and wait for its file; a client that goes away cancels it, unless it was asked for before."""
    async with await OpenWait.begin(service.store, owner):
        return await file_of(service, await _finished(request, service, owner))


async def _finished(request: Request, service: Service, owner: str) -> VideoRecord:
    """Return the job that a request asks for once its video is completed; raises APIError if it ends otherwise."""
    creating = asyncio.ensure_future(ask_for_video(request, service, owner))
    try:
        asked, _ = await asyncio.shield(creating)
        while not await request.is_disconnected():
            job = found(await run_in_threadpool(service.store.get, asked.id, owner), asked.id)
            if job.status == Status.COMPLETED:
                return job
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
    data = [video_of(service, job) for job in page.jobs]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return VideoList(data=data, has_more=page.has_more, first_id=first, last_id=last)


@_videos.get("/videos/{video_id}", responses=POLLED | errors(404))
def retrieve(job: Own, response: Response, service: Served) -> Video:
    """Say how far a video is."""
    return _shown(service, job, response)


@_videos.post("/videos/{video_id}/cancel", responses=errors(404))
def cancel(video_id: str, service: Served, owner: Owner) -> Video:
    """End a video that is not finished; nothing happens to one that has ended."""
    return video_of(service, found(service.store.cancel(video_id, owner), video_id))


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
    asked = await ask_for_remix(request, service, job)
    return await run_in_threadpool(_shown, service, asked, response)


def _shown(service: Service, job: VideoRecord, response: Response) -> Video:
    """Show a job, and say when to ask again: the later, the more wait before it."""
    video = video_of(service, job)
    if not video.status.is_end:
        wait_s = min(service.polling.max_client_s, service.polling.client_s * (1 + (video.position or 0)))
        response.headers["openai-poll-after-ms"] = str(int(1000 * wait_s))
    return video
