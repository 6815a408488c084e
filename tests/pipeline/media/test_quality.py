"""Figures of clips of which they are known, and the flags that follow from them."""

from dataclasses import astuple

import numpy as np
import pytest

from pipeline.media.quality import STANDARD, Figures, QualityMeter, Thresholds
from pipeline.media.video import Frames
from pyramid_flow.toy.world import DIRECTIONS, Scene

SIZE = (96, 128)


def measured(frames: Frames) -> Figures:
    meter = QualityMeter()
    meter.add(frames)
    return meter.figures()


def flags(frames: Frames) -> list[str]:
    return STANDARD.flags(measured(frames))


def plain(level: int, num_frames: int = 9) -> Frames:
    return np.full((num_frames, *SIZE, 3), level, np.uint8)


def noise(num_frames: int, size: tuple[int, int] = SIZE) -> Frames:
    return np.random.default_rng(0).integers(0, 256, (num_frames, *size, 3), dtype=np.uint8)


def square(right: float, down: float, size: tuple[int, int] = SIZE) -> Frames:
    """Return a clip of a bright square that moves by so many pixels per frame."""
    frames = np.full((9, *size, 3), 40, np.uint8)
    for number, frame in enumerate(frames):
        top, left = (round(length / 2 - 16 + number * step) for length, step in zip(size, (down, right), strict=True))
        frame[top : top + 32, left : left + 32] = 200
    return frames


@pytest.mark.parametrize(("level", "expected"), [(0, ["black", "flat"]), (255, ["white", "flat"]), (128, ["flat"])])
def test_plain_clips_are_flat_and_frozen(level, expected):
    figures = measured(plain(level))
    assert figures.brightness == pytest.approx(level / 255)
    assert astuple(figures)[1:7] == (0, 0, 0, 0, None, 0)
    assert STANDARD.flags(figures) == [*expected, "frozen"]
    assert flags(plain(level, num_frames=1)) == expected


def test_a_still_has_no_motion_and_is_not_frozen():
    figures = measured(noise(1))
    assert astuple(figures)[3:] == (None,) * 6
    assert STANDARD.flags(figures) == []


def test_a_picture_that_stands_still_is_frozen_only():
    assert flags(np.repeat(noise(1), 5, axis=0)) == ["frozen"]


@pytest.mark.parametrize(
    ("right", "down", "angle"),
    [(2, 0, 0), (0, -2, 90), (-2, 0, 180), (0, 2, 270), (2, -2, 45), (0.5, 0, 0), (5, 0, 0), (0, 5, 270)],
)
@pytest.mark.parametrize("size", [SIZE, (192, 256)])
def test_a_square_moves_where_it_moves(right, down, angle, size):
    figures = measured(square(right, down, size))
    assert abs((figures.motion_direction - angle + 180) % 360 - 180) < 3
    assert STANDARD.flags(figures) == []


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", ["circle", "square", "cross"])
def test_shapes_of_the_toys_world_move_as_their_captions_say(direction, shape):
    scene = Scene("red", shape, "large", direction, "slowly", "dark", start=(0.5, 0.5))
    figures = measured(scene.render(num_frames=9, side=64))
    assert abs((figures.motion_direction - DIRECTIONS[direction] + 180) % 360 - 180) < 5


def test_a_panned_picture_moves_as_a_whole():
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    levels = [120 + 50 * np.sin((x - 2 * i) / 9) + 50 * np.cos((y + i) / 7) for i in range(9)]
    frames = np.repeat(np.stack(levels).astype(np.uint8)[..., None], 3, axis=-1)
    assert measured(frames).motion_direction == pytest.approx(np.degrees(np.arctan2(1, 2)), abs=5)


def test_a_square_before_a_busy_background_moves_where_it_moves():
    frames = np.repeat(noise(1), 9, axis=0)
    for number, frame in enumerate(frames):
        frame[30 - 2 * number : 62 - 2 * number, 40:72] = 200
    assert measured(frames).motion_direction == pytest.approx(90, abs=5)


def test_what_moves_both_ways_or_at_random_has_no_direction():
    there = square(2, 0)
    figures = measured(np.concatenate([there, there[::-1]]))
    assert (figures.motion_direction, figures.drift) == (None, 0)
    assert figures.motion > STANDARD.frozen_below
    assert measured(noise(20)).motion_direction is None


def test_motion_is_the_mean_change_and_drift_that_from_first_to_last():
    levels = np.array([0, 51, 51, 153], np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (4, *SIZE, 3))
    figures = measured(frames)
    assert (figures.motion, figures.max_motion, figures.drift) == pytest.approx((0.2, 0.4, 0.6), abs=1e-6)
    assert figures.motion_direction is None


def test_a_cut_is_a_jump():
    assert flags(np.concatenate([square(1, 0), 255 - square(1, 0)])) == ["jump"]


def test_noise_is_sharp_and_loses_it_when_it_is_smoothed():
    sharp = noise(2)
    smooth = sharp.copy()
    smooth[:, 1:] = sharp[:, 1:] // 2 + sharp[:, :-1] // 2
    assert measured(sharp).sharpness > 2 * measured(smooth).sharpness


def test_sharpness_is_the_variance_of_the_laplacian_in_levels():
    frame = noise(1)[0]
    luma = frame @ np.array([54, 183, 19]) / 256
    laplacian = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * luma[1:-1, 1:-1]
    assert measured(frame[None]).sharpness == pytest.approx(laplacian.var(), rel=1e-3)


def test_brightness_and_contrast_are_those_of_luma():
    frames = plain(0)
    frames[:, :, : SIZE[1] // 2, 1] = 255  # green
    figures = measured(frames)
    assert (figures.brightness, figures.contrast) == pytest.approx((183 / 512, 183 / 512))


@pytest.mark.parametrize("size", [(64, 64), (96, 128), (384, 640), (70, 150), (40, 40)])
def test_chunks_give_the_figures_of_the_whole(size):
    frames = noise(9, size)
    meter = QualityMeter()
    for start, stop in ((0, 1), (1, 1), (1, 5), (5, 9)):
        meter.add(frames[start:stop])
    assert meter.figures() == measured(frames)


def test_what_is_kept_is_two_small_frames():
    meter = QualityMeter()
    meter.add(noise(3, (384, 640)))
    assert sum(value.nbytes for value in vars(meter).values() if isinstance(value, np.ndarray)) < 3 * 96 * 160 * 4


def test_limits_of_nothing_raise_no_flag():
    never = Thresholds(black_below=0, white_above=1, flat_below=0, frozen_below=0, jump_above=1)
    assert [never.flags(measured(plain(level))) for level in (0, 255)] == [[], []]
    assert never.flags(measured(np.concatenate([plain(0), plain(255)]))) == []
