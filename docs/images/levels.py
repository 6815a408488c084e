"""Draw docs/images/levels.svg, the model in one picture: `python docs/images/levels.py`."""

from pathlib import Path

from pyramid_flow.sampling.params import SPATIAL_FACTOR
from pyramid_flow.sampling.pyramid import history_level
from pyramid_flow.transformer.tokens import PATCH

PICTURE = Path(__file__).with_name("levels.svg")
HEIGHT, WIDTH = 384, 640
LEVELS = (0, 1, 2)
UNITS = 5
NEWEST = UNITS - 1

LEFT, COLUMN, RIGHT = 80, 58, 420
SIDES = {0: 9, 1: 18, 2: 36}
COLOURS = {0: "#8dbbe8", 1: "#4f8fd0", 2: "#1f4e8c"}
INK, PALE, NOW = "#222", "#666", "#e07b1a"
STAIRS_TOP, ROWS_TOP, ROW, END = 66, 232, 62, 416


def tokens(level: int) -> int:
    """Return the number of tokens of one frame at a level."""
    patch = SPATIAL_FACTOR * PATCH << (LEVELS[-1] - level)
    return (HEIGHT // patch) * (WIDTH // patch)


def held(unit: int, level: int) -> list[int]:
    """Return the level of every past frame, oldest first, while `level` of a unit is sampled."""
    return [history_level(unit - frame, level) for frame in range(unit)]


def draw() -> str:
    """Return the picture as SVG."""
    size = f'width="{RIGHT + 12}" height="{END}"'
    view = f'viewBox="0 0 {RIGHT + 12} {END}" font-family="system-ui, sans-serif" font-size="13" fill="{INK}"'
    frame = f'<rect {size} fill="white"/>'
    return "\n".join(
        [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {view}>', frame, *_stairs(), *_rows(), "</svg>\n"]
    )


def _stairs() -> list[str]:
    """Draw the order of sampling: each unit climbs from noise at level 0 to level 2."""
    marks = [_title(STAIRS_TOP - 42, "Unit by unit, and each unit up the levels")]
    marks += [_text(LEFT + (unit + 0.5) * COLUMN, STAIRS_TOP - 16, f"unit {unit}", "middle") for unit in range(UNITS)]
    marks.append(_text(RIGHT, STAIRS_TOP - 16, "tokens", "end", PALE))
    bottom, floors = STAIRS_TOP + 86, {0: 0, 1: 16, 2: 46}
    for level in LEVELS:
        floor = bottom - floors[level]
        marks.append(_text(12, floor - SIDES[level] / 2 + 5, f"level {level}"))
        marks.append(_text(RIGHT, floor - SIDES[level] / 2 + 5, str(tokens(level)), "end", PALE))
        for unit in range(UNITS):
            x = LEFT + unit * COLUMN + {0: 2, 1: 8, 2: 20}[level]
            marks.append(_square(x, floor - SIDES[level], level, now=unit == NEWEST))
    marks += [_text(LEFT + unit * COLUMN, bottom + 16, "noise", "start", PALE) for unit in range(UNITS)]
    return marks


def _rows() -> list[str]:
    """Draw the history that the newest unit sees at each level, in the columns of its frames."""
    marks = [
        _title(ROWS_TOP - 14, f"What unit {NEWEST} sees while it is sampled"),
        _text(RIGHT, ROWS_TOP - 14, "in all", "end", PALE),
    ]
    for row, level in enumerate(LEVELS):
        middle = ROWS_TOP + row * ROW + 22
        levels = [*held(NEWEST, level), level]
        marks.append(_text(12, middle + 5, f"at level {level}"))
        marks.append(_text(RIGHT, middle + 5, str(sum(map(tokens, levels))), "end", PALE))
        for frame, each in enumerate(levels):
            x, half = LEFT + (frame + 0.5) * COLUMN, SIDES[each] / 2
            marks.append(_square(x - half, middle - half, each, now=frame == NEWEST))
            marks.append(_text(x, middle + half + 14, str(tokens(each)), "middle", PALE))
    return marks


def _square(x: float, y: float, level: int, *, now: bool) -> str:
    side = SIDES[level]
    return f'<rect x="{x:g}" y="{y:g}" width="{side}" height="{side}" fill="{NOW if now else COLOURS[level]}"/>'


def _title(y: float, text: str) -> str:
    return f'<text x="12" y="{y:g}" font-weight="600">{text}</text>'


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = INK) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}">{text}</text>'


if __name__ == "__main__":
    PICTURE.write_text(draw())
