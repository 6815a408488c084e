"""The gallery is a picture of what it was given, whatever that was."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.media.video import ThumbnailStrip
from pipeline.reports import contact_sheet as report
from pipeline.reports.contact_sheet import MAX_ENTRIES, TILE_WIDTH, GalleryEntry, gallery
from pyramid_flow.errors import InvalidValueError

BLUE = (0, 0, 200)


def blue_strip(height=64, width=128, num_frames=4):
    strip = ThumbnailStrip(num_frames)
    strip.add(np.full((num_frames, height, width, 3), BLUE, np.uint8))
    return strip.webp()


def pixels(png):
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB")).astype(int)


def near(image, colour, tolerance=12):
    return (np.abs(image - colour) <= tolerance).all(-1)


def test_the_sheet_is_white_and_holds_every_strip():
    sheet = pixels(gallery([GalleryEntry("a", "b", blue_strip())] * 5, columns=2))
    assert (sheet[[0, -1]] == 255).all()
    assert near(sheet, BLUE).sum() == pytest.approx(5 * 64 * 4 * 128, rel=0.02)


def test_a_failed_row_is_a_red_tile_in_place_of_its_strip():
    sheet = pixels(gallery([GalleryEntry("a", "b", blue_strip(), error="height 700 is not a multiple of 64")]))
    assert not near(sheet, BLUE).any()
    assert near(sheet, (0xF3, 0xE9, 0xE9), 0).sum() > 10_000
    assert near(sheet, (0x8F, 0x1F, 0x1F), 0).any()


def test_a_longer_reason_does_not_reach_beyond_its_tile():
    sheet = pixels(gallery([GalleryEntry("w" * 999, "i" * 999, error="e" * 999), GalleryEntry("", "", None)]))
    gap = slice(report.MARGIN + TILE_WIDTH, report.MARGIN + TILE_WIDTH + report.GAP)
    below_heading = 2 * report.MARGIN
    assert (sheet[below_heading:, gap] == 255).all()
    assert (sheet[:, -report.MARGIN + 1 :] == 255).all()
    assert (sheet[-report.MARGIN + 4 :] == 255).all()


@pytest.mark.parametrize("shape", [(768, 1280), (1280, 768), (1280, 256, 1), (64, 2), (2, 64)])
def test_any_size_of_strip_fits_a_tile(shape):
    sheet = pixels(gallery([GalleryEntry("a", "b", blue_strip(*shape))]))
    assert sheet.shape[1] == TILE_WIDTH + 2 * report.MARGIN
    assert sheet.shape[0] < 600


def test_no_entries_give_a_small_sheet():
    sheet = pixels(gallery([]))
    assert sheet.shape[0] < 200
    assert (sheet < 100).any()


def test_columns_are_kept_but_not_left_empty():
    entries = [GalleryEntry("a", "b", blue_strip())] * 3
    widths = [pixels(gallery(entries, columns=columns)).shape[1] for columns in (1, 2, 3, 9)]
    assert widths == [2 * report.MARGIN + n * TILE_WIDTH + (n - 1) * report.GAP for n in (1, 2, 3, 3)]
    with pytest.raises(InvalidValueError, match="columns"):
        gallery(entries, columns=0)


def test_entries_beyond_the_cap_are_counted_not_drawn():
    entry = GalleryEntry("a", "b")
    full, more = ([entry] * n for n in (MAX_ENTRIES, MAX_ENTRIES + 7))
    assert pixels(gallery(more)).shape == pixels(gallery(full)).shape
    assert report._heading(more) == f"{MAX_ENTRIES + 7} rendered, 7 of them not shown"


def test_the_heading_counts():
    good, bad = GalleryEntry("a", "b"), GalleryEntry("a", "b", error="no")
    assert report._heading([good, bad, bad]) == "1 rendered, 2 failed"
    assert report._heading([]) == "nothing yet"


def test_a_broken_thumbnail_is_told_not_raised():
    sheet = pixels(gallery([GalleryEntry("a", "b", b"RIFF no picture"), GalleryEntry("a", "b", blue_strip()[:200])]))
    assert near(sheet, (0xF0, 0xF0, 0xF0), 0).sum() > 10_000


@pytest.mark.parametrize("text", ["日本語 🎬", "a\0b\nc\td", "\ud800", "\u202eabc", "é — ×", " ", "x\n" * 5000])
def test_any_text_can_be_a_caption(text):
    assert pixels(gallery([GalleryEntry(text, text, error=text)])).size


@pytest.mark.parametrize("text", ["word " * 300, "w" * 900, "short", "", "two  blanks\nand a line", "a " + "w" * 90])
@pytest.mark.parametrize("max_lines", [1, 2, 3])
def test_wrapped_lines_fit_and_lose_nothing_but_the_end(text, max_lines):
    lines = report._wrap(text, 16, 200, max_lines)
    assert len(lines) <= max_lines
    assert all(report._fits(line, 16, 200) for line in lines)
    kept = "".join(lines).replace(" ", "").removesuffix("...")
    assert "".join(text.split()).startswith(kept)


def test_equal_entries_give_equal_bytes():
    entries = [GalleryEntry("a", "b", blue_strip()), GalleryEntry("c", "d", error="e")]
    assert gallery(entries) == gallery(entries)
