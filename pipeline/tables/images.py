"""Input images named by a URI: only files below one root are read, and what allowed web servers hold."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from pipeline.request import RequestError
from pipeline.storage.faults import presentable
from pipeline.storage.filesystems import protocols
from pipeline.storage.redaction import redacted
from pipeline.storage.urls import climbs, is_web
from pipeline.tables.image_download import DownloadLimits, Fetcher, ImageError, is_public_address
from pyramid_flow.images.decoding import MAX_BYTES


@dataclass(frozen=True)
class ImageRoot:
    """The folder or URL below which an image URI must lie, unless it is an http(s) URL of an allowed host.

    is_public: whether a web server at an IP address may be asked.
    """

    kind: ClassVar[str] = "image"
    max_bytes: ClassVar[int] = MAX_BYTES

    url: str
    allowed_hosts: frozenset[str] = frozenset()
    is_public: Callable[[str], bool] = is_public_address

    def read(self, uri: str) -> bytes:
        """Return an image file's bytes; `uri` is relative to the root, a full URI below it, or at an allowed host.

        Links and ".." are resolved before the comparison, ".." is refused where there are no folders.

        Raises:
            RequestError: The URI lies outside the root and the allowed hosts, or the image is too large.
            ImageError: There is no such file, or it cannot be read.
            StorageError: A web server cannot be reached, or fails.
        """
        if is_web(uri) or is_web(self.url):
            fetcher = Fetcher(self.allowed_hosts, DownloadLimits(self.max_bytes), self.is_public)
            return fetcher.read(uri, self.url if is_web(self.url) else None)
        return self._read_file(uri)

    def _read_file(self, uri: str) -> bytes:
        (fs, root), name = url_to_fs(self.url), redacted(uri)
        try:
            path = _local(uri, root) if isinstance(fs, LocalFileSystem) else _remote(uri, root, fs)
            if path is None:
                raise RequestError(f"{self.kind} {name!r} lies outside the {self.kind} root {redacted(self.url)}")
            if fs.info(path)["type"] != "file":  # reading a pipe would never end
                raise ImageError(f"{self.kind} {name!r} is no file")
            data: bytes = fs.cat_file(path, end=self.max_bytes + 1)
        except RequestError:
            raise
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL byte
            raise ImageError(f"{self.kind} {name!r} cannot be read: {redacted(str(error))}") from presentable(error)
        if len(data) > self.max_bytes:
            raise RequestError(f"{self.kind} {name!r} is larger than {self.max_bytes} bytes")
        return data


NO_IMAGES = ImageRoot("/nonexistent")
"""No folder, and no web server: pictures come with their requests."""


def _local(uri: str, root: str) -> str | None:
    """Return the path of a local file with all links resolved, or None if it lies outside the root."""
    base, name = Path(root).resolve(), uri.removeprefix("file://")
    target = (base / name).resolve()
    return None if "://" in name or not target.is_relative_to(base) else str(target)


def _remote(uri: str, root: str, fs: AbstractFileSystem) -> str | None:
    """Return the path of an object, or None if it lies outside the root."""
    base = root.rstrip("/") + "/"
    full = any(uri.startswith(f"{protocol}://") for protocol in protocols(fs))
    path = str(fs._strip_protocol(uri)) if full else uri
    if (full or path.startswith("/")) and not path.startswith(base):
        return None
    name = path.removeprefix(base)
    return None if "://" in name or climbs(name) else base + name
