"""The file systems below a storage: opening one for a URL, and the functions that only local folders require."""

import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.dircache import DirCache

from pipeline.storage.faults import StorageError, explained, presentable
from pipeline.storage.paths import TEMPORARY_PREFIX

S3_TRIES_PER_REQUEST = 2
"""A failed part is sent again before the whole file is; more would multiply with `Retries.attempts`."""

EXTRAS = {"s3": "s3", "s3a": "s3"}
"""Extra of this package that brings the driver of a kind of URL."""


def open_filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """Open the file system of a URL, with the driver's own retries bounded; returns it and the path below it.

    Raises:
        StorageError: The driver is not installed, or the URL cannot be used.
    """
    try:
        fs, root = url_to_fs(url, skip_instance_cache=True)
    except ImportError as error:
        scheme = url.partition("://")[0]
        remedy = f"pip install 'pyramid-render[{EXTRAS[scheme]}]'" if scheme in EXTRAS else str(error)
        raise StorageError(f"cannot use {url} as storage, its driver is not installed: {remedy}") from error
    except Exception as error:  # noqa: BLE001 - re-raised
        raise explained(f"use {url} as storage", error) from presentable(error)
    if isinstance(getattr(fs, "dircache", None), DirCache):
        fs.dircache.use_listings_cache = False  # others write too
    if "s3" in protocols(fs):
        # s3fs would repeat botocore's retries; what the user configured for s3fs goes before
        fs.retries = 1
        limits = {"mode": "standard", "total_max_attempts": S3_TRIES_PER_REQUEST}
        fs.config_kwargs = {"retries": limits, **fs.config_kwargs}
    return fs, root


def replace_local(target: Path, data: bytes | Path) -> None:
    """Write a local file whole or not at all."""
    # not tempfile: its files are readable by their owner only
    target.parent.mkdir(parents=True, exist_ok=True)
    partial_file = target.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}")
    try:
        if isinstance(data, Path):
            shutil.copyfile(data, partial_file)
        else:
            partial_file.write_bytes(data)
        partial_file.replace(target)
    except BaseException:
        partial_file.unlink(missing_ok=True)
        raise


def protocols(fs: AbstractFileSystem) -> tuple[str, ...]:
    """Return the names of a file system's protocol."""
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def local_files(folder: str) -> Iterator[str]:
    """Yield all files below a local folder; raises OSError for a folder that cannot be listed."""
    # not fs.find(): it leaves out what cannot be listed
    for parent, _, names in os.walk(folder, onerror=_raise_unless_absent):
        yield from (f"{parent}/{name}" for name in names)


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error
