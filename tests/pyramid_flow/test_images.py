"""Input images: files of every kind become upright RGB of the right size, and broken ones are refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, features

from pyramid_flow import InvalidValueError, images
from pyramid_flow.images import fit_image, open_image, upright

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
    assert np.array_equal(np.asarray(images.upright(upright)), np.asarray(upright))


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
    monkeypatch.setattr(images, "MAX_BYTES", 100)
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


@pytest.mark.parametrize("file_format", images.FORMATS)
def test_a_caller_lowers_the_limit_on_pixels_for_every_format(file_format, monkeypatch):
    data = encoded(PICTURE, file_format)
    assert open_image(data, max_pixels=PICTURE.width * PICTURE.height).size == PICTURE.size
    monkeypatch.setattr(images, "upright", lambda image: pytest.fail("pixels were decoded"))
    with pytest.raises(InvalidValueError, match="image 16x12 has more than 191 pixels"):
        open_image(data, max_pixels=191)


def tiled_tiff(*tiles: int) -> bytes:
    """Return a deflated TIFF of 10x10 black pixels in one tile; several sides repeat the tags of its size."""
    body = zlib.compress(bytes(tiles[0] ** 2))
    tags = [(256, 10), (257, 10), (258, 8), (259, 8), (262, 1), (277, 1)]
    tags += [(tag, side) for tag in (322, 323) for side in tiles] + [(324, 8), (325, len(body))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(tags)) + entries + bytes(4)


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


def progressive_jpeg(repeats: int) -> bytes:
    """Return a JPEG whose last scan is repeated; a scan without any change has 56 bytes."""
    data = encoded(Image.new("L", (16, 16)), "JPEG", progressive=True)
    end, scan = data[-2:], data[data.rindex(b"\xff\xc4") : -2]
    return data[:-2] + scan * repeats + end


def test_a_jpeg_of_many_scans_is_refused():
    data = progressive_jpeg(images.MAX_SCANS)
    with pytest.raises(InvalidValueError, match=rf"image \({len(data)} bytes\) has more than 100 JPEG scans"):
        open_image(data)


def test_bytes_after_the_end_of_a_jpeg_are_no_scans():
    data = progressive_jpeg(20) + b"\xff\xda" * images.MAX_SCANS  # a phone appends a video, a gain map or a preview
    assert open_image(data).size == (16, 16)


@pytest.mark.parametrize("data", [tiled_tiff(16), encoded(Image.new("L", (10, 10)), "TIFF", big_tiff=True)])
def test_tiled_and_large_tiff_files_are_read(data):
    assert np.asarray(open_image(data, max_pixels=16**2)).shape == (10, 10, 3)


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
