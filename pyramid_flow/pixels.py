"""Between pictures and normalised latents: input images, posterior samples, decoded frames as uint8."""

import io
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pyramid_flow.errors import InvalidValueError, NonFiniteError
from pyramid_flow.presets import LatentStatistics
from pyramid_flow.vae import CausalVideoVAE, LatentDistribution, temporal_chunks

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Picture formats that are read: none whose decoder runs another program."""

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 2**26
"""Of an input image; both are checked before it is decoded."""

BACKGROUND = "white"
"""What shows through where an input image is transparent."""

BARS = "black"
"""What a padded image has above and below, or left and right."""

ImageFit = Literal["crop", "pad"]

Item = TypeVar("Item")


def open_image(data: bytes) -> Image.Image:
    """Decode an image file, of an animation the first frame, and return it upright in RGB, see `upright`.

    Raises InvalidValueError if it does not decode, or is larger than `MAX_BYTES` or `MAX_PIXELS`.
    """
    if len(data) > MAX_BYTES:
        raise InvalidValueError("image", f"({len(data)} bytes)", f"is larger than {MAX_BYTES} bytes")
    with _decoding(f"({len(data)} bytes)"), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise InvalidValueError("image", f"{image.width}x{image.height}", f"has more than {MAX_PIXELS} pixels")
        return upright(image)


@contextmanager
def _decoding(shown: str) -> Iterator[None]:
    """Turn what Pillow raises while it decodes into InvalidValueError."""
    try:
        yield
    except UnidentifiedImageError as error:
        rule = f"is not in a known picture format ({', '.join(FORMATS)})"
        raise InvalidValueError("image", shown, rule) from error
    except InvalidValueError:
        raise
    except (
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
        ArithmeticError,
        AttributeError,
        LookupError,
        OSError,
        RuntimeError,
        SyntaxError,
        TypeError,
        ValueError,
        struct.error,
    ) as error:
        raise InvalidValueError("image", shown, f"does not decode: {error}") from error


def upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF says and bring it to RGB: transparency over `BACKGROUND`, 16-bit grey scaled to 8.

    Raises InvalidValueError if its levels are neither of 8 nor of 16 bits.
    """
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith(("I", "F")):
        turned = _eight_bits(turned)
    if not turned.has_transparency_data:
        return turned.convert("RGB")
    background = Image.new("RGBA", turned.size, BACKGROUND)
    return Image.alpha_composite(background, turned.convert("RGBA")).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey levels of 16 bits, which Pillow would clip; integers of 32 bits may hold levels of 8."""
    levels = np.asarray(image)
    if levels.dtype.kind == "f" or levels.min() < 0 or levels.max() >= 2**16:
        raise InvalidValueError("image", f"of mode {image.mode}", "has levels of neither 8 nor 16 bits")
    has_8_bits = image.mode == "I" and levels.max() < 2**8
    return Image.fromarray((levels if has_8_bits else levels >> 8).astype(np.uint8))


def image_pixels(image: Image.Image, height: int, width: int, fit: ImageFit = "crop") -> Tensor:
    """Bring an image to a size: float32 [1,3,1,H,W] in [-1, 1].

    fit: "crop" = scaled to cover the size and cropped around the centre; "pad" = scaled to lie within it, centred, with
    `BARS` around. Raises InvalidValueError for another fit, or an image that is none or does not decode.
    """
    if not isinstance(image, Image.Image):
        raise InvalidValueError("image", f"of type {type(image).__name__}", "is not a PIL.Image.Image")
    if fit not in get_args(ImageFit):
        raise InvalidValueError("image_fit", fit, f"is not one of {', '.join(get_args(ImageFit))}")
    with _decoding(f"{image.width}x{image.height}"):
        rgb = upright(image)
    size = (width, height)
    fitted = _padded(rgb, size) if fit == "pad" else ImageOps.fit(rgb, size, Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(fitted, dtype=np.float32)) / 255 * 2 - 1
    return pixels.permute(2, 0, 1)[None, :, None].contiguous()


def _padded(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Do what ImageOps.pad does, which makes a very thin image 0 pixels thin."""
    scale = min(size[0] / image.width, size[1] / image.height)
    inner = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
    )
    padded = Image.new("RGB", size, BARS)
    padded.paste(inner, ((size[0] - inner.width) // 2, (size[1] - inner.height) // 2))
    return padded


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
