"""The miniFLUX network: joint blocks, then single-stream blocks, with a three-axis rotary embedding."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyramid_flow.errors import InvalidValueError
from pyramid_flow.transformer.attention import AttentionContext
from pyramid_flow.transformer.layers import (
    SHIFT_SCALE_GATE,
    BlockConditioning,
    JointBlock,
    Modulation,
    ModulationParams,
    RMSNorm,
    modulate,
    split_heads,
)
from pyramid_flow.transformer.model import BlockInputs, PyramidTransformer, check_supported
from pyramid_flow.transformer.tokens import PATCH, patchify

RMS_EPS = 1e-6
"""Of the q/k norms: the other family has another one, and no test is fine enough to tell them apart."""

TEXT_NORM = "norm_added"

SUPPORTED = {"use_temporal_causal": True, "interp_condition_pos": True}


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
        return context.attend(q, k, v)


class SingleBlock(nn.Module):
    """Single-stream block: attention and MLP in parallel over text and image tokens together."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm = Modulation(dim, SHIFT_SCALE_GATE)
        self.attn = SingleAttention(dim, num_heads)
        self.proj_mlp = nn.Linear(dim, 4 * dim)
        self.proj_out = nn.Linear(5 * dim, dim)

    def modulation(self, activated: Tensor) -> tuple[ModulationParams, ...]:
        """Return the vectors of all tokens; activated = SiLU(conditioning) [B,D]."""
        return (self.norm(activated),)

    def forward(self, z: Tensor, conditioning: BlockConditioning, context: AttentionContext) -> Tensor:
        """z [B,S,D] -> the last of its tokens, those that ask [B,Q,D]."""
        vectors = self.modulation(conditioning) if isinstance(conditioning, Tensor) else conditioning
        [(shift, gain, gate)] = vectors
        tokens = modulate(z, shift, gain)
        asking = context.asking(tokens)
        mlp = F.gelu(self.proj_mlp(asking), approximate="tanh")
        features = torch.cat([self.attn(asking, tokens, context), mlp], dim=-1)
        return torch.addcmul(context.asking(z), gate, self.proj_out(features))


class FluxNetwork(PyramidTransformer):
    """The published miniFLUX velocity model: joint blocks, then single-stream ones, and rotary angles of three axes.

    `in_channels` counts a patch: 16 latent channels x 2 x 2. `patch_size` is not read.
    """

    class_name: ClassVar[str] = "PyramidFluxTransformer"

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
        check_supported(locals(), SUPPORTED)
        if sum(axes_dims_rope) != attention_head_dim:
            raise InvalidValueError("axes_dims_rope", axes_dims_rope, f"does not sum to head size {attention_head_dim}")
        dim = num_attention_heads * attention_head_dim
        super().__init__(
            latent_channels=in_channels // PATCH**2,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            text_dim=joint_attention_dim,
            pooled_dim=pooled_projection_dim,
            axes_dims_rope=axes_dims_rope,
        )
        self.x_embedder = nn.Linear(in_channels, dim)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(dim, num_attention_heads, RMS_EPS, TEXT_NORM) for _ in range(num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(dim, num_attention_heads) for _ in range(num_single_layers)
        )

    def _embed_clips(self, clips: Sequence[Tensor], positions: Tensor | None) -> Tensor:
        patches = torch.cat([patchify(clip.to(self.dtype)) for clip in clips], dim=1)
        tokens: Tensor = self.x_embedder(patches)
        return tokens

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """All blocks, in the order in which they run."""
        return (*self.transformer_blocks, *self.single_transformer_blocks)

    def _run_blocks(self, image: Tensor, text: Tensor | None, inputs: Sequence[BlockInputs]) -> Tensor:
        num_joint = len(self.transformer_blocks)
        for block, own in zip(self.transformer_blocks, inputs[:num_joint], strict=True):
            image, text = self._run(block, image, text, *own)
        tokens = image if text is None else torch.cat([text, image], dim=1)
        for block, own in zip(self.single_transformer_blocks, inputs[num_joint:], strict=True):
            tokens = self._run(block, tokens, *own)
        return tokens
