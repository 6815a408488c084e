"""Prompts as embeddings: the text encoders of both layouts (T5 tokens, CLIP pooled)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BatchEncoding,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)

from pyramid_flow.errors import CheckpointError, ShapeError
from pyramid_flow.placement import execution_device
from pyramid_flow.weight_files import stored_tensors

MAX_TOKENS = 128
POOLED_MAX_TOKENS = 77
VOCABULARIES = ("tokenizer.json", "spiece.model", "vocab.json")


@dataclass(frozen=True)
class TextLayout:
    """Where a family of checkpoints keeps its text encoders; a tokenizer lies beside each, under the same number.

    clips: folders of the CLIP encoders, whose pooled vectors are joined in this order; t5: folder of the T5 encoder;
    clip_class: decides whether a pooled vector is projected.
    """

    clips: tuple[str, ...]
    t5: str
    clip_class: type[CLIPTextModel | CLIPTextModelWithProjection]

    @property
    def encoders(self) -> tuple[str, ...]:
        """Folders of all encoders."""
        return (*self.clips, self.t5)

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Folders of all tokenizers."""
        return tuple(tokenizer_of(encoder) for encoder in self.encoders)


TEXT_LAYOUTS = {
    "miniflux": TextLayout(("text_encoder",), "text_encoder_2", CLIPTextModel),
    "sd3": TextLayout(("text_encoder", "text_encoder_2"), "text_encoder_3", CLIPTextModelWithProjection),
}
"""By family."""


@dataclass(frozen=True)
class TextEmbedding:
    """Encoded prompts: tokens [B,L,D], mask bool [B,L] (True = valid), pooled [B,P]."""

    tokens: Tensor
    mask: Tensor
    pooled: Tensor

    def __post_init__(self) -> None:
        if self.tokens.ndim != 3 or self.mask.shape != self.tokens.shape[:2]:
            raise ShapeError("text mask", f"{list(self.tokens.shape[:-1])} as the tokens", tuple(self.mask.shape))
        if self.pooled.ndim != 2 or len(self.pooled) != len(self.tokens):
            raise ShapeError("pooled text", f"[{len(self.tokens)},P]", tuple(self.pooled.shape))

    def __len__(self) -> int:
        return len(self.tokens)

    def trimmed(self) -> "TextEmbedding":
        """Drop the positions that are padding in every row."""
        length = int(self.mask.any(dim=0).nonzero().max()) + 1 if bool(self.mask.any()) else 0
        return TextEmbedding(self.tokens[:, :length], self.mask[:, :length].bool(), self.pooled)

    def select(self, rows: Tensor) -> "TextEmbedding":
        """Return the given rows (indices)."""
        return TextEmbedding(self.tokens[rows], self.mask[rows], self.pooled[rows])

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "TextEmbedding":
        """Return the embedding on `device`, its floating-point tensors in `dtype`."""
        tokens, pooled = self.tokens.to(device, dtype), self.pooled.to(device, dtype)
        return TextEmbedding(tokens, self.mask.to(device), pooled)


def concatenate(parts: Sequence[TextEmbedding]) -> TextEmbedding:
    """Join embeddings along the batch, padding them to the longest."""
    length = max(part.tokens.shape[1] for part in parts)
    missing = [length - part.tokens.shape[1] for part in parts]
    return TextEmbedding(
        tokens=torch.cat([F.pad(part.tokens, (0, 0, 0, pad)) for part, pad in zip(parts, missing, strict=True)]),
        mask=torch.cat([F.pad(part.mask.bool(), (0, pad)) for part, pad in zip(parts, missing, strict=True)]),
        pooled=torch.cat([part.pooled for part in parts]),
    )


