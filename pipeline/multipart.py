"""Multipart uploads of s3fs are completed or aborted, because a bucket keeps and bills the parts of open ones."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)


class _Upload(NamedTuple):
    task: asyncio.Task[Any] | None
    bucket: str
    key: str


_open_uploads: ContextVar[dict[str, _Upload] | None] = ContextVar("_open_uploads", default=None)
"""Open uploads by ID. fsspec copies the context of the calling thread into the task on its event loop."""


def track_uploads(fs: Any) -> None:  # noqa: ANN401 - fsspec has no types
    """Make an `S3FileSystem` record its multipart uploads, for `abort_on_failure`.

    s3fs does not return the ID of an upload, and does not abort an upload whose task is cancelled, as after a timeout.
    """
    call_s3 = fs._call_s3

    async def call_and_record(method: str, *arguments: object, **options: Any) -> Any:  # noqa: ANN401
        response = await call_s3(method, *arguments, **options)
        uploads = _open_uploads.get()
        if uploads is not None and method == "create_multipart_upload":
            upload = _Upload(asyncio.current_task(), options["Bucket"], options["Key"])
            uploads[response["UploadId"]] = upload
        elif uploads is not None and method in ("complete_multipart_upload", "abort_multipart_upload"):
            uploads.pop(options["UploadId"], None)
        return response

    fs._call_s3 = call_and_record


@contextmanager
def abort_on_failure(fs: Any) -> Iterator[None]:  # noqa: ANN401
    """Abort the multipart uploads that the block opened and left open, if it raises.

    Covers timeouts, interrupts and a failed abort by s3fs. It cannot cover a killed process.

    Args:
        fs: An `S3FileSystem` that `track_uploads` has prepared.
    """
    uploads: dict[str, _Upload] = {}
    token = _open_uploads.set(uploads)
    try:
        yield
    except BaseException:
        for upload_id, upload in list(uploads.items()):
            _abort(fs, upload_id, upload)
        raise
    finally:
        _open_uploads.reset(token)


def _abort(fs: Any, upload_id: str, upload: _Upload) -> None:  # noqa: ANN401
    if upload.task is not None:  # after an interrupt it still sends parts
        fs.loop.call_soon_threadsafe(upload.task.cancel)
    try:
        fs.abort_mpu(upload.bucket, upload.key, upload_id)
    except FileNotFoundError:
        logger.debug("multipart upload %s of %s is already closed", upload_id, upload.key)
    except Exception as error:  # noqa: BLE001 - the caller raises the cause of the failed upload
        logger.warning("multipart upload of %s/%s stays open: %s", upload.bucket, upload.key, type(error).__name__)
