"""A small CLIP model with random weights, and what transformers itself makes of the same frames and words."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from pipeline.media.image_text import BAD, FILES, GOOD, ImageTextError, ImageTextModel, PickedFrames, check_model
from pyramid_flow.errors import NonFiniteError
from tests.pipeline.clip import small_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return small_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return list(rng.integers(0, 256, (3, 64, 96, 3), np.uint8))


@torch.no_grad()
def test_scores_are_those_of_transformers_own_logits(clip, frames):
    model = CLIPModel.from_pretrained(clip)
    words, pictures = AutoTokenizer.from_pretrained(clip), CLIPImageProcessor.from_pretrained(clip)
    similarities, qualities = [], []
    for frame in frames:
        inputs = words(["a red ball", GOOD, BAD], padding=True, return_tensors="pt")
        pixels = pictures(images=Image.fromarray(frame), return_tensors="pt")
        [logits] = model(**inputs, **pixels).logits_per_image
        similarities.append(float(logits[0] / model.logit_scale.exp()))
        qualities.append(float(torch.sigmoid(logits[1] - logits[2])))
    scores = ImageTextModel(clip, "cpu", torch.float32).scores("a red ball", frames)
    assert scores == {
        "text_similarity": pytest.approx(np.mean(similarities), abs=1e-5),
        "aesthetics": pytest.approx(np.mean(qualities), abs=1e-5),
    }
    assert scores["text_similarity"] != 0


def test_another_prompt_gets_another_similarity_and_the_same_aesthetics(clip, frames):
    model = ImageTextModel(clip, "cpu", torch.float32)
    one, other = (model.scores(prompt, frames) for prompt in ("a red ball", "blue background"))
    assert abs(one["text_similarity"] - other["text_similarity"]) > 1e-4
    assert one["aesthetics"] == pytest.approx(other["aesthetics"], abs=1e-5)


def test_scores_that_are_not_finite_are_none(clip, frames):
    model = ImageTextModel(clip, "cpu", torch.float32)
    torch.nn.init.constant_(model.model.visual_projection.weight, torch.nan)
    with pytest.raises(NonFiniteError, match="not finite"):
        model.scores("a red ball", frames)


def test_a_long_prompt_is_cut(clip, frames):
    model = ImageTextModel(clip, "cpu", torch.float32)
    scores = [model.scores("a red ball " * count, frames)["text_similarity"] for count in (20, 40)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


@pytest.mark.parametrize(
    ("num_frames", "expected"), [(1, [0]), (5, [0, 1, 2, 3, 4]), (33, [0, 5, 9, 14, 18, 23, 27, 32])]
)
def test_frames_are_picked_evenly_whatever_the_chunks(num_frames, expected):
    clip = np.arange(num_frames, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2).repeat(3, 3)
    for size in (1, 4, 40):
        picked = PickedFrames(num_frames)
        for start in range(0, num_frames, size):
            picked.add(clip[start : start + size])
        assert [int(frame[0, 0, 0]) for frame in picked.frames] == expected


@pytest.mark.parametrize("name", FILES)
def test_a_folder_that_lacks_a_file_is_refused(clip, tmp_path, name):
    folder = shutil.copytree(clip, tmp_path / "clip")
    (folder / name).unlink()
    with pytest.raises(ImageTextError, match=f"has no {name}"):
        check_model(str(folder))


@pytest.mark.parametrize(("text", "message"), [('{"model_type": "t5"}', "is of type 't5'"), ("[]", "cannot be read")])
def test_another_kind_of_model_is_refused(clip, tmp_path, text, message):
    folder = shutil.copytree(clip, tmp_path / "clip")
    (folder / "config.json").write_text(text)
    with pytest.raises(ImageTextError, match=message):
        check_model(str(folder))


def test_a_folder_with_an_adapter_is_refused(clip, tmp_path):
    folder = shutil.copytree(clip, tmp_path / "clip")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "megatron_core": "planted"}')
    with pytest.raises(ImageTextError, match="holds an adapter"):
        check_model(str(folder))
