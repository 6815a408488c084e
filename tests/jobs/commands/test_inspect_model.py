"""Inspecting: what is told of a checkpoint is what loading it would show."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from jobs import cli
from jobs.commands.inspect_model import stored_parts
from pyramid_flow import Checkpoint
from pyramid_flow.checkpoints.published import record_fetched
from tests.pyramid_flow.goldens import TINY_MINIFLUX, TINY_SD3

DIT = "diffusion_transformer_384p"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a checkpoint with two variants, quick to count."""
    folder = shutil.copytree(TINY_MINIFLUX, tmp_path / "checkpoint")
    shutil.copytree(folder / DIT, folder / "diffusion_transformer_768p")
    (folder / "pyramid.json").write_text('{"sizes": [[64, 64], [64, 128]], "max_num_frames": 9}')
    return folder


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert cli.main(["inspect", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_is_told_is_what_is_loaded(capsys):
    [variant] = told(capsys, "toy")["variants"]
    checkpoint = Checkpoint.open("toy")
    transformer = checkpoint.load_transformer(torch.bfloat16, "cpu")
    assert (variant["name"], variant["family"]) == ("toy", "miniflux")
    assert variant["fingerprint"] == checkpoint.fingerprint
    assert variant["sizes"] == [[64, 64]]
    assert variant["max_num_frames"] == 33
    assert variant["parts"]["transformer"]["parameters"] == sum(each.numel() for each in transformer.parameters())
    assert variant["parts"]["vae"]["stored"] == ["bfloat16"]
    assert (
        variant["parts"]["vae"]["bytes"]
        == (checkpoint.root / "causal_video_vae").joinpath("diffusion_pytorch_model.safetensors").stat().st_size
    )
    assert variant["memory"]["vae"]["weights"] == 2 * variant["parts"]["vae"]["parameters"]


def test_every_variant_is_told_with_the_memory_of_every_mode(capsys, folder):
    in_bfloat16, in_float32 = (told(capsys, str(folder), "--dtype", dtype) for dtype in ("bfloat16", "float32"))
    assert [variant["name"] for variant in in_bfloat16["variants"]] == ["384p", "768p"]
    for half, whole in zip(in_bfloat16["variants"], in_float32["variants"], strict=True):
        needed = half["needed"]
        assert needed["full"] > needed["offload"] >= needed["sequential"]
        assert all(needed[mode] < whole["needed"][mode] for mode in needed)


def test_smaller_tiles_need_less(capsys, folder):
    (folder / "pyramid.json").write_text('{"sizes": [[128, 128]], "max_num_frames": 9}')
    whole, tiled = (told(capsys, str(folder), *tile)["variants"][0]["memory"] for tile in ([], ["--tile", "64"]))
    assert tiled["vae"]["activations"] < whole["vae"]["activations"]
    assert tiled["transformer"] == whole["transformer"]


def test_people_get_a_table(capsys, folder):
    assert cli.main(["inspect", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    fingerprint = Checkpoint.open(folder, "384p").fingerprint
    assert lines[0] == f"384p (miniflux), trained for 64x64, 64x128 and up to 9 frames, fingerprint {fingerprint}"
    assert [line.split()[0] for line in lines[2:6]] == ["text_encoder", "text_encoder_2", "transformer", "vae"]
    assert lines[6].startswith("  memory in bfloat16 for 9 frames of 64x64: full ")
    assert lines[7].startswith("768p (miniflux)")
    assert len({len(line) for line in lines[1:6]}) == 1


def test_a_fetched_name_is_as_good_as_its_folder(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    record_fetched("miniflux", folder)
    assert told(capsys, "miniflux") == told(capsys, str(folder))


def test_the_parts_of_the_other_family_are_counted_from_their_headers():
    checkpoint = Checkpoint.open(TINY_SD3)
    parts = stored_parts(checkpoint)
    assert checkpoint.family == "sd3"
    assert sorted(parts) == ["text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae"]
    assert all(part.parameters > 0 and part.stored == ("float32",) for part in parts.values())


@pytest.mark.parametrize(
    ("break_it", "word"),
    [
        (shutil.rmtree, "there is no checkpoint folder"),
        (lambda folder: (folder / DIT / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / DIT / "config.json").write_text('{"_class_name": "UNet"}'), "holds a UNet"),
        (lambda folder: shutil.rmtree(folder / "text_encoder_2"), "text_encoder_2"),
        (lambda folder: (folder / "causal_video_vae/diffusion_pytorch_model.safetensors").write_text("{}"), "be read"),
    ],
)
def test_what_is_damaged_is_one_line_and_exit_code_2(capsys, folder, break_it, word):
    break_it(folder)
    assert cli.main(["inspect", str(folder)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pyramid-render inspect: ")
    assert word in captured.err
    assert len(captured.err.splitlines()) == 1


def test_a_name_that_was_not_fetched_says_the_command(capsys):
    assert cli.main(["inspect", "sd3"]) == 2
    assert "run `pyramid-render fetch sd3`" in capsys.readouterr().err
