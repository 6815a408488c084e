"""One place for files: a local folder or an object store, reached through fsspec by checked relative paths.

Transient faults of a store are retried here and nowhere above; what is left becomes one StorageError.
"""

import logging
import mimetypes
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fsspec.implementations.local import LocalFileSystem
from tenacity import (
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_before_delay,
    wait_exponential,
    wait_random_exponential,
)

from pipeline.storage.faults import (
    Fault,
    StorageError,
    explained,
    fault,
    lacks_bucket,
    log_retry,
    presentable,
)
from pipeline.storage.filesystems import local_files, open_filesystem, protocols, replace_local
from pipeline.storage.paths import TEMPORARY_PREFIX, check_path, check_url, is_temporary

logger = logging.getLogger(__name__)

T = TypeVar("T")

S3_PART_BYTES = 8 * 2**20
"""Size of the parts of an S3 upload; files from twice this size on are sent in parts."""

DOWNLOAD_BYTES = 8 * 2**20
"""Read at a time of what is downloaded; so much may be fetched again after a fault."""

SLOWEST_UPLOAD = 2**18
"""Bytes per second; slower uploads count as stalled."""


class DamagedError(ConnectionError):
    """What lies in an object store is not as long as what was sent."""


@dataclass(frozen=True)
class Retries:
    """How patiently a call is repeated after a transient fault.

    Each wait is drawn between half of and all of a length that starts at `first_wait_s` and doubles up to `max_wait_s`:
    30 to 60 s in all, if every try fails at once. The second try is always made; later ones only within `window_s`.
    An upload to an object store may take `upload_timeout_s` and the time that its bytes take at SLOWEST_UPLOAD.
    """

    attempts: int = 6
    first_wait_s: float = 2.0
    max_wait_s: float = 30.0
    window_s: float = 90.0
    upload_timeout_s: float = 30.0


