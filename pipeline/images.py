"""Input images named by a URI: only files below one root are read."""

from dataclasses import dataclass
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from pipeline.request import RequestError
from pyramid_flow.errors import PyramidFlowError

MAX_IMAGE_BYTES = 64 * 2**20


class ImageError(PyramidFlowError):
    """An input image cannot be fetched."""


@dataclass(frozen=True)
class ImageRoot:
    """The folder or URL below which every image URI must lie."""

    url: str

    def read(self, uri: str) -> bytes:
        """Return an image file's bytes; `uri` is relative to the root or a full URI below it.

        Links and ".." are resolved before the comparison. Raises RequestError for a URI outside the root and ImageError
        for a file that cannot be read.
        """
        fs, root = url_to_fs(self.url)
        try:
            path = _local(uri, root) if isinstance(fs, LocalFileSystem) else _remote(uri, root, fs)
            if path is None:
                raise RequestError(f"image {uri!r} lies outside the image root {self.url}")
            if fs.info(path)["type"] != "file":  # reading a pipe would never end
                raise ImageError(f"image {uri!r} is no file")
            data: bytes = fs.cat_file(path, end=MAX_IMAGE_BYTES + 1)
        except RequestError:
            raise
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL byte
            raise ImageError(f"image {uri!r} cannot be read: {error}") from error
        if len(data) > MAX_IMAGE_BYTES:
            raise RequestError(f"image {uri!r} is larger than {MAX_IMAGE_BYTES} bytes")
        return data


def _local(uri: str, root: str) -> str | None:
    """Return the path of a local file with all links resolved, or None if it lies outside the root."""
    base, name = Path(root).resolve(), uri.removeprefix("file://")
    target = (base / name).resolve()
    return None if "://" in name or not target.is_relative_to(base) else str(target)


def _remote(uri: str, root: str, fs: AbstractFileSystem) -> str | None:
    """Return the path of an object, or None if it lies outside the root."""
    base = root.rstrip("/") + "/"
    full = any(uri.startswith(f"{protocol}://") for protocol in _protocols(fs))
    path = str(fs._strip_protocol(uri)) if full else uri
    if (full or path.startswith("/")) and not path.startswith(base):
        return None
    name = path.removeprefix(base)
    return None if "://" in name or ".." in name.split("/") else base + name


def _protocols(fs: AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
