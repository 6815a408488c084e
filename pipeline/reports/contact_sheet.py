"""The gallery page: a contact sheet of thumbnail strips with captions, as one PNG."""

import io
import logging
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from pyramid_flow.errors import InvalidValueError

logger = logging.getLogger(__name__)

MAX_ENTRIES = 64
"""A gallery shows this many entries; its heading says how many are not shown."""

TILE_WIDTH, MAX_PICTURE_HEIGHT = 512, 384
MARGIN, GAP = 28, 24
CAPTION_LINES, DETAIL_LINES, REASON_LINES = 2, 2, 3
MAX_TEXT = 500  # characters looked at; more never fit into the lines of a tile

WHITE, INK, FAINT = "#ffffff", "#1c1c1c", "#6b6b6b"
FAILED_FILL, FAILED_EDGE, FAILED_INK = "#f3e9e9", "#c98f8f", "#8f1f1f"
EMPTY_FILL, EMPTY_EDGE = "#f0f0f0", "#c8c8c8"

# Pillow's own font knows ASCII and a few quotes; NFKD takes accents off, these have no such form
_SPELLED = str.maketrans(
    {"×": "x", "–": "-", "—": "-", "→": "->", "ß": "ss", "ø": "o", "Ø": "O", "æ": "ae", "Æ": "AE", "ł": "l"}
)


@dataclass(frozen=True)
class GalleryEntry:
    """One tile of the gallery.

    Attributes:
        caption: The prompt; shortened to two lines.
        detail: Id, seed, size x frames; shortened to two lines.
        thumbnail: An encoded image, such as `ThumbnailStrip.webp` returns; None if there is none.
        error: Why the row failed; None if it did not. A failed row shows this in place of the thumbnail.
    """

    caption: str
    detail: str
    thumbnail: bytes | None = None
    error: str | None = None


@dataclass(frozen=True)
class _Tile:
    """A tile ready to be placed: its picture and its lines of text, already wrapped."""

    picture: Image.Image
    caption: tuple[str, ...]
    detail: tuple[str, ...]


def gallery(entries: Sequence[GalleryEntry], columns: int = 2) -> bytes:
    """Draws a contact sheet of the first `MAX_ENTRIES` entries, row by row in their order.

    Args:
        entries: What to show; none gives a small sheet that says so.
        columns: Tiles beside each other, each 512 pixels wide; fewer if there are fewer entries.

    Returns:
        A PNG on white.

    Raises:
        InvalidValueError: `columns` is below 1.
    """
    if columns < 1:
        raise InvalidValueError("columns", columns, "is below 1")
    tiles = [_tile(entry) for entry in entries[:MAX_ENTRIES]]
    columns = max(1, min(columns, len(tiles)))
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    sheet = Image.new("RGB", (2 * MARGIN + columns * (TILE_WIDTH + GAP) - GAP, _sheet_height(rows)), WHITE)
    ImageDraw.Draw(sheet).text((MARGIN, MARGIN), _heading(entries), INK, _font(22))
    top = MARGIN + _line_height(22) + GAP
    for row in rows:
        for column, tile in enumerate(row):
            _draw_tile(sheet, tile, MARGIN + column * (TILE_WIDTH + GAP), top)
        top += _row_height(row) + GAP
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _heading(entries: Sequence[GalleryEntry]) -> str:
    if not entries:
        return "nothing yet"
    failed = sum(entry.error is not None for entry in entries)
    parts = [f"{len(entries) - failed} rendered"]
    if failed:
        parts.append(f"{failed} failed")
    if len(entries) > MAX_ENTRIES:
        parts.append(f"{len(entries) - MAX_ENTRIES} of them not shown")
    return ", ".join(parts)


def _tile(entry: GalleryEntry) -> _Tile:
    return _Tile(
        picture=_picture(entry),
        caption=_wrap(entry.caption, 16, TILE_WIDTH, CAPTION_LINES),
        detail=_wrap(entry.detail, 13, TILE_WIDTH, DETAIL_LINES),
    )


