"""A judge of the bundled model's clips: it looks at pixels only, and says what moves and how, or 'none'.

What differs from the commonest colour is the object. It must look like one of the world's shapes in the mean over all
frames, so that a ragged or split one is none of them; its way is a straight line through its centres.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import atan2, degrees, hypot, log

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from pyramid_flow.toy.world import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, SIZES, SPEEDS, Float, Frames, coverage

NONE = "none"
MIN_CONTRAST = 40.0  # RGB distance of an object's pixel from the background
MAX_COLOUR_DISTANCE = 60.0  # RGB distance of a colour from the one it is called
MIN_OVERLAP = 0.8  # intersection over union with the shape it is called
MAX_SIZE_RATIO, MAX_SPEED_RATIO = 1.3, 1.8
MIN_TRAVEL = 0.06  # share of the side, first to last frame; less is frozen
MAX_STRAY = 0.04  # root mean square distance from the straight line, share of the side
MIN_PIECE = 0.0015  # share of the frame
MIN_VISIBLE = 0.9  # share of the frames in which there is an object

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Attributes:
    """What a clip shows, by the names of the world, or 'none' where nothing of the world fits.

    pieces: connected pieces of what moves, which nine of ten frames do not exceed; place: the object's centroid in the
    first frame, (x, y) as shares of the side, or None.
    """

    colour: str
    shape: str
    size: str
    direction: str
    speed: str
    background: str
    pieces: int
    place: tuple[float, float] | None


def judge(frames: Frames) -> Attributes:
    """Look at a clip [N,H,W,3] of square frames."""
    pixels = frames.astype(np.float64)
    background = np.median(pixels.reshape(-1, 3), axis=0)
    colour = _object_colour(pixels, background)
    background_name = _nearest_colour(background, BACKGROUNDS)
    if colour is None:
        return Attributes(NONE, NONE, NONE, NONE, NONE, background_name, 0, None)
    masks = _masks(pixels, background, colour)
    centres = [_centroid(mask) for mask in masks]
    shape, radius = _shape(masks, centres)
    direction, speed = _way(centres)
    return Attributes(
        colour=_nearest_colour(colour, COLOURS),
        shape=shape,
        size=_nearest(radius, SIZES, MAX_SIZE_RATIO) if shape != NONE else NONE,
        direction=direction,
        speed=speed,
        background=background_name,
        pieces=_num_pieces(masks),
        place=centres[0],
    )


def _object_colour(pixels: Float, background: Float) -> Float | None:
    """Return the median colour of what differs most from the background; None if nothing does."""
    distance = np.linalg.norm(pixels - background, axis=-1)
    visible = distance > MIN_CONTRAST
    if visible.mean() < MIN_PIECE:
        return None
    core = distance >= np.median(distance[visible])
    colour: Float = np.median(pixels[core], axis=0)
    return colour


def _masks(pixels: Float, background: Float, colour: Float) -> Mask:
    """Return the pixels [N,H,W] that are nearer to the object than to the background, along the line between them."""
    way = colour - background
    mask: Mask = (pixels - background) @ way > 0.5 * (way @ way)
    return mask


def _centroid(mask: Mask) -> tuple[float, float] | None:
    if mask.mean() < MIN_PIECE:
        return None
    y, x = (positions.mean() + 0.5 for positions in np.nonzero(mask))
    return float(x / len(mask)), float(y / len(mask))


def _shape(masks: Mask, centres: Sequence[tuple[float, float] | None]) -> tuple[str, float]:
    """Return the shape that overlaps best when it is as large and lies where the object does, and its radius."""
    side = masks.shape[1]
    visible = [(mask, centre) for mask, centre in zip(masks, centres, strict=True) if centre is not None]
    if len(visible) < MIN_VISIBLE * len(masks):
        return NONE, 0.0
    overlaps, radii = {}, {}
    for shape in SHAPES:
        unit_area, (offset_x, offset_y) = _unit(shape)
        found = []
        radii[shape] = float(np.median([np.sqrt(mask.sum() / unit_area) / side for mask, _ in visible]))
        for mask, (x, y) in visible:
            radius = np.sqrt(mask.sum() / unit_area) / side
            template = coverage(shape, (x - radius * offset_x, y - radius * offset_y), radius, side) > 0.5
            found.append((mask & template).sum() / (mask | template).sum())
        overlaps[shape] = float(np.mean(found))
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return (best, radii[best]) if overlaps[best] >= MIN_OVERLAP else (NONE, 0.0)


@cache
def _unit(shape: str) -> tuple[float, tuple[float, float]]:
    """Return the area and the centroid of a shape of radius 1 around (0, 0)."""
    side, radius = 256, 0.25
    mask = coverage(shape, (0.5, 0.5), radius, side) > 0.5
    centre = _centroid(mask)
    assert centre is not None
    x, y = ((position - 0.5) / radius for position in centre)
    return float(mask.sum()) / (radius * side) ** 2, (x, y)


def _way(centres: Sequence[tuple[float, float] | None]) -> tuple[str, str]:
    """Return direction and speed of a straight line through the centres; both none if there is no such way."""
    times = [number / max(1, len(centres) - 1) for number, centre in enumerate(centres) if centre is not None]
    if len(times) < MIN_VISIBLE * len(centres) or len(times) < 2:
        return NONE, NONE
    points = np.array([centre for centre in centres if centre is not None])
    line = np.stack([np.ones(len(times)), times], axis=1)
    fit, *_ = np.linalg.lstsq(line, points, rcond=None)
    stray = np.sqrt(np.square(points - line @ fit).sum(axis=1).mean())
    (x, y), travelled = fit[1], hypot(*fit[1])
    if travelled < MIN_TRAVEL or stray > MAX_STRAY:
        return NONE, NONE
    angle = degrees(atan2(-y, x))
    direction = min(DIRECTIONS, key=lambda name: abs((angle - DIRECTIONS[name] + 180) % 360 - 180))
    return direction, _nearest(travelled, SPEEDS, MAX_SPEED_RATIO)


def _num_pieces(masks: Mask) -> int:
    counts = [_count_pieces(mask) for mask in masks]
    return int(np.quantile(counts, 0.9, method="higher"))


def _count_pieces(mask: Mask) -> int:
    """Count the connected pieces of a mask [H,W] that are not specks; diagonal neighbours are connected.

    Every pixel starts with a label of its own and takes the greatest one around it until nothing changes.
    """
    inside = torch.from_numpy(mask)[None, None].float()
    labels = inside * torch.arange(1, mask.size + 1, dtype=torch.float32).view(inside.shape)
    while True:
        spread = F.max_pool2d(labels, 3, stride=1, padding=1) * inside
        if torch.equal(spread, labels):
            break
        labels = spread
    sizes = labels[labels > 0].unique(return_counts=True)[1]
    return int((sizes >= max(2, MIN_PIECE * mask.size)).sum())


def _nearest_colour(colour: Float, names: Mapping[str, tuple[int, int, int]]) -> str:
    distances = {name: float(np.linalg.norm(colour - np.array(value))) for name, value in names.items()}
    best = min(distances, key=lambda name: distances[name])
    return best if distances[best] <= MAX_COLOUR_DISTANCE else NONE


def _nearest(value: float, names: Mapping[str, float], max_ratio: float) -> str:
    """Return the name whose value is nearest in ratio; none if it is further off than the greatest ratio."""
    distances = {name: abs(log(value / known)) for name, known in names.items()}
    best = min(distances, key=lambda name: distances[name])
    return best if distances[best] <= log(max_ratio) else NONE
