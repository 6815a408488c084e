"""The encoder and the decoder of the causal video VAE, and the blocks they are made of.

Every block maps x [B,C,T,H,W] and a `FeatureCache` to [B,C',T',H',W']; only convolutions look across frames.
"""

from collections.abc import Iterable, Sequence
from itertools import chain, pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pyramid_flow.vae.conv import CausalConv3d, FeatureCache, is_exact_inference

GROUP_NORM_EPS = 1e-6

SLICE_FRAMES = 2
"""Frames that pass through a decoder's block at once: what two frames by four convolutions need."""


class FrameGroupNorm(nn.GroupNorm):
    """Group normalisation with statistics of one frame; the result is laid out channels-last.

    Without gradients the sums are taken here: those of the CPU's channels-last kernel lose two digits in a large frame.
    """

    def __init__(self, num_groups: int, num_channels: int) -> None:
        super().__init__(num_groups, num_channels, eps=GROUP_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        frames = self._normalized(frames) if is_exact_inference(x) else super().forward(frames)
        frames = frames.contiguous(memory_format=torch.channels_last)
        return rearrange(frames, "(b t) c h w -> b c t h w", b=x.shape[0])

    def _normalized(self, x: Tensor) -> Tensor:
        centred = x - self._of_groups(x.mean((2, 3)))
        variance = self._of_groups(centred.square().mean((2, 3)))
        scale = (variance + self.eps).rsqrt_().mul_(self.weight[:, None, None])
        return torch.addcmul(self.bias[:, None, None], centred, scale, out=centred)

    def _of_groups(self, of_channels: Tensor) -> Tensor:
        """Average [N,C] over each group: [N,C,1,1]."""
        means = of_channels.unflatten(1, (self.num_groups, -1)).mean(2)
        repeated: Tensor = means.repeat_interleave(self.num_channels // self.num_groups, dim=1)
        return repeated[:, :, None, None]


def silu(normalised: Tensor) -> Tensor:
    """SiLU in place, because a norm's output is used nowhere else and is as large as a chunk gets."""
    return F.silu(normalised, inplace=True)


class ResnetBlock(nn.Module):
    """shortcut(x) + conv2(SiLU(norm2(conv1(SiLU(norm1(x))))))."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = FrameGroupNorm(num_groups, in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = FrameGroupNorm(num_groups, out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        changes_channels = in_channels != out_channels
        self.conv_shortcut = CausalConv3d(in_channels, out_channels, kernel_size=1) if changes_channels else None

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        hidden: Tensor = self.conv1(silu(self.norm1(x)), cache)
        hidden = self.conv2(silu(self.norm2(hidden)), cache)
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x, cache)
        return hidden.add_(shortcut)


class FrameAttention(nn.Module):
    """x + to_out(softmax(q k^T / sqrt(C)) v) over the pixels of one frame, one head of all C channels."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.group_norm = FrameGroupNorm(num_groups, channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        b, _, t, h, w = x.shape
        tokens = rearrange(self.group_norm(x), "b c t h w -> (b t) 1 (h w) c")
        mixed = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        out: Tensor = self.to_out[0](mixed)
        return x + rearrange(out, "(b t) 1 (h w) c -> b c t h w", b=b, t=t, h=h, w=w)


class MidBlock(nn.Module):
    """Resnet, attention within each frame, resnet."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, num_groups) for _ in range(2))
        self.attentions = nn.ModuleList([FrameAttention(channels, num_groups)])

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        x = self.resnets[0](x, cache)
        x = self.attentions[0](x)
        x = self.resnets[1](x, cache)
        return x


class Downsample(nn.Module):
    """Strided convolution: (1,2,2) halves H and W; (2,1,1) maps the first 1+2k frames to 1+k, later 2k to k."""

    def __init__(self, channels: int, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=stride)

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        out: Tensor = self.conv(x, cache)
        return out


class SpatialUpsample(nn.Module):
    """Convolution to 4C channels, which then become 2 x 2 pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, 4 * channels)

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        pixels: Tensor = self.conv(x, cache)
        return rearrange(pixels, "b (c p1 p2) t h w -> b t (h p1) (w p2) c", p1=2, p2=2).movedim(-1, 1)


class TemporalUpsample(nn.Module):
    """Convolution to 2C channels, which then become 2 frames: 1+k first frames to 1+2k, later k to 2k."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, 2 * channels)

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        is_first = cache.before(self.conv) is None
        pairs: Tensor = self.conv(x, cache)
        frames = rearrange(pairs, "b (c p) t h w -> b (t p) h w c", p=2).movedim(-1, 1)
        return frames[:, :, 1:] if is_first else frames


def _resnets(in_channels: int, out_channels: int, num_layers: int, num_groups: int) -> nn.ModuleList:
    channels = pairwise([in_channels, *[out_channels] * num_layers])
    return nn.ModuleList(ResnetBlock(before, after, num_groups) for before, after in channels)


class DownBlock(nn.Module):
    """Resnets, then half the height and width, then half the frames; each halving is optional."""

    def __init__(
        self, in_channels: int, out_channels: int, num_layers: int, num_groups: int, *, spatial: bool, temporal: bool
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, num_layers, num_groups)
        self.downsamplers = nn.ModuleList([Downsample(out_channels, (1, 2, 2))] if spatial else [])
        self.temporal_downsamplers = nn.ModuleList([Downsample(out_channels, (2, 1, 1))] if temporal else [])

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        for layer in chain(self.resnets, self.downsamplers, self.temporal_downsamplers):
            x = layer(x, cache)
        return x


class UpBlock(nn.Module):
    """Resnets, then twice the height and width, then twice the frames; each doubling is optional."""

    def __init__(
        self, in_channels: int, out_channels: int, num_layers: int, num_groups: int, *, spatial: bool, temporal: bool
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, num_layers, num_groups)
        self.upsamplers = nn.ModuleList([SpatialUpsample(out_channels)] if spatial else [])
        self.temporal_upsamplers = nn.ModuleList([TemporalUpsample(out_channels)] if temporal else [])

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        for layer in chain(self.resnets, self.upsamplers, self.temporal_upsamplers):
            x = layer(x, cache)
        return x


class Encoder(nn.Module):
    """Pixels [B,3,1+8k,H,W] -> mean and log-variance [B,32,1+k,H/8,W/8], before `quant_conv`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        block_channels: Sequence[int],
        num_layers: Sequence[int],
        num_groups: int,
        spatial: Sequence[bool],
        temporal: Sequence[bool],
    ) -> None:
        super().__init__()
        first, last = block_channels[0], block_channels[-1]
        channels = pairwise([first, *block_channels])
        self.conv_in = CausalConv3d(in_channels, first)
        self.down_blocks = nn.ModuleList(
            DownBlock(before, after, layers, num_groups, spatial=halve_space, temporal=halve_time)
            for (before, after), layers, halve_space, halve_time in zip(
                channels, num_layers, spatial, temporal, strict=True
            )
        )
        self.mid_block = MidBlock(last, num_groups)
        self.conv_norm_out = FrameGroupNorm(num_groups, last)
        self.conv_out = CausalConv3d(last, out_channels)

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        x = self.conv_in(x, cache)
        for block in self.down_blocks:
            x = block(x, cache)
        x = self.mid_block(x, cache)
        out: Tensor = self.conv_out(silu(self.conv_norm_out(x)), cache)
        return out


