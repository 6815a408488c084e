"""The decoder as it was published, in plain PyTorch: the yardstick of `pyramid_flow.vae` for results and for speed.

Every causal convolution is one conv3d over the chunk with two frames put in front, zeros in the first chunk and then
the last ones of the chunk before; nothing is skipped, shared or reordered. Parameters come under their published names.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from pyramid_flow import CausalVideoVAE

Weights = Mapping[str, Tensor]
Cache = dict[str, Tensor]
"""The last two input frames of each convolution by its name; empty before the first chunk."""


class PlainDecoder:
    """Decodes with the parameters of a `CausalVideoVAE`, which it shares."""

    def __init__(self, vae: CausalVideoVAE) -> None:
        self.weights: Weights = vae.state_dict(keep_vars=True)
        self.num_groups: int = vae.config["decoder_norm_num_groups"]
        self.num_layers: list[int] = list(vae.config["decoder_layers_per_block"])
        self.spatial: list[bool] = list(vae.config["decoder_spatial_up_sample"])
        self.temporal: list[bool] = list(vae.config["decoder_temporal_up_sample"])

    def decode(self, latents: Tensor, window: int | None = 1, tile: int | None = None) -> Tensor:
        """Decode latents [B,16,T,h,w] to pixels [B,3,8T-7,8h,8w], `window` latents at a time, in tiles of `tile` px."""
        if tile is None or 8 * max(latents.shape[-2:]) <= tile:
            return self.decode_untiled(latents, window)
        return tiled(lambda part: self.decode_untiled(part, window), latents, tile)

    def decode_untiled(self, latents: Tensor, window: int | None) -> Tensor:
        num_latents = latents.shape[2]
        later = range(window + 1, num_latents, window) if window else ()
        cache: Cache = {}
        cuts = pairwise([0, *later, num_latents])
        return torch.cat([self.chunk(latents[:, :, a:b], cache, a == 0) for a, b in cuts], dim=2)

    def chunk(self, x: Tensor, cache: Cache, is_first: bool) -> Tensor:
        """Decode one chunk; leaves in the cache what the next one needs."""
        x = F.conv3d(x, *self.parameters("post_quant_conv.conv"))
        x = self.causal_conv("decoder.conv_in", x, cache)
        x = self.resnet("decoder.mid_block.resnets.0", x, cache)
        x = self.attention("decoder.mid_block.attentions.0", x)
        x = self.resnet("decoder.mid_block.resnets.1", x, cache)
        for i, (num_layers, spatial, temporal) in enumerate(
            zip(self.num_layers, self.spatial, self.temporal, strict=True)
        ):
            for j in range(num_layers):
                x = self.resnet(f"decoder.up_blocks.{i}.resnets.{j}", x, cache)
            if spatial:
                x = twice_the_size(self.causal_conv(f"decoder.up_blocks.{i}.upsamplers.0.conv", x, cache))
            if temporal:
                x = twice_the_frames(self.causal_conv(f"decoder.up_blocks.{i}.temporal_upsamplers.0.conv", x, cache))
                x = x[:, :, 1:] if is_first else x
        return self.causal_conv("decoder.conv_out", F.silu(self.norm("decoder.conv_norm_out", x)), cache)

    def resnet(self, name: str, x: Tensor, cache: Cache) -> Tensor:
        hidden = self.causal_conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), cache)
        hidden = self.causal_conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", hidden)), cache)
        if f"{name}.conv_shortcut.conv.weight" in self.weights:
            x = F.conv3d(x, *self.parameters(f"{name}.conv_shortcut.conv"))
        return x + hidden

    def attention(self, name: str, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        tokens = self.norm(f"{name}.group_norm", x).permute(0, 2, 3, 4, 1).reshape(b * t, 1, h * w, c)
        query, key, value = (F.linear(tokens, *self.parameters(f"{name}.to_{each}")) for each in "qkv")
        mixed = F.scaled_dot_product_attention(query, key, value)
        out = F.linear(mixed, *self.parameters(f"{name}.to_out.0"))
        return x + out.reshape(b, t, h, w, c).permute(0, 4, 1, 2, 3)

    def norm(self, name: str, x: Tensor) -> Tensor:
        """Normalise each frame by itself."""
        b, c, t, h, w = x.shape
        frames = x.transpose(1, 2).reshape(b * t, c, h, w)
        frames = F.group_norm(frames, self.num_groups, *self.parameters(name), eps=1e-6)
        return frames.reshape(b, t, c, h, w).transpose(1, 2)

    def causal_conv(self, name: str, x: Tensor, cache: Cache) -> Tensor:
        before = cache[name] if name in cache else x.new_zeros(*x.shape[:2], 2, *x.shape[3:])
        x = torch.cat([before, x], dim=2)
        cache[name] = x[:, :, -2:].clone()
        return F.conv3d(x, *self.parameters(f"{name}.conv"), padding=(0, 1, 1))

    def parameters(self, name: str) -> tuple[Tensor, Tensor]:
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]


def twice_the_size(x: Tensor) -> Tensor:
    """[B,(C 2 2),T,h,w] -> [B,C,T,2h,2w]."""
    b, c, t, h, w = x.shape
    return x.reshape(b, c // 4, 2, 2, t, h, w).permute(0, 1, 4, 5, 2, 6, 3).reshape(b, c // 4, t, 2 * h, 2 * w)


def twice_the_frames(x: Tensor) -> Tensor:
    """[B,(C 2),T,h,w] -> [B,C,2T,h,w]."""
    b, c, t, h, w = x.shape
    return x.reshape(b, c // 2, 2, t, h, w).transpose(2, 3).reshape(b, c // 2, 2 * t, h, w)


def tiled(decode: Callable[[Tensor], Tensor], latents: Tensor, tile: int) -> Tensor:
    """Decode tiles that overlap by a quarter; fade each into the one above, then into the one on its left."""
    side, extent = tile // 8, tile // 4
    keep = tile - extent
    height, width = latents.shape[-2:]
    tops, lefts = range(0, height, side * 3 // 4), range(0, width, side * 3 // 4)
    tiles = [[decode(latents[..., top : top + side, left : left + side]) for left in lefts] for top in tops]
    for i, row in enumerate(tiles):
        for j, current in enumerate(row):
            if i > 0:
                fade(tiles[i - 1][j].mT, current.mT, extent)
            if j > 0:
                fade(row[j - 1], current, extent)
    rows = [torch.cat([current[..., :keep, :keep] for current in row], dim=-1) for row in tiles]
    return torch.cat(rows, dim=-2)


def fade(before: Tensor, after: Tensor, extent: int) -> None:
    """Fade, in place, from the right end of `before` into the left end of `after`."""
    extent = min(before.shape[-1], after.shape[-1], extent)
    weight = torch.arange(extent, dtype=after.dtype, device=after.device) / extent
    after[..., :extent] = before[..., -extent:] * (1 - weight) + after[..., :extent] * weight
