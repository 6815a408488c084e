"""Sign-ins of browsers: a cookie holds a random session id, the database knows which API key it stands for."""

import secrets
from dataclasses import dataclass

from sqlalchemy import delete, select
from starlette.requests import Request
from starlette.responses import Response

from pipeline.serving.http.keys import Keys, hashed
from pipeline.serving.http.middleware import is_own_origin
from pipeline.serving.http.schemas import APIError
from pipeline.serving.queue.records import Session
from pipeline.serving.queue.store import Store

COOKIE = "pyramid_render_session"
SESSION_S = 24 * 3600
"""Lifetime of a session; the cookie itself ends with the browser."""

MAX_SESSIONS = 100
"""Sessions that one key has; a further one ends the oldest."""

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
ID_BYTES = 32


@dataclass(frozen=True)
class Sessions:
    """The sessions in a database; each is valid as long as its API key is."""

    store: Store
    keys: Keys

    def begin(self, key: str) -> str | None:
        """Start a session; returns its id, or None for an unknown key. Expired sessions are removed."""
        if self.keys.owner(key) is None:
            return None
        session_id, now = secrets.token_urlsafe(ID_BYTES), self.store.clock()
        session = Session(id_hash=hashed(session_id), key_hash=hashed(key), expires_at=now + SESSION_S)
        newest = select(Session.id_hash).where(Session.key_hash == session.key_hash).order_by(Session.expires_at.desc())
        with self.store.writer.begin() as transaction:
            oldest = transaction.scalars(newest.offset(MAX_SESSIONS - 1)).all()
            transaction.execute(delete(Session).where((Session.expires_at <= now) | Session.id_hash.in_(oldest)))
            transaction.add(session)
        return session_id

    def owner(self, session_id: str) -> str | None:
        """Return the owner of a session's key, or None if the session or its key is not valid any more."""
        with self.store.reader() as transaction:
            session = transaction.get(Session, hashed(session_id))
        if session is None or session.expires_at <= self.store.clock():
            return None
        return self.keys.names.get(session.key_hash)

    def end(self, session_id: str) -> None:
        """Remove a session."""
        with self.store.writer.begin() as transaction:
            transaction.execute(delete(Session).where(Session.id_hash == hashed(session_id)))


def set_cookie(response: Response, request: Request, session_id: str | None) -> None:
    """Give a browser its session id, or take it back (None)."""
    attributes = {"path": "/", "secure": _is_https(request), "httponly": True, "samesite": "strict"}
    if session_id is None:
        response.delete_cookie(_cookie_name(request), **attributes)  # type: ignore[arg-type]
    else:
        response.set_cookie(_cookie_name(request), session_id, **attributes)  # type: ignore[arg-type]


def session_of(request: Request) -> str | None:
    """Return the session id in a browser's cookie."""
    return request.cookies.get(_cookie_name(request))


def _cookie_name(request: Request) -> str:
    """Return the cookie's name, with the prefix by which browsers refuse cookies that another host has set."""
    return f"__Host-{COOKIE}" if _is_https(request) else COOKIE


def _is_https(request: Request) -> bool:
    forwarded = request.headers.get("x-forwarded-proto", request.url.scheme)
    return forwarded.partition(",")[0].strip().lower() == "https"


def check_origin(request: Request) -> None:
    """Check that a page of this service sent a request that a browser signs with its cookie by itself.

    Raises:
        APIError: 403 if the method can change something and the Origin header is not the service's own address.
    """
    if request.method not in SAFE_METHODS and not is_own_origin(request.headers):
        raise APIError(403, "foreign_origin", "requests with a session must come from this service's own page")
