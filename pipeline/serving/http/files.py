"""Files of videos over HTTP: streamed, in ranges, a first frame out of a strip, and their removal."""

import io
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from functools import partial
from pathlib import PurePath
from typing import Any

from anyio import CapacityLimiter, to_thread
from PIL import Image
from starlette.datastructures import Headers
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from pipeline.ledger.compact import FILES
from pipeline.media.video import THUMBNAIL_FRAMES
from pipeline.serving.http.access import counted
from pipeline.serving.http.schemas import APIError
from pipeline.serving.queue.records import ID_PREFIX, Claim, VideoRecord
from pipeline.storage.storage import Storage

CHUNK_BYTES = 2**20
"""Bytes of a file that are read and sent at a time."""

MAX_DOWNLOADS, MAX_PER_LINK = 64, 16
"""Files of one owner that a replica sends at the same time, and those of them by one signed link."""

_reading = CapacityLimiter(64)
"""Threads that wait for the storage: others answer what needs the database only."""

VALID_S = 3600
"""Lifetime of an object store's signed URL."""


@dataclass(frozen=True)
class MediaFile:
    """A file of a finished video, in the storage or in memory."""

    source: str | bytes
    """Path in the storage, or the content itself."""
    size: int
    media_type: str
    name: str
    """File name for the client."""
    etag: str
    """Name of the content, with quotes."""
    completed_at: float
    """Seconds since 1970."""

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every answer about the file."""
        return {
            "Accept-Ranges": "bytes",
            "Cache-Control": "private, max-age=3600",
            "Content-Disposition": f'attachment; filename="{self.name}"',
            "ETag": self.etag,
            "Last-Modified": formatdate(self.completed_at, usegmt=True),
        }

    async def chunks(self, storage: Storage, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        """Yield the content, or its bytes from `start` up to, not including, `stop`."""
        stop = self.size if stop is None else stop
        for offset in range(start, stop, CHUNK_BYTES):
            read = partial(self._read, storage, offset, min(offset + CHUNK_BYTES, stop))
            yield await to_thread.run_sync(read, limiter=_reading)

    def _read(self, storage: Storage, start: int, stop: int) -> bytes:
        return storage.get(self.source, start, stop) if isinstance(self.source, str) else self.source[start:stop]


def media_file(storage: Storage, job: VideoRecord, variant: str) -> MediaFile:
    """Return a file of a finished job: the video or still, its first frame, or its strip of frames."""
    result = job.result or {}
    etag, completed_at = result["sha256"], job.completed_at or 0.0
    if variant == "video":
        uri, kind = result["uri"], result["media_type"]
        size = result.get("bytes") or storage.size(uri)
        return MediaFile(uri, size, kind, f"{job.id}{PurePath(uri).suffix}", f'"{etag}"', completed_at)
    data = storage.get(result["thumbnail_uri"])  # some 20 KB
    if variant == "thumbnail":
        data = first_of_strip(data, job.request["num_frames"])
    name = f"{job.id}-{variant}.webp"
    return MediaFile(data, len(data), "image/webp", name, f'"{etag}-{variant}"', completed_at)


class FileAnswer(Response):
    """Sends a file, or the part of it that a Range header names, in chunks that are read as they are sent.

    Follows RFC 9110: a known ETag in If-None-Match is answered 304; If-Range guards a Range; several ranges are
    answered with the whole file.

    Args:
        open_file: Finds the file.
        storage: Where it lies.
        downloads: Number of files that are being sent, by owner and by link.
        limits: Names under which this answer counts there, and how many each may have.
    """

    def __init__(
        self,
        open_file: Callable[[], MediaFile],
        storage: Storage,
        downloads: Counter[str],
        limits: Mapping[str, int],
    ) -> None:
        super().__init__()
        self.open_file, self.storage, self.downloads, self.limits = open_file, storage, downloads, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a GET or HEAD request; raises APIError before anything is sent."""
        for name, limit in self.limits.items():
            if self.downloads[name] >= limit:
                raise APIError(429, "too_many_downloads", f"{limit} downloads are open", retry_after_s=1)
        with counted(self.downloads, *self.limits):
            file = await to_thread.run_sync(self.open_file, limiter=_reading)
            answer = await self._answer(file, Headers(scope=scope), scope["method"])
            await answer(scope, receive, send)

    async def _answer(self, file: MediaFile, headers: Headers, method: str) -> Response:
        if _is_known(file, headers):
            return Response(status_code=304, headers=file.headers)
        start, stop = _range(headers.get("range"), file.size) or (0, file.size)
        if headers.get("if-range", file.etag) not in (file.etag, file.headers["Last-Modified"]):
            start, stop = 0, file.size
        about = {**file.headers, "Content-Length": str(stop - start)}
        status = 200
        if stop - start < file.size:
            status, about["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{file.size}"
        if method == "HEAD":
            return Response(None, status, about, file.media_type)
        chunks = file.chunks(self.storage, start, stop)
        first = await anext(chunks, b"")  # before the head, so that a lost file is an error
        return StreamingResponse(_chain(first, chunks), status, about, file.media_type)


def _is_known(file: MediaFile, headers: Headers) -> bool:
    known = [tag.strip().removeprefix("W/") for tag in headers.get("if-none-match", "").split(",")]
    return file.etag in known or known == ["*"]


async def _chain(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for chunk in rest:
        yield chunk


def _range(header: str | None, size: int) -> tuple[int, int] | None:
    """Return first byte and end of the one range that a header asks for, None for the whole file.

    Raises:
        APIError: 416 for a header that is malformed or starts beyond the file.
    """
    if header is None:
        return None
    unit, _, ranges = header.partition("=")
    if unit.strip().lower() != "bytes" or "," in ranges:
        return None
    match = re.fullmatch(r"\s*(\d{0,18})-(\d{0,18})\s*", ranges, re.ASCII)
    first, last = match.groups() if match else ("", "")
    if first:
        start, stop = int(first), min(int(last) + 1, size) if last else size
    else:
        start, stop = size - min(int(last or 0), size), size
    if start >= stop:
        message = f"Range {header[:80]!r} is not a part of {size} bytes"
        raise APIError(416, "invalid_range", message, headers={"Content-Range": f"bytes */{size}"})
    return start, stop


def fragments_folder(job_id: str) -> str:
    """Return where the fragments of a job lie, those of each claim in a folder of their own."""
    return f"stream/{job_id.removeprefix(ID_PREFIX)}"


def fragment_path(claim: Claim, index: int) -> str:
    """Return where a fragment of a claimed job lies."""
    return f"{fragments_folder(claim.id)}/{claim.fence}/{index}.m4s"


def remove_attempt(storage: Storage, claim: Claim, result: Mapping[str, Any]) -> None:
    """Remove what one claim of a job has made, and nothing of what another one has."""
    fragments = storage.list(f"{fragments_folder(claim.id)}/{claim.fence}")
    for path in (result["uri"], result["thumbnail_uri"], *fragments):
        if path:
            storage.delete(path)


def remove_files(storage: Storage, job: VideoRecord) -> None:
    """Remove everything that is stored of a job."""
    name, result = job.id.removeprefix(ID_PREFIX), job.result or {}
    paths = {job.image, result.get("uri"), result.get("thumbnail_uri")}
    if job.followed:
        paths |= set(storage.list(fragments_folder(job.id)))
    if (job.fence or 0) > 1:  # attempts that were lost may have published files, which no row names
        published = [path for folder in FILES for path in storage.list(f"{folder}/{name[:2]}")]
        paths |= {path for path in published if PurePath(path).name.startswith(f"{name}-")}
    for path in paths:
        if path:
            storage.delete(path)


def first_of_strip(strip: bytes, num_frames: int) -> bytes:
    """Return the first frame of the thumbnail strip of a video, as webp."""
    with Image.open(io.BytesIO(strip)) as image:
        frame = image.crop((0, 0, image.width // min(THUMBNAIL_FRAMES, num_frames), image.height))
    sink = io.BytesIO()
    frame.save(sink, "WEBP")
    return sink.getvalue()