class Decoder(nn.Module):
    """Latents [B,16,1+k,h,w], after `post_quant_conv` -> pixels [B,3,1+8k,8h,8w], not clamped.

    `block_channels` counts from the pixels inwards, as in the published config; the other lists follow execution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        block_channels: Sequence[int],
        num_layers: Sequence[int],
        num_groups: int,
        spatial: Sequence[bool],
        temporal: Sequence[bool],
    ) -> None:
        super().__init__()
        first, last = block_channels[-1], block_channels[0]
        channels = pairwise([first, *reversed(block_channels)])
        self.conv_in = CausalConv3d(in_channels, first)
        self.mid_block = MidBlock(first, num_groups)
        self.up_blocks = nn.ModuleList(
            UpBlock(before, after, layers, num_groups, spatial=double_space, temporal=double_time)
            for (before, after), layers, double_space, double_time in zip(
                channels, num_layers, spatial, temporal, strict=True
            )
        )
        self.conv_norm_out = FrameGroupNorm(num_groups, last)
        self.conv_out = CausalConv3d(last, out_channels)

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        """Decode a chunk; for inference in slices, so that only the smallest features are there for all its frames."""
        is_first = cache.before(self.conv_in) is None
        if torch.is_grad_enabled() or (is_first and x.shape[2] == 1):
            return self._rest(self.up_blocks, self._start(x, cache), cache)
        passing = FeatureCache(cache.features, keep=True)
        parts = [x[:, :, :1], x[:, :, 1:]] if is_first else [x]
        return torch.cat([self._rest(self.up_blocks, self._start(part, passing), passing) for part in parts], dim=2)

    def _start(self, x: Tensor, cache: FeatureCache) -> Tensor:
        out: Tensor = self.mid_block(self.conv_in(x, cache), cache)
        return out

    def _rest(self, blocks: Iterable[nn.Module], x: Tensor, cache: FeatureCache) -> Tensor:
        """Pass x through the blocks and the end: each slice of a block's result goes all the way before the next."""
        block, *later = blocks
        x = block(x, cache)
        if not later:
            out: Tensor = self.conv_out(silu(self.conv_norm_out(x)), cache)
            return out
        slices = [x] if torch.is_grad_enabled() else x.split(SLICE_FRAMES, dim=2)
        return torch.cat([self._rest(later, each, cache) for each in slices], dim=2)
