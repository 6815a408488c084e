"""Low-rank adapters (Hu et al. 2021) in the format of `peft`, added to a transformer's weights when it is loaded."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pyramid_flow.errors import CheckpointError, InvalidValueError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

APPLIED = {
    *("r", "lora_alpha", "use_rslora", "fan_in_fan_out", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
}
"""Keys of a config that say which weights an adapter changes, and by how much."""

IGNORED = {
    *("peft_type", "peft_version", "inference_mode", "lora_dropout", "runtime_config"),
    *("task_type", "auto_mapping", "base_model_name_or_path", "revision"),
}
"""Keys that matter in training only, or name the model that was trained, which peft could import or download."""

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Adapter:
    """A folder as peft writes it, and how much of it is added: W + weight (alpha / rank) B A."""

    path: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Adapter":
        """Read PATH or PATH=WEIGHT; raises InvalidValueError for a weight that is no finite number."""
        path, separator, weight = text.rpartition("=")
        if text and not separator:
            return cls(Path(text).expanduser().resolve())
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not path or not math.isfinite(number):
            raise InvalidValueError("lora", text, "is not PATH or PATH=WEIGHT, such as style=0.8")
        return cls(Path(path).expanduser().resolve(), number)

    def __str__(self) -> str:
        return f"{self.path.name}={self.weight:g}"

    @property
    def files(self) -> tuple[Path, Path]:
        """Its config and its weights; raises CheckpointError if one is missing (only safetensors are read)."""
        files = self.path / CONFIG_FILE, self.path / WEIGHTS_FILE
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"the adapter {self.path} has no file {file.name}")
        return files

    @property
    def digest(self) -> str:
        """A hash over its config, its weights and how much of them is added; raises CheckpointError."""
        digest = hashlib.sha256(f"{self.weight}".encode())
        for file in self.files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its weights by the names that peft gives them; raises CheckpointError if they cannot be read."""
        _, weights = self.files
        try:
            return load_file(weights)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{weights} cannot be read: {error}") from error


def merge_adapters(transformer: Model, adapters: Sequence[Adapter]) -> Model:
    """Add adapters to a transformer's weights; raises CheckpointError for one that does not fit it."""
    from peft import set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    for adapter in adapters:
        adapted, tensors = apply_adapter(transformer, adapter), adapter.tensors
        set_peft_model_state_dict(adapted, tensors)
        for module in adapted.modules():
            if isinstance(module, LoraLayer):
                module.scale_layer(adapter.weight)
        transformer = cast(Model, adapted.merge_and_unload())
    return transformer


def apply_adapter(transformer: nn.Module, adapter: Adapter) -> "PeftModel":
    """Wrap a transformer, which may be on the meta device, for an adapter's weights; raises CheckpointError.

    peft takes seconds to import, so it is imported where it is needed.
    """
    from peft import get_peft_model, get_peft_model_state_dict

    config_file, weights_file = adapter.files
    try:
        adapted = cast("PeftModel", get_peft_model(transformer, _lora_config(config_file)))
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{config_file} does not fit the transformer: {error}") from error
    expected = {name: tensor.shape for name, tensor in get_peft_model_state_dict(adapted).items()}
    actual = {name: tensor.shape for name, tensor in adapter.tensors.items()}
    for name in sorted(expected.keys() ^ actual.keys()):
        raise CheckpointError(f"{weights_file} {'lacks' if name in expected else 'holds an unknown'} tensor {name}")
    for name, shape in expected.items():
        if actual[name] != shape:
            raise CheckpointError(
                f"{weights_file}: tensor {name} has shape {list(actual[name])}, expected {list(shape)}"
            )
    return adapted


def _lora_config(file: Path) -> "LoraConfig":
    """Return the part of a config that is applied.

    Raises CheckpointError for any other setting: some cannot be scaled by a weight, others name modules that peft
    imports (`megatron_core`) or files that it loads (`corda_config`).
    """
    from peft import LoraConfig

    values = json.loads(file.read_text())
    if (kind := values.get("peft_type")) != "LORA":
        raise CheckpointError(f"{file} is not a LoRA adapter but {kind}")
    for field in fields(LoraConfig):
        value = values.get(field.name)
        if value and value != field.default and field.name not in APPLIED | IGNORED:
            raise CheckpointError(f"{file} sets {field.name}, which is not supported")
    return LoraConfig(**{name: value for name, value in values.items() if name in APPLIED})
