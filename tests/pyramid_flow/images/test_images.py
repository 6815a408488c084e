"""Input images: files of every kind become upright RGB of the right size, and broken ones are refused."""

import io
import struct
import tracemalloc
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import ExifTags, Image, JpegImagePlugin, PngImagePlugin, features

from pyramid_flow import InvalidValueError
from pyramid_flow.images import decoding, fitting, formats
from pyramid_flow.images.decoding import open_image
from pyramid_flow.images.fitting import fit_image, upright

AVIF = ["AVIF"] if features.check("avif") else []
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8))


RED, HALF = (255, 0, 0), (255, 127, 127)


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def colours(image: Image.Image) -> list[tuple[int, ...]]:
    """Return the colours of an image of one row, from left to right."""
    assert image.mode == "RGB"
    return [tuple(colour) for colour in np.asarray(image)[0].tolist()]


def corrupted(data: bytes, seed: int) -> bytes:
    source = np.random.default_rng(seed)
    broken = np.frombuffer(data, dtype=np.uint8).copy()
    broken[source.integers(0, len(broken), size=3)] = source.integers(0, 256, size=3)
    return broken[: source.integers(1, len(broken)) if seed % 3 == 0 else None].tobytes()


def test_a_photo_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways: turn right
    upright = open_image(encoded(PICTURE, "PNG", exif=exif))
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(PICTURE), -1))
    assert np.array_equal(np.asarray(fitting.upright(upright)), np.asarray(upright))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 32), (128, 128)])
@pytest.mark.parametrize("turned", [False, True])
def test_an_image_is_scaled_to_cover_and_cropped_around_its_centre(height, width, turned):
    bands = np.zeros((64, 256, 3), dtype=np.uint8)
    bands[:, :96, 0] = bands[:, 96:160, 1] = bands[:, 160:, 2] = 255
    image = Image.fromarray(bands.swapaxes(0, 1) if turned else bands)
    levels = np.asarray(fit_image(image, height, width))
    assert levels.shape == (height, width, 3)
    inside = levels[height // 8 : -height // 8, width // 8 : -width // 8]
    assert (inside == [0, 255, 0]).all()


@pytest.mark.parametrize(("height", "width"), [(64, 128), (128, 64), (64, 64)])
def test_a_padded_image_is_whole_and_has_bars_around(height, width):
    padded = np.asarray(fit_image(Image.new("RGB", (90, 30), "red"), height, width, "pad"))
    shown = (padded == RED).all(axis=-1)
    bars = (padded == 0).all(axis=-1)
    assert (shown | bars).all()
    inner = round(width / 3)
    top = (height - inner) // 2
    assert shown[top : top + inner].all()
    assert shown.sum() == inner * width


@pytest.mark.parametrize("size", [(10_000, 1), (1, 10_000)])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_a_very_thin_image_is_no_trouble(size, fit):
    assert np.asarray(fit_image(Image.new("RGB", size, "red"), 64, 128, fit)).max() == 255


def test_an_unknown_fit_is_refused():
    with pytest.raises(InvalidValueError, match="image_fit stretch is not one of crop, pad"):
        fit_image(PICTURE, 64, 64, "stretch")


def with_palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 255, 255, 0, 0])
    image.putpixel((1, 0), 1)
    return image


