"""The safetensors files of a model's folder: which tensor lies where, read from their headers alone."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pyramid_flow.checkpoints.layout import WEIGHT_STEMS, check_file_name
from pyramid_flow.errors import CheckpointError

STORED_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: bytes `start` to `stop` of the file hold its values."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_elements(self) -> int:
        """Number of its values."""
        return prod(self.shape)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a folder's weights by name: one file, or several with an index; reads headers only.

    Raises CheckpointError for a file that is missing or cannot be read.
    """
    return {name: tensor for file in _weight_files(folder) for name, tensor in _tensors_of(file).items()}


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raises CheckpointError."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def _weight_files(folder: Path) -> list[Path]:
    # Both indices are checked, as the library that loads the folder chooses by itself.
    listed = {stem: _listed_files(folder / f"{stem}.safetensors.index.json") for stem in WEIGHT_STEMS}
    for stem, files in listed.items():  # not a variant's file beside them, such as model.fp16.safetensors
        if files is not None:
            return files
        if (file := folder / f"{stem}.safetensors").exists():
            return [file]
    pickled = ", only pickled weights (*.bin), which are never read" if any(folder.glob("*.bin")) else ""
    raise CheckpointError(f"{folder} has no safetensors file{pickled}")


def _listed_files(index: Path) -> list[Path] | None:
    """Return the weight files that an index names; None if there is no index."""
    if not index.exists():
        return None
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map")
    for name in weight_map.values():
        check_file_name(name, index)
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names the file {name!r}, which is not a .safetensors file")
    return [index.parent / name for name in sorted(set(weight_map.values()))]


def _tensors_of(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, framework="pt"), file.open("rb") as stream:  # the library has checked header and size
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    header.pop("__metadata__", None)
    return {name: _stored(file, name, entry, 8 + length) for name, entry in header.items()}


def _stored(file: Path, name: str, entry: dict[str, Any], data: int) -> StoredTensor:
    if entry["dtype"] not in STORED_DTYPES:
        raise CheckpointError(f"{file}: tensor {name} is {entry['dtype']}, not one of {', '.join(STORED_DTYPES)}")
    start, stop = entry["data_offsets"]
    return StoredTensor(file, STORED_DTYPES[entry["dtype"]], tuple(entry["shape"]), data + start, data + stop)
