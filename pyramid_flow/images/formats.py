"""Picture files without the metadata that Pillow would parse without a limit, and the orientation in their EXIF."""

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import NamedTuple

import numpy as np
from PIL import Image

from pyramid_flow.errors import InvalidValueError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Picture formats that are read: none whose decoder runs another program."""

MAX_SCANS = 100
"""Limit of scans in a JPEG. Each costs the time of a whole image, however few bytes it has; encoders write about 10."""

MAX_BLOCKS = 2**16
"""Limit of PNG chunks, of JPEG segments and GIF blocks before the first image, and of TIFF strips or tiles."""

MAX_TAG_VALUES = 2**12
"""Limit of values in any other TIFF tag."""

MAX_PPM_HEADER_BYTES = 2**12

MAX_EXIF_BYTES = 2**17
"""Decompressed bytes in which the orientation of a PNG's compressed EXIF is looked up."""


def invalid(data: bytes, rule: str) -> InvalidValueError:
    return InvalidValueError("image", f"({len(data)} bytes)", rule)


_SIGNATURES: dict[str, tuple[bytes, ...]] = {
    "BMP": (b"BM",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "PPM": tuple(b"P%d" % number for number in range(1, 7)),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0"),  # Pillow reads a big-endian BigTIFF as a classic TIFF
    "WEBP": (b"RIFF",),
}


def detect_format(data: bytes) -> str:
    for file_format, signatures in _SIGNATURES.items():
        if data.startswith(signatures):
            return file_format
    raise invalid(data, UNKNOWN_FORMAT)


UNKNOWN_FORMAT = f"is not in a known picture format ({', '.join(FORMATS)})"


def _bounded(data: bytes, blocks: Iterator[bytes]) -> list[bytes]:
    """Return the blocks of a file, whose number is at most `MAX_BLOCKS`."""
    found = list(islice(blocks, MAX_BLOCKS + 1))
    if len(found) > MAX_BLOCKS:
        raise invalid(data, f"has more than {MAX_BLOCKS} blocks of metadata or pixels")
    return found


def _read_png(data: bytes) -> tuple[bytes, bytes]:
    """Return a PNG of the chunks that its pixels require, and its EXIF."""
    chunks = _bounded(data, _png_chunks(data))
    exif = next((chunk for chunk in chunks if chunk.startswith(_PNG_EXIF, 4)), b"")
    return data[:8] + b"".join(chunk for chunk in chunks if chunk[4:8] in _PNG_PIXELS), _png_exif(exif)


_PNG_PIXELS = frozenset([b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"])
_RAW_EXIF = b"Raw profile type exif\0"
"""Key of a text in which ImageMagick stores EXIF as hexadecimal digits."""

_PNG_EXIF = (b"eXIf", b"tEXt" + _RAW_EXIF, b"zTXt" + _RAW_EXIF)


def _png_chunks(data: bytes) -> Iterator[bytes]:
    position, chunk = 8, b""
    while position < len(data) and chunk[4:8] != b"IEND":
        end = position + 12 + int.from_bytes(data[position : position + 4])
        chunk = data[position:end]
        yield chunk
        position = end


def _png_exif(chunk: bytes) -> bytes:
    if chunk.startswith(b"eXIf", 4):
        return chunk[8:-4]
    text = chunk[8 + len(_RAW_EXIF) : -4][:MAX_EXIF_BYTES]
    with suppress(ValueError, zlib.error):
        if chunk.startswith(b"zTXt", 4):
            text = zlib.decompressobj().decompress(text[1:], MAX_EXIF_BYTES)
        digits = b"".join(text.split(b"\n")[3:])
        return bytes.fromhex(digits[: len(digits) // 2 * 2].decode("latin-1"))
    return b""


def _read_jpeg(data: bytes) -> tuple[bytes, bytes]:
    """Return a JPEG of the segments that its pixels require, and its EXIF.

    Raises InvalidValueError if it has more than `MAX_SCANS` scans.
    """
    segments = _bounded(data, _jpeg_segments(data))
    pixels = data[:2] + b"".join(segment for segment in segments if segment[1] in _JPEG_PIXELS)
    if _num_scans(pixels) > MAX_SCANS:
        raise invalid(data, f"has more than {MAX_SCANS} JPEG scans")
    exif = (segment[10:] for segment in segments if segment[1] == 0xE1 and segment[4:10] == b"Exif\0\0")
    return pixels, next(exif, b"")


_JPEG_SEGMENT = re.compile(rb"\xff([^\x00-\xbf\xd0-\xd7\xff])")
"""Marker of a segment with a length: of any other marker, libjpeg skips only the marker or refuses the file."""

_JPEG_PIXELS = frozenset([*range(0xC0, 0xD0), 0xDA, 0xDB, 0xDD, 0xE0, 0xEE]) - {0xC8}
"""Frames, tables and scans; JFIF (APP0) and Adobe's APP14 name the colour space. Pillow reads a length in each."""

_START_OF_SCAN, _END_OF_IMAGE = b"\xda", b"\xd9"


def _jpeg_segments(data: bytes) -> Iterator[bytes]:
    """Yield each segment before the first scan, and the rest of the file."""
    position = 2
    while segment := _JPEG_SEGMENT.search(data, position):
        if segment[1] in (_START_OF_SCAN, _END_OF_IMAGE):
            yield data[segment.start() :]
            return
        position = _segment_end(data, segment)
        yield data[segment.start() : position]


def _segment_end(data: bytes, segment: re.Match[bytes]) -> int:
    return segment.end() + max(2, int.from_bytes(data[segment.end() : segment.end() + 2]))


def _num_scans(data: bytes) -> int:
    """Return the number of scans of the first image of a JPEG file, at most `MAX_SCANS` + 1."""
    scans, position = 0, 2
    while scans <= MAX_SCANS and (segment := _JPEG_SEGMENT.search(data, position)) and segment[1] != _END_OF_IMAGE:
        scans += segment[1] == _START_OF_SCAN
        position = _segment_end(data, segment)
    return scans


def _read_gif(data: bytes) -> tuple[bytes, bytes]:
    """Return a GIF of which only the last graphic control extension precedes the first image, and no EXIF."""
    start = 13 + (6 << (data[10] & 7) if data[10] & 0x80 else 0)  # after the palette
    *extensions, rest = _bounded(data, _gif_blocks(data, start))
    controls = [extension[:7] + b"\0" for extension in extensions if extension.startswith(b"!\xf9\x04")]
    return data[:start] + b"".join(controls[-1:]) + rest, b""


def _gif_blocks(data: bytes, position: int) -> Iterator[bytes]:
    """Yield each extension before the first image, and the rest of the file."""
    while (kind := data[position : position + 1]) not in (b",", b";", b""):
        end = _sub_blocks_end(data, position + 2) if kind == b"!" else position + 1  # decoders skip any other byte
        yield data[position:end]
        position = end
    yield data[position:]


def _sub_blocks_end(data: bytes, position: int) -> int:
    while size := data[position]:
        position += 1 + size
    return position + 1


_PPM_NUMBER = rb"(?:\s|#[^\r\n]*[\r\n])+(\d{1,10})"
_PPM_HEADER = re.compile(rb"P(?:4%(n)b%(n)b|([56])%(n)b%(n)b%(n)b)\s" % {b"n": _PPM_NUMBER})


def _read_ppm(data: bytes) -> tuple[bytes, bytes]:
    """Return a binary PPM whose levels have 8 bits, or 16 if it is grey, and no EXIF.

    Pillow scales other levels one by one in Python, and parses a plain PPM in quadratic time.

    Raises InvalidValueError for a plain PPM and for a header that is too long.
    """
    if data[1:2] in b"123":
        raise invalid(data, f"is a plain PPM (P{data[1:2].decode()}); use a binary one (P4, P5 or P6) or a PNG")
    header = _PPM_HEADER.match(data[:MAX_PPM_HEADER_BYTES])
    if not header:
        raise invalid(data, f"has no valid PPM header in its first {MAX_PPM_HEADER_BYTES} bytes")
    kind, maximum = header[3], int(header[6] or 255)
    if maximum == 255 or not 0 < maximum < 2**16 or (kind, maximum) == (b"5", 2**16 - 1):
        return data, b""
    sample = np.dtype(">u2" if maximum > 255 else "u1")
    samples = np.frombuffer(data, sample, (len(data) - header.end()) // sample.itemsize, header.end())
    levels = samples * np.float32(255 / maximum)
    np.minimum(np.rint(levels, out=levels), 255, out=levels)
    return b"P%b %b %b 255 " % header.group(3, 4, 5) + levels.astype(np.uint8).tobytes(), b""


class _Directory(NamedTuple):
    """First directory of a TIFF, a BigTIFF or an EXIF, which has the layout of a TIFF."""

    order: str
    """Byte order, for `struct`."""

    is_big: bool
    """Whether it is a BigTIFF, whose offsets and counts have 8 bytes."""

    entries: list[bytes]
    """Tag, type, count and value of each tag as the file stores them."""

    def header(self, entry: bytes) -> tuple[int, int, int]:
        """Return an entry's tag, type and count."""
        tag, kind, count = struct.unpack_from(f"{self.order}HHQ" if self.is_big else f"{self.order}HHI", entry)
        return tag, kind, count


def _directory(data: bytes) -> _Directory:
    order, is_big = ("<" if data.startswith(b"II") else ">"), data.startswith(b"II+\0")
    (start,) = struct.unpack_from(f"{order}Q" if is_big else f"{order}I", data, 8 if is_big else 4)
    (count,) = struct.unpack_from(f"{order}Q" if is_big else f"{order}H", data, start)
    first, size = (start + 8, 20) if is_big else (start + 2, 12)
    end = min(first + min(count, MAX_BLOCKS) * size, len(data) - size + 1)
    return _Directory(order, is_big, [data[entry : entry + size] for entry in range(first, end, size)])


def _read_tiff(data: bytes) -> tuple[bytes, bytes]:
    """Return a TIFF with a directory of the tags that its pixels require, and its EXIF: the file itself.

    Raises InvalidValueError if a tag occurs twice: Pillow uses the last one and its decoder the first one.
    """
    directory = _directory(data)
    kept = [entry for entry in directory.entries if directory.header(entry)[0] in _TIFF_PIXELS]
    tags = [directory.header(entry)[0] for entry in kept]
    if len(set(tags)) < len(tags):
        raise invalid(data, "repeats a tag of its TIFF directory")
    for tag, kind, count in map(directory.header, kept):
        if kind not in _TIFF_TYPES:
            raise invalid(data, f"has type {kind} in its TIFF tag {tag}, which is not one of {_TIFF_TYPES}")
        limit = MAX_BLOCKS if tag in _TIFF_STRIPS else MAX_TAG_VALUES
        if count > limit:
            raise invalid(data, f"has {count} values in its TIFF tag {tag}, more than {limit}")
    return _with_directory(data, directory._replace(entries=kept)), data


_TIFF_STRIPS = frozenset([273, 279, 324, 325])
"""Offsets and byte counts of strips and tiles."""

_TIFF_PIXELS = _TIFF_STRIPS | {
    *(256, 257, 258, 259, 262, 266, 277, 278, 284),  # size, samples, compression and layout
    *(292, 293, 317, 320, 322, 323, 332, 338, 339, 347),  # fax, predictor, palette, tiles, inks, alpha, JPEG tables
    *(529, 530, 531, 532),  # YCbCr
}


_TIFF_TYPES = (1, 2, 3, 4, 5, 7, 16)
"""BYTE, ASCII, SHORT, LONG, RATIONAL, UNDEFINED and LONG8. Pillow ignores others that libtiff reads."""


def _with_directory(data: bytes, directory: _Directory) -> bytes:
    """Return a TIFF that ends with a directory and refers to it instead of its own."""
    order, entries, count = directory.order, b"".join(directory.entries), len(directory.entries)
    if directory.is_big:
        header, added = data[:8] + struct.pack(f"{order}Q", len(data)), struct.pack(f"{order}Q", count)
    else:
        header, added = data[:4] + struct.pack(f"{order}I", len(data)), struct.pack(f"{order}H", count)
    return header + data[len(header) :] + added + entries + bytes(8)  # no further directory


def _read_unchanged(data: bytes) -> tuple[bytes, bytes]:
    return data, b""


READERS: dict[str, Callable[[bytes], tuple[bytes, bytes]]] = {
    "BMP": _read_unchanged,
    "GIF": _read_gif,
    "JPEG": _read_jpeg,
    "PNG": _read_png,
    "PPM": _read_ppm,
    "TIFF": _read_tiff,
    "WEBP": _read_unchanged,  # Pillow copies its EXIF to `Image.info` and parses none of its metadata
}
"""For each format: the file without the metadata that Pillow would parse, and its EXIF, empty if there is none."""


_ORIENTATION, _SHORT = 0x0112, 3

TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def orientation_of(exif: bytes) -> int:
    """Return the orientation of an EXIF; 1, which is upright, if it has none or is damaged."""
    data = exif.removeprefix(b"Exif\0\0")
    if data.startswith(_SIGNATURES["TIFF"]):
        with suppress(struct.error, OverflowError):
            directory = _directory(data)
            for entry in directory.entries:
                if directory.header(entry) == (_ORIENTATION, _SHORT, 1):
                    (orientation,) = struct.unpack_from(f"{directory.order}H", entry, 12 if directory.is_big else 8)
                    return int(orientation)
    return 1
