"""PyramidTransformer: what both velocity models share, all but their patches, positions and blocks. No diffusers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyramid_flow.errors import InvalidValueError, ShapeError
from pyramid_flow.memory.placement import execution_device
from pyramid_flow.parallel.sampler import HeadExchange, SequenceGroup
from pyramid_flow.text.embedding import TextEmbedding
from pyramid_flow.transformer.attention import AttentionContext, RotaryTable, attention, rotary_table
from pyramid_flow.transformer.history_cache import BlockCache
from pyramid_flow.transformer.layers import (
    BlockConditioning,
    ConditioningEmbedding,
    Modulation,
    ModulationParams,
    modulate,
)
from pyramid_flow.transformer.tokens import PATCH, PrefixLayout, position_ids, prefix_layout, unpatchify


@dataclass(frozen=True)
class TextState:
    """What a prompt contributes to every evaluation: tokens [B,L,D], pooled [B,D].

    pads: how many of each row's tokens are padding; they come first.
    """

    tokens: Tensor
    pooled: Tensor
    pads: tuple[int, ...]

    def select(self, rows: Tensor) -> "TextState":
        """Return the given rows (indices), of unchanged length."""
        pads = tuple(self.pads[row] for row in rows.tolist())
        rows = rows.to(self.tokens.device)
        return TextState(self.tokens[rows], self.pooled[rows], pads)


@dataclass(frozen=True)
class Conditioning:
    """What timestep and pooled text contribute to one evaluation.

    activated: SiLU(c) [B,D]; blocks, out: what the modulations of each block and of the output make of it; None = not
    computed ahead, each block does it for itself.
    """

    activated: Tensor
    blocks: tuple[tuple[ModulationParams, ...], ...] | None = None
    out: ModulationParams | None = None


@dataclass(frozen=True)
class HistoryState:
    """What the past contributes to every evaluation of one unit at one level; tokens [B,S,D] are embedded.

    has_text: whether text is evaluated, or cached with the frames that are not among the tokens. positions: map
    [1,D,h,w] that is added to the current frame's patches, None where rotary angles say it all. current: [C,1,h,w].
    """

    tokens: Tensor
    has_text: bool
    rotary: RotaryTable
    positions: Tensor | None
    layout: PrefixLayout
    current: tuple[int, ...]


BlockInputs = tuple[BlockConditioning, AttentionContext]
"""What a block takes beside tokens."""


class PyramidTransformer(nn.Module, ABC):
    """A velocity model whose tensors have the published names.

    An evaluation is split by how often its parts change: `embed_text` once per prompt, `condition` once per prompt and
    timestep, `embed_history` once per unit and level, `forward` at every step.
    """

    class_name: ClassVar[str]
    """Name of the public class, which a checkpoint's config.json has as `_class_name`."""

    def __init__(
        self,
        *,
        latent_channels: int,
        num_attention_heads: int,
        attention_head_dim: int,
        text_dim: int,
        pooled_dim: int,
        axes_dims_rope: Sequence[int],
    ) -> None:
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.num_attention_heads, self.attention_head_dim = num_attention_heads, attention_head_dim
        self.text_dim, self.pooled_dim = text_dim, pooled_dim
        self.gradient_checkpointing = False  # see `enable_gradient_checkpointing` of diffusers
        self.axes_dims_rope = tuple(axes_dims_rope)
        self.context_embedder = nn.Linear(text_dim, dim)
        self.time_text_embed = ConditioningEmbedding(dim, pooled_dim)
        self.norm_out = Modulation(dim, ("scale", "shift"))
        self.proj_out = nn.Linear(dim, PATCH**2 * latent_channels)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent frame."""
        return self.proj_out.out_features // PATCH**2

    @property
    def device(self) -> torch.device:
        """Where it computes, wherever its weights rest."""
        return execution_device(self)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of its weights."""
        return next(self.parameters()).dtype

    def embed_text(self, text: TextEmbedding) -> TextState:
        """Bring the pads to the front, trim those that no prompt of the batch needs, and embed the rest.

        Text has no positions, so its order means nothing; with pads in front, what a row may see is one slice.
        """
        self._check("text tokens", "[B,L,{}]", text.tokens, self.text_dim)
        self._check("pooled text", "[B,{}]", text.pooled, self.pooled_dim)
        valid = text.mask.bool()  # looked at where the text lies, so that a device is not waited for
        lengths = valid.sum(dim=1).tolist()
        order = valid.int().argsort(dim=1, stable=True)[:, valid.shape[1] - max(lengths) :]
        places = order[..., None].expand(-1, -1, text.tokens.shape[2])
        tokens = text.tokens.gather(1, places.to(text.tokens.device))
        pooled = self.time_text_embed.text_embedder(text.pooled.to(self.device, self.dtype))
        pads = tuple(max(lengths) - length for length in lengths)
        return TextState(self.context_embedder(tokens.to(self.device, self.dtype)), pooled, pads)

    def embed_history(
        self, history: Sequence[Tensor], current: Sequence[int], text: TextState, num_cached: int = 0
    ) -> HistoryState:
        """Embed past frames, each [B,C,T,h,w] at its level, for a current frame of shape [B,C,1,h,w].

        text: its rows are those of B videos, once or for each guidance branch. num_cached: how many of the first clips
        are not evaluated, as their keys and values are cached with the text's.
        """
        rows, batch, channels = len(text.pads), current[0], self.latent_channels
        _check_clip("current frame", current, rows if rows % batch else batch, channels, num_frames=1)
        for clip in history:
            _check_clip("history clip", clip.shape, batch, channels)
        shapes = [(frames, height, width) for _, _, frames, height, width in (*(c.shape for c in history), current)]
        text_length, evaluated = text.tokens.shape[1], history[num_cached:]
        layout = prefix_layout(shapes, text_length, num_cached)
        ids = position_ids(shapes, text_length)[-layout.num_queries :]
        positions = self._position_map(current[3] // PATCH, current[4] // PATCH)
        return HistoryState(
            tokens=self._embed_clips(evaluated, positions) if evaluated else text.tokens[:batch, :0],
            has_text=not num_cached,
            rotary=rotary_table(ids, self.axes_dims_rope, self.device),
            positions=positions,
            layout=layout,
            current=tuple(current[1:]),
        )

    def condition(self, timestep: Tensor, text: TextState, *, ahead: bool = False) -> Conditioning:
        """Embed timesteps [B] on the 0...1000 scale, float32, with the pooled text; ahead: compute all modulations."""
        if timestep.shape != text.pooled.shape[:1]:
            raise ShapeError("timestep", f"[{len(text.pooled)}]", tuple(timestep.shape))
        activated = F.silu(self.time_text_embed(timestep, text.pooled))
        if not ahead:
            return Conditioning(activated)
        blocks: Any = self.blocks
        return Conditioning(activated, tuple(block.modulation(activated) for block in blocks), self.norm_out(activated))

    def forward(
        self,
        latents: Tensor,
        conditioning: Conditioning,
        text: TextState,
        history: HistoryState,
        cache: Sequence[BlockCache] | None = None,
        group: SequenceGroup | None = None,
    ) -> Tensor:
        """Return the velocity of the current frame.

        latents [B,C,1,h,w] on the level's grid. cache: one per block; holds the keys and values of what `history`
        leaves out, and gets those of what it is to keep. group: processes that are given the same and share the
        work; the cache then has this process' heads. Returns [B,C,1,h,w].
        """
        if tuple(latents.shape) != (len(text.tokens), *history.current):
            raise ShapeError("latents", str([len(text.tokens), *history.current]), tuple(latents.shape))
        current = self._embed_clips([latents], history.positions)
        copies = len(latents) // len(history.tokens)  # one per guidance branch
        evaluated = text.tokens if history.has_text else text.tokens[:, :0]
        streams = [evaluated, history.tokens.repeat(copies, 1, 1), current]
        exchange = None
        if group is not None:
            exchange = HeadExchange(group, tuple(stream.shape[1] for stream in streams))
            streams = [group.share(stream) for stream in streams]

        asked = attention(history.layout, text.pads, latents.device)
        every = AttentionContext(history.rotary, asked, exchange=exchange)
        contexts = [every] * (len(self.blocks) - 1) + [every.last(current.shape[1])]
        if cache is not None:
            contexts = [replace(context, cache=own) for context, own in zip(contexts, cache, strict=True)]
        conditionings: Sequence[BlockConditioning] = conditioning.blocks or [conditioning.activated] * len(contexts)
        inputs = list(zip(conditionings, contexts, strict=True))

        image = torch.cat(streams[1:], dim=1)
        out = self._run_blocks(image, streams[0] if history.has_text else None, inputs)
        gain, shift = conditioning.out or self.norm_out(conditioning.activated)
        patches = self.proj_out(modulate(out, shift, gain))
        if group is not None:
            patches = group.gather(patches, current.shape[1])
        return unpatchify(patches, *latents.shape[-2:])

    def _position_map(self, height: int, width: int) -> Tensor | None:
        """Return the positions [1,D,h,w] to add to a current frame of so many patches, if the model adds any."""
        return None

    @abstractmethod
    def _embed_clips(self, clips: Sequence[Tensor], positions: Tensor | None) -> Tensor:
        """Turn clips [B,C,T,h,w] of any levels into tokens [B,S,D]; positions: the current frame's map."""

    @property
    @abstractmethod
    def blocks(self) -> tuple[nn.Module, ...]:
        """All blocks, in the order in which they run."""

    @abstractmethod
    def _run_blocks(self, image: Tensor, text: Tensor | None, inputs: Sequence[BlockInputs]) -> Tensor:
        """Return the current frame's tokens [B,N,D] after all blocks, each of which has its inputs.

        image [B,S,D], text [B,L,D] or None if it is cached. In the last block only the current frame's tokens ask,
        because nothing reads the others any more.
        """

    def _run(self, block: nn.Module, *arguments: object) -> Any:  # noqa: ANN401 - as the block
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    def _check(self, name: str, pattern: str, tensor: Tensor, features: int) -> None:
        if tensor.ndim != pattern.count(",") + 1 or tensor.shape[-1] != features:
            raise ShapeError(name, pattern.format(features), tuple(tensor.shape))


def check_supported(arguments: Mapping[str, object], supported: Mapping[str, object]) -> None:
    """Raise InvalidValueError for an argument of a published config that has another value than the supported one."""
    for name, value in supported.items():
        if arguments[name] != value:
            raise InvalidValueError(name, repr(arguments[name]), f"is not supported, only {value!r} is")


def _check_clip(name: str, shape: Sequence[int], batch: int, channels: int, num_frames: int | None = None) -> None:
    frames = "T" if num_frames is None else num_frames
    fits = len(shape) == 5 and tuple(shape[:2]) == (batch, channels) and not (shape[3] % PATCH or shape[4] % PATCH)
    if not fits or num_frames not in (None, shape[2]):
        raise ShapeError(name, f"[{batch},{channels},{frames},h,w] with even h and w", tuple(shape))