def row_of(mode: str, *values: object) -> Image.Image:
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(row_of("RGBA", (*RED, 255), (*RED, 128), (*RED, 0)), "PNG"), [RED, HALF, (255, 255, 255)]),
        (encoded(row_of("LA", (0, 255), (0, 128), (0, 0)), "PNG"), [(0,) * 3, (127,) * 3, (255,) * 3]),
        (encoded(with_palette(), "PNG", transparency=0), [(255,) * 3, RED]),
        (encoded(with_palette(), "PNG", transparency=bytes([0, 128])), [(255,) * 3, HALF]),
        (encoded(with_palette(), "GIF", transparency=0), [(255,) * 3, RED]),
        (encoded(row_of("RGB", RED, (1, 2, 3)), "PNG", transparency=(1, 2, 3)), [RED, (255,) * 3]),
        (encoded(row_of("L", 0, 9, 255), "PNG"), [(0,) * 3, (9,) * 3, (255,) * 3]),
        (encoded(row_of("1", 0, 255), "PNG"), [(0,) * 3, (255,) * 3]),
        (encoded(row_of("I;16", 0, 0x0AFF, 0x8000, 0xFFFF), "PNG"), [(n,) * 3 for n in (0, 10, 128, 255)]),
        (encoded(row_of("I;16", 0, 0x0AFF, 0x8000, 0xFFFF), "TIFF"), [(n,) * 3 for n in (0, 10, 128, 255)]),
        (b"P5 4 1 65535 " + bytes([0, 0, 0x0A, 0xFF, 0x80, 0, 0xFF, 0xFF]), [(n,) * 3 for n in (0, 10, 128, 255)]),
        (encoded(row_of("CMYK", (0, 255, 255, 0), (0, 0, 0, 255)), "TIFF"), [RED, (0,) * 3]),
    ],
    ids=["RGBA", "LA", "P", "P with alpha", "GIF", "RGB with a key", "L", "1", "I;16", "I;16 TIFF", "PGM", "CMYK"],
)
def test_files_of_any_kind_become_8_bits_of_rgb_on_white(data, expected):
    assert colours(open_image(data)) == expected


