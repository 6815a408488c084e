"""The fingerprint of a checkpoint: a hash over every tensor in use, remembered as long as no file changes."""

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pyramid_flow.checkpoints.user_cache import cache_folder, replace_text
from pyramid_flow.checkpoints.weight_files import StoredTensor, stored_tensors
from pyramid_flow.errors import CheckpointError

FORMAT = 1
"""Of the remembered entries; raised whenever the hash or what identifies it changes."""

CHUNK_BYTES = 1 << 20
SETTLED_S = 2.0
"""Age from which a file's time of change is trusted: two changes within one tick of a clock would look like one."""

SLOW_BYTES = 1 << 30
"""From here on a hash takes long enough to say so."""

Weights = Mapping[str, Mapping[str, StoredTensor]]

logger = logging.getLogger(__name__)


def fingerprint(folders: Sequence[Path], settings: bytes = b"", cache: Path | None = None) -> str:
    """Return 16 hex digits of a hash over settings and all tensors of the folders, however they are sharded.

    Of a tensor its folder's name, its name, type, shape and bytes count. A remembered value is used while path, size,
    inode and times of change of every file and all headers are the same: a file whose bytes change beneath its file
    system, or while a clock is set back, goes unnoticed. cache: the folder of the remembered values (default: the
    user's); one that cannot be read or written only costs time. Raises CheckpointError for files that cannot be read.
    """
    weights = {folder.name: dict(sorted(stored_tensors(folder).items())) for folder in folders}
    entry = _entry(cache or cache_folder() / "fingerprints", folders)
    identity = _identity(weights, settings)
    known = _remembered(entry, identity)
    if known is not None:
        return known
    started = time.time()
    value = _hash(weights, settings)
    if _settled(weights, started):
        with suppress(OSError):
            replace_text(entry, json.dumps({"identity": identity, "fingerprint": value}))
    return value


def _hash(weights: Weights, settings: bytes) -> str:
    """Read every tensor once, in pieces, by one thread: hashing waits for nothing, and one hash is one chain."""
    size = sum(tensor.stop - tensor.start for tensors in weights.values() for tensor in tensors.values())
    if size >= SLOW_BYTES:
        logger.info("reading %.1f GB of weights for their fingerprint", size / 1e9)
    digest = hashlib.sha256(settings)
    for folder, tensors in weights.items():
        digest.update(folder.encode())
        for name, tensor in tensors.items():
            digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
            _update(digest, tensor)
    return digest.hexdigest()[:16]


def _update(digest: Any, tensor: StoredTensor) -> None:  # noqa: ANN401 - hashlib names no type
    left = tensor.stop - tensor.start
    try:
        with tensor.file.open("rb", buffering=0) as stream:
            stream.seek(tensor.start)
            while piece := stream.read(min(left, CHUNK_BYTES)):
                digest.update(piece)
                left -= len(piece)
    except OSError as error:
        raise CheckpointError(f"{tensor.file} cannot be read: {error}") from error
    if left:
        raise CheckpointError(f"{tensor.file} ends {left} bytes too early")


def _identity(weights: Weights, settings: bytes) -> str:
    """Return a hash over everything but the tensors' bytes, and over what changes when these do."""
    digest = hashlib.sha256(f"{FORMAT} ".encode() + settings)
    for folder, tensors in weights.items():
        digest.update(f"{folder} {tensors}".encode())
    for file in _files(weights):
        status = file.stat()
        digest.update(f"{status.st_size} {status.st_ino} {status.st_mtime_ns} {status.st_ctime_ns}".encode())
    return digest.hexdigest()


def _settled(weights: Weights, now: float) -> bool:
    return all(file.stat().st_mtime <= now - SETTLED_S for file in _files(weights))


def _files(weights: Weights) -> list[Path]:
    return sorted({tensor.file for tensors in weights.values() for tensor in tensors.values()})


def _entry(cache: Path, folders: Sequence[Path]) -> Path:
    """Return one file per checkpoint and variant, so that a new value takes the place of the old one."""
    paths = "\n".join(str(folder) for folder in folders)
    return cache / f"{hashlib.sha256(paths.encode()).hexdigest()[:32]}.json"


def _remembered(entry: Path, identity: str) -> str | None:
    try:
        known = json.loads(entry.read_text())
    except (OSError, ValueError):
        return None
    matches = isinstance(known, dict) and known.get("identity") == identity
    value = known.get("fingerprint") if matches else None
    return value if isinstance(value, str) else None
