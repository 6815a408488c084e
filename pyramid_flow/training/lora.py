"""Low-rank adapters (Hu et al. 2021) on a transformer's linear maps, in the format of `peft`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pyramid_flow.errors import InvalidValueError

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor

    from pyramid_flow.checkpoints.diffusers_models import TransformerModel
    from pyramid_flow.transformer.model import PyramidTransformer

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass(frozen=True)
class LoRA:
    """Rank and scale (alpha / rank) of the adapters; targets: ends of the names of the linear maps that get one."""

    rank: int
    alpha: int
    targets: tuple[str, ...] = ATTENTION

    @property
    def config(self) -> "LoraConfig":
        """The same for peft, which takes a second to import."""
        from peft import LoraConfig

        return LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=list(self.targets))


def add_lora(transformer: "PyramidTransformer", lora: LoRA) -> None:
    """Give a transformer adapters that change nothing yet; they alone are trained from then on."""
    from peft import inject_adapter_in_model

    transformer.requires_grad_(False)
    inject_adapter_in_model(lora.config, transformer)


def check_lora(transformer: "PyramidTransformer", lora: LoRA) -> None:
    """Raise InvalidValueError if a transformer has no linear map for a target."""
    from torch import nn  # here, so that settings read the names of the maps without it

    names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    for target in lora.targets:
        if not any(name.endswith(f".{target}") for name in names):
            raise InvalidValueError("lora_targets", target, "is the end of no linear map's name")


def merge_lora(
    transformer: "TransformerModel", lora: LoRA, weights: Mapping[str, "Tensor"], folder: Path
) -> "TransformerModel":
    """Write trained adapters to a folder as peft does, and return the transformer with them added to its weights.

    transformer: without adapters; weights: of the adapters, by their names in a transformer that has them.
    """
    from peft import get_peft_model

    adapted = get_peft_model(transformer, lora.config)
    inner = cast("TransformerModel", adapted.get_base_model())
    inner.load_state_dict(dict(weights), strict=False)
    adapted.save_pretrained(str(folder))
    return cast("TransformerModel", adapted.merge_and_unload())
