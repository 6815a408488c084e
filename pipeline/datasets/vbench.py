"""Suites of prompts to score a model by: their table of requests, and videos under the names that VBench looks for."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.compute as pc
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from pipeline.ledger import ledger
from pipeline.storage.paths import TEMPORARY_PREFIX, check_path
from pipeline.storage.storage import Storage
from pyramid_flow.errors import PyramidFlowError

MAX_NAME_BYTES = 255


class SuiteError(PyramidFlowError, ValueError):
    """A suite of prompts cannot be used."""


def read_suite(path: Path) -> list[str]:
    """Return a suite's prompts, each once: the lines of a text file, or `prompt_en` of the entries of a JSON list.

    Raises SuiteError, also for a prompt that cannot be the name of a file.
    """
    try:
        text = path.read_text(encoding="utf-8")
        entries = json.loads(text) if path.suffix == ".json" else [line.strip() for line in text.split("\n")]
        found = [entry if isinstance(entry, str) else entry["prompt_en"] for entry in entries]
        prompts = list(dict.fromkeys(prompt for prompt in found if prompt.strip()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise SuiteError(f"suite {path} is neither lines of text nor a JSON list with prompt_en: {reason}") from error
    if not prompts:
        raise SuiteError(f"suite {path} has no prompts")
    for prompt in prompts:
        _check_name(prompt)
    return prompts


def suite_table(prompts: Sequence[str], samples: int, fields: Mapping[str, object]) -> pa.Table:
    """Return the table: a row per prompt and sample, whose seed is its number; fields: of every row's request."""
    rows = [{"prompt": prompt, "seed": i, "sample": i, **fields} for prompt in prompts for i in range(samples)]
    return pa.Table.from_pylist(rows)


def file_name(prompt: str, sample: int) -> str:
    """Return the name that VBench looks for."""
    return f"{prompt}-{sample}.mp4"


def gather(storage: Storage, prompts: Sequence[str], samples: int, folder: Path) -> int:
    """Put the suite's videos that are rendered into a folder, by the names that VBench looks for; returns how many.

    What is there already stays. Raises SuiteError if the folder cannot take them.
    """
    names = {file_name(prompt, sample) for prompt in prompts for sample in range(samples)}
    rows = ledger.read(storage, ["prompt", "sample", "status", "media_type", "uri"])
    videos = rows.filter((pc.field("status") == "succeeded") & (pc.field("media_type") == "video/mp4"))
    named = {file_name(row["prompt"], row["sample"]): row["uri"] for row in videos.to_pylist()}
    found = {name: path for name, path in named.items() if name in names}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, path in found.items():
            place(storage, path, folder / name)
    except OSError as error:
        raise SuiteError(f"{folder} cannot take the videos: {error}") from error
    return len(found)


def default_folder(storage: Storage) -> Path:
    """Return the folder for the named videos of an output; raises SuiteError for one in an object store."""
    root = local_path(storage)
    if root is None:
        raise SuiteError(f"output {storage.uri} is no folder of this machine: --videos must say where its videos go")
    return root / "vbench"


def local_path(storage: Storage) -> Path | None:
    """Return where an output is on this machine; None for one in an object store."""
    fs, path = url_to_fs(storage.uri)
    return Path(path) if isinstance(fs, LocalFileSystem) else None


def place(storage: Storage, path: str, target: Path) -> None:
    """Place a video of the output at a target, as a hard link if possible; an existing file of its size is kept.

    Raises:
        StorageError: The path, which comes from the ledger, leads out of the output.
    """
    check_path(path)
    root = local_path(storage)
    if root is not None and _linked(root / path, target):
        return
    if target.exists() and target.stat().st_size == storage.size(path):
        return
    # in a folder of its own, since VBench takes all files for videos, and on the same file system
    with TemporaryDirectory(dir=target.parent, prefix=TEMPORARY_PREFIX) as folder:
        partial = Path(folder, target.name)
        storage.download(path, partial)
        partial.replace(target)


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except FileExistsError:
        return target.exists() and target.samefile(source)
    except OSError:  # another file system, or one without links
        return False
    return True


def _check_name(prompt: str) -> None:
    """Raise SuiteError if VBench's name for a prompt's video cannot be that of a file in one folder."""
    shown = prompt if len(prompt) <= 80 else f"{prompt[:77]}..."
    if "/" in prompt or not prompt.isprintable():
        raise SuiteError(f"prompt {shown!r} has a '/' or a control character: no file can have the name VBench expects")
    if (size := len(file_name(prompt, 999).encode())) > MAX_NAME_BYTES:
        raise SuiteError(f"prompt {shown!r} makes a file name of {size} bytes, more than {MAX_NAME_BYTES}")
