"""Middleware that logs requests, keeps them small, and makes answers safe in a browser."""

import logging
import re
import time
from contextlib import suppress
from urllib.parse import urlsplit
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.monitoring.logs import log_fields
from pipeline.serving.http.schemas import APIError

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
CLIENT_GONE = 499
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
"""Names that a browser on this machine has for it."""


class RequestLimits:
    """Refuses bodies of more than `max_bytes`, whatever length is announced, and NUL characters in the address."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, counting its body."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:  # PostgreSQL has no such texts
            wrong = APIError(400, "invalid_value", "the address holds a NUL character")
            return await JSONResponse(wrong.body, wrong.status)(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        error = APIError(413, "body_too_large", f"the body is larger than {self.max_bytes} bytes")
        if length.isdigit() and int(length) > self.max_bytes:
            return await JSONResponse(error.body, error.status)(scope, receive, send)
        received, is_refused, has_begun = 0, False, False

        async def counted() -> Message:
            nonlocal received, is_refused
            message = await receive()
            received += len(message.get("body", b""))
            if received <= self.max_bytes:
                return message
            if not is_refused and not has_begun:
                is_refused = True
                await JSONResponse(error.body, error.status)(scope, receive, send)
            return {"type": "http.disconnect"}

        async def unless_refused(message: Message) -> None:
            nonlocal has_begun
            if not is_refused:
                has_begun = True
                await send(message)

        with suppress(ClientDisconnect):  # also of a client that was refused
            await self.app(scope, counted, unless_refused)


class RequestLog:
    """Logs each request under an id, the caller's own if it is a plain one; answers what breaks with a 500.

    names_requests: whether to tell the id in the answer.
    """

    def __init__(self, app: ASGIApp, *, names_requests: bool) -> None:
        self.app, self.names_requests = app, names_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and log how it went."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid4().hex
        state = scope.setdefault("state", {})
        began, status = time.monotonic(), CLIENT_GONE

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.names_requests:
                    MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        with log_fields(request_id=request_id):
            try:
                await self.app(scope, receive, noted)
            except Exception:
                logger.exception("a request broke")
                if status != CLIENT_GONE:
                    raise  # what has begun can only be cut off
                error = APIError(500, "internal_error", "the service failed; its log says why")
                await JSONResponse(error.body, error.status)(scope, receive, noted)
            finally:
                asked = {"method": scope["method"], "path": scope["path"], "owner": state.get("owner")}
                taken_ms = round(1000 * (time.monotonic() - began), 1)
                logger.info("request", extra={**asked, "status": status, "milliseconds": taken_ms})


class SecurityHeaders:
    """Adds headers that keep a browser from guessing types, framing and leaking; an answer's own policy is kept."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and add to the head of its answer."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, with_headers)


class OwnPagesOnly:
    """Refuses what a page of another site makes a browser send, except that it follows a link."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, unless the browser says that another site sent it."""
        if scope["type"] == "http" and _is_foreign(Headers(scope=scope), scope["method"]):
            error = APIError(403, "cross_site", "pages of other sites must not send requests here")
            return await JSONResponse(error.body, error.status)(scope, receive, send)
        return await self.app(scope, receive, send)


def _is_foreign(headers: Headers, method: str) -> bool:
    if method == "GET" and headers.get("sec-fetch-mode") == "navigate":
        return False
    return headers.get("sec-fetch-site") in ("cross-site", "same-site") or (
        "origin" in headers and not is_own_origin(headers)
    )


def is_own_origin(headers: Headers) -> bool:
    """Compare the Origin header with the address that the browser asked for, as a proxy passes it on."""
    host = headers.get("x-forwarded-host", headers.get("host", "")).partition(",")[0].strip()
    try:
        origin = urlsplit(headers.get("origin", ""))
    except ValueError:
        return False
    return origin.scheme in ("http", "https") and origin.netloc.lower() == host.lower()
