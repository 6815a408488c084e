"""Input images named by a URI: only files below one root are read."""

from dataclasses import dataclass
from pathlib import Path

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
        local = isinstance(fs, LocalFileSystem)
        path = self._local(uri, root) if local else self._remote(uri, root)
        try:
            if fs.size(path) > MAX_IMAGE_BYTES:
                raise RequestError(f"image {uri!r} is larger than {MAX_IMAGE_BYTES} bytes")
            data: bytes = fs.cat_file(path)
            return data
        except OSError as error:
            raise ImageError(f"image {uri!r} cannot be read: {error}") from error

    def _local(self, uri: str, root: str) -> str:
        base = Path(root).resolve()
        target = (base / uri.removeprefix("file://")).resolve()
        if "://" in uri.removeprefix("file://") or not target.is_relative_to(base):
            raise RequestError(f"image {uri!r} lies outside the image root {self.url}")
        return str(target)

    def _remote(self, uri: str, root: str) -> str:
        scheme = self.url.split("://", 1)[0]
        path = uri.removeprefix(f"{scheme}://").removeprefix(root.rstrip("/") + "/")
        if "://" in path or path.startswith("/") or ".." in path.split("/"):
            raise RequestError(f"image {uri!r} lies outside the image root {self.url}")
        return f"{root.rstrip('/')}/{path}"
