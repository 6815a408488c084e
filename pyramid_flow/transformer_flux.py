"""PyramidFluxTransformer: double-stream blocks, then single-stream blocks, with a three-axis rotary embedding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyramid_flow.attention import AttentionContext, RotaryTable, attention, rotary_table
from pyramid_flow.errors import InvalidValueError, ShapeError
from pyramid_flow.layers import (
    ConditioningEmbedding,
    JointBlock,
    Modulation,
    RMSNorm,
    modulate,
    split_heads,
)
from pyramid_flow.text import TextEmbedding
from pyramid_flow.tokens import PATCH, PrefixLayout, patchify, position_ids, prefix_layout, unpatchify

RMS_EPS = 1e-6


@dataclass(frozen=True)
class TextState:
    """What a prompt contributes to every evaluation: tokens [B,L,D], pooled [B,D], mask bool [B,L] (None = no pads)."""

    tokens: Tensor
    pooled: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class HistoryState:
    """What the past contributes to every evaluation of one unit at one level; tokens [B,S,D] are embedded."""

    tokens: Tensor
    rotary: RotaryTable
    layout: PrefixLayout
    current: tuple[int, ...]


class SingleAttention(nn.Module):
    """Projections and q/k norms of a single-stream block; the output projection belongs to the block."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        head_dim = dim // num_heads
        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = RMSNorm(head_dim, RMS_EPS), RMSNorm(head_dim, RMS_EPS)

    def forward(self, asking: Tensor, tokens: Tensor, context: AttentionContext) -> Tensor:
        """asking [B,Q,D]: the last Q of `tokens` [B,S,D] -> [B,Q,D]."""
        q = self.norm_q(split_heads(self.to_q(asking), self.num_heads))
        k = self.norm_k(split_heads(self.to_k(tokens), self.num_heads))
        v = split_heads(self.to_v(tokens), self.num_heads)
        rotate = context.rotary.rotate
        return context.attention(rotate(q), rotate(k), v)


