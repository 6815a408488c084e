"""One place for files: a local folder or an object store, reached through fsspec by checked relative paths."""

import logging
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from pyramid_flow.errors import PyramidFlowError

logger = logging.getLogger(__name__)

TEMPORARY_PREFIX = ".tmp-"
"""File names that begin so are unfinished writes: `Storage.list` does not show them and no path may use them."""


class StorageError(PyramidFlowError):
    """A path is refused, or a folder or object store cannot be used; the cause is chained."""


class Storage:
    """Files below one local folder or object-store URL. Picklable: workers get the same place, local ones absolute.

    Paths are relative, with forward slashes, and are checked before anything is touched.

    Args:
        url: A local folder, absolute or relative to the current one, or a URL that fsspec knows
            (file:// s3:// gs:// abfs:// hf:// memory:// ...). The package behind it must be installed.

    Raises:
        StorageError: The URL is empty, of an unknown kind, or needs a package that is not installed.
    """

    def __init__(self, url: str) -> None:
        if not url:
            raise StorageError("storage needs a folder or a URL, got an empty string")
        with _reported(f"use {url} as storage"):
            self._fs, root = url_to_fs(url)
        self.root: str = root.rstrip("/")
        self._is_local = isinstance(self._fs, LocalFileSystem)
        if not self.root and "memory" not in _protocols(self._fs.protocol):
            raise StorageError(f"storage {url} names no folder or bucket")

    def __repr__(self) -> str:
        return f"Storage({self._fs.unstrip_protocol(self.root)!r})"

    def put(self, path: str, data: bytes | Path) -> None:
        """Writes a file whole or not at all, replacing what was there; folders are made as needed.

        Args:
            path: Relative path of the file.
            data: Its content, or a local file that holds it.

        Raises:
            StorageError: The path is refused, or writing failed.
        """
        target = self._absolute(path)
        with _reported(f"write {self.url(path)}"):
            self._put(target, data)

    def get(self, path: str) -> bytes:
        """Returns a file's content.

        Raises:
            StorageError: The path is refused, or there is no such file, or reading failed.
        """
        target = self._absolute(path)
        with _reported(f"read {self.url(path)}"):
            return bytes(self._fs.cat_file(target))

    def exists(self, path: str) -> bool:
        """Says whether there is a file or folder of that name.

        Raises:
            StorageError: The path is refused, or the store cannot be asked.
        """
        target = self._absolute(path)
        with _reported(f"look for {self.url(path)}"):
            self._fs.invalidate_cache()  # other workers write too
            return bool(self._fs.exists(target))

    def list(self, prefix: str = "") -> list[str]:
        """Returns all files below a folder, recursively, as sorted paths relative to the root.

        Args:
            prefix: Relative path of the folder; "" is the root. An absent folder gives an empty list.

        Raises:
            StorageError: The path is refused, or listing failed.
        """
        folder = self._absolute(prefix) if prefix else self.root
        with _reported(f"list {self._fs.unstrip_protocol(folder)}"):
            self._fs.invalidate_cache()
            found = self._fs.find(folder)
        below = (name for name in found if name.startswith(f"{folder}/"))
        return sorted(name[len(self.root) + 1 :] for name in below if not _is_temporary(name))

    def delete(self, path: str) -> None:
        """Removes a file; one that is not there is as good as removed.

        Raises:
            StorageError: The path is refused, names a folder, or removing failed.
        """
        target = self._absolute(path)
        with _reported(f"delete {self.url(path)}"):
            self._delete(target)

    def url(self, path: str) -> str:
        """Returns the full URI of a path, such as file:///out/a.mp4 or s3://bucket/out/a.mp4.

        Raises:
            StorageError: The path is refused.
        """
        return str(self._fs.unstrip_protocol(self._absolute(path)))

    def probe(self) -> None:
        """Writes, reads back and removes a small file, making a local root folder if there is none.

        Raises:
            StorageError: One sentence that says why the place cannot be written.
        """
        token = secrets.token_bytes(16)
        target = f"{self.root}/{TEMPORARY_PREFIX}probe-{token.hex()}"
        with _reported(f"use {self._fs.unstrip_protocol(self.root)} for output, it is not writable"):
            self._put(target, token)
            found = self._fs.cat_file(target)
            self._delete(target)
        if found != token:
            raise StorageError(f"{self!r} returned other bytes than were written to it")

    def _absolute(self, path: str) -> str:
        _check_path(path)
        return f"{self.root}/{path}"

    def _put(self, target: str, data: bytes | Path) -> None:
        if self._is_local:
            _replace_local(Path(target), data)
        elif isinstance(data, Path):
            self._fs.put_file(str(data), target)
        else:
            self._fs.pipe_file(target, data)

    def _delete(self, target: str) -> None:
        try:
            if self._is_local:
                Path(target).unlink()
            else:
                self._fs.rm_file(target)
        except FileNotFoundError:
            logger.debug("%s was already gone", target)


def _replace_local(target: Path, data: bytes | Path) -> None:
    # not tempfile: its files are readable by their owner only
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}")
    try:
        if isinstance(data, Path):
            shutil.copyfile(data, partial)
        else:
            partial.write_bytes(data)
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _check_path(path: str) -> None:
    parts = path.split("/")
    if "" in parts:
        raise StorageError(f"path {path!r} is empty, absolute or has an empty part")
    if "." in parts or ".." in parts:
        raise StorageError(f"path {path!r} has a '.' or '..' part")
    if "\\" in path or not path.isprintable():
        raise StorageError(f"path {path!r} has a backslash or a control character")
    if _is_temporary(path):
        raise StorageError(f"path {path!r} has a part that begins with {TEMPORARY_PREFIX!r}")


def _is_temporary(path: str) -> bool:
    return any(part.startswith(TEMPORARY_PREFIX) for part in path.split("/"))


def _protocols(protocol: str | tuple[str, ...]) -> tuple[str, ...]:
    return (protocol,) if isinstance(protocol, str) else protocol


@contextmanager
def _reported(action: str) -> Iterator[None]:
    # every store has its own tree of exceptions, not all of them OSErrors
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise StorageError(f"cannot {action}: {reason[0]}") from error
