"""What requests stand on, and who may ask for what: dependencies of the interface's routes."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool

from pipeline.serving.http.keys import Keys
from pipeline.serving.http.links import Links
from pipeline.serving.http.schemas import APIError
from pipeline.serving.http.scrape import Scrape
from pipeline.serving.http.sessions import Sessions, check_origin, session_of
from pipeline.serving.queue.records import VideoRecord
from pipeline.serving.queue.store import Store
from pipeline.storage.storage import Storage
from pipeline.tables.images import NO_IMAGES, ImageRoot
from pyramid_flow import Preset

LOCAL_OWNER = "local"
"""Owner of all videos when no keys are asked for."""


@dataclass(frozen=True)
class Polling:
    """Intervals, in seconds, at which the state of a video is read."""

    client_s: float = 1.0
    """Interval that clients are asked to keep; it grows with the number of videos ahead of theirs."""
    max_client_s: float = 10.0
    events_s: float = 0.3
    """For event streams and for requests that wait for their video."""
    stream_s: float = 0.1
    """For streams of videos that are being made."""


@dataclass(frozen=True)
class Service:
    """What the interface stands on.

    keys: who may ask; None = everyone, which is for one's own machine only. links: signs those to files; images: what
    pictures may be fetched; nodes: returns the URLs of the nodes' metrics; names_requests: whether an answer tells the
    request's id, unless a proxy does; redirects: whether files of videos come from the object store itself. downloads
    and pictures: files that this replica sends, and pictures that it reads, by whom; scrape: the latest metrics.
    """

    store: Store
    storage: Storage
    preset: Preset
    model: str
    fingerprint: str
    keys: Keys | None
    links: Links = field(default_factory=Links)
    images: ImageRoot = NO_IMAGES
    nodes: Callable[[], Sequence[str]] = tuple
    names_requests: bool = True
    redirects: bool = False
    downloads: Counter[str] = field(default_factory=Counter)
    pictures: Counter[str] = field(default_factory=Counter)
    scrape: Scrape = field(default_factory=Scrape)
    polling: Polling = Polling()

    @property
    def sessions(self) -> Sessions | None:
        """Sign-ins of browsers; None = there are no keys to sign in with."""
        return None if self.keys is None else Sessions(self.store, self.keys)


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Served = Annotated[Service, Depends(_service)]
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


async def _owner(request: Request, service: Served, credentials: Credentials) -> str:
    """Return who asks, by API key or by the session in a browser's cookie."""
    owner: str | None = LOCAL_OWNER
    if service.keys is not None:
        owner = service.keys.owner(credentials.credentials) if credentials else await _signed_in(request, service)
    if owner is None:
        raise APIError(401, "invalid_api_key", "an API key is required: Authorization: Bearer KEY")
    request.state.owner = owner
    return owner


async def _signed_in(request: Request, service: Served) -> str | None:
    """Return the owner of a browser's session, or None."""
    session_id = session_of(request)
    if session_id is None or service.sessions is None:
        return None
    check_origin(request)
    return await run_in_threadpool(service.sessions.owner, session_id)


SignedIn = Annotated[str | None, Depends(_signed_in)]
"""Name of the key that a browser has signed in with."""

Owner = Annotated[str, Depends(_owner)]
"""Name of the key that asks."""


async def _reader(
    request: Request,
    video_id: str,
    service: Served,
    credentials: Credentials,
    variant: str | None = None,
    expires: int = 0,
    signature: str | None = None,
) -> str | None:
    """Return who asks for a file, None for whoever has a good link to it."""
    path = file_path(video_id, request.url.path.rpartition("/")[2])
    if signature and service.links.is_good(path, variant, expires, signature, service.store.clock()):
        return None
    return await _owner(request, service, credentials)


def _own(video_id: str, service: Served, owner: Owner) -> VideoRecord:
    return found(service.store.get(video_id, owner), video_id)


def _readable(video_id: str, service: Served, reader: Annotated[str | None, Depends(_reader)]) -> VideoRecord:
    return found(service.store.get(video_id, reader), video_id)


Own = Annotated[VideoRecord, Depends(_own)]
"""The video that a path names, if it is the asker's."""

Readable = Annotated[VideoRecord, Depends(_readable)]
"""The video whose file a path names, for its owner and for whoever has a signed link to the file."""


@contextmanager
def counted(counts: Counter[str], *names: str) -> Iterator[None]:
    """Count names for as long as something lasts."""
    counts.update(names)
    try:
        yield
    finally:
        counts.subtract(names)
        for name in names:
            if not counts[name]:
                del counts[name]


def file_path(video_id: str, name: str) -> str:
    """Return the path of a video's file in the interface."""
    return f"/v1/videos/{video_id}/{name}"


def found(job: VideoRecord | None, video_id: str) -> VideoRecord:
    """Return a job; raises APIError if there is none."""
    if job is None:
        raise APIError(404, "video_not_found", f"there is no video {video_id!r}")
    return job
