"""Decoded images: brought upright and to RGB, and fitted to a video's size."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pyramid_flow.errors import InvalidValueError
from pyramid_flow.images.formats import UNKNOWN_FORMAT

BACKGROUND = "white"
"""What shows through where an input image is transparent."""

BARS = "black"
"""What a padded image has above and below, or left and right."""

ImageFit = Literal["crop", "pad"]


@contextmanager
def decoding_errors(shown: str) -> Iterator[None]:
    """Turn what Pillow raises while it decodes into InvalidValueError."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise InvalidValueError("image", shown, UNKNOWN_FORMAT) from error
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
    return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    background = Image.new("RGBA", image.size, BACKGROUND)
    return Image.alpha_composite(background, image.convert("RGBA")).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey levels of 16 bits, which Pillow would clip; integers of 32 bits may hold levels of 8."""
    levels = np.asarray(image)
    if levels.dtype.kind == "f" or levels.min() < 0 or levels.max() >= 2**16:
        raise InvalidValueError("image", f"of mode {image.mode}", "has levels of neither 8 nor 16 bits")
    has_8_bits = image.mode == "I" and levels.max() < 2**8
    return Image.fromarray((levels if has_8_bits else levels >> 8).astype(np.uint8))


def fit_image(image: Image.Image, height: int, width: int, fit: ImageFit = "crop") -> Image.Image:
    """Return an image upright, in RGB and of a size.

    fit: "crop" = scaled to cover the size and cropped around the centre; "pad" = scaled to lie within it, centred, with
    `BARS` around. Raises InvalidValueError for another fit, another type than an image, or an image that does not
    decode.
    """
    if not isinstance(image, Image.Image):
        raise InvalidValueError("image", f"of type {type(image).__name__}", "is not a PIL.Image.Image")
    if fit not in get_args(ImageFit):
        raise InvalidValueError("image_fit", fit, f"is not one of {', '.join(get_args(ImageFit))}")
    with decoding_errors(f"{image.width}x{image.height}"):
        rgb = upright(image)
    size = (width, height)
    return _padded(rgb, size) if fit == "pad" else ImageOps.fit(rgb, size, Image.Resampling.LANCZOS)


def _padded(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Do what ImageOps.pad does, which makes a very thin image 0 pixels thin."""
    scale = min(size[0] / image.width, size[1] / image.height)
    inner = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
    )
    padded = Image.new("RGB", size, BARS)
    padded.paste(inner, ((size[0] - inner.width) // 2, (size[1] - inner.height) // 2))
    return padded
