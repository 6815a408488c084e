"""Between pictures and normalised latents: input images, posterior samples, decoded frames as uint8."""

import io
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pyramid_flow.errors import InvalidValueError
from pyramid_flow.presets import LatentStatistics
from pyramid_flow.vae import CausalVideoVAE, LatentDistribution, temporal_chunks

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Picture formats that are read: none whose decoder runs another program."""

MAX_PIXELS = 2**26
"""Of an input image; checked before it is decoded."""


def open_image(data: bytes) -> Image.Image:
    """Decode an image file and turn it upright as its EXIF says; raises InvalidValueError if it does not decode."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InvalidValueError("image", f"{image.width}x{image.height}", f"has more than {MAX_PIXELS} pixels")
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError as error:
        raise InvalidValueError("image", f"({len(data)} bytes)", "is not in a known picture format") from error
    except InvalidValueError:
        raise
    except (
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
        OSError,
        RuntimeError,
        SyntaxError,
        ValueError,
    ) as error:
        raise InvalidValueError("image", f"({len(data)} bytes)", f"does not decode: {error}") from error


def image_pixels(image: Image.Image, height: int, width: int) -> Tensor:
    """Scale an image to cover the size, crop it around the centre: float32 [1,3,1,H,W] in [-1, 1]."""
    fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(fitted, dtype=np.float32)) / 255 * 2 - 1
    return pixels.permute(2, 0, 1)[None, :, None].contiguous()


@torch.no_grad()
def encode_image(vae: CausalVideoVAE, pixels: Tensor) -> LatentDistribution:
    """Encode image pixels [B,3,1,H,W] to the posterior of their latent, float32 on the CPU."""
    posterior = vae.encode_moments(pixels.to(vae.device, vae.dtype))
    return LatentDistribution(posterior.mean.float().cpu(), posterior.logvar.float().cpu())


def image_latent(posterior: LatentDistribution, noise: Tensor, statistics: LatentStatistics) -> Tensor:
    """Sample the posterior with noise [B,C,1,h,w] and normalise: the first latent frame of image-to-video."""
    return statistics.normalize(posterior.sample(noise))


@torch.no_grad()
def decode_frames(
    vae: CausalVideoVAE,
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
    for frames in vae.decode_stream(temporal_chunks(raw, window), tile=tile):
        yield as_uint8(frames).cpu()


def as_uint8(frames: Tensor) -> Tensor:
    """Map decoded frames [B,3,N,H,W] to uint8 [B,N,H,W,3]: y * 127.5 + 127.5, clamped and truncated."""
    levels = (frames.float() * 127.5 + 127.5).clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 4, 1).contiguous()
