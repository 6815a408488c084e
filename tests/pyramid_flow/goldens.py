"""The golden data, its tolerances, and the tiny checkpoints (see tests/golden/README.md)."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pyramid_flow import CausalVideoVAE, Checkpoint, PyramidTransformer, TextEmbedding, TextEncoder

GOLDEN = Path(__file__).parents[1] / "golden"
TINY_MINIFLUX = GOLDEN / "checkpoints" / "tiny-miniflux"
TINY_SD3 = GOLDEN / "checkpoints" / "tiny-sd3"
TINY = {"miniflux": TINY_MINIFLUX, "sd3": TINY_SD3}
POOLED_DIMS = {"miniflux": 16, "sd3": 32}


def tensors(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / "goldens" / f"{name}.safetensors")


def parameters(name: str) -> Any:
    return json.loads((GOLDEN / "goldens" / f"{name}.json").read_text())


def manifest(model: str) -> Any:
    return json.loads((GOLDEN / "official_checkpoint_manifest.json").read_text())[model]


@cache
def tiny_transformer(family: str = "miniflux") -> PyramidTransformer:
    return Checkpoint.open(TINY[family]).load_transformer(torch.float32, "cpu")


@cache
def tiny_vae(family: str = "miniflux") -> CausalVideoVAE:
    return Checkpoint.open(TINY[family]).load_vae(torch.float32, "cpu")


@cache
def tiny_text_encoder(family: str = "miniflux") -> TextEncoder:
    return Checkpoint.open(TINY[family]).load_text_encoder(torch.float32, "cpu")


class RecordedNoise:
    """A NoiseSource that replays the draws of a golden run, whatever the number of equal rows."""

    def __init__(self, data: dict[str, Tensor]) -> None:
        self.data = data
        self.blocks = 0

    def initial(self, shape: Sequence[int]) -> Tensor:
        return self._checked(self.data["initial_noise"], shape)

    def block(self, shape: Sequence[int]) -> Tensor:
        self.blocks += 1
        return self._checked(self.data[f"block_noise.{self.blocks - 1}"], shape)

    def posterior(self, shape: Sequence[int]) -> Tensor:
        return self._checked(self.data["posterior_noise"], shape)

    @property
    def exhausted(self) -> bool:
        return f"block_noise.{self.blocks}" not in self.data

    @staticmethod
    def _checked(noise: Tensor, shape: Sequence[int]) -> Tensor:
        assert tuple(noise.shape) == tuple(shape)
        return noise


def text_embedding(data: dict[str, Tensor], prefix: str = "") -> TextEmbedding:
    return TextEmbedding(
        tokens=data[f"{prefix}prompt_embeds"],
        mask=data[f"{prefix}prompt_attention_mask"].bool(),
        pooled=data[f"{prefix}pooled_prompt_embeds"],
    )


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_text(lengths: Sequence[int], seed: int = 0, family: str = "miniflux") -> TextEmbedding:
    """Embeddings for a tiny model whose row i has lengths[i] valid tokens; the pads hold huge values."""
    longest = max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    tokens = randn(len(lengths), longest, 32, seed=seed).masked_fill(~mask[..., None], 1e4)
    return TextEmbedding(tokens, mask, randn(len(lengths), POOLED_DIMS[family], seed=seed + 1))


def rows(text: TextEmbedding, *indices: int) -> TextEmbedding:
    return text.select(torch.tensor(indices))


def assert_forward_equal(actual: Tensor, expected: Tensor) -> None:
    """One forward pass: max abs difference <= 1e-5 x max(1, max |expected|)."""
    assert actual.shape == expected.shape
    limit = 1e-5 * max(1.0, expected.abs().max().item())
    assert (actual - expected).abs().max().item() <= limit


def assert_run_equal(actual: Tensor, expected: Tensor) -> None:
    """A whole run: relative L2 distance <= 1e-5."""
    assert actual.shape == expected.shape
    assert ((actual - expected).norm() / expected.norm()).item() <= 1e-5


def save_adapter(transformer: PyramidTransformer, folder: Path, seed: int, rank: int = 2, alpha: int = 6) -> Path:
    """Write random adapters of a transformer as a training with peft leaves them."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["to_q", "proj_mlp"])
    adapted = get_peft_model(transformer, config)
    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    with torch.no_grad():
        for number, layer in enumerate(layers):
            for part in (layer.lora_A, layer.lora_B):
                part["default"].weight.copy_(randn(*part["default"].weight.shape, seed=100 * seed + number))
    adapted.save_pretrained(str(folder))
    return folder
