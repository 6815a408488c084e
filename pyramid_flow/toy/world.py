"""The synthetic world of the bundled model: one shape that moves over a plain background, with a caption."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import cos, radians, sin, sqrt
from random import Random

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Frames = NDArray[np.uint8]
"""A clip [N,H,W,3]."""

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (240, 225, 50),
    "green": (40, 170, 60),
    "cyan": (70, 215, 225),
    "blue": (50, 80, 230),
    "purple": (160, 60, 205),
    "white": (245, 245, 245),
}
BACKGROUNDS: Mapping[str, tuple[int, int, int]] = {"dark": (24, 24, 28), "grey": (112, 112, 118), "brown": (92, 62, 40)}
SIZES: Mapping[str, float] = {"small": 0.11, "medium": 0.155, "large": 0.215}
"""Radius as a share of the frame's side."""

SPEEDS: Mapping[str, float] = {"slowly": 0.18, "quickly": 0.45}
"""Share of the frame's side that is travelled from the first frame to the last."""

DIRECTIONS: Mapping[str, float] = {
    "right": 0,
    "up and right": 45,
    "up": 90,
    "up and left": 135,
    "left": 180,
    "down and left": 225,
    "down": 270,
    "down and right": 315,
}
"""Degrees, counter-clockwise from the right."""

MARGIN = 0.02  # of the side, between the path and the border
HELD_OUT = 8  # one of so many combinations of colour, shape and direction


def _circle(x: Float, y: Float) -> Float:
    return np.hypot(x, y) - 1


def _square(x: Float, y: Float) -> Float:
    return np.maximum(abs(x), abs(y)) - 0.88


def _triangle(x: Float, y: Float) -> Float:
    down = y - 0.29  # the middle of its height is at 0
    return np.maximum(down, (sqrt(3) * abs(x) - down) / 2) - 0.58


def _cross(x: Float, y: Float) -> Float:
    across, along = np.minimum(abs(x), abs(y)), np.maximum(abs(x), abs(y))
    distance: Float = np.maximum(across - 0.36, along - 1)
    return distance


SHAPES: Mapping[str, Callable[[Float, Float], Float]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
}
"""Signed distance to the outline of a shape of radius 1 around (0, 0), negative inside; y points down."""


@dataclass(frozen=True)
class Scene:
    """What a clip shows; start: where the centre is at first, (x, y) as shares of the side, y downwards."""

    colour: str
    shape: str
    size: str
    direction: str
    speed: str
    background: str
    start: tuple[float, float]

    @property
    def caption(self) -> str:
        """What the clip shows, in words."""
        return (
            f"a {self.size} {self.colour} {self.shape} moves {self.speed} {self.direction} on a {self.background} "
            "background"
        )

    @property
    def is_held_out(self) -> bool:
        """Whether its combination of colour, shape and direction is never shown in training."""
        colour, shape = list(COLOURS).index(self.colour), list(SHAPES).index(self.shape)
        direction = list(DIRECTIONS).index(self.direction)
        return (colour + 2 * shape + 3 * direction) % HELD_OUT == 0

    def centre(self, time: float) -> tuple[float, float]:
        """Return where the centre is at a time from 0 (the first frame) to 1 (the last one)."""
        angle, travelled = radians(DIRECTIONS[self.direction]), SPEEDS[self.speed] * time
        return self.start[0] + travelled * cos(angle), self.start[1] - travelled * sin(angle)

    def render(self, num_frames: int, side: int) -> Frames:
        """Draw the clip, with soft outlines of one pixel: uint8 [num_frames, side, side, 3]."""
        background, colour = np.array(BACKGROUNDS[self.background]), np.array(COLOURS[self.colour])
        frames = []
        for number in range(num_frames):
            centre = self.centre(number / max(1, num_frames - 1))
            alpha = coverage(self.shape, centre, SIZES[self.size], side)[..., None]
            frames.append(np.rint(background + alpha * (colour - background)).astype(np.uint8))
        return np.stack(frames)


def coverage(shape: str, centre: tuple[float, float], radius: float, side: int) -> Float:
    """Return how much of each pixel [side, side] a shape covers; centre and radius as shares of the side."""
    y, x = np.mgrid[:side, :side] + 0.5
    scale = radius * side
    distance = SHAPES[shape]((x - centre[0] * side) / scale, (y - centre[1] * side) / scale) * scale
    return np.clip(0.5 - distance, 0, 1)


def draw_scene(rng: Random, sizes: tuple[str, ...] = tuple(SIZES), *, held_out: bool = False) -> Scene:
    """Draw a scene of the combinations that are trained on, or of those that are held out."""
    while True:
        direction, speed, size = rng.choice(list(DIRECTIONS)), rng.choice(list(SPEEDS)), rng.choice(sizes)
        scene = Scene(
            colour=rng.choice(list(COLOURS)),
            shape=rng.choice(list(SHAPES)),
            size=size,
            direction=direction,
            speed=speed,
            background=rng.choice(list(BACKGROUNDS)),
            start=_start(rng, direction, speed, size),
        )
        if scene.is_held_out == held_out:
            return scene


def held_out_captions(sizes: tuple[str, ...] = tuple(SIZES)) -> Iterator[str]:
    """Yield the captions of all combinations that are never trained on, in a fixed order."""
    for names in product(COLOURS, SHAPES, sizes, DIRECTIONS, SPEEDS, BACKGROUNDS):
        scene = Scene(*names, start=(0.5, 0.5))
        if scene.is_held_out:
            yield scene.caption


def _start(rng: Random, direction: str, speed: str, size: str) -> tuple[float, float]:
    """Draw a start from which the whole path stays in the frame."""
    angle, travelled = radians(DIRECTIONS[direction]), SPEEDS[speed]
    room = SIZES[size] + MARGIN
    x, y = (_along(rng, room, move) for move in (travelled * cos(angle), -travelled * sin(angle)))
    return x, y


def _along(rng: Random, room: float, move: float) -> float:
    return rng.uniform(room - min(0.0, move), 1 - room - max(0.0, move))
