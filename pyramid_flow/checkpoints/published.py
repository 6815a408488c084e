"""The published checkpoints: their repositories on the Hugging Face Hub, and where `fetch` has put them."""

from pathlib import Path

from pyramid_flow.checkpoints.user_cache import cache_folder, replace_text
from pyramid_flow.errors import CheckpointError

REPOSITORIES = {"miniflux": "rain1011/pyramid-flow-miniflux", "sd3": "rain1011/pyramid-flow-sd3"}
"""By the name that stands for the fetched folder."""


def fetched_folder(name: str) -> Path:
    """Return the folder that was last fetched whole under a name; raises CheckpointError, saying how to fetch it."""
    command = f"pyramid-render fetch {name}"
    try:
        folder = Path(_record(name).read_text())
    except OSError as error:
        raise CheckpointError(f"{name} has not been fetched on this machine: run `{command}`") from error
    if not folder.is_dir():
        raise CheckpointError(f"{name} was fetched to {folder}, which is gone: run `{command}`")
    return folder


def record_fetched(name: str, folder: Path) -> None:
    """Let a name stand for a folder; raises OSError."""
    replace_text(_record(name), str(folder))


def _record(name: str) -> Path:
    return cache_folder() / "fetched" / name
