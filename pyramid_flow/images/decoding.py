"""Decoding a picture file of a stranger, within limits on its bytes, its pixels and the work of its decoder."""

import io
from math import prod

from PIL import Image, TiffImagePlugin

from pyramid_flow.errors import InvalidValueError
from pyramid_flow.images.fitting import decoding_errors, to_rgb
from pyramid_flow.images.formats import READERS, TRANSPOSES, detect_format, invalid, orientation_of

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 2**26
"""Default limits of an input image; both are checked before it is decoded."""

MAX_SCANS = 100
"""Limit of scans in a JPEG. Each costs the time of a whole image, however few bytes it has; encoders write about 10."""

MAX_BLOCKS = 2**16
"""Limit of PNG chunks, of JPEG segments and GIF blocks before the first image, and of TIFF strips or tiles."""

MAX_TAG_VALUES = 2**12
"""Limit of values in any other TIFF tag."""

MAX_PPM_HEADER_BYTES = 2**12

MAX_EXIF_BYTES = 2**17
"""Decompressed bytes in which the orientation of a PNG's compressed EXIF is looked up."""

BACKGROUND = "white"
"""What shows through where an input image is transparent."""

BARS = "black"
"""What a padded image has above and below, or left and right."""


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file and return it upright in RGB, see `upright`.

    Pillow copies, inflates or parses metadata without a limit, so it receives the file without metadata.

    Args:
        data: The file. An animation yields its first frame.
        max_pixels: Largest width x height. The file's header decides, before any pixel is decoded.

    Raises:
        InvalidValueError: The file does not decode, or exceeds `MAX_BYTES`, `max_pixels` or a limit of its format.
    """
    if len(data) > MAX_BYTES:
        raise invalid(data, f"is larger than {MAX_BYTES} bytes")
    with decoding_errors(f"({len(data)} bytes)"):
        file_format = detect_format(data)
        pixels, exif = READERS[file_format](data)
        with Image.open(io.BytesIO(pixels), formats=(file_format,)) as image:
            if _num_decoded_pixels(image) > max_pixels:
                raise InvalidValueError("image", f"{image.width}x{image.height}", f"has more than {max_pixels} pixels")
            if _num_strip_bytes(image) > len(data):
                raise invalid(data, "has TIFF strips or tiles that overlap or end after the file")
            if file_format == "JPEG":
                image.decodermaxblock = len(pixels)  # Pillow appends and rescans blocks that libjpeg does not consume
            return _decode(image, orientation_of(image.info.get("exif", exif)))


def _decode(image: Image.Image, orientation: int) -> Image.Image:
    method = TRANSPOSES.get(orientation)
    rgb = to_rgb(image.copy() if method is None else image.transpose(method))
    rgb.info.clear()  # otherwise `upright` would apply an orientation again
    return rgb


def _num_decoded_pixels(image: Image.Image) -> int:
    """Return the number of pixels that the decoder writes, which may exceed those of the image."""
    sides = image.size
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # a decoder decodes whole tiles
        tiles = (image.tag_v2.get(tag, 1) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH))
        return prod(-(-side // int(tile)) * int(tile) for side, tile in zip(sides, tiles, strict=True))
    if image.format == "BMP" and image.info["compression"] in _BMP_RUN_LENGTH:
        return image.width * (image.height + 256)  # a run-length code may jump 255 rows ahead of the last row
    return prod(sides)


_BMP_RUN_LENGTH = (1, 2)


def _num_strip_bytes(image: Image.Image) -> int:
    """Return the sum of the strips of a compressed TIFF, whose decoder reads a strip several times if they overlap."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile) or image.info["compression"] == "raw":
        return 0
    return max(sum(map(int, image.tag_v2.get(tag, ()))) for tag in (279, 325))
