"""The commands `dataset` and `train`, from clips to a model that renders; bad settings fail before a cluster starts."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from peft import PeftModel

from jobs import cli
from pipeline.training.clips import clips
from pyramid_flow import Checkpoint, PyramidFlowPipeline
from pyramid_flow.toy.blank import write_blank_toy
from tests.pyramid_flow.goldens import TINY_MINIFLUX


def run(*arguments: str) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "jobs.cli", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def config(folder: Path, **values: object) -> list[str]:
    path = folder / f"{values['task']}.yaml"
    path.write_text(yaml.safe_dump({"fresh": True, "log_steps": 2, "checkpoint_steps": 2, **values}))
    return ["--config", str(path)]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Return a folder with a blank model and a table of clips."""
    folder = tmp_path_factory.mktemp("world")
    write_blank_toy(folder / "blank")
    table = str(folder / "clips.parquet")
    assert (
        cli.main(["dataset", "world", "--output", table, "--count", "40", "--num-frames", "9", "--sizes", "large"]) == 0
    )
    return folder


def test_the_world_is_a_table_of_clips_that_repeats(world, tmp_path):
    again = tmp_path / "again.parquet"
    flags = ["--count", "40", "--num-frames", "9", "--sizes", "large"]
    assert cli.main(["dataset", "world", "--output", str(again), *flags]) == 0
    table = pq.read_table(world / "clips.parquet")
    assert table.equals(pq.read_table(again))
    assert {clip.shape for clip in clips(table)} == {(9, 64, 64, 3)}
    assert all("a large " in prompt for prompt in table["prompt"].to_pylist())


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"workers": 4}, "batch_size 2 is not a multiple of streams 4"),
        ({"streams": 3, "workers": 2}, "streams 3 is not a multiple of workers 2"),
        ({"phases": [{"data": ["nowhere.parquet"], "steps": 1, "batch_size": 2}]}, "nowhere.parquet"),
        ({"model": "nowhere"}, "no checkpoint folder"),
        ({"streams": 4, "batch_size": 4}, "too few for 4 streams"),
        ({"level_weights": [1.0]}, "at least 3 items"),
        ({"task": "transformer", "crop": 32}, "for the VAE only"),
        ({"lora_rank": 4}, "lora_rank is for the transformer only"),
        ({"task": "transformer", "lora_rank": 4}, "not of fresh ones"),
        ({"learning_rate": 1}, "no setting 'learning_rate'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(world, tmp_path, caplog, capsys, values, reason):
    phase = {"data": [str(world / "clips.parquet")], "steps": 1, "batch_size": 2}
    values = dict(values)
    phase |= {name: values.pop(name) for name in ("batch_size", "crop") if name in values}
    given = {"task": "vae", "model": str(world / "blank"), "output": str(tmp_path / "out"), "phases": [phase]}
    try:
        code = cli.main(["train", *config(tmp_path, **given | values)])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert reason in caplog.text + capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_clips_to_a_model_that_renders(world, tmp_path):
    vae, latents, transformer = (tmp_path / name for name in ("vae", "latents", "transformer"))
    table = {"data": [str(world / "clips.parquet")], "steps": 2}
    phases = [{**table, "batch_size": 4, "num_frames": 1, "crop": 32}, {**table, "batch_size": 2}]
    places = {"model": str(world / "blank"), "output": str(vae)}
    run("train", *config(tmp_path, task="vae", phases=phases, **places))
    statistics = Checkpoint.open(vae / "model").preset.statistics
    assert statistics != Checkpoint.open(world / "blank").preset.statistics
    encode = ["--input", str(world / "clips.parquet"), "--output", str(latents), "--model", str(vae / "model")]
    run("dataset", "encode", *encode)
    places = {"model": str(vae / "model"), "output": str(transformer)}
    phases = [{"data": [str(latents)], "steps": 4, "batch_size": 6}]
    run("train", *config(tmp_path, task="transformer", phases=phases, num_frames=9, ema_decay=0.9, **places))
    pipe = PyramidFlowPipeline.from_pretrained(transformer / "model", torch_dtype=torch.float32)
    assert pipe("a red circle", num_frames=9).frames.shape == (1, 9, 64, 64, 3)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_published_checkpoint_is_fine_tuned_with_adapters(world, tmp_path):
    model, latents, out = str(TINY_MINIFLUX), tmp_path / "latents", tmp_path / "out"
    encode = ["--input", str(world / "clips.parquet"), "--output", str(latents), "--model", model]
    run("dataset", "encode", *encode)
    phases = [{"data": [str(latents)], "steps": 4, "batch_size": 6}]
    values = {"num_frames": 9, "lora_rank": 2, "lr": 1e-2, "warmup_steps": 1, "example_steps": 4, "example_count": 2}
    places = {"model": model, "output": str(out), "fresh": False}
    run("train", *config(tmp_path, task="transformer", phases=phases, **values, **places))
    assert len(list((out / "examples" / "transformer-000004").glob("*.mp4"))) == 2
    before, after = (Checkpoint.open(path).load_transformer(torch.float32, "cpu") for path in (model, out / "model"))
    bare = PeftModel.from_pretrained(before, out / "lora").merge_and_unload()
    for (name, merged), (_, own) in zip(bare.named_parameters(), after.named_parameters(), strict=True):
        torch.testing.assert_close(merged, own, msg=name)
    changed = [
        name
        for (name, tensor), (_, old) in zip(
            after.named_parameters(),
            Checkpoint.open(model).load_transformer(torch.float32, "cpu").named_parameters(),
            strict=True,
        )
        if not torch.equal(tensor, old)
    ]
    assert changed
    assert all(".attn." in name for name in changed)
