"""Models in an object store: every node keeps a copy of its own, filled once, by whichever process asks first."""

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.storage.storage import Storage
from pyramid_flow import Checkpoint
from pyramid_flow.checkpoints.layout import needed_files
from pyramid_flow.checkpoints.user_cache import cache_folder, replace_text
from pyramid_flow.errors import CheckpointError

SUMS = "SHA256SUMS"
"""File beside a model that says what its files must be, as `sha256sum` writes it; without it, sizes must do."""

WHOLE, LOCK, PART = "whole.json", "lock", ".part"

logger = logging.getLogger(__name__)


def is_stored(model: str) -> bool:
    """Tell whether a model is named by the URL of an object store, rather than by a folder or a name."""
    return "://" in model


def open_checkpoint(model: str, variant: str | None, lora: tuple[str, ...] = ()) -> Checkpoint:
    """Open a checkpoint by folder, name or URL; one with a URL is first brought to this node, see `local_copy`.

    Raises CheckpointError, and StorageError.
    """
    return Checkpoint.open(local_copy(model, variant) if is_stored(model) else model, variant, lora)


def local_copy(url: str, variant: str | None) -> Path:
    """Return this node's copy of a stored model, and fill it if it is not whole.

    It lies in the user's cache, where processes of a node find it, and one of them at a time fills it. What was begun
    goes on where it stopped, and a file that has changed in the store is fetched again. Raises CheckpointError, and
    StorageError.
    """
    storage = Storage(url)
    folder = cache_folder() / "models" / hashlib.sha256(storage.uri.encode()).hexdigest()[:16]
    copy = Copy(storage, folder / storage.uri.rstrip("/").rpartition("/")[2], folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("%s: waiting for the process that fetches it", url)
        lock.acquire()
    try:
        copy.fill([variant] if variant else [])
    finally:
        lock.release()
    return copy.folder


@dataclass(frozen=True)
class Copy:
    """A copy of a stored model; beside: where it is noted which of its files are whole."""

    storage: Storage
    folder: Path
    beside: Path

    def fill(self, variants: list[str]) -> None:
        """Fetch the files that the variants need (none = all) and that are not whole yet."""
        listed = self.storage.list()
        if not listed:
            raise CheckpointError(f"there is no checkpoint at {self.storage.uri}")
        whole = self._whole()
        there = {name: self._version(name) for name in needed_files(listed, variants)}
        missing = [name for name, version in there.items() if whole.get(name) != version]
        if not missing:
            return
        sums = self._sums() if SUMS in listed else {}
        if not sums:
            logger.warning("%s has no %s: only the sizes of its files are checked", self.storage.uri, SUMS)
        self._check_room(missing)
        for number, name in enumerate(missing, 1):
            logger.info("%s: file %d of %d, %s", self.storage.uri, number, len(missing), name)
            self._fetch(name, there[name], sums)
            replace_text(self.beside / WHOLE, json.dumps(whole := whole | {name: there[name]}))

    def _whole(self) -> dict[str, str]:
        """Return the version of each file that is whole."""
        try:
            noted: dict[str, str] = json.loads((self.beside / WHOLE).read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return {name: version for name, version in noted.items() if (self.folder / name).exists()}

    def _version(self, name: str) -> str:
        """Return what changes when a file is written again."""
        return f"{self.storage.size(name)} bytes, {self.storage.modified(name).isoformat()}"

    def _sums(self) -> dict[str, str]:
        lines = (line.split(maxsplit=1) for line in self.storage.get(SUMS).decode().splitlines() if line.strip())
        return {name.lstrip("*").removeprefix("./"): digest for digest, name in lines}

    def _check_room(self, names: list[str]) -> None:
        needed = sum(self.storage.size(name) for name in names)
        needed -= sum(part.stat().st_size for part in map(self._part, names) if part.exists())
        free = shutil.disk_usage(self.beside).free
        if needed > free:
            raise CheckpointError(f"{self.storage.uri} needs {needed} bytes in {self.beside}, and {free} are free")

    def _part(self, name: str) -> Path:
        return self.folder / f"{name}{PART}"

    def _fetch(self, name: str, version: str, sums: dict[str, str]) -> None:
        """Fetch a file; raises CheckpointError if it is not what it should be, and leaves nothing of it then."""
        part, note = self._part(name), self._part(f"{name}.version")
        part.parent.mkdir(parents=True, exist_ok=True)
        if not note.exists() or note.read_text() != version:
            part.unlink(missing_ok=True)
            note.write_text(version)
        self.storage.download(name, part)
        digest = sums.get(name)
        if part.stat().st_size != self.storage.size(name) or (digest and _sha256(part) != digest):
            part.unlink()
            note.unlink()
            raise CheckpointError(f"{self.storage.url(name)} is not what {SUMS if digest else 'its size'} says it is")
        part.replace(self.folder / name)
        note.unlink()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
