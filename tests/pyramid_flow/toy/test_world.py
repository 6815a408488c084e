"""The world: clips show what their captions say, all of it, and some combinations are kept from training."""

from collections import Counter
from random import Random

import numpy as np
import pytest

from pyramid_flow.toy.world import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, SIZES, Scene, draw_scene, held_out_captions

SCENE = Scene("red", "circle", "small", "up and left", "slowly", "dark", (0.5, 0.5))


def test_a_caption_says_it_all():
    assert SCENE.caption == "a small red circle moves slowly up and left on a dark background"


def test_a_clip_has_the_colours_and_moves_as_told():
    clip = SCENE.render(33, 64)
    assert clip.shape == (33, 64, 64, 3)
    assert clip.dtype == np.uint8
    assert tuple(clip[0, 0, 0]) == BACKGROUNDS["dark"]
    assert tuple(clip[0, 32, 32]) == COLOURS["red"]
    red = [np.argwhere(frame[..., 0] > 100).mean(axis=0) for frame in clip]
    assert (red[-1] < red[0]).all()  # upwards, and to the left


@pytest.mark.parametrize("side", [64, 128])
def test_everything_stays_in_the_frame(side):
    rng = Random(3)
    for _ in range(100):
        scene = draw_scene(rng)
        border = np.ones((side, side), bool)
        border[1:-1, 1:-1] = False
        for frame in scene.render(2, side):
            assert (frame[border] == BACKGROUNDS[scene.background]).all()


def test_held_out_combinations_are_an_eighth_of_all_and_every_attribute_is_trained_on():
    scenes = [
        Scene(colour, shape, "large", direction, "slowly", "dark", (0.5, 0.5))
        for colour in COLOURS
        for shape in SHAPES
        for direction in DIRECTIONS
    ]
    held = [scene for scene in scenes if scene.is_held_out]
    assert len(held) == len(scenes) / 8
    for names in (COLOURS, SHAPES, DIRECTIONS):
        counts = Counter(
            name for scene in held for name in (scene.colour, scene.shape, scene.direction) if name in names
        )
        assert set(counts) == set(names)
        assert len(set(counts.values())) == 1
    captions = list(held_out_captions(("large",)))
    assert len(captions) == len(set(captions)) == len(held) * 2 * len(BACKGROUNDS)


def test_a_draw_is_of_one_kind_and_repeats():
    for held_out in (False, True):
        drawn = [draw_scene(Random(seed), held_out=held_out) for seed in range(20)]
        assert {scene.is_held_out for scene in drawn} == {held_out}
        assert drawn == [draw_scene(Random(seed), held_out=held_out) for seed in range(20)]
    assert {draw_scene(Random(seed), ("medium",)).size for seed in range(20)} == {"medium"}
    assert {draw_scene(Random(seed)).size for seed in range(50)} == set(SIZES)
