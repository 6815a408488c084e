"""Input images: decoding a file, bringing it upright and to RGB, and fitting it to a video's size."""

import io
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from pyramid_flow.errors import InvalidValueError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Picture formats that are read: none whose decoder runs another program."""

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 2**26
"""Default limits of an input image; both are checked before it is decoded."""

MAX_SCANS = 100
"""Of a JPEG, each of which costs the time of a whole image, however few bytes it has; encoders write about 10."""

BACKGROUND = "white"
"""What shows through where an input image is transparent."""

BARS = "black"
"""What a padded image has above and below, or left and right."""

ImageFit = Literal["crop", "pad"]


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file and return it upright in RGB, see `upright`.

    Args:
        data: The file. An animation yields its first frame.
        max_pixels: Largest width x height. The file's header decides, before any pixel is decoded.

    Raises:
        InvalidValueError: The file does not decode, or exceeds `MAX_BYTES` or `max_pixels`.
    """
    if len(data) > MAX_BYTES:
        raise InvalidValueError("image", f"({len(data)} bytes)", f"is larger than {MAX_BYTES} bytes")
    with _decoding(f"({len(data)} bytes)"), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if max(image.width * image.height, _tile_pixels(image, data)) > max_pixels:
            raise InvalidValueError("image", f"{image.width}x{image.height}", f"has more than {max_pixels} pixels")
        if image.format in ("JPEG", "MPO") and _num_scans(data) > MAX_SCANS:
            raise InvalidValueError("image", f"({len(data)} bytes)", f"has more than {MAX_SCANS} JPEG scans")
        return upright(image)


_JPEG_SEGMENT = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")
_START_OF_SCAN, _END_OF_IMAGE = b"\xda", b"\xd9"


def _num_scans(data: bytes) -> int:
    """Return the number of scans of the first image of a JPEG file, at most `MAX_SCANS` + 1."""
    scans, position = 0, 2
    while scans <= MAX_SCANS and (segment := _JPEG_SEGMENT.search(data, position)) and segment[1] != _END_OF_IMAGE:
        scans += segment[1] == _START_OF_SCAN
        position = segment.end() + int.from_bytes(data[segment.end() : segment.end() + 2])
    return scans


def _tile_pixels(image: Image.Image, data: bytes) -> int:
    """Return the pixels of a TIFF's tile, which may be larger than the image but decodes as a whole; otherwise 0.

    Raises InvalidValueError if a tag occurs twice: Pillow uses the last one and its decoder the first one.
    """
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 0
    tags = _tiff_tags(data)
    if len(set(tags)) < len(tags):
        raise InvalidValueError("image", f"({len(data)} bytes)", "repeats a tag of its TIFF directory")
    sides = [image.tag_v2[tag] for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH) if tag in tags]
    return prod(map(int, sides)) if sides else 0


def _tiff_tags(data: bytes) -> list[int]:
    """Return the tags of the first directory of a TIFF or BigTIFF."""
    order = "<" if data.startswith(b"II") else ">"
    is_big = 43 in data[2:4]
    (start,) = struct.unpack_from(f"{order}Q" if is_big else f"{order}I", data, 8 if is_big else 4)
    (count,) = struct.unpack_from(f"{order}Q" if is_big else f"{order}H", data, start)
    head, size = (8, 20) if is_big else (2, 12)
    entries = range(start + head, min(start + head + count * size, len(data)), size)
    return [struct.unpack_from(f"{order}H", data, entry)[0] for entry in entries]


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
    with _decoding(f"{image.width}x{image.height}"):
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
