"""The SD3 network: joint blocks only, with a map of spatial positions and a rotary embedding of time."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pyramid_flow.errors import InvalidValueError
from pyramid_flow.transformer.attention import AttentionContext
from pyramid_flow.transformer.layers import (
    SHIFT_SCALE_GATE,
    BlockConditioning,
    FeedForward,
    JointBlock,
    JointProjections,
    Modulation,
    ModulationParams,
    modulate,
)
from pyramid_flow.transformer.model import BlockInputs, PyramidTransformer, check_supported
from pyramid_flow.transformer.tokens import PATCH

RMS_EPS = 1e-5
"""Of the q/k norms: the other family has another one, and no test is fine enough to tell them apart."""

TEXT_NORM = "norm_add"
POSITION_BASE = 10000.0

SUPPORTED = {
    "patch_size": PATCH,
    "pos_embed_type": "sincos",
    "qk_norm": "rms_norm",
    "use_temporal_causal": True,
    # The published config does not name the following, with which its weights were trained.
    "use_t5_mask": True,
    "add_temp_pos_embed": True,
    "temp_pos_embed_type": "rope",
    "interp_condition_pos": True,
}


def sincos_positions(dim: int, side: int, extent: float) -> Tensor:
    """Return the positions of a grid that spans `extent` with side x side cells, rows first: float32 [1,side^2,D].

    [E(x) | E(y)] with E(v) = [sin(v w) | cos(v w)] and w_m = 10000^(-4m/D), m < D/4.
    """
    coordinates = torch.arange(side, dtype=torch.float32) / (side / extent)  # rounded as those of the published table
    exponents = torch.arange(dim // 4, dtype=torch.float64) / (dim // 4)
    angles = coordinates.double()[:, None] * POSITION_BASE**-exponents
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1).float()
    x, y = axis.expand(side, -1, -1), axis[:, None].expand(-1, side, -1)
    return torch.cat([x, y], dim=-1).reshape(1, side * side, dim)


class PatchEmbedding(nn.Module):
    """2x2 patches by a convolution, and the positions of a grid of side x side patches, kept with the weights."""

    pos_embed: Tensor

    def __init__(self, channels: int, dim: int, side: int, extent: float) -> None:
        super().__init__()
        self.side = side
        self.proj = nn.Conv2d(channels, dim, PATCH, stride=PATCH)
        self.register_buffer("pos_embed", sincos_positions(dim, side, extent))

    def crop(self, height: int, width: int) -> Tensor:
        """Return the positions of the grid's centre: [1,D,height,width]."""
        if max(height, width) > self.side:
            rule = f"is more than the {self.side} x {self.side} patches that have a position"
            raise InvalidValueError("current frame", f"{height} x {width}", rule)
        top, left = (self.side - height) // 2, (self.side - width) // 2
        grid: Tensor = rearrange(self.pos_embed, "1 (h w) d -> 1 d h w", h=self.side)
        return grid[..., top : top + height, left : left + width]

    def forward(self, clip: Tensor, positions: Tensor) -> Tensor:
        """clip [B,C,T,h,w], positions [1,D,h',w'] that are brought to its grid -> tokens [B,S,D]."""
        patches = self.proj(rearrange(clip, "b c t h w -> (b t) c h w"))
        if positions.shape[2:] != patches.shape[2:]:
            positions = F.interpolate(positions, patches.shape[2:], mode="bilinear", align_corners=False)
        tokens: Tensor = rearrange(patches + positions, "(b t) d h w -> b (t h w) d", b=len(clip))
        return tokens


class LastJointAttention(JointProjections):
    """Joint attention in which image tokens alone ask; the published weights of text's queries are never read."""

    def forward(self, asking: Tensor, image: Tensor, text: Tensor | None, context: AttentionContext) -> Tensor:
        """asking [B,Q,D]: the last Q of `image` [B,S,D], which is modulated like text [B,L,D] -> [B,Q,D]."""
        mixed = context.attend(self.image_queries(asking), self.keys(image, text), self.values(image, text))
        out: Tensor = self.to_out[0](mixed)
        return out


