"""Small texts kept between runs in the user's cache folder, beside what huggingface_hub keeps there."""

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder of this project in the assets cache of huggingface_hub, which reads HF_HOME and its like."""
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "pyramid-render"


def replace_text(path: Path, text: str) -> None:
    """Write a file in one step, so that who reads it meanwhile sees the old text or the new one; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as part:
        part.write(text)
    try:
        os.replace(part.name, path)
    except OSError:
        os.unlink(part.name)
        raise