def test_a_jpeg_in_cmyk_keeps_its_colours():
    [[red, green]] = np.asarray(open_image(encoded(Image.new("CMYK", (2, 1), (0, 255, 255, 0)), "JPEG"))).astype(int)
    assert np.abs([red - RED, green - RED]).max() < 8


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_is_its_first_frame(file_format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert set(colours(open_image(data))) == {RED}


@pytest.mark.parametrize(
    "image", [Image.new("F", (4, 4), 0.5), row_of("I", 0, 2**20), row_of("I", -1, 5)], ids=["F", "large", "negative"]
)
def test_levels_that_cannot_be_scaled_are_refused(image):
    with pytest.raises(InvalidValueError, match=f"image of mode {image.mode} has levels of neither 8 nor 16 bits"):
        open_image(encoded(image, "TIFF"))


def test_a_file_that_is_too_large_is_not_looked_at(monkeypatch):
    monkeypatch.setattr(decoding, "MAX_BYTES", 100)
    with pytest.raises(InvalidValueError, match=r"image \(101 bytes\) is larger than 100 bytes"):
        open_image(bytes(101))


def test_a_truncated_file_is_said_to_be_truncated():
    data = encoded(PICTURE.resize((300, 300)), "JPEG")
    with pytest.raises(InvalidValueError, match=r"does not decode: image file is truncated"):
        open_image(data[: len(data) // 2])


def test_a_bomb_is_refused_before_it_is_decoded():
    bomb = encoded(Image.new("1", (2**13, 2**13 + 1)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(InvalidValueError, match="image 8192x8193 has more than 67108864 pixels"):
        open_image(bomb)


@pytest.mark.parametrize("file_format", formats.FORMATS)
def test_a_caller_lowers_the_limit_on_pixels_for_every_format(file_format, monkeypatch):
    data = encoded(PICTURE, file_format)
    assert open_image(data, max_pixels=PICTURE.width * PICTURE.height).size == PICTURE.size
    monkeypatch.setattr(decoding, "_decode", lambda *_: pytest.fail("pixels were decoded"))
    with pytest.raises(InvalidValueError, match="image 16x12 has more than 191 pixels"):
        open_image(data, max_pixels=191)


def tiff(*tags: tuple[int, int, int, int], body: bytes = b"") -> bytes:
    """Return a TIFF of a body, which begins at byte 8, and a directory of (tag, type, count, value)."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(tags)) + entries + bytes(4)


def grey_tiff(width: int, height: int, *tags: tuple[int, int, int, int], body: bytes, compression: int = 8) -> bytes:
    size = ((256, 4, 1, width), (257, 4, 1, height), (258, 4, 1, 8), (259, 4, 1, compression), (262, 4, 1, 1))
    return tiff(*size, (277, 4, 1, 1), *tags, body=body)


def tiled_tiff(*tiles: int) -> bytes:
    """Return a deflated TIFF of 10x10 black pixels in one tile; several sides repeat the tags of its size."""
    body = zlib.compress(bytes(tiles[0] ** 2))
    sides = [(tag, 4, 1, side) for tag in (322, 323) for side in tiles]
    return grey_tiff(10, 10, *sides, (324, 4, 1, 8), (325, 4, 1, len(body)), body=body)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiled_tiff(2**11), "image 10x10 has more than 4000000 pixels"),
        (tiled_tiff(2**11, 16), r"image \(\d+ bytes\) repeats a tag of its TIFF directory"),
    ],
    ids=["large tile", "two sizes of a tile"],
)
def test_a_tile_larger_than_its_image_counts_as_its_size(data, message):
    with pytest.raises(InvalidValueError, match=message):
        open_image(data, max_pixels=4_000_000)


def repeated(offset: int, size: int, count: int) -> bytes:
    """Return the offsets of `count` strips or tiles at the same offset, and their sizes."""
    return struct.pack("<I", offset) * count + struct.pack("<I", size) * count


def test_wide_tiles_of_a_thin_image_count_as_their_size():
    strips = repeated(8, 1, 256)
    places = ((322, 4, 1, 2**14), (323, 4, 1, 16), (324, 4, 256, 8), (325, 4, 256, 8 + 4 * 256))
    with pytest.raises(InvalidValueError, match="image 1x4096 has more than 4000000 pixels"):
        open_image(grey_tiff(1, 4096, *places, body=strips), max_pixels=4_000_000)


def test_strips_of_a_compressed_tiff_that_overlap_are_refused():
    count, strip = 4096, zlib.compress(bytes(8))  # in reversed bit order, libtiff copies every strip
    offsets = 8 + len(strip)
    places = ((266, 3, 1, 2), (273, 4, count, offsets), (278, 4, 1, 1), (279, 4, count, offsets + 4 * count))
    data = grey_tiff(8, count, *places, body=strip + repeated(8, 2**15, count))
    with pytest.raises(InvalidValueError, match=rf"image \({len(data)} bytes\) has TIFF strips or tiles that overlap"):
        open_image(data)


@pytest.mark.parametrize(("tag", "limit"), [(258, 2**12), (273, 2**16), (279, 2**16), (325, 2**16)])
def test_a_tiff_tag_of_many_values_is_refused(tag, limit):
    data = tiff((tag, 5, limit + 1, 8))
    message = rf"image \({len(data)} bytes\) has {limit + 1} values in its TIFF tag {tag}, more than {limit}"
    with pytest.raises(InvalidValueError, match=message):
        open_image(data)


@pytest.mark.parametrize("tag", [279, 322])
def test_a_tiff_tag_of_a_type_that_only_libtiff_reads_is_refused(tag):
    data = tiff((tag, 17, 1, 8))
    with pytest.raises(
        InvalidValueError, match=rf"image \({len(data)} bytes\) has type 17 in its TIFF tag {tag}, which"
    ):
        open_image(data)


def test_a_tiff_tag_that_pixels_do_not_require_may_have_any_number_of_values():
    assert open_image(grey_tiff(1, 1, (273, 4, 1, 8), (282, 5, 2**20, 8), body=bytes(8), compression=1)).size == (1, 1)


def progressive_jpeg(repeats: int) -> bytes:
    """Return a JPEG whose last scan is repeated; a scan without any change has 56 bytes."""
    data = encoded(Image.new("L", (16, 16)), "JPEG", progressive=True)
    end, scan = data[-2:], data[data.rindex(b"\xff\xc4") : -2]
    return data[:-2] + scan * repeats + end


def test_a_jpeg_of_many_scans_is_refused():
    data = progressive_jpeg(formats.MAX_SCANS)
    with pytest.raises(InvalidValueError, match=rf"image \({len(data)} bytes\) has more than 100 JPEG scans"):
        open_image(data)


@pytest.mark.parametrize("marker", [0x01, 0x02, 0x05, 0xBF, 0xD0])
def test_scans_behind_a_marker_that_libjpeg_skips_are_counted(marker):
    data = progressive_jpeg(formats.MAX_SCANS)
    start = data.index(b"\xff\xda") + 10  # within the first scan, where it would be found at a restart
    data = data[:start] + bytes([0xFF, marker]) + struct.pack(">H", len(data) - start - 2) + data[start:]
    with pytest.raises(InvalidValueError, match="has more than 100 JPEG scans"):
        open_image(data)


def test_bytes_after_the_end_of_a_jpeg_are_no_scans():
    data = progressive_jpeg(20) + b"\xff\xda" * formats.MAX_SCANS  # a phone appends a video, a gain map or a preview
    assert open_image(data).size == (16, 16)


def test_padding_of_a_jpeg_is_read_once(monkeypatch):
    sizes, load_read = [], JpegImagePlugin.JpegImageFile.load_read
    monkeypatch.setattr(
        JpegImagePlugin.JpegImageFile, "load_read", lambda self, size: sizes.append(size) or load_read(self, size)
    )
    data = encoded(PICTURE, "JPEG")
    assert open_image(data[:-2] + b"\xff" * 2**20 + data[-2:]).size == PICTURE.size
    assert len(sizes) == 1


@pytest.mark.parametrize("data", [tiled_tiff(16), encoded(Image.new("L", (10, 10)), "TIFF", big_tiff=True)])
def test_tiled_and_large_tiff_files_are_read(data):
    assert np.asarray(open_image(data, max_pixels=16**2)).shape == (10, 10, 3)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd", "lzma"])
def test_compressed_tiff_files_open_as_they_were(compression):
    assert np.array_equal(np.asarray(open_image(encoded(PICTURE, "TIFF", compression=compression))), PICTURE)


QUARTERS = Image.fromarray(
    np.kron(
        np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8), np.ones((16, 32, 1), np.uint8)
    )
)
UPRIGHT = {
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}


def exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "a camera"
    exif[ExifTags.Base.Orientation] = orientation
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"a comment"
    return exif.tobytes()


def raw_profile(exif: bytes) -> bytes:
    """Return an EXIF as ImageMagick stores it in the text of a PNG."""
    digits = exif.hex()
    lines = [digits[start : start + 72] for start in range(0, len(digits), 72)]
    return "\n".join(["", "exif", f"{len(exif):8}", *lines, ""]).encode()


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_with_text(key: str, text: bytes, zip: bool = True) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text(key, text, zip=zip)
    return encoded(QUARTERS, "PNG", pnginfo=info)


def turned_files(orientation: int) -> dict[str, bytes]:
    exif = exif_of(orientation)
    big_endian = b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHHI", 0x0112, 3, 1, orientation, 0, 0)
    return {
        "JPEG": encoded(QUARTERS, "JPEG", exif=exif),
        "JPEG, big-endian": encoded(QUARTERS, "JPEG", exif=big_endian),
        "PNG": encoded(QUARTERS, "PNG", exif=exif),
        "PNG, raw profile": png_with_text("Raw profile type exif", raw_profile(exif)),
        "PNG, raw profile without compression": png_with_text("Raw profile type exif", raw_profile(exif), zip=False),
        "WEBP": encoded(QUARTERS, "WEBP", exif=exif),
        "TIFF": encoded(QUARTERS, "TIFF", exif=exif),
        "TIFF, compressed": encoded(QUARTERS, "TIFF", tiffinfo={0x0112: orientation}, compression="tiff_lzw"),
        "BigTIFF": encoded(QUARTERS, "TIFF", exif=exif, big_tiff=True),
    }


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_every_orientation_of_every_format_is_applied_once(orientation):
    expected = UPRIGHT[orientation](np.asarray(QUARTERS)).astype(int)
    for name, data in turned_files(orientation).items():
        image = open_image(data)
        assert image.size == expected.shape[1::-1], name
        assert np.abs(np.asarray(image) - expected).mean() < 8, name  # a JPEG blurs the edges
        assert upright(image).tobytes() == image.tobytes(), name


def overlapping_tags(count: int, size: int) -> bytes:
    """Return an EXIF whose tags all have the same value."""
    start = 8 + 2 + 12 * count + 4
    tags = b"".join(struct.pack("<HHII", 40_000 + index, 1, size, start) for index in range(count))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", count) + tags + bytes(4 + size)


EXIF_BOMB, JPEG_EXIF_BOMB = overlapping_tags(200, 2**19), b"Exif\0\0" + overlapping_tags(2500, 30_000)


def jpeg_with_bomb(before: bytes) -> bytes:
    """Return a JPEG with an EXIF bomb in bytes of its header that a decoder may skip."""
    data, length = encoded(QUARTERS, "JPEG"), struct.pack(">H", len(JPEG_EXIF_BOMB) + 2)
    return data[:2] + before + b"\xff\xe1" + length + JPEG_EXIF_BOMB + data[20:]  # without JFIF, which has a resolution


@pytest.mark.parametrize(
    "data",
    [
        encoded(QUARTERS, "PNG", exif=EXIF_BOMB),
        png_with_text("Raw profile type exif", raw_profile(EXIF_BOMB)),
        encoded(QUARTERS, "JPEG", exif=JPEG_EXIF_BOMB, dpi=(72, 72)),
        jpeg_with_bomb(b""),
        jpeg_with_bomb(b"\xff\xc8\xff\xff"),
        jpeg_with_bomb(b"\xff\xd8\xff\xff"),
        jpeg_with_bomb(b"\xff\xd9"),
        encoded(QUARTERS, "WEBP", exif=EXIF_BOMB),
        grey_tiff(
            *(1, 1, (273, 4, 1, 8), *((40_000 + tag, 1, 2**19, 8) for tag in range(200))),
            body=bytes(2**19),
            compression=1,
        ),
        grey_tiff(1, 1, (273, 4, 1, 8), (0x8769, 4, 1, 8), body=EXIF_BOMB[8:], compression=1),
    ],
    ids=[
        "PNG",
        "PNG text",
        "JPEG",
        "JPEG without resolution",
        "JPEG in JPG",
        "JPEG in SOI",
        "JPEG after EOI",
        "WEBP",
        "TIFF",
        "EXIF of a TIFF",
    ],
)
def test_tags_that_share_a_value_take_no_memory(data):
    tracemalloc.start()
    try:
        with suppress(InvalidValueError):
            open_image(data)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def test_only_the_first_exif_of_a_png_is_decompressed():
    chunk = png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(2**17)))
    data = encoded(PICTURE, "PNG")
    assert open_image(data[:33] + chunk * 2**14 + data[33:]).size == PICTURE.size


def test_bytes_after_the_end_of_a_png_are_no_chunks():
    assert open_image(encoded(PICTURE, "PNG") + bytes(2**20)).size == PICTURE.size


def test_large_text_and_profiles_of_a_png_are_not_decompressed():
    info = PngImagePlugin.PngInfo()
    for index in range(5):  # 8 MiB each, as the graph of a node editor; Pillow refuses more than 1
        info.add_text(f"workflow {index}", bytes(2**23), zip=True)
    data = encoded(QUARTERS, "PNG", pnginfo=info, icc_profile=bytes(2**23))
    tracemalloc.start()
    try:
        assert open_image(data).size == QUARTERS.size
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [1, 2, 3])
def test_a_plain_ppm_is_refused(kind):
    data = b"P%d 4096 1024 255\n" % kind + b"#\n" * 2**18
    message = rf"image \({len(data)} bytes\) is a plain PPM \(P{kind}\); use a binary one \(P4, P5 or P6\) or a PNG"
    with pytest.raises(InvalidValueError, match=message):
        open_image(data)


def test_a_binary_ppm_may_have_comments_and_any_maximum():
    red = [RED, (0,) * 3]
    assert colours(open_image(b"P6\n# GIMP\n2 1\n# levels\n255\n\xff\0\0\0\0\0")) == red
    assert colours(open_image(b"P6 2 1 100\n\x64\0\0\0\0\0")) == red
    assert colours(open_image(b"P6 2 1 1023\n\x03\xff" + bytes(10))) == red
    assert colours(open_image(b"P5 2 1 15\n\x0f\x05")) == [(255,) * 3, (85,) * 3]
    assert colours(open_image(b"P4 2 1\n\x80")) == [(0,) * 3, (255,) * 3]
    with pytest.raises(InvalidValueError, match="has no valid PPM header in its first 4096 bytes"):
        open_image(b"P6\n" + b"#\n" * 2**18 + b"1 1 255 " + bytes(3))


def gif_with(extension: bytes) -> bytes:
    """Return a GIF with an extension before its first image."""
    data = encoded(with_palette(), "GIF", transparency=0)
    start = data.index(b"!\xf9")
    return data[:start] + extension + data[start:]


def test_a_gif_of_many_extensions_is_refused():
    data = gif_with(b"!\xfe\x01a\0" * 2**16)
    with pytest.raises(InvalidValueError, match=rf"image \({len(data)} bytes\) has more than 65536 blocks"):
        open_image(data)


@pytest.mark.parametrize(
    "extension",
    [b"!\xfe\x01a\0" * 2**15, b"!\xfe" + b"\x01a" * 2**18 + b"\0", b"!\xf9\x04\0\0\0\0\0", b"\0\0"],
    ids=["comments", "long comment", "two controls", "padding"],
)
def test_extensions_before_the_image_of_a_gif_are_skipped(extension):
    assert colours(open_image(gif_with(extension))) == [(255,) * 3, RED]


@pytest.mark.parametrize(
    "data",
    [
        b"\x89PNG\r\n\x1a\n" + b"\0\0\0\0abCd\0\0\0\0" * (2**16 + 1),
        b"\xff\xd8" + b"\xff\xc4\0\x02" * (2**16 + 1),
    ],
    ids=["PNG", "JPEG"],
)
def test_a_file_of_many_blocks_is_refused(data):
    with pytest.raises(InvalidValueError, match=rf"image \({len(data)} bytes\) has more than 65536 blocks"):
        open_image(data)


def run_length_bmp(width: int, height: int, codes: bytes) -> bytes:
    palette = bytes(4) + b"\0\0\xff\0"
    start = 14 + 40 + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(codes), 0, 0, 2, 0)
    return b"BM" + struct.pack("<IHHI", start + len(codes), 0, 0, start) + header + palette + codes


def test_a_jump_in_a_bmp_counts_as_pixels():
    assert colours(open_image(run_length_bmp(2, 1, b"\x01\x01\x01\0\0\x01"))) == [RED, (0,) * 3]
    with pytest.raises(InvalidValueError, match="image 1048576x1 has more than 67108864 pixels"):
        open_image(run_length_bmp(2**20, 1, b"\0\x02\xff\xff"))


def test_metadata_of_a_jpeg_changes_no_pixel():
    plain = np.asarray(open_image(encoded(QUARTERS, "JPEG")))
    photo = encoded(QUARTERS, "JPEG", exif=exif_of(1), icc_profile=bytes(200_000), comment=b"a comment")
    assert np.array_equal(open_image(photo), plain)
    several = encoded(QUARTERS, "MPO", save_all=True, append_images=[PICTURE])
    assert np.array_equal(open_image(several), plain)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_images_of_any_mode_are_accepted(mode):
    source = PICTURE.convert("L").convert("I").convert("I;16") if mode == "I;16" else PICTURE.convert(mode)
    fitted = fit_image(source, 64, 64)
    assert (fitted.mode, fitted.size) == ("RGB", (64, 64))


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "GIF"])
def test_lossless_files_open_as_they_were(file_format):
    source = PICTURE.convert("L").convert("RGB") if file_format == "GIF" else PICTURE
    image = open_image(encoded(source, file_format))
    assert image.mode == "RGB"
    assert np.array_equal(np.array(image), np.array(source))


@pytest.mark.parametrize("data", [b"", b"not an image", encoded(PICTURE, "PNG")[:60], encoded(PICTURE, "JPEG")[:200]])
def test_an_image_that_does_not_decode_is_refused(data):
    with pytest.raises(InvalidValueError, match=rf"image \({len(data)} bytes\) (does not decode|is not in)"):
        open_image(data)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_gives_no_other_error():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = encoded(PICTURE, "JPEG", exif=exif.tobytes())
    start = data.index(b"Exif")
    refused = 0
    for seed in range(300):
        damaged = bytearray(data)
        for place in np.random.default_rng(seed).integers(start, start + 40, 3):
            damaged[place] = (damaged[place] + 1 + seed) % 256
        try:
            open_image(bytes(damaged))
        except InvalidValueError:
            refused += 1
    assert refused


def test_integers_of_32_bits_may_hold_levels_of_8():
    assert colours(upright(row_of("I", 0, 9, 200))) == [(0,) * 3, (9,) * 3, (200,) * 3]
    assert colours(upright(row_of("I", 0, 0x0AFF, 0xFFFF))) == [(0,) * 3, (10,) * 3, (255,) * 3]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "ICO", *AVIF])
def test_broken_files_give_no_other_error(file_format):
    data = encoded(PICTURE, file_format)
    refused = 0
    for seed in range(60):
        try:
            open_image(corrupted(data, seed))
        except InvalidValueError:
            refused += 1
    assert refused
