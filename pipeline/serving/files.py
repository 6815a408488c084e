"""Files of videos over HTTP: in ranges, a first frame out of a strip, and their end."""

import hashlib
import io
import tempfile
from collections.abc import Mapping
from email.utils import formatdate
from pathlib import PurePath
from typing import Any

from fastapi.responses import FileResponse
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pipeline.compact import FILES
from pipeline.serving.tables import ID_PREFIX, Claim, Job
from pipeline.storage import Storage
from pipeline.video import THUMBNAIL_FRAMES


class BytesResponse(FileResponse):
    """Sends bytes as a file is sent, in ranges if they are asked for."""

    def __init__(self, data: bytes, **options: Any) -> None:  # noqa: ANN401 - as FileResponse's
        super().__init__("", **options)
        self.data = data

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the bytes by way of a file that is gone afterwards, however the sending ends."""
        with tempfile.NamedTemporaryFile() as file:
            await run_in_threadpool(file.write, self.data)
            file.flush()
            self.path = file.name
            await super().__call__(scope, receive, send)


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


def remove_files(storage: Storage, job: Job) -> None:
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


def file_answer(data: bytes, media_type: str, name: str, job: Job) -> Response:
    """Return the answer that sends a file of a job."""
    headers = {
        "ETag": f'"{hashlib.sha256(data).hexdigest()[:32]}"',
        "Last-Modified": formatdate(job.completed_at, usegmt=True),
        "Cache-Control": "private, max-age=3600",
    }
    return BytesResponse(data, headers=headers, media_type=media_type, filename=name)
