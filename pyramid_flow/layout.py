"""The published layout: names of a checkpoint's folders and files, and which of them a render needs."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from pyramid_flow.errors import CheckpointError

TRANSFORMER_PREFIX = "diffusion_transformer_"
VAE_FOLDER = "causal_video_vae"
CONFIG_FILE = "config.json"
PRESET_FILE = "pyramid.json"

WEIGHT_STEMS = ("diffusion_pytorch_model", "model")
"""Names of weight files without their ends: those of diffusers and of transformers."""

MODEL_FOLDERS = (VAE_FOLDER, "text_encoder", "text_encoder_[2-9]", f"{TRANSFORMER_PREFIX}*")
WEIGHT_FILES = [
    f"{stem}{end}"
    for stem in WEIGHT_STEMS
    for end in (".safetensors", ".safetensors.index.json", "-?????-of-?????.safetensors")
]
NEEDED = (
    PRESET_FILE,
    *(f"{folder}/{file}" for folder in MODEL_FOLDERS for file in (CONFIG_FILE, *WEIGHT_FILES)),
    *(f"{folder}/{file}" for folder in ("tokenizer", "tokenizer_[2-9]") for file in ("*.json", "*.txt", "*.model")),
)
"""What of a repository is needed; never pickled weights, which could run code when they are loaded."""


def needed_files(names: Iterable[str], variants: Sequence[str]) -> list[str]:
    """Choose among a repository's or store's files those that the variants need (none = all variants), sorted.

    Raises CheckpointError for a variant that is not there.
    """
    needed = sorted(name for name in names if any(fnmatchcase(name, pattern) for pattern in NEEDED))
    folders = sorted({name.partition("/")[0] for name in needed if name.startswith(TRANSFORMER_PREFIX)})
    if not folders:
        raise CheckpointError(f"there is no folder {TRANSFORMER_PREFIX}* with safetensors")
    chosen = [variant if variant in folders else TRANSFORMER_PREFIX + variant for variant in variants] or folders
    for folder in chosen:
        if folder not in folders:
            there = ", ".join(each.removeprefix(TRANSFORMER_PREFIX) for each in folders)
            raise CheckpointError(
                f"there is no variant {folder.removeprefix(TRANSFORMER_PREFIX)!r}, there are: {there}"
            )
    return [name for name in needed if name.partition("/")[0] not in set(folders) - set(chosen)]
