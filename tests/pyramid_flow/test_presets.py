"""Presets: the published numbers, and what a checkpoint's own pyramid.json may change."""

import dataclasses
import json

import pytest

from pyramid_flow import CheckpointError, LatentStatistics, Preset
from pyramid_flow.presets import NEGATIVE_PROMPT, PRESETS
from pyramid_flow.sampling.params import SamplingParams

EVERY = [preset for presets in PRESETS.values() for preset in presets.values()]
FIRST = {"miniflux": (-0.04, 1 / 1.8726), "sd3": (0.1490, 1 / 1.8415)}


@pytest.mark.parametrize(
    ("family", "variant", "size", "frames", "guidance_range"),
    [
        ("miniflux", "384p", (384, 640), 121, (1, 15)),
        ("miniflux", "768p", (768, 1280), 241, (7, 9)),
        ("miniflux", "image", (1024, 1024), 1, (1, 15)),
        ("sd3", "384p", (384, 640), 121, (1, 15)),
        ("sd3", "768p", (768, 1280), 241, (7, 9)),
    ],
)
def test_published_presets(family, variant, size, frames, guidance_range):
    preset = PRESETS[family][variant]
    assert preset.sizes == (size,)
    assert preset.max_num_frames == frames
    assert preset.guidance_range == guidance_range
    assert (preset.num_inference_steps, preset.video_num_inference_steps) == ((20, 20, 20), (10, 10, 10))
    assert preset.guidance_scale == 7
    assert (preset.later_guidance(has_image=False), preset.later_guidance(has_image=True)) == (5, 4)
    assert preset.prompt_suffix == ", hyper quality, Ultra HD, 8K"
    assert preset.negative_prompt == NEGATIVE_PROMPT
    assert preset.statistics == LatentStatistics(*FIRST[family], -0.2343, 1 / 3.0986)


def test_every_published_preset_is_tested():
    assert {family: set(presets) for family, presets in PRESETS.items()} == {
        "miniflux": {"384p", "768p", "image"},
        "sd3": {"384p", "768p"},
    }


@pytest.mark.parametrize("preset", EVERY)
def test_recommended_guidance_is_within_its_range(preset):
    low, high = preset.guidance_range
    assert low <= preset.guidance_scale <= high
    low, high = preset.video_guidance_range
    assert low <= min(preset.video_guidance_scale, preset.image_to_video_guidance_scale) <= high


@pytest.mark.parametrize("preset", EVERY)
def test_defaults_of_every_preset_can_be_sampled(preset):
    for height, width in preset.sizes:
        params = SamplingParams(
            height,
            width,
            preset.max_num_frames,
            preset.num_inference_steps,
            preset.video_num_inference_steps,
            preset.guidance_scale,
            preset.video_guidance_scale,
        )
        assert params.num_units == 1 + preset.max_num_frames // 8


def test_values_of_pyramid_json_win_and_the_rest_stays():
    values = {
        "sizes": [[64, 128], [128, 64]],
        "max_num_frames": 49,
        "num_inference_steps": [4, 3, 2],
        "guidance_scale": 3,
        "guidance_range": [2, 4.5],
        "prompt_suffix": "",
        "statistics": {"first_shift": 0.5, "later_scale": 2},
    }
    updated = Preset().updated(values)
    assert updated == Preset(
        sizes=((64, 128), (128, 64)),
        max_num_frames=49,
        num_inference_steps=(4, 3, 2),
        guidance_scale=3,
        guidance_range=(2, 4.5),
        prompt_suffix="",
        statistics=LatentStatistics(first_shift=0.5, later_scale=2),
    )
    assert Preset().updated({}) == Preset()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_frames": 9}, "holds max_frames; known are .*max_num_frames"),
        ({"statistics": {"shift": 1.0}}, "holds shift; known are .*first_shift"),
        ({"max_num_frames": "9"}, "max_num_frames is '9', expected something like 121"),
        ({"max_num_frames": True}, "max_num_frames is True"),
        ({"max_num_frames": 9.0}, "max_num_frames is 9.0"),
        ({"guidance_scale": "7"}, "guidance_scale is '7'"),
        ({"guidance_scale": None}, "guidance_scale is None"),
        ({"prompt_suffix": 3}, "prompt_suffix is 3"),
        ({"num_inference_steps": 4}, r"num_inference_steps is 4, expected something like \(20, 20, 20\)"),
        ({"num_inference_steps": ["4", "4", "4"]}, "num_inference_steps"),
        ({"num_inference_steps": [4, 4]}, r"num_inference_steps is \[4, 4\], expected something like \(20, 20, 20\)"),
        ({"guidance_range": [7]}, r"guidance_range is \[7\], expected something like \(1.0, 15.0\)"),
        ({"guidance_range": 7}, "guidance_range is 7"),
        ({"sizes": [[64, 64, 64]]}, "sizes"),
        ({"sizes": []}, "sizes"),
        ({"sizes": [[64]]}, "sizes"),
        ({"sizes": [64, 64]}, "sizes"),
        ({"sizes": [["64", "64"]]}, "sizes"),
        ({"statistics": 3}, "statistics is 3"),
        ({"statistics": {"first_shift": "a"}}, "first_shift is 'a'"),
    ],
)
def test_unknown_keys_and_wrong_types_are_named(values, message):
    with pytest.raises(CheckpointError, match=message):
        Preset().updated(values)


@pytest.mark.parametrize("preset", EVERY)
def test_a_preset_survives_pyramid_json(preset):
    assert Preset(fps=1, guidance_scale=2.0).updated(json.loads(json.dumps(dataclasses.asdict(preset)))) == preset


def test_presets_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["miniflux"]["384p"].fps = 8
    with pytest.raises(dataclasses.FrozenInstanceError):
        Preset().statistics.first_shift = 0.0
