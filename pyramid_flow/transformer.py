"""PyramidTransformer: what both velocity models share, all but their patches, positions and blocks."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyramid_flow.attention import AttentionContext, RotaryTable, attention, rotary_table
from pyramid_flow.errors import InvalidValueError, ShapeError
from pyramid_flow.layers import ConditioningEmbedding, Modulation, modulate
from pyramid_flow.placement import execution_device
from pyramid_flow.text import TextEmbedding
from pyramid_flow.tokens import PATCH, PrefixLayout, position_ids, prefix_layout, unpatchify


@dataclass(frozen=True)
class TextState:
    """What a prompt contributes to every evaluation: tokens [B,L,D], pooled [B,D], mask bool [B,L] (None = no pads)."""

    tokens: Tensor
    pooled: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class HistoryState:
    """What the past contributes to every evaluation of one unit at one level; tokens [B,S,D] are embedded.

    positions: map [1,D,h,w] that is added to the current frame's patches, None where rotary angles say it all.
    """

    tokens: Tensor
    rotary: RotaryTable
    positions: Tensor | None
    layout: PrefixLayout
    current: tuple[int, ...]


class PyramidTransformer(ModelMixin, ConfigMixin, ABC):  # type: ignore[misc]
    """A velocity model whose tensors have the published names.

    An evaluation is split by how often its parts change: `embed_text` once per prompt, `embed_history` once per unit
    and level, `forward` at every step.
    """

    _supports_gradient_checkpointing = True
    _required_config: ClassVar[Mapping[str, object]]

    def __init__(
        self, *, latent_channels: int, dim: int, text_dim: int, pooled_dim: int, axes_dims_rope: Sequence[int]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        for name, required in self._required_config.items():
            if self.config[name] != required:
                raise InvalidValueError(name, repr(self.config[name]), f"is not supported, only {required!r} is")
        self.gradient_checkpointing = False  # see `enable_gradient_checkpointing` of diffusers
        self.axes_dims_rope = tuple(axes_dims_rope)
        self.context_embedder = nn.Linear(text_dim, dim)
        self.time_text_embed = ConditioningEmbedding(dim, pooled_dim)
        self.norm_out = Modulation(dim, 2)
        self.proj_out = nn.Linear(dim, PATCH**2 * latent_channels)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent frame."""
        return self.proj_out.out_features // PATCH**2

    @property
    def device(self) -> torch.device:
        """Where it computes, wherever its weights rest."""
        return execution_device(self)

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
        positions = self._position_map(current[3] // PATCH, current[4] // PATCH)
        return HistoryState(
            tokens=self._embed_clips(history, positions) if history else text.tokens[:, :0],
            rotary=rotary_table(position_ids(shapes, text_length), self.axes_dims_rope, self.device),
            positions=positions,
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
        current = self._embed_clips([latents], history.positions)
        activated = F.silu(self.time_text_embed(timestep, text.pooled))
        asked = attention(history.layout, key_mask(text, history.layout), len(latents), latents.device)
        whole = AttentionContext(history.rotary, asked)
        last = AttentionContext(history.rotary, asked.last(current.shape[1]))

        image = torch.cat([history.tokens, current], dim=1)
        out = self._run_blocks(image, text.tokens, activated, whole, last)
        scale, shift = self.norm_out(activated)
        return unpatchify(self.proj_out(modulate(out, shift, scale)), *latents.shape[-2:])

    def _position_map(self, height: int, width: int) -> Tensor | None:
        """Return the positions [1,D,h,w] to add to a current frame of so many patches, if the model adds any."""
        return None

    @abstractmethod
    def _embed_clips(self, clips: Sequence[Tensor], positions: Tensor | None) -> Tensor:
        """Turn clips [B,C,T,h,w] of any levels into tokens [B,S,D]; positions: the current frame's map."""

    @abstractmethod
    def _run_blocks(
        self, image: Tensor, text: Tensor, activated: Tensor, whole: AttentionContext, last: AttentionContext
    ) -> Tensor:
        """Return the current frame's tokens [B,N,D] after all blocks.

        image [B,S,D], text [B,L,D], activated = SiLU(conditioning) [B,D]. In the last block only the current frame's
        tokens ask (`last`), because nothing reads the others any more.
        """

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
