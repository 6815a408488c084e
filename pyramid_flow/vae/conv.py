"""The causal convolution and the feature cache that lets a video pass through it in temporal chunks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Features = dict[nn.Module, Tensor]
"""Of each causal convolution the last input frames [B,C,1 or 2,h,w], which it needs again."""


def is_exact_inference(x: Tensor) -> bool:
    """Whether to trade products for sums, which half precision would round too much: without gradients, in 32 bits."""
    return not torch.is_grad_enabled() and x.dtype.itemsize >= 4


class FeatureCache:
    """What the convolutions remember of one video while it passes through them, chunk by chunk.

    Each convolution takes its frames of the chunk before from `features`, if there was one, and puts those that the
    next chunk needs in their place, unless `keep` is False, for then none comes. No tensor is ever changed.
    """

    def __init__(self, features: Features | None, *, keep: bool) -> None:
        self.features = {} if features is None else features
        self.keep = keep

    def before(self, conv: nn.Module) -> Tensor | None:
        """Return the frames in front of a convolution's next chunk; None = zeros, as it is the first."""
        return self.features.get(conv)

    def remember(self, conv: nn.Module, x: Tensor, overlap: int) -> None:
        """Keep the last `overlap` frames of what has passed through a convolution, with x as its newest chunk."""
        if not self.keep:
            return
        if x.shape[2] < overlap:
            before = self.before(conv)
            x = F.pad(x, (0, 0, 0, 0, 1, 0)) if before is None else torch.cat([before[:, :, -1:], x], dim=2)
        last = x[:, :, -overlap:]
        # A view would keep all of the chunk alive.
        self.features[conv] = last if last.nbytes == last.untyped_storage().nbytes() else last.clone()


class FrameConv3d(nn.Conv3d):
    """3-D convolution over a chunk and the frames in front of it, computed frame by frame where that is less work."""

    def forward(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """x [B,C,T,H,W], before [B,C,k-1 or less,H,W] or None for zeros -> [B,C',T',H',W']."""
        if self.kernel_size[0] == 1:
            return super().forward(x)
        if before is None:
            if x.shape[2] == 1:
                return self._frame(x[:, :, 0], self.weight[:, :, -1], self.bias).unsqueeze(2)
            before = torch.zeros_like(x[:, :, : self.kernel_size[0] - 1])
        if self.stride[0] == 1 and is_exact_inference(x):
            return self._in_pairs([*before.unbind(2), *x.unbind(2)])
        return super().forward(torch.cat([before, x], dim=2))

    def _in_pairs(self, frames: list[Tensor]) -> Tensor:
        """Compute two frames by four convolutions of sums of frames instead of six: Winograd's F(2, 3) along time.

        For frames a, b, c, d behind each other and taps u, v, w, with p = (b + c) * (u + v + w) / 2 and
        q = (c - b) * (u - v + w) / 2 the two are (a - c) * u + p + q and p - q - (b - d) * w.
        """
        first, middle, last = self.weight.unbind(2)
        total, alternating = (first + middle + last) / 2, (first - middle + last) / 2
        result = self._empty_result(frames[0], len(frames) - 2)
        out = result.unbind(2)
        for i in range(0, len(out) - 1, 2):
            a, b, c, d = frames[i : i + 4]
            p, q = self._frame(b + c, total, self.bias), self._frame(c - b, alternating)
            torch.add(p, q, out=out[i])
            torch.sub(p, q, out=out[i + 1])
            del p, q
            out[i].add_(self._frame(a - c, first))
            out[i + 1].sub_(self._frame(b - d, last))
        if len(out) % 2:
            a, b, c = frames[-3:]
            out[-1].copy_(self._frame(a, first, self.bias))
            out[-1].add_(self._frame(b, middle)).add_(self._frame(c, last))
        return result

    def _empty_result(self, frame: Tensor, num_frames: int) -> Tensor:
        height, width = ((side - 1) // step + 1 for side, step in zip(frame.shape[2:], self.stride[1:], strict=True))
        shape = (frame.shape[0], self.out_channels, num_frames, height, width)
        return torch.empty(shape, dtype=frame.dtype, device=frame.device, memory_format=torch.channels_last_3d)

    def _frame(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride[1:], (int(self.padding[1]), int(self.padding[2])))


class CausalConv3d(nn.Module):
    """3-D convolution, zero-padded by k // 2 on all sides in space and by k - 1 frames, only in front, in time."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        super().__init__()
        space = kernel_size // 2
        self.conv = FrameConv3d(in_channels, out_channels, kernel_size, stride, padding=(0, space, space))
        self.overlap = kernel_size - stride[0]

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        """x [B,C,T,H,W], the chunk after those in the cache -> [B,C',T',H',W'], as if all chunks had come at once."""
        out: Tensor = self.conv(x, cache.before(self))
        if self.overlap:
            cache.remember(self, x, self.overlap)
        return out