class TextEncoder(nn.Module):
    """T5 for the token embeddings and their mask; one CLIP encoder or several, joined, for the pooled vector."""

    def __init__(
        self,
        clips: Sequence[PreTrainedModel],
        clip_tokenizers: Sequence[PreTrainedTokenizerBase],
        t5: PreTrainedModel,
        t5_tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        super().__init__()
        self.clips, self.t5 = nn.ModuleList(clips), t5
        self.clip_tokenizers, self.t5_tokenizer = tuple(clip_tokenizers), t5_tokenizer

    @classmethod
    def from_pretrained(cls, path: Path, layout: TextLayout, torch_dtype: torch.dtype) -> "TextEncoder":
        """Load the encoders and tokenizers of a checkpoint folder."""
        return cls(
            clips=[_load(layout.clip_class, path / folder, torch_dtype) for folder in layout.clips],
            clip_tokenizers=[_tokenizer(path / tokenizer_of(folder)) for folder in layout.clips],
            t5=_load(T5EncoderModel, path / layout.t5, torch_dtype),
            t5_tokenizer=_tokenizer(path / tokenizer_of(layout.t5)),
        ).eval()

    def save_pretrained(self, path: Path, layout: TextLayout) -> None:
        """Write encoders and tokenizers to the folders that `from_pretrained` reads."""
        tokenizers = (*self.clip_tokenizers, self.t5_tokenizer)
        for folder, encoder, tokenizer in zip(layout.encoders, (*self.clips, self.t5), tokenizers, strict=True):
            encoder.save_pretrained(path / folder)
            tokenizer.save_pretrained(path / tokenizer_of(folder))

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> TextEmbedding:
        """Encode prompts as they are (no suffix is added): tokens [B,128,D], mask [B,128], pooled [B,P].

        Prompts beyond 128 T5 or 77 CLIP tokens are cut, keeping the end-of-sequence token.
        """
        device = execution_device(self)
        ids = _tokenize(self.t5_tokenizer, prompts, MAX_TOKENS).to(device)
        tokens = self.t5(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).last_hidden_state
        pooled = [
            _pooled(clip, _tokenize(tokenizer, prompts, POOLED_MAX_TOKENS).to(device)["input_ids"])
            for clip, tokenizer in zip(self.clips, self.clip_tokenizers, strict=True)
        ]
        return TextEmbedding(tokens, ids["attention_mask"].bool(), torch.cat(pooled, dim=-1))

    def is_truncated(self, prompt: str) -> bool:
        """Tell whether the T5 encoder sees only the beginning of the prompt."""
        return len(self.t5_tokenizer(prompt, truncation=False)["input_ids"]) > MAX_TOKENS


def tokenizer_of(encoder: str) -> str:
    """Return the folder of the tokenizer that belongs to an encoder's."""
    return encoder.replace("text_encoder", "tokenizer")


def check_vocabulary(folder: Path) -> None:
    """Raise CheckpointError unless a tokenizer's folder has a vocabulary."""
    if not any((_existing(folder) / name).exists() for name in VOCABULARIES):
        raise CheckpointError(f"{folder} has no vocabulary: {', '.join(VOCABULARIES[:-1])} or {VOCABULARIES[-1]}")


def _pooled(clip: nn.Module, ids: Tensor) -> Tensor:
    """Return the vector [B,P] at the end of the text, projected if the encoder does that."""
    output = clip(input_ids=ids)
    pooled: Tensor = output.text_embeds if isinstance(clip, CLIPTextModelWithProjection) else output.pooler_output
    return pooled


def _tokenize(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], length: int) -> BatchEncoding:
    ids: BatchEncoding = tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return ids


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    check_vocabulary(folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (KeyError, OSError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    return tokenizer


def _load(cls: type[PreTrainedModel], folder: Path, torch_dtype: torch.dtype) -> PreTrainedModel:
    """Load an encoder strictly; transformers accepts CLIP keys with and without the `text_model.` prefix."""
    if not (_existing(folder) / "config.json").exists():
        raise CheckpointError(f"{folder} has no config.json")
    stored_tensors(folder)
    try:
        loaded: Any = cls.from_pretrained(
            folder,
            dtype=torch_dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are listed; they raise below
        )
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    model, info = loaded
    wrong = [*info["missing_keys"], *info["mismatched_keys"]]
    if wrong:
        raise CheckpointError(f"{folder} lacks or has other shapes for: {', '.join(map(str, wrong[:5]))}")
    encoder: PreTrainedModel = model.requires_grad_(False)
    return encoder


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"the checkpoint has no folder {folder}")
    return folder
