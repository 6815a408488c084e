"""The causal convolution and the feature cache that lets a video pass through it in temporal chunks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Features = tuple[Tensor, ...]
"""Per causal convolution, in the order in which they run: the last input frames [B,C,1 or 2,h,w] it needs again."""


class FeatureCache:
    """What the convolutions remember of one video while one chunk of it passes through them.

    A cache lives for one chunk. Each convolution takes its frames of the previous chunk from `past` (None on the
    first chunk) and, if `keep`, leaves those the next chunk needs in `present`. Nothing in `past` is changed.
    """

    def __init__(self, past: Features | None, *, keep: bool) -> None:
        self.is_first = past is None
        self.keep = keep
        self._past = iter(past or ())
        self._present: list[Tensor] = []

    @property
    def present(self) -> Features:
        """The features for the next chunk; complete when the chunk has passed. Empty unless `keep`."""
        return tuple(self._present)

    def extend(self, x: Tensor, padding: int, overlap: int) -> Tensor:
        """Put frames in front of the chunk x [B,C,T,H,W]: `padding` zeros on the first chunk, else the cached ones.

        The last `overlap` frames of the result are what the next chunk will get in front. A video's single first
        frame comes back as it is, see `StillConv3d`.
        """
        is_still = self.is_first and x.shape[2] == 1
        if is_still and not self.keep:
            return x
        extended = F.pad(x, (0, 0, 0, 0, padding, 0)) if self.is_first else torch.cat([next(self._past), x], dim=2)
        if self.keep:
            # A copy, because a view would keep the whole chunk alive.
            self._present.append(extended[:, :, -overlap:].clone())
        return x if is_still else extended


class StillConv3d(nn.Conv3d):
    """3-D convolution that takes a single frame to be one behind zero frames, of which only the last tap sees it."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] > 1:
            return super().forward(x)
        # A third of the arithmetic, and far more than that saved where 3-D kernels are poor.
        weight, padding = self.weight[:, :, -1], (int(self.padding[1]), int(self.padding[2]))
        return F.conv2d(x[:, :, 0], weight, self.bias, self.stride[1:], padding).unsqueeze(2)


class CausalConv3d(nn.Module):
    """3-D convolution, zero-padded by k // 2 on all sides in space and by k - 1 frames, only in front, in time."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        super().__init__()
        space = kernel_size // 2
        self.conv = StillConv3d(in_channels, out_channels, kernel_size, stride, padding=(0, space, space))
        self.padding = kernel_size - 1
        self.overlap = kernel_size - stride[0]

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        """x [B,C,T,H,W], the chunk after those in the cache -> [B,C',T',H',W'], as if all chunks had come at once."""
        if self.padding:
            x = cache.extend(x, self.padding, self.overlap)
        out: Tensor = self.conv(x)
        return out
