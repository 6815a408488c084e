"""Between pictures and normalised latents: input images, posterior samples, decoded frames as uint8."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pyramid_flow.errors import NonFiniteError
from pyramid_flow.images.fitting import ImageFit, fit_image
from pyramid_flow.presets import LatentStatistics
from pyramid_flow.vae.model import LatentDistribution, VAENetwork, temporal_chunks

Item = TypeVar("Item")


def image_pixels(image: Image.Image, height: int, width: int, fit: ImageFit = "crop") -> Tensor:
    """Bring an image to a size, see `fit_image`: float32 [1,3,1,H,W] in [-1, 1]; raises InvalidValueError."""
    fitted = fit_image(image, height, width, fit)
    pixels = torch.from_numpy(np.asarray(fitted, dtype=np.float32)) / 255 * 2 - 1
    return pixels.permute(2, 0, 1)[None, :, None].contiguous()


@torch.no_grad()
def encode_image(vae: VAENetwork, pixels: Tensor) -> LatentDistribution:
    """Encode image pixels [B,3,1,H,W] to the posterior of their latent, float32 on the CPU."""
    posterior = vae.encode_moments(pixels.to(vae.device, vae.dtype))
    return LatentDistribution(posterior.mean.float().cpu(), posterior.logvar.float().cpu())


def image_latent(posterior: LatentDistribution, noise: Tensor, statistics: LatentStatistics) -> Tensor:
    """Sample the posterior with noise [B,C,1,h,w] and normalise: the first latent frame of image-to-video."""
    return statistics.normalize(posterior.sample(noise))


@torch.no_grad()
def decode_frames(
    vae: VAENetwork,
    latents: Tensor,
    statistics: LatentStatistics,
    *,
    window: int = 1,
    tile: int | None = None,
) -> Iterator[Tensor]:
    """Decode normalised latents [B,C,T,h,w] chunk by chunk: yields uint8 [B,N,H,W,3] on the CPU.

    window: latents per chunk; tile: side of a spatial tile in pixels, None = no tiling. Memory is that of a chunk.
    """
    raw = statistics.denormalize(latents.float()).to(vae.device, vae.dtype)
    downloads: Iterator[Download] = map(Download, vae.decode_stream([*temporal_chunks(raw, window)], tile=tile))
    if vae.device.type != "cpu":  # whoever takes the frames does so while the device works on the next ones
        downloads = one_ahead(downloads)
    for download in downloads:
        yield download.frames()


class Download:
    """Decoded frames [B,3,N,H,W] on their way to the host as uint8 [B,N,H,W,3], copied once and without waiting.

    The copy goes to pinned memory, of which PyTorch gives out the same again once the frames before have been dropped.
    """

    def __init__(self, decoded: Tensor) -> None:
        self._levels = quantized(decoded).to("cpu", non_blocking=True)
        self._is_finite = decoded.isfinite().all().to("cpu", non_blocking=True)
        self._copied = None if decoded.device.type == "cpu" else torch.Event(decoded.device)
        if self._copied:
            self._copied.record()

    def frames(self) -> Tensor:
        """Wait for the frames; raises NonFiniteError for NaN, which would become black, and infinity."""
        if self._copied:
            self._copied.synchronize()
        if not self._is_finite:
            raise NonFiniteError("the decoded frames are not finite")
        return self._levels


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield each item once the next one has been begun."""
    begun = iter(items)
    for item in begun:
        for following in begun:
            yield item
            item = following
        yield item


def as_uint8(frames: Tensor) -> Tensor:
    """Return `quantized` frames on the CPU; raises NonFiniteError for NaN, which would become black, and infinity."""
    return Download(frames).frames()


def quantized(frames: Tensor) -> Tensor:
    """Map decoded frames [B,3,N,H,W] to uint8 [B,N,H,W,3]: y * 127.5 + 127.5, clamped and truncated."""
    levels = (frames.float() * 127.5 + 127.5).clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 4, 1).contiguous()
