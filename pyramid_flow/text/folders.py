"""Folders of text encoders and tokenizers: what they must hold, and must not, before transformers reads them."""

from pathlib import Path

from pyramid_flow.checkpoints.layout import CONFIG_FILE, check_file_name
from pyramid_flow.checkpoints.weight_files import read_json, stored_tensors
from pyramid_flow.errors import CheckpointError

VOCABULARIES = ("tokenizer.json", "spiece.model", "vocab.json")
TOKENIZER_CONFIG = "tokenizer_config.json"
VOCABULARY_KEYS = ("vocab_file", "merges_file", "spm_file", "tokenizer_file")
"""Keys of a tokenizer's config that name its files; transformers before 5.24 opens them wherever they are."""

ADAPTER_CONFIG = "adapter_config.json"
"""transformers loads such an adapter unasked: it changes the weights, and its config can name modules to import."""


def check_encoder(folder: Path) -> None:
    """Raise CheckpointError unless a folder holds a config and readable safetensors, and no adapter."""
    if not (_existing(folder) / CONFIG_FILE).exists():
        raise CheckpointError(f"{folder} has no {CONFIG_FILE}")
    if (folder / ADAPTER_CONFIG).exists():
        raise CheckpointError(f"{folder} holds an adapter ({ADAPTER_CONFIG}): merge it into the weights, or remove it")
    stored_tensors(folder)


def check_tokenizer(folder: Path) -> None:
    """Raise CheckpointError unless a folder holds a vocabulary, and its config names no file elsewhere."""
    if not any((_existing(folder) / name).exists() for name in VOCABULARIES):
        raise CheckpointError(f"{folder} has no vocabulary: {', '.join(VOCABULARIES[:-1])} or {VOCABULARIES[-1]}")
    config = folder / TOKENIZER_CONFIG
    values = read_json(config) if config.exists() else {}
    for name in (values[key] for key in VOCABULARY_KEYS if values.get(key) is not None):
        check_file_name(name, config)


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"the checkpoint has no folder {folder}")
    return folder
