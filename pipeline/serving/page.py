"""The page's application: who may see it, and what keeps it safe in a browser; what it shows is in `ui`."""

from collections.abc import Awaitable, Callable
from typing import Annotated

import gradio as gr
from fastapi import APIRouter, FastAPI, Form, HTTPException, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from gradio import processing_utils
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from pipeline.serving import markup
from pipeline.serving.client import COOKIE, ServiceError, VideosClient
from pipeline.serving.fields import MAX_BODY_BYTES
from pipeline.serving.keys import hashed
from pipeline.serving.middleware import LOCAL_HOSTS, BodyLimit, OwnPagesOnly, RequestLog, SecurityHeaders
from pipeline.serving.ui import Page

SIGN_IN = "sign-in"
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",  # Gradio needs both
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' blob:",
        "font-src 'self' data:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)


def create_page(api_url: str, *, asks_keys: bool) -> FastAPI:
    """Return the page of the service at a URL; if that asks for no keys, it answers to names of this machine only."""
    client = VideosClient(api_url)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if asks_keys:
        app.include_router(_signing(client))
    else:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_HOSTS)
    app.add_middleware(OwnPagesOnly)
    app.add_middleware(CORSMiddleware)  # allows nothing: without it Gradio allows every site
    app.add_middleware(BodyLimit, max_bytes=MAX_BODY_BYTES)
    app.add_middleware(RequestLog, names_requests=False)
    app.add_middleware(SecurityHeaders, policy=POLICY)
    blocks = Page(client).blocks
    blocks.has_launched = True  # else Gradio takes any path that a browser names for one of the page's own
    processing_utils.async_ssrf_protected_download = _refuse_to_fetch
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        auth_dependency=_reader(client) if asks_keys else None,
        theme=gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
        css=markup.CSS,
        footer_links=[],
        run_history=False,
        max_file_size=MAX_BODY_BYTES,
        ssr_mode=False,
    )
    return app


async def _refuse_to_fetch(url: str, cache_dir: str) -> str:
    """Stand in for what Gradio does with a URL in place of an upload."""
    raise gr.Error("files are uploaded, not fetched", print_exception=False)


def _reader(client: VideosClient) -> Callable[[Request], Awaitable[str]]:
    """Return what tells by whose key the page is asked for; who has none is led to the form, and gets nothing else."""

    async def reader(request: Request) -> str:
        key = request.cookies.get(COOKIE)
        try:
            if key and await client.accepts(key):
                return hashed(key)
        except ServiceError as error:
            raise HTTPException(503, str(error)) from error
        if request.url.path.endswith("/"):  # the page itself
            raise HTTPException(303, headers={"Location": SIGN_IN})
        raise HTTPException(401)

    return reader


def _signing(client: VideosClient) -> APIRouter:
    """Return the routes that put a key into a cookie, and take it out."""
    router = APIRouter()

    @router.get(f"/{SIGN_IN}", response_class=HTMLResponse)
    async def form() -> str:
        return markup.sign_in()

    @router.post(f"/{SIGN_IN}")
    async def sign_in(request: Request, key: Annotated[str, Form()] = "") -> Response:
        key = key.strip()
        try:
            if not await client.accepts(key):
                return HTMLResponse(markup.sign_in("This key is not known."), 401)
        except ServiceError as error:
            return HTMLResponse(markup.sign_in(str(error)), 503)
        answer = RedirectResponse("./", 303)
        answer.set_cookie(COOKIE, key, path=_path(request), secure=_is_https(request), httponly=True, samesite="strict")
        return answer

    @router.post("/sign-out")
    async def sign_out(request: Request) -> Response:
        answer = RedirectResponse(SIGN_IN, 303)
        answer.delete_cookie(COOKIE, path=_path(request))
        return answer

    return router


def _path(request: Request) -> str:
    """Return the path that the page lies below; the cookie is sent nowhere else."""
    return request.url.path.rpartition("/")[0] or "/"


def _is_https(request: Request) -> bool:
    return request.headers.get("x-forwarded-proto", request.url.scheme) == "https"
