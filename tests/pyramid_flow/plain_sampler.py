"""The sampler as published, for miniFLUX: every token of every frame at every step, under one dense mask.

It shares the schedule, the pyramid and the noise with the product, which have parity tests of their own, and nothing of
its transformer but the weights and the equations. Attention is fused and noise is drawn at once, so that its speed is
that of the algorithm.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from pyramid_flow import NoiseSource, PyramidFluxTransformer, PyramidSchedule, SamplingParams, TextEmbedding
from pyramid_flow.sampling.pyramid import history_clips, latent_pyramid, noise_pyramid, stack_frames
from pyramid_flow.transformer.tokens import position_ids

EPS = 1e-6


class PlainTransformer:
    """The velocity of the last clip of a list: weights by their published names, config of the checkpoint."""

    def __init__(self, transformer: PyramidFluxTransformer) -> None:
        self.weights: Mapping[str, Tensor] = transformer.state_dict()
        self.config: Mapping[str, Any] = transformer.config
        self.heads = transformer.config["num_attention_heads"]

    def __call__(self, clips: Sequence[Tensor], timestep: float, text: TextEmbedding) -> Tensor:
        """clips: oldest first, each [B,16,1,h,w]; text: padded -> [B,16,1,h,w]."""
        shapes = [(clip.shape[2], *clip.shape[3:]) for clip in clips]
        length, current = text.tokens.shape[1], clips[-1]
        patches = "b c t (h p1) (w p2) -> b (t h w) (p1 p2 c)"
        x = self.linear("x_embedder", torch.cat([rearrange(clip, patches, p1=2, p2=2) for clip in clips], dim=1))
        y = self.linear("context_embedder", text.tokens)
        c = F.silu(self.conditioning(torch.full((len(x),), timestep, device=x.device), text.pooled))
        ids = position_ids(shapes, length).to(x.device)
        mask, angles = dense_mask(ids[:, 0], text.mask.to(x.device)), self.angles(ids)
        for i in range(self.config["num_layers"]):
            x, y = self.double_block(f"transformer_blocks.{i}.", x, y, c, mask, angles)
        z = torch.cat([y, x], dim=1)
        for i in range(self.config["num_single_layers"]):
            z = self.single_block(f"single_transformer_blocks.{i}.", z, c, mask, angles)
        scale, shift = self.modulation("norm_out.linear", c, 2)
        height, width = current.shape[-2:]
        out = self.linear("proj_out", normalised(z[:, length:], shift, scale))[:, -(height * width // 4) :]
        return rearrange(out, "b (h w) (p1 p2 c) -> b c 1 (h p1) (w p2)", h=height // 2, p1=2, p2=2)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def modulation(self, name: str, c: Tensor, chunks: int) -> tuple[Tensor, ...]:
        return self.linear(name, c)[:, None].chunk(chunks, dim=-1)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.linear_2", F.silu(self.linear(f"{name}.linear_1", x)))

    def conditioning(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        frequencies = 10000.0 ** (-torch.arange(128, device=timestep.device) / 128)
        angles = timestep[:, None] * frequencies
        embedded = self.mlp("time_text_embed.timestep_embedder", torch.cat([angles.cos(), angles.sin()], dim=-1))
        return embedded + self.mlp("time_text_embed.text_embedder", pooled)

    def angles(self, ids: Tensor) -> Tensor:
        """Rotations of every token's pairs of features, complex [S, head_dim / 2]."""
        axes = [
            ids[:, axis, None] * 10000.0 ** (-torch.arange(0, dim, 2, device=ids.device).double() / dim)
            for axis, dim in enumerate(self.config["axes_dims_rope"])
        ]
        return torch.exp(1j * torch.cat(axes, dim=-1)).to(torch.complex64)

    def heads_of(self, projection: str, x: Tensor, norm: str | None = None) -> Tensor:
        """[B,S,D] -> [B,H,S,head_dim], normalised if there is a norm."""
        split = rearrange(self.linear(projection, x), "b s (h d) -> b h s d", h=self.heads)
        return split if norm is None else F.rms_norm(split, split.shape[-1:], self.weights[f"{norm}.weight"], EPS)

    def double_block(
        self, name: str, x: Tensor, y: Tensor, c: Tensor, mask: Tensor, angles: Tensor
    ) -> tuple[Tensor, Tensor]:
        on_x, on_y = (self.modulation(f"{name}{norm}.linear", c, 6) for norm in ("norm1", "norm1_context"))
        x_in, y_in = normalised(x, *on_x[:2]), normalised(y, *on_y[:2])
        attn = f"{name}attn."
        q, k, v = (
            torch.cat([self.heads_of(f"{attn}{text}", y_in, added), self.heads_of(f"{attn}{image}", x_in, own)], dim=2)
            for text, added, image, own in (
                ("add_q_proj", f"{attn}norm_added_q", "to_q", f"{attn}norm_q"),
                ("add_k_proj", f"{attn}norm_added_k", "to_k", f"{attn}norm_k"),
                ("add_v_proj", None, "to_v", None),
            )
        )
        y_out, x_out = attend(q, k, v, mask, angles).split([y.shape[1], x.shape[1]], dim=1)
        x = x + on_x[2] * self.linear(f"{attn}to_out.0", x_out)
        y = y + on_y[2] * self.linear(f"{attn}to_add_out", y_out)
        x = x + on_x[5] * self.feed_forward(f"{name}ff", normalised(x, *on_x[3:5]))
        y = y + on_y[5] * self.feed_forward(f"{name}ff_context", normalised(y, *on_y[3:5]))
        return x, y

    def feed_forward(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.net.2", F.gelu(self.linear(f"{name}.net.0.proj", x), approximate="tanh"))

    def single_block(self, name: str, z: Tensor, c: Tensor, mask: Tensor, angles: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(f"{name}norm.linear", c, 3)
        inner, attn = normalised(z, shift, scale), f"{name}attn."
        q = self.heads_of(f"{attn}to_q", inner, f"{attn}norm_q")
        k = self.heads_of(f"{attn}to_k", inner, f"{attn}norm_k")
        mixed = attend(q, k, self.heads_of(f"{attn}to_v", inner), mask, angles)
        hidden = F.gelu(self.linear(f"{name}proj_mlp", inner), approximate="tanh")
        return z + gate * self.linear(f"{name}proj_out", torch.cat([mixed, hidden], dim=-1))


def normalised(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def dense_mask(times: Tensor, valid: Tensor) -> Tensor:
    """bool [B,1,S,S]: i sees j if both are padding or neither is, and j is not later."""
    padding = F.pad(~valid, (0, len(times) - valid.shape[1]))
    return ((padding[:, :, None] == padding[:, None]) & (times[:, None] >= times))[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, angles: Tensor) -> Tensor:
    """[B,H,S,d] -> [B,S,H*d]."""
    rotated = (torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * angles).flatten(-2) for x in (q, k))
    mixed = F.scaled_dot_product_attention(*rotated, v, attn_mask=mask)
    return rearrange(mixed, "b h s d -> b s (h d)")


@torch.no_grad()
def plain_latents(
    transformer: PyramidFluxTransformer,
    text: TextEmbedding,
    negative: TextEmbedding,
    params: SamplingParams,
    noise: NoiseSource,
    image_latent: Tensor | None = None,
) -> Tensor:
    """Sample one row or several, all guided, as `generate_latents` does; text and negative: equally long, padded."""
    model, schedule = PlainTransformer(transformer), PyramidSchedule()
    both = TextEmbedding(*(torch.cat([getattr(each, name) for each in (negative, text)]) for name in FIELDS))
    shape = params.latent_shape(len(text), transformer.latent_channels)
    finished = [] if image_latent is None else [latent_pyramid(image_latent, len(schedule.levels))]
    first, start = len(finished), noise_pyramid(noise.initial(shape), len(schedule.levels))[0]
    for unit in range(first, params.num_units):
        frame = start[:, :, unit - first : unit - first + 1]
        counts = params.num_inference_steps if unit == 0 else params.video_num_inference_steps
        for level in schedule.levels:
            if level.index:
                frame = level.enter(frame, noise.block((*frame.shape[:3], 2 * frame.shape[3], 2 * frame.shape[4])))
            for timestep, delta in level.steps(counts[level.index]):
                clips = [*history_clips(finished, level.index), frame]
                guided = model([torch.cat([clip, clip]) for clip in clips], timestep, both)
                v_negative, v_positive = guided.chunk(2)
                scale = params.scale(unit, len(text)).to(frame.device)
                frame = frame + delta * (v_negative + scale * (v_positive - v_negative))
        finished.append(latent_pyramid(frame, len(schedule.levels)))
    return stack_frames(finished)


FIELDS = ("tokens", "mask", "pooled")
