"""The published layout: names of a checkpoint's folders and files, and which of them a render needs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

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


@dataclass(frozen=True)
class TextLayout:
    """Where a family of checkpoints keeps its text encoders; a tokenizer lies beside each, under the same number.

    clips: folders of the CLIP encoders, whose pooled vectors are joined in this order; t5: folder of the T5 encoder;
    projects_pooled: whether the CLIP encoders project their pooled vectors.
    """

    clips: tuple[str, ...]
    t5: str
    projects_pooled: bool

    @property
    def encoders(self) -> tuple[str, ...]:
        """Folders of all encoders."""
        return (*self.clips, self.t5)

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Folders of all tokenizers."""
        return tuple(tokenizer_of(encoder) for encoder in self.encoders)


TEXT_LAYOUTS = {
    "miniflux": TextLayout(("text_encoder",), "text_encoder_2", projects_pooled=False),
    "sd3": TextLayout(("text_encoder", "text_encoder_2"), "text_encoder_3", projects_pooled=True),
}
"""By family."""


def needed_files(names: Iterable[str], variants: Sequence[str]) -> list[str]:
    """Choose among a repository's or store's files those that the variants need (none = all variants), sorted.

    Raises CheckpointError for a variant that is not there.
    """
    needed = sorted(name for name in names if any(_matches(name, pattern) for pattern in NEEDED))
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


def _matches(name: str, pattern: str) -> bool:
    """Return whether a path matches a pattern part by part: a "*" must not match "a/../../b"."""
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def tokenizer_of(encoder: str) -> str:
    """Return the folder of the tokenizer that belongs to an encoder's."""
    return encoder.replace("text_encoder", "tokenizer")


def check_file_name(name: object, source: Path) -> None:
    """Raise CheckpointError unless a name that a file holds is that of a file beside it."""
    if not isinstance(name, str) or name in ("", ".", "..") or not name.isprintable() or set("/\\") & set(name):
        raise CheckpointError(f"{source} names the file {str(name)[:80]!r}, which is not a name without a folder")
