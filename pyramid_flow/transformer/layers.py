"""Layers shared by both transformers: modulation, feed-forward, conditioning embedding and the joint block."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pyramid_flow.transformer.attention import AttentionContext

LAYER_NORM_EPS = 1e-6
TIMESTEP_CHANNELS = 256


def timestep_embedding(timestep: Tensor) -> Tensor:
    """Embed timesteps [B] on the 0...1000 scale sinusoidally, cosines first: float32 [B,256]."""
    half = TIMESTEP_CHANNELS // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep.float()[:, None] * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulate(x: Tensor, shift: Tensor, gain: Tensor) -> Tensor:
    """LN(x) gain + shift, the LayerNorm without affine: x [B,S,D], shift and gain [B,1,D]."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS), gain)


ModulationParams = tuple[Tensor, ...]
"""Shifts, gains and gates [B,1,D] of one stream of tokens."""

Kind = Literal["shift", "scale", "gate"]
SHIFT_SCALE_GATE: tuple[Kind, ...] = ("shift", "scale", "gate")
"""What a checkpoint stores for an attention or a feed-forward branch, in this order."""

BlockConditioning = Tensor | tuple[ModulationParams, ...]
"""SiLU(c) [B,D] of timestep and pooled text, or what a block's `modulation` has made of it ahead."""


class Modulation(nn.Module):
    """Linear map from SiLU(conditioning) [B,D] to vectors [B,1,D], in the order of `kinds`.

    The checkpoint's scale s becomes the gain 1 + s, so that it is added once however often the vectors are used.
    """

    def __init__(self, dim: int, kinds: Sequence[Kind]) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, len(kinds) * dim)
        self.kinds = kinds

    def forward(self, activated: Tensor) -> ModulationParams:
        vectors = self.linear(activated)[:, None].chunk(len(self.kinds), dim=-1)
        return tuple(1 + each if kind == "scale" else each for kind, each in zip(self.kinds, vectors, strict=True))