def _picture(entry: GalleryEntry) -> Image.Image:
    if entry.error is not None:
        return _notice("failed", entry.error, FAILED_FILL, FAILED_EDGE, FAILED_INK)
    if entry.thumbnail is None:
        return _notice("no picture", "", EMPTY_FILL, EMPTY_EDGE, FAINT)
    try:
        return _fitted(entry.thumbnail)
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow's decoders raise
        logger.warning("a thumbnail of the gallery cannot be read: %s", error)
        return _notice("no picture", "its thumbnail cannot be read", EMPTY_FILL, EMPTY_EDGE, FAINT)


def _fitted(thumbnail: bytes) -> Image.Image:
    with Image.open(io.BytesIO(thumbnail)) as image:
        picture = image.convert("RGB")
    scale = min(1.0, TILE_WIDTH / picture.width, MAX_PICTURE_HEIGHT / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _notice(title: str, reason: str, fill: str, edge: str, ink: str) -> Image.Image:
    """A coloured box with a title and a wrapped reason, in the place of a picture."""
    padding = 14
    lines = _wrap(reason, 14, TILE_WIDTH - 2 * padding, REASON_LINES)
    height = 2 * padding + _line_height(16) + len(lines) * _line_height(14)
    box = Image.new("RGB", (TILE_WIDTH, height), fill)
    draw = ImageDraw.Draw(box)
    draw.rectangle((0, 0, TILE_WIDTH - 1, height - 1), outline=edge)
    draw.text((padding, padding), title, ink, _font(16))
    _draw_lines(draw, lines, padding, padding + _line_height(16), 14, ink)
    return box


def _draw_tile(sheet: Image.Image, tile: _Tile, left: int, top: int) -> None:
    sheet.paste(tile.picture, (left, top))
    draw = ImageDraw.Draw(sheet)
    below = _draw_lines(draw, tile.caption, left, top + tile.picture.height + 8, 16, INK)
    _draw_lines(draw, tile.detail, left, below, 13, FAINT)


def _draw_lines(draw: ImageDraw.ImageDraw, lines: Sequence[str], left: int, top: int, size: int, ink: str) -> int:
    for line in lines:
        draw.text((left, top), line, ink, _font(size))
        top += _line_height(size)
    return top


def _sheet_height(rows: Sequence[Sequence[_Tile]]) -> int:
    return 2 * MARGIN + _line_height(22) + sum(GAP + _row_height(row) for row in rows)


def _row_height(row: Sequence[_Tile]) -> int:
    return max(_tile_height(tile) for tile in row)


def _tile_height(tile: _Tile) -> int:
    return tile.picture.height + 8 + len(tile.caption) * _line_height(16) + len(tile.detail) * _line_height(13)


def _wrap(text: str, size: int, width: int, max_lines: int) -> tuple[str, ...]:
    """Breaks text at blanks, or inside a word longer than a line, and ends it with dots if it does not fit."""
    lines = [""]
    for word in _spelled(text).split():
        joined = f"{lines[-1]} {word}".lstrip()
        if _fits(joined, size, width):
            lines[-1] = joined
            continue
        pieces = _broken(word, size, width)
        lines = [*(lines if lines[-1] else lines[:-1]), *pieces]
    shown = lines[:max_lines] if lines[0] else []
    if len(lines) > max_lines or len(text) > MAX_TEXT:
        shown[-1:] = [_dotted(line, size, width) for line in shown[-1:]]
    return tuple(shown)


def _broken(word: str, size: int, width: int) -> list[str]:
    pieces = [""]
    for character in word:
        if not _fits(pieces[-1] + character, size, width):
            pieces.append("")
        pieces[-1] += character
    return pieces


def _dotted(line: str, size: int, width: int) -> str:
    while line and not _fits(f"{line}...", size, width):
        line = line[:-1]
    return f"{line.rstrip(' .,;')}..."


def _fits(line: str, size: int, width: int) -> bool:
    return _font(size).getlength(line) <= width


def _spelled(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", text[:MAX_TEXT].translate(_SPELLED))
    return "".join(character for character in decomposed if unicodedata.category(character) not in ("Mn", "Cf", "Cs"))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _line_height(size: int) -> int:
    return round(size * 1.4)