class LastJointBlock(nn.Module):
    """Joint block after which text is dropped: image tokens see it, and nothing becomes of it."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = Modulation(dim, 2 * SHIFT_SCALE_GATE)
        self.norm1_context = Modulation(dim, ("scale", "shift"))
        self.attn = LastJointAttention(dim, num_heads, RMS_EPS, TEXT_NORM)
        self.ff = FeedForward(dim)

    def modulation(self, activated: Tensor) -> tuple[ModulationParams, ...]:
        """Return the vectors of image and text; activated = SiLU(conditioning) [B,D]."""
        return self.norm1(activated), self.norm1_context(activated)

    def forward(
        self, x: Tensor, y: Tensor | None, conditioning: BlockConditioning, context: AttentionContext
    ) -> tuple[Tensor, None]:
        """x [B,S,D], y [B,L,D], None where its keys and values are cached -> those of x that ask, [B,Q,D]."""
        vectors = self.modulation(conditioning) if isinstance(conditioning, Tensor) else conditioning
        (shift1, gain1, gate1, shift2, gain2, gate2), (y_gain, y_shift) = vectors

        tokens = modulate(x, shift1, gain1)
        y = None if y is None else modulate(y, y_shift, y_gain)
        x = torch.addcmul(context.asking(x), gate1, self.attn(context.asking(tokens), tokens, y, context))
        x = torch.addcmul(x, gate2, self.ff(modulate(x, shift2, gain2)))
        return x, None


class MMDiTNetwork(PyramidTransformer):
    """The published SD3 velocity model: joint blocks, positions on the current frame's grid, rotary angles of time.

    A coarser history frame's positions are the current frame's, brought to its grid. `max_num_frames` is not read.
    """

    class_name: ClassVar[str] = "PyramidDiffusionMMDiT"

    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 24,
        attention_head_dim: int = 64,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1536,
        pooled_projection_dim: int = 2048,
        pos_embed_max_size: int = 192,
        max_num_frames: int = 200,
        pos_embed_type: str = "sincos",
        qk_norm: str = "rms_norm",
        use_flash_attn: bool = False,
        use_temporal_causal: bool = True,
        use_t5_mask: bool = True,
        add_temp_pos_embed: bool = True,
        temp_pos_embed_type: str = "rope",
        interp_condition_pos: bool = True,
        use_gradient_checkpointing: bool = False,
        gradient_checkpointing_ratio: float = 0.6,
    ) -> None:
        check_supported(locals(), SUPPORTED)
        dim = num_attention_heads * attention_head_dim
        if caption_projection_dim != dim:
            rule = f"is not {num_attention_heads} heads x {attention_head_dim}"
            raise InvalidValueError("caption_projection_dim", caption_projection_dim, rule)
        super().__init__(
            latent_channels=in_channels,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            text_dim=joint_attention_dim,
            pooled_dim=pooled_projection_dim,
            axes_dims_rope=(attention_head_dim,),
        )
        self.pos_embed = PatchEmbedding(in_channels, dim, pos_embed_max_size, extent=sample_size / PATCH)
        self.transformer_blocks = nn.ModuleList(
            [
                *(JointBlock(dim, num_attention_heads, RMS_EPS, TEXT_NORM) for _ in range(num_layers - 1)),
                LastJointBlock(dim, num_attention_heads),
            ]
        )

    def _position_map(self, height: int, width: int) -> Tensor | None:
        return self.pos_embed.crop(height, width)

    def _embed_clips(self, clips: Sequence[Tensor], positions: Tensor | None) -> Tensor:
        return torch.cat([self.pos_embed(clip.to(self.dtype), positions) for clip in clips], dim=1)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """All blocks, in the order in which they run."""
        return tuple(self.transformer_blocks)

    def _run_blocks(self, image: Tensor, text: Tensor | None, inputs: Sequence[BlockInputs]) -> Tensor:
        for block, own in zip(self.transformer_blocks, inputs, strict=True):
            image, text = self._run(block, image, text, *own)
        return image
