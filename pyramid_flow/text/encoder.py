"""The text encoders of both layouts and their tokenizers: prompts become a `TextEmbedding`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
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

from pyramid_flow.checkpoints.layout import TextLayout, tokenizer_of
from pyramid_flow.errors import CheckpointError
from pyramid_flow.memory.placement import execution_device
from pyramid_flow.text.embedding import MAX_TOKENS, POOLED_MAX_TOKENS, TextEmbedding
from pyramid_flow.text.folders import check_encoder, check_tokenizer


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
        clip_class = CLIPTextModelWithProjection if layout.projects_pooled else CLIPTextModel
        return cls(
            clips=[_load(clip_class, path / folder, torch_dtype) for folder in layout.clips],
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
    check_tokenizer(folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (KeyError, OSError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    return tokenizer


def _load(cls: type[PreTrainedModel], folder: Path, torch_dtype: torch.dtype) -> PreTrainedModel:
    """Load an encoder strictly; transformers accepts CLIP keys with and without the `text_model.` prefix."""
    check_encoder(folder)
    try:
        loaded: Any = cls.from_pretrained(
            folder,
            dtype=torch_dtype,
            local_files_only=True,
            trust_remote_code=False,
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
