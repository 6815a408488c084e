"""Which URLs and which paths below them storage accepts."""

from pipeline.storage.faults import StorageError
from pipeline.storage.redaction import redacted

TEMPORARY_PREFIX = ".tmp-"
"""File names that begin so are unfinished writes: `Storage.list` does not show them and no path may use them."""


def check_url(url: str) -> None:
    """Raise StorageError for a place that cannot be one: empty, a chain of URLs, or with credentials in it."""
    if not url:
        raise StorageError("storage needs a folder or a URL, got an empty string")
    if "::" in url:
        raise StorageError(f"storage {redacted(url)} is a chain of URLs: caches and archives cannot take output")
    scheme, _, rest = url.partition("://")
    user = rest.partition("/")[0].rpartition("@")[0]
    if rest and scheme not in ("file", "local", "memory") and ("?" in rest or ":" in user):
        raise StorageError(
            f"a {scheme} URL for storage carries a password or a query: leave credentials to the environment"
        )


def check_path(path: str) -> None:
    """Raise StorageError for a path that is not relative, leads out of its place, or names an unfinished write."""
    parts = path.split("/")
    if "" in parts:
        raise StorageError(f"path {path!r} is empty, absolute or has an empty part")
    if "." in parts or ".." in parts:
        raise StorageError(f"path {path!r} has a '.' or '..' part")
    if "\\" in path or not path.isprintable():
        raise StorageError(f"path {path!r} has a backslash or a control character")
    if "?versionId=" in path:  # s3fs would cut it off
        raise StorageError(f"path {path!r} has a version id")
    if is_temporary(path):
        raise StorageError(f"path {path!r} has a part that begins with {TEMPORARY_PREFIX!r}")


def is_temporary(path: str) -> bool:
    """Tell whether a path is that of an unfinished write."""
    return any(part.startswith(TEMPORARY_PREFIX) for part in path.split("/"))