class SingleBlock(nn.Module):
    """Single-stream block: attention and MLP in parallel over text and image tokens together."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm = Modulation(dim, 3)
        self.attn = SingleAttention(dim, num_heads)
        self.proj_mlp = nn.Linear(dim, 4 * dim)
        self.proj_out = nn.Linear(5 * dim, dim)

    def forward(self, z: Tensor, activated: Tensor, context: AttentionContext) -> Tensor:
        """z [B,S,D] -> the last `attention.num_queries` tokens [B,Q,D]."""
        shift, scale, gate = self.norm(activated)
        tokens = modulate(z, shift, scale)
        asking = tokens[:, -context.attention.num_queries :]
        mlp = F.gelu(self.proj_mlp(asking), approximate="tanh")
        features = torch.cat([self.attn(asking, tokens, context), mlp], dim=-1)
        out: Tensor = z[:, -asking.shape[1] :] + gate * self.proj_out(features)
        return out


class PyramidFluxTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The published miniFLUX velocity model (specification of the checkpoint: tensor names are the published ones).

    An evaluation is split by how often its parts change: `embed_text` once per prompt, `embed_history` once per unit
    and level, `forward` at every step. `in_channels` counts a patch: 16 latent channels x 2 x 2.
    """

    _repeated_blocks = ("JointBlock", "SingleBlock")  # type: ignore[assignment]
    _no_split_modules = ("JointBlock", "SingleBlock")  # type: ignore[assignment]
    _supports_gradient_checkpointing = True

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        num_layers: int = 8,
        num_single_layers: int = 16,
        attention_head_dim: int = 64,
        num_attention_heads: int = 30,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        axes_dims_rope: Sequence[int] = (16, 24, 24),
        use_flash_attn: bool = False,
        use_temporal_causal: bool = True,
        interp_condition_pos: bool = True,
        use_gradient_checkpointing: bool = False,
        gradient_checkpointing_ratio: float = 0.6,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if not (use_temporal_causal and interp_condition_pos):
            raise InvalidValueError(
                "config",
                {"use_temporal_causal": use_temporal_causal, "interp_condition_pos": interp_condition_pos},
                "describes a model that is not causal in time or does not interpolate positions: not supported",
            )
        if sum(axes_dims_rope) != attention_head_dim:
            raise InvalidValueError("axes_dims_rope", axes_dims_rope, f"does not sum to head size {attention_head_dim}")
        dim = num_attention_heads * attention_head_dim
        self.gradient_checkpointing = False  # see `enable_gradient_checkpointing` of diffusers
        self.num_attention_heads = num_attention_heads
        self.axes_dims_rope = tuple(axes_dims_rope)
        self.x_embedder = nn.Linear(in_channels, dim)
        self.context_embedder = nn.Linear(joint_attention_dim, dim)
        self.time_text_embed = ConditioningEmbedding(dim, pooled_projection_dim)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(dim, num_attention_heads, RMS_EPS) for _ in range(num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(dim, num_attention_heads) for _ in range(num_single_layers)
        )
        self.norm_out = Modulation(dim, 2)
        self.proj_out = nn.Linear(dim, in_channels)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent frame."""
        return self.x_embedder.in_features // PATCH**2

    def embed_text(self, text: TextEmbedding) -> TextState:
        """Trim the pads that no prompt of the batch needs and embed what does not depend on the step."""
        self._check("text tokens", "[B,L,{}]", text.tokens, self.context_embedder.in_features)
        pooled_dim = self.time_text_embed.text_embedder.linear_1.in_features
        self._check("pooled text", "[B,{}]", text.pooled, pooled_dim)
        text = text.trimmed()
        has_pads = not bool(text.mask.all())  # asked where the text lies, so that a device is not waited for
        text = text.to(self.device, self.dtype)
        pooled = self.time_text_embed.text_embedder(text.pooled)
        mask = text.mask if has_pads else None
        return TextState(self.context_embedder(text.tokens), pooled, mask)

    def embed_history(self, history: Sequence[Tensor], current: Sequence[int], text: TextState) -> HistoryState:
        """Embed past frames, each [B,C,T,h,w] at its level, for a current frame of shape [B,C,1,h,w]."""
        batch, channels = len(text.tokens), self.latent_channels
        _check_clip("current frame", current, batch, channels, num_frames=1)
        for clip in history:
            _check_clip("history clip", clip.shape, batch, channels)
        shapes = [(frames, height, width) for _, _, frames, height, width in (*(c.shape for c in history), current)]
        text_length = text.tokens.shape[1]
        ids = position_ids(shapes, text_length)
        patches = [patchify(clip.to(self.dtype)) for clip in history]
        tokens = self.x_embedder(torch.cat(patches, dim=1)) if patches else text.tokens[:, :0]
        return HistoryState(
            tokens=tokens,
            rotary=rotary_table(ids, self.axes_dims_rope, self.device),
            layout=prefix_layout(shapes, text_length),
            current=tuple(current),
        )

    def forward(self, latents: Tensor, timestep: Tensor, text: TextState, history: HistoryState) -> Tensor:
        """Return the velocity of the current frame.

        latents [B,C,1,h,w] on level's grid; timestep [B] on the 0...1000 scale, float32. Returns [B,C,1,h,w].
        """
        if tuple(latents.shape) != history.current:
            raise ShapeError("latents", str(list(history.current)), tuple(latents.shape))
        if timestep.shape != latents.shape[:1]:
            raise ShapeError("timestep", f"[{len(latents)}]", tuple(timestep.shape))
        height, width = latents.shape[-2:]
        current = self.x_embedder(patchify(latents.to(self.dtype)))
        activated = F.silu(self.time_text_embed(timestep, text.pooled))
        everything = attention(history.layout, key_mask(text, history.layout), len(latents), latents.device)
        context = AttentionContext(history.rotary, everything)
        last = AttentionContext(history.rotary, everything.last(current.shape[1]))

        x, y = torch.cat([history.tokens, current], dim=1), text.tokens
        for block in self.transformer_blocks:
            x, y = self._run(block, x, y, activated, context)
        z = torch.cat([y, x], dim=1)
        for block in self.single_transformer_blocks[:-1]:
            z = self._run(block, z, activated, context)
        z = self._run(self.single_transformer_blocks[-1], z, activated, last)  # nothing reads other tokens any more

        scale, shift = self.norm_out(activated)
        return unpatchify(self.proj_out(modulate(z, shift, scale)), height, width)

    def _run(self, block: nn.Module, *arguments: Tensor | AttentionContext) -> Any:  # noqa: ANN401 - as the block
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    def _check(self, name: str, pattern: str, tensor: Tensor, features: int) -> None:
        if tensor.ndim != pattern.count(",") + 1 or tensor.shape[-1] != features:
            raise ShapeError(name, pattern.format(features), tuple(tensor.shape))


def _check_clip(name: str, shape: Sequence[int], batch: int, channels: int, num_frames: int | None = None) -> None:
    frames = "T" if num_frames is None else num_frames
    fits = len(shape) == 5 and tuple(shape[:2]) == (batch, channels) and not (shape[3] % PATCH or shape[4] % PATCH)
    if not fits or num_frames not in (None, shape[2]):
        raise ShapeError(name, f"[{batch},{channels},{frames},h,w] with even h and w", tuple(shape))


def key_mask(text: TextState, layout: PrefixLayout) -> Tensor | None:
    """Return bool [B,S], False for text pads, or None when there are none."""
    if text.mask is None:
        return None
    tokens = layout.key_ends[-1] - text.mask.shape[1]
    return F.pad(text.mask, (0, tokens), value=True)
