"""The judge sees what is there, also through some blur and noise, and is not taken in by what is not whole."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pyramid_flow.toy.judge import NONE, judge
from pyramid_flow.toy.world import BACKGROUNDS, Scene, draw_scene

NAMES = ("colour", "shape", "size", "direction", "speed", "background")
SCENE = Scene("green", "square", "large", "right", "slowly", "grey", (0.4, 0.5))


def blurred(clip: np.ndarray, seed: int) -> np.ndarray:
    """Blur a clip by a pixel and add some noise, as a lossy decoder does."""
    pixels = torch.from_numpy(clip).permute(0, 3, 1, 2).float()
    pixels = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
    return (pixels + 8 * noise).clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()


def right(scene: Scene, clip: np.ndarray) -> bool:
    seen = judge(clip)
    return seen.pieces == 1 and all(getattr(seen, name) == getattr(scene, name) for name in NAMES)


@pytest.mark.parametrize(
    ("side", "num_frames", "count"),
    [
        (64, 33, 12),
        pytest.param(64, 33, 120, marks=pytest.mark.integration),
        pytest.param(128, 49, 8, marks=pytest.mark.integration),
    ],
)
def test_it_is_right_about_the_worlds_own_clips(side, num_frames, count):
    scenes = [draw_scene(Random(seed), held_out=bool(seed % 2)) for seed in range(count)]
    assert sum(right(scene, scene.render(num_frames, side)) for scene in scenes) >= 0.99 * count


@pytest.mark.parametrize("count", [8, pytest.param(40, marks=pytest.mark.integration)])
def test_it_is_right_about_slightly_blurred_ones(count):
    scenes = [draw_scene(Random(seed), ("medium", "large")) for seed in range(count)]
    assert sum(right(scene, blurred(scene.render(33, 64), seed)) for seed, scene in enumerate(scenes)) >= count - 1


def test_the_place_is_that_of_the_first_frame():
    x, y = judge(SCENE.render(33, 64)).place
    assert (x, y) == pytest.approx((0.4, 0.5), abs=0.01)


def test_a_frozen_object_goes_nowhere():
    clip = np.repeat(SCENE.render(1, 64), 33, axis=0)
    seen = judge(clip)
    assert (seen.shape, seen.colour, seen.direction, seen.speed) == ("square", "green", NONE, NONE)


def test_a_jumping_object_has_no_direction():
    clip = SCENE.render(33, 64)
    assert judge(clip[np.random.default_rng(0).permutation(33)]).direction == NONE


def test_a_split_object_is_two_pieces_and_no_shape():
    clip = SCENE.render(33, 64)
    for frame in clip:
        frame[26:38] = BACKGROUNDS["grey"]
    seen = judge(clip)
    assert (seen.pieces, seen.shape, seen.size) == (2, NONE, NONE)
    assert seen.direction == "right"


def test_a_ragged_object_is_no_shape():
    clip, rng = SCENE.render(33, 64), np.random.default_rng(0)
    for frame in clip:
        holes = np.repeat(np.repeat(rng.random((16, 16)) < 0.3, 4, axis=0), 4, axis=1)
        frame[holes] = BACKGROUNDS["grey"]
    assert judge(clip).shape == NONE


def test_an_object_that_fades_away_is_no_shape_and_goes_nowhere():
    clip = SCENE.render(33, 64)
    clip[16:] = BACKGROUNDS["grey"]
    seen = judge(clip)
    assert (seen.shape, seen.direction) == (NONE, NONE)


def test_two_objects_are_two_pieces():
    clip = SCENE.render(33, 64)
    other = replace(SCENE, size="small", start=(0.15, 0.15)).render(33, 64)
    both = np.where(other == np.array(BACKGROUNDS["grey"]), clip, other)
    assert judge(both).pieces == 2


def test_a_colour_of_its_own_is_none():
    clip = SCENE.render(33, 64)
    clip[(clip == (40, 170, 60)).all(axis=-1)] = (255, 100, 255)
    assert judge(clip).colour == NONE


@pytest.mark.parametrize("kind", ["plain", "noise"])
def test_nothing_is_nothing(kind):
    clip = np.full((33, 64, 64, 3), 112, np.uint8)
    if kind == "noise":
        clip = np.random.default_rng(0).integers(0, 256, clip.shape, dtype=np.uint8)
    seen = judge(clip)
    assert (seen.shape, seen.size, seen.direction, seen.speed) == (NONE,) * 4
    assert seen.pieces != 1