class RMSNorm(nn.Module):
    """x rsqrt(mean(x^2) + eps) w over the last axis, statistics in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class GELUProjection(nn.Module):
    """Linear, then GELU in its tanh form."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Linear D -> 4D, GELU (tanh), linear 4D -> D."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # Index 1 is empty because the published names are net.0 and net.2.
        self.net = nn.Sequential(GELUProjection(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class EmbeddingMLP(nn.Module):
    """Linear, SiLU, linear."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


class ConditioningEmbedding(nn.Module):
    """c = MLP_t(phi(t)) + MLP_p(pooled); the pooled half does not depend on the step and is computed once."""

    def __init__(self, dim: int, pooled_dim: int) -> None:
        super().__init__()
        self.timestep_embedder = EmbeddingMLP(TIMESTEP_CHANNELS, dim)
        self.text_embedder = EmbeddingMLP(pooled_dim, dim)

    def forward(self, timestep: Tensor, pooled_embedding: Tensor) -> Tensor:
        """timestep [B], pooled_embedding = text_embedder(pooled) [B,D] -> [B,D]."""
        out: Tensor = self.timestep_embedder(timestep_embedding(timestep).to(pooled_embedding.dtype))
        return out + pooled_embedding


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B,S,H*D] -> [B,H,S,D]."""
    return rearrange(x, "b s (h d) -> b h s d", h=num_heads)


class JointProjections(nn.Module):
    """Projections and q/k norms of text and image tokens that meet in one attention.

    text_norm: what the checkpoint calls the q/k norms of text, without _q and _k.
    """

    def __init__(self, dim: int, num_heads: int, eps: float, text_norm: str) -> None:
        super().__init__()
        head_dim = dim // num_heads
        self.num_heads, self.text_norm = num_heads, text_norm
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = RMSNorm(head_dim, eps), RMSNorm(head_dim, eps)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.add_module(f"{text_norm}_q", RMSNorm(head_dim, eps))
        self.add_module(f"{text_norm}_k", RMSNorm(head_dim, eps))

    def image_queries(self, image: Tensor) -> Tensor:
        """[B,S,D] -> [B,H,S,head_dim]."""
        out: Tensor = self.norm_q(split_heads(self.to_q(image), self.num_heads))
        return out

    def queries(self, image: Tensor, text: Tensor | None) -> Tensor:
        """image [B,S,D], text [B,L,D] if it is evaluated -> [B,H,L+S,head_dim]."""
        q_image = self.image_queries(image)
        if text is None:
            return q_image
        q_text = getattr(self, f"{self.text_norm}_q")(split_heads(self.add_q_proj(text), self.num_heads))
        return torch.cat([q_text, q_image], dim=2)

    def keys(self, image: Tensor, text: Tensor | None) -> Tensor:
        """image [B,S,D], text [B,L,D] if it is evaluated -> [B,H,L+S,head_dim]."""
        k_image: Tensor = self.norm_k(split_heads(self.to_k(image), self.num_heads))
        if text is None:
            return k_image
        k_text = getattr(self, f"{self.text_norm}_k")(split_heads(self.add_k_proj(text), self.num_heads))
        return torch.cat([k_text, k_image], dim=2)

    def values(self, image: Tensor, text: Tensor | None) -> Tensor:
        """image [B,S,D], text [B,L,D] if it is evaluated -> [B,H,L+S,head_dim]."""
        v_image = split_heads(self.to_v(image), self.num_heads)
        if text is None:
            return v_image
        return torch.cat([split_heads(self.add_v_proj(text), self.num_heads), v_image], dim=2)


class JointAttention(JointProjections):
    """Attention over text and image tokens together, each stream with its own projections and q/k norms."""

    def __init__(self, dim: int, num_heads: int, eps: float, text_norm: str) -> None:
        super().__init__(dim, num_heads, eps, text_norm)
        self.to_add_out = nn.Linear(dim, dim)

    def forward(self, image: Tensor, text: Tensor | None, context: AttentionContext) -> tuple[Tensor, Tensor | None]:
        """image [B,S,D] and text [B,L,D], both modulated -> their attention outputs, same shapes."""
        mixed = context.attend(self.queries(image, text), self.keys(image, text), self.values(image, text))
        if text is None:
            return self.to_out[0](mixed), None
        text_out, image_out = mixed.split([text.shape[1], image.shape[1]], dim=1)
        return self.to_out[0](image_out), self.to_add_out(text_out)


class JointBlock(nn.Module):
    """Double-stream block: image x and text y with their own weights meet in one attention."""

    def __init__(self, dim: int, num_heads: int, eps: float, text_norm: str) -> None:
        super().__init__()
        self.norm1 = Modulation(dim, 2 * SHIFT_SCALE_GATE)
        self.norm1_context = Modulation(dim, 2 * SHIFT_SCALE_GATE)
        self.attn = JointAttention(dim, num_heads, eps, text_norm)
        self.ff = FeedForward(dim)
        self.ff_context = FeedForward(dim)

    def modulation(self, activated: Tensor) -> tuple[ModulationParams, ...]:
        """Return the vectors of image and text; activated = SiLU(conditioning) [B,D]."""
        return self.norm1(activated), self.norm1_context(activated)

    def forward(
        self, x: Tensor, y: Tensor | None, conditioning: BlockConditioning, context: AttentionContext
    ) -> tuple[Tensor, Tensor | None]:
        """x [B,S,D], y [B,L,D], None where its keys and values are cached -> x, y."""
        vectors = self.modulation(conditioning) if isinstance(conditioning, Tensor) else conditioning
        (shift1, gain1, gate1, shift2, gain2, gate2), y_vectors = vectors
        y_shift1, y_gain1, y_gate1, y_shift2, y_gain2, y_gate2 = y_vectors

        y_tokens = None if y is None else modulate(y, y_shift1, y_gain1)
        attn_x, attn_y = self.attn(modulate(x, shift1, gain1), y_tokens, context)
        x = torch.addcmul(x, gate1, attn_x)
        x = torch.addcmul(x, gate2, self.ff(modulate(x, shift2, gain2)))
        if y is not None and attn_y is not None:
            y = torch.addcmul(y, y_gate1, attn_y)
            y = torch.addcmul(y, y_gate2, self.ff_context(modulate(y, y_shift2, y_gain2)))
        return x, y
