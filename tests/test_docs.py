"""What README and docs show: the examples run as they stand, the picture is the one its script draws."""

import re
import runpy
from pathlib import Path

import pytest
from PIL import Image

from pyramid_flow import Checkpoint, Preset
from pyramid_flow.presets import PRESETS

ROOT = Path(__file__).parents[1]


def example(page: str, first_words: str) -> str:
    """Return the page's Python example that begins with some words."""
    [code] = [
        code
        for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
        if code.startswith(first_words)
    ]
    return code


@pytest.mark.integration
def test_the_readmes_example_renders_a_video_and_goes_on_from_an_image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(example("README.md", "from pyramid_flow"), names)
    with Image.open("circle.gif") as circle:
        assert (circle.size, circle.n_frames) == ((64, 64), 33)
    assert names["again"].shape == (9, 64, 64, 3)


@pytest.mark.integration
def test_the_models_example_shows_progress_keeps_latents_and_stops_early():
    names: dict[str, object] = {}
    exec(example("docs/model.md", "import torch\nfrom pyramid_flow"), names)
    preset = Checkpoint.open("toy").preset
    steps = sum(preset.num_inference_steps) + sum(preset.video_num_inference_steps) + 1
    assert len(names["kept"]) == names["bar"].n == steps
    assert [tuple(latents.shape) for latents in names["kept"][:: preset.num_inference_steps[0]]][:3] == [
        (1, 16, 1, side, side) for side in (2, 4, 8)
    ]


def test_the_picture_is_what_its_script_draws():
    script = runpy.run_path(str(ROOT / "docs/images/levels.py"))
    assert script["PICTURE"].read_text() == script["draw"]()


def test_the_table_of_presets_is_that_of_the_code():
    lines = (ROOT / "docs/model.md").read_text().splitlines()
    shown = [line for line in lines if line.startswith(tuple(f"| {family} |" for family in PRESETS))]
    assert shown == [row(family, name, preset) for family in PRESETS for name, preset in PRESETS[family].items()]
    assert {preset.fps for presets in PRESETS.values() for preset in presets.values()} == {24}


def row(family: str, variant: str, preset: Preset) -> str:
    [(height, width)], frames = preset.sizes, preset.max_num_frames
    length = "a still" if frames == 1 else f"{frames // preset.fps} s"
    steps = (preset.num_inference_steps, preset.video_num_inference_steps)
    scales = (preset.guidance_scale, preset.video_guidance_scale, preset.image_to_video_guidance_scale)
    cells = (
        family,
        variant,
        f"{height}x{width}",
        f"{frames} ({length})",
        ", ".join("/".join(map(str, counts)) for counts in steps),
        ", ".join(f"{scale:g}" for scale in scales),
        "{:g} to {:g}".format(*preset.guidance_range),
    )
    return f"| {' | '.join(cells)} |"