class Storage:
    """Files below one local folder or object-store URL, with retries against transient faults.

    Picklable: workers get the same place, local ones absolute. Threads and forked processes may share one.
    Paths are relative, with forward slashes, and are checked before anything is touched.

    Args:
        url: A local folder, absolute or relative to the current one, or a URL that fsspec knows
            (file:// s3:// gs:// abfs:// hf:// memory:// ...). The package behind it must be installed, and finds
            its credentials in the environment: the URL may not carry any.
        retries: How patiently transient faults are met.

    Raises:
        StorageError: The URL is empty, chained, of an unknown kind, or carries credentials, or its package is missing.
    """

    def __init__(self, url: str, retries: Retries = Retries()) -> None:
        check_url(url)
        self.retries = retries
        fs, root = open_filesystem(url)
        self.root: str = root.rstrip("/")
        self._is_local = isinstance(fs, LocalFileSystem)
        if not self.root and "memory" not in protocols(fs):
            raise StorageError(f"storage {url} names no folder or bucket")
        self._url = self.root if self._is_local else url
        # event loops and connections do not survive a fork; the parent's must not be closed by the child either
        self._fs_by_process: dict[int, Any] = {os.getpid(): fs}

    def __reduce__(self) -> tuple[type["Storage"], tuple[str, Retries]]:
        return Storage, (self._url, self.retries)

    def __repr__(self) -> str:
        return f"Storage({self._fs.unstrip_protocol(self.root)!r})"

    def put(self, path: str, data: bytes | Path) -> None:
        """Writes a file whole or not at all, replacing what was there; folders are made as needed.

        In an object store the size of what arrived is compared with what was sent.

        Args:
            path: Relative path of the file.
            data: Its content, or a local file that holds it.

        Raises:
            StorageFullError: There is no room for it.
            StorageError: The path is refused, or writing failed.
        """
        target = self._absolute(path)
        try:
            self._persist(f"write {self.url(path)}", partial(self._put, target, data))
        except StorageError as error:
            if isinstance(error.__cause__, DamagedError):
                self._discard(target)
            raise

    def get(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Returns a file's content, or its bytes from `start` up to, not including, `stop`.

        Raises:
            StorageError: The path is refused, or there is no such file, or reading failed.
        """
        target = self._absolute(path)
        return self._persist(f"read {self.url(path)}", lambda: bytes(self._fs.cat_file(target, start=start, end=stop)))

    def signed_url(self, path: str, valid_s: int) -> str | None:
        """Returns a URL that gives anyone access to a file for a while, or None if the store cannot sign.

        Raises:
            StorageError: The path is refused, or signing failed.
        """
        target = self._absolute(path)
        try:
            return self._persist(f"sign {self.url(path)}", lambda: str(self._fs.sign(target, expiration=valid_s)))
        except StorageError as error:
            if isinstance(error.__cause__, NotImplementedError):
                return None
            raise

    def exists(self, path: str) -> bool:
        """Says whether there is a file or folder of that name.

        Raises:
            StorageError: The path is refused, or the store cannot be asked.
        """
        target = self._absolute(path)
        return self._persist(f"look for {self.url(path)}", partial(self._exists, target))

    def modified(self, path: str) -> datetime:
        """Returns when a file was last written, in UTC and by the store's clock.

        Raises:
            StorageError: The path is refused, or there is no such file, or the store cannot be asked.
        """
        target = self._absolute(path)
        return self._persist(f"look for {self.url(path)}", partial(self._modified, target))

    def size(self, path: str) -> int:
        """Returns the size of a file in bytes.

        Raises:
            StorageError: The path is refused, or there is no such file, or the store cannot be asked.
        """
        target = self._absolute(path)
        return self._persist(f"look for {self.url(path)}", lambda: int(self._fs.info(target)["size"]))

    def download(self, path: str, target: Path) -> None:
        """Appends to a local file what it lacks of a stored one, so that a broken download goes on where it stopped.

        Args:
            path: Relative path of the stored file.
            target: The local one; what it holds already must be the stored one's beginning.

        Raises:
            StorageFullError: There is no room for it.
            StorageError: The path is refused, or there is no such file, or reading failed.
        """
        source = self._absolute(path)
        self._persist(f"fetch {self.url(path)}", partial(self._download, source, target))

    def list(self, prefix: str = "") -> list[str]:
        """Returns all files below a folder, recursively, as sorted paths relative to the root.

        Args:
            prefix: Relative path of the folder; "" is the root. An absent folder gives an empty list.

        Raises:
            StorageError: The path is refused, or listing failed.
        """
        folder = self._absolute(prefix) if prefix else self.root
        found = self._persist(f"list {self._fs.unstrip_protocol(folder)}", partial(self._find, folder))
        # object stores may hold empty objects that stand for folders
        below = (name for name in found if name.startswith(f"{folder}/") and not name.endswith("/"))
        return sorted(name[len(self.root) + 1 :] for name in below if not is_temporary(name))

    def delete(self, path: str) -> None:
        """Removes a file; one that is not there is as good as removed.

        Raises:
            StorageError: The path is refused, names a local folder, or removing failed.
        """
        target = self._absolute(path)
        self._persist(f"delete {self.url(path)}", partial(self._delete, target))

    @property
    def uri(self) -> str:
        """The full URI of the place itself."""
        return str(self._fs.unstrip_protocol(self.root))

    def url(self, path: str) -> str:
        """Returns the full URI of a path, such as file:///out/a.mp4 or s3://bucket/out/a.mp4.

        Raises:
            StorageError: The path is refused.
        """
        return str(self._fs.unstrip_protocol(self._absolute(path)))

    def probe(self) -> None:
        """Writes, reads back and removes a small file, making a local root folder if there is none.

        Raises:
            StorageFullError: There is no room for it.
            StorageError: One sentence that says why the place cannot be written.
        """
        token = secrets.token_bytes(16)
        target = f"{self.root}/{TEMPORARY_PREFIX}probe-{token.hex()}"
        action = f"use {self._fs.unstrip_protocol(self.root)} for output, it is not writable"
        try:
            found = self._persist(action, partial(self._echo, target, token))
        except BaseException:
            self._discard(target)
            raise
        if found != token:
            raise StorageError(f"{self!r} returned other bytes than were written to it")

    @property
    def _fs(self) -> Any:  # noqa: ANN401 - fsspec has no types
        process = os.getpid()
        if process not in self._fs_by_process:
            self._fs_by_process.setdefault(process, open_filesystem(self._url)[0])
        return self._fs_by_process[process]

    def _absolute(self, path: str) -> str:
        check_path(path)
        return f"{self.root}/{path}"

    def _persist(self, action: str, call: Callable[[], T]) -> T:
        limits = self.retries
        half_wait = {"multiplier": limits.first_wait_s / 2, "max": limits.max_wait_s / 2}
        retrying = Retrying(
            stop=stop_after_attempt(limits.attempts) | (stop_after_attempt(2) & stop_before_delay(limits.window_s)),
            wait=wait_exponential(**half_wait) + wait_random_exponential(**half_wait),
            retry=retry_if_exception(lambda error: fault(error) is Fault.TRANSIENT),
            before_sleep=partial(log_retry, action, limits.attempts),
            reraise=True,
        )
        try:
            return retrying(call)
        except Exception as error:  # noqa: BLE001 - re-raised; the drivers' exceptions have no common base
            raise explained(action, error, retrying.statistics["attempt_number"]) from presentable(error)

    def _put(self, target: str, data: bytes | Path) -> None:
        if self._is_local:
            replace_local(Path(target), data)
            return
        sent = data.stat().st_size if isinstance(data, Path) else len(data)
        options = self._upload_options(target, sent)
        try:
            if isinstance(data, Path):
                self._fs.put_file(str(data), target, **options)
            else:
                self._fs.pipe_file(target, data, **options)
        except BaseException:
            if sent > S3_PART_BYTES:
                self._abort_uploads(target)
            raise
        self._verify(target, sent)

    def _upload_options(self, target: str, sent: int) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if self._fs.async_impl:
            # fsspec's own limit: read time-outs of the drivers begin only when the last byte was taken
            options["timeout"] = self.retries.upload_timeout_s + sent / SLOWEST_UPLOAD
        if "s3" in protocols(self._fs):
            options["chunksize"] = S3_PART_BYTES
            # s3fs aborts a failed upload while other parts are in flight, and a part that arrives after the abort stays
            # in the bucket. One part at a time prevents that, but limits a large file to the speed of one connection.
            options["max_concurrency"] = 1
            if kind := mimetypes.guess_type(target, strict=False)[0]:
                options["ContentType"] = kind  # browsers show a page, and play a video, that says it is one
        return options

    def _abort_uploads(self, target: str) -> None:
        """Abort multipart uploads to a file, because a bucket keeps and bills their parts.

        s3fs does so when the store refuses a part, but not after a timeout or an interrupt.
        """
        if "s3" not in protocols(self._fs):
            return
        with suppress(Exception):  # the caller raises the cause; a lifecycle rule removes what is left
            bucket, key, _version = self._fs.split_path(target)
            for upload in self._fs.list_multipart_uploads(bucket):
                if upload["Key"] == key:
                    self._fs.abort_mpu(bucket, key, upload["UploadId"])

    def _verify(self, target: str, sent: int) -> None:
        self._fs.invalidate_cache()
        try:
            arrived = self._fs.info(target)["size"]
        except FileNotFoundError as error:  # it was written, so a store that has lost it is no fault of the job's
            raise DamagedError(f"0 of {sent} bytes arrived") from error
        if arrived != sent:
            raise DamagedError(f"{arrived} of {sent} bytes arrived")

    def _discard(self, target: str) -> None:
        """Remove an incomplete or damaged file if possible, because readers would take it for a whole one."""
        with suppress(Exception):
            self._fs.rm_file(target)

    def _exists(self, target: str) -> bool:
        # not fs.exists(): for many stores it takes any failure for "no"
        self._fs.invalidate_cache()
        try:
            self._fs.info(target)
        except (FileNotFoundError, NotADirectoryError) as error:
            if lacks_bucket(error):
                raise
            return False
        return True

    def _modified(self, target: str) -> datetime:
        self._fs.invalidate_cache()
        found: datetime = self._fs.modified(target)
        return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)

    def _download(self, source: str, target: Path) -> None:
        with target.open("ab") as local, self._fs.open(source, "rb", cache_type="readahead") as stored:
            stored.seek(local.tell())
            shutil.copyfileobj(stored, local, DOWNLOAD_BYTES)

    def _find(self, folder: str) -> Iterable[str]:
        if self._is_local:
            return tuple(local_files(folder))
        self._fs.invalidate_cache()
        try:
            return tuple(self._fs.find(folder))
        except FileNotFoundError as error:
            if lacks_bucket(error):
                raise
            return ()

    def _delete(self, target: str) -> None:
        try:
            if self._is_local:
                Path(target).unlink()
            else:
                self._fs.rm_file(target)
        except FileNotFoundError as error:
            if lacks_bucket(error):
                raise
            logger.debug("%s was already gone", target)

    def _echo(self, target: str, data: bytes) -> bytes:
        self._put(target, data)
        found = bytes(self._fs.cat_file(target))
        self._delete(target)
        return found
