"""Prompts as embeddings: T5 tokens with their mask, and pooled CLIP vectors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pyramid_flow.errors import ShapeError

MAX_TOKENS = 128
POOLED_MAX_TOKENS = 77


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
