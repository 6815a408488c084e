"""The bundled model: small enough to ship, and it makes what prompts say that it was never trained on."""

from random import Random

import pytest
import torch

from pyramid_flow import Checkpoint, PyramidFlowPipeline
from pyramid_flow.checkpoints.checkpoint import BUNDLED
from pyramid_flow.toy.judge import judge
from pyramid_flow.toy.world import draw_scene

MAX_BYTES = 25e6


def test_it_goes_by_its_name_and_is_whole():
    checkpoint = Checkpoint.open("toy")
    checkpoint.check()
    assert (checkpoint.name, checkpoint.variant) == ("toy", "toy")
    assert checkpoint.preset.sizes == ((64, 64),)
    assert sum(file.stat().st_size for file in BUNDLED["toy"].rglob("*") if file.is_file()) <= MAX_BYTES


def test_a_folder_of_that_name_is_still_reached(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy" / "diffusion_transformer_mine").mkdir(parents=True)
    assert Checkpoint.open("./toy").name == "toy/mine"


@pytest.fixture(scope="module")
def seen():
    """Return scenes of combinations that were never trained on, and what the judge sees in their videos."""
    pipe = PyramidFlowPipeline.from_pretrained("toy", torch_dtype=torch.float32)
    scenes = [draw_scene(Random(f"bundled {number}"), ("medium", "large"), held_out=True) for number in range(8)]
    videos = pipe([scene.caption for scene in scenes], seed=0).frames
    return list(zip(scenes, map(judge, videos), strict=True))


@pytest.mark.integration
@pytest.mark.parametrize(("name", "least"), [("colour", 7), ("background", 8), ("direction", 6), ("speed", 6)])
def test_it_makes_what_the_prompt_says(seen, name, least):
    assert sum(getattr(scene, name) == getattr(found, name) for scene, found in seen) >= least


@pytest.mark.integration
def test_what_moves_is_in_one_piece(seen):
    assert sum(found.pieces == 1 for _, found in seen) >= 7
