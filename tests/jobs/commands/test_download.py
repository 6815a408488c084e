"""Fetching, against a Hub of HTTP on this machine that serves the tiny checkpoint with files nobody needs."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save

from jobs import cli
from pyramid_flow import Checkpoint, CheckpointError
from pyramid_flow.checkpoints.layout import needed_files
from tests.jobs.hub import COMMIT, Hub, running
from tests.pyramid_flow.goldens import TINY_MINIFLUX, TINY_SD3

NAME = "rain1011/pyramid-flow-miniflux"
DIT = "diffusion_transformer_384p"
WEIGHTS = f"{DIT}/diffusion_pytorch_model.safetensors"
VAE = "causal_video_vae/diffusion_pytorch_model.safetensors"
UNNEEDED = (
    "README.md",
    "text_encoder/pytorch_model.bin",
    "text_encoder_2/model.fp16.safetensors",
    f"{DIT}/flax.msgpack",
)
ROOT = Path(__file__).parents[3]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = shutil.copytree(TINY_MINIFLUX, tmp_path / "repository")
    other = shutil.copytree(folder / DIT, folder / "diffusion_transformer_768p")
    for file in other.iterdir():  # files of equal content come once
        file.write_bytes(file.read_bytes() + b" " if file.suffix == ".json" else changed(file))
    for name in UNNEEDED:
        (folder / name).write_bytes(b"x" * 100)
    return folder


def changed(file: Path) -> bytes:
    return save({name: tensor + 1 for name, tensor in load_file(file).items()}, metadata={"format": "pt"})


@pytest.fixture
def hub(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Run the Hub, and let huggingface_hub know of no other and keep its files here."""
    with running(Hub(NAME, repository)) as hub:
        use_endpoint(monkeypatch, hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "home" / "assets"))
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
        yield hub


def use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def files_in(folder: Path) -> set[str]:
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in files if path.parts[0] != ".cache"}


def needed_of(hub: Hub) -> set[str]:
    return set(hub.names) - set(UNNEEDED)


# What comes


@pytest.mark.parametrize("into_folder", [False, True])
def test_what_is_needed_comes_and_the_name_stands_for_it(hub, tmp_path, capsys, into_folder):
    output = ["--output", str(tmp_path / "out")] if into_folder else []
    assert cli.main(["fetch", "miniflux", *output]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert files_in(folder) == needed_of(hub)
    assert (folder == tmp_path / "out") == into_folder
    checkpoint = Checkpoint.open("miniflux", "768p")
    checkpoint.check()
    assert checkpoint.root == folder
    assert checkpoint.name == f"{'out' if into_folder else 'pyramid-flow-miniflux'}/768p"
    for load in (checkpoint.load_transformer, checkpoint.load_vae, checkpoint.load_text_encoder):
        load(torch.float32, "cpu")


def test_only_the_chosen_variant_comes(hub, tmp_path):
    assert cli.main(["fetch", "miniflux", "--variant", "768p", "--output", str(tmp_path / "out")]) == 0
    expected = {name for name in needed_of(hub) if not name.startswith(DIT)}
    assert files_in(tmp_path / "out") == set(hub.served) == expected


def test_what_is_there_does_not_come_again(hub):
    assert cli.main(["fetch", "miniflux", "--variant", "384p"]) == 0
    hub.served.clear()
    assert cli.main(["fetch", "miniflux"]) == 0
    assert all(name.startswith("diffusion_transformer_768p/") for name in hub.served)
    assert Checkpoint.open("miniflux", "384p").root == Checkpoint.open("miniflux", "768p").root


@pytest.mark.parametrize("variants", [[], ["384p"], [DIT]])
def test_the_other_family_has_a_third_encoder(variants):
    names = [path.relative_to(TINY_SD3).as_posix() for path in TINY_SD3.rglob("*") if path.is_file()]
    assert needed_files([*names, "text_encoder_3/pytorch_model.bin"], variants) == sorted(names)


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("pyramid.json", True),
        ("text_encoder_2/model-00001-of-00002.safetensors", True),
        ("text_encoder_2/model.safetensors.index.json", True),
        ("tokenizer_2/spiece.model", True),
        ("causal_video_vae/diffusion_pytorch_model.bin", False),
        ("text_encoder_2/pytorch_model.bin.index.json", False),
        ("text_encoder_2/model.fp16-00001-of-00002.safetensors", False),
        (f"{DIT}/optimizer.pt", False),
        ("vae/config.json", False),
        ("model_index.json", False),
        ("../tokenizer/vocab.json", False),
        ("tokenizer/../../vocab.json", False),
        ("diffusion_transformer_384p/../../config.json", False),
        ("diffusion_transformer_../config.json", True),
        ("tokenizer//vocab.json", False),
    ],
)
def test_files_are_chosen_by_folder_and_kind(name, needed):
    assert (name in needed_files([name, WEIGHTS], [])) == needed


# Cut off


def test_a_connection_that_is_cut_goes_on_where_it_was(hub, repository, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what has not filled one is lost
    hub.cuts[WEIGHTS] = [1000, 2000]
    assert cli.main(["fetch", "miniflux", "--variant", "384p"]) == 0
    assert hub.served[WEIGHTS] == (repository / WEIGHTS).stat().st_size
    Checkpoint.open("miniflux").load_transformer(torch.float32, "cpu")


def test_after_a_lasting_cut_the_next_run_takes_only_what_is_missing(hub, capsys):
    hub.cuts[WEIGHTS] = [1000] + [0] * 20
    assert cli.main(["fetch", "miniflux"]) == 1
    assert "run it again to resume" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="not been fetched"):
        Checkpoint.open("miniflux", "384p")
    came = {name for name in hub.served if name != WEIGHTS}
    assert VAE in came
    hub.cuts.clear()
    hub.served.clear()
    assert cli.main(["fetch", "miniflux"]) == 0
    assert set(hub.served) == needed_of(hub) - came
    Checkpoint.open("miniflux", "384p").check()


def test_an_interrupt_keeps_what_came_whole(hub, monkeypatch, capsys):
    download = HfApi.hf_hub_download

    def interrupted(self: HfApi, repository: str, file: str, **options: object) -> object:
        if file == WEIGHTS and not options.get("dry_run"):
            raise KeyboardInterrupt
        return download(self, repository, file, **options)

    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "hf_hub_download", interrupted)
        assert cli.main(["fetch", "miniflux"]) == 130
    assert "interrupted; what came whole is kept" in capsys.readouterr().err
    came = set(hub.served)
    assert VAE in came
    hub.served.clear()
    assert cli.main(["fetch", "miniflux"]) == 0
    assert set(hub.served) == needed_of(hub) - came


@pytest.mark.integration
def test_ctrl_c_during_a_download_leaves_no_part_of_a_file(hub, tmp_path):
    hub.stall = WEIGHTS
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jobs.cli", "fetch", "miniflux"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert hub.stalled.wait(timeout=120)
        time.sleep(1)  # until the client waits for what does not come
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; what came whole is kept" in errors
    assert not list((tmp_path / "home").rglob("*.incomplete"))
    hub.stall = None
    came = set(hub.served) - {WEIGHTS}
    hub.served.clear()
    assert cli.main(["fetch", "miniflux"]) == 0
    assert set(hub.served) == needed_of(hub) - came


# What cannot be had


def test_too_little_disk_is_said_before_anything_comes(hub, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**6, 0, 10**5))
    assert cli.main(["fetch", "miniflux", "--output", str(tmp_path / "new" / "out")]) == 2
    assert "has 0.0 GB free, but 0.0 GB are to come: give another --output" in capsys.readouterr().err
    assert hub.num_served == 0
    assert files_in(tmp_path / "new" / "out") == set()


def test_files_that_are_there_need_no_disk_but_copies_do(hub, tmp_path, monkeypatch):
    assert cli.main(["fetch", "miniflux"]) == 0
    monkeypatch.setattr("shutil.disk_usage", lambda _: namedtuple("usage", "free")(0))
    assert cli.main(["fetch", "miniflux"]) == 0
    assert cli.main(["fetch", "miniflux", "--output", str(tmp_path / "out")]) == 2


def test_without_a_network_it_is_said_what_to_bring(hub, monkeypatch, capsys):
    use_endpoint(monkeypatch, "http://127.0.0.1:1")
    assert cli.main(["fetch", "miniflux"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "127.0.0.1:1 cannot be reached" in line
    assert f"copy of {NAME}" in line
    assert "give that folder to --model" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["maxiflux"], "name 'maxiflux': Input should be 'miniflux' or 'sd3'"),
        ([], "NAME"),
        (["miniflux", "--variant", "1080p"], "no variant '1080p', there are: 384p, 768p"),
        (["miniflux", "--revision", "v9"], f"{NAME} has no revision 'v9'"),
        (["sd3"], "has no repository rain1011/pyramid-flow-sd3"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(hub, capsys, arguments, message):
    try:
        code = cli.main(["fetch", *arguments])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("pyramid-render fetch: ")
    assert message in line
    assert hub.num_served == 0


def test_a_commit_is_a_revision_too(hub):
    assert cli.main(["fetch", "miniflux", "--revision", COMMIT]) == 0


def test_pickled_weights_are_never_fetched_but_may_be_brought(hub, repository, tmp_path, capsys):
    weights = (repository / VAE).read_bytes()
    (repository / VAE).rename(repository / VAE.replace(".safetensors", ".bin"))
    out = tmp_path / "out"
    assert cli.main(["fetch", "miniflux", "--output", str(out)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{out}/causal_video_vae has no safetensors file" in line
    assert "convert its pickled weights" in line
    assert not list(out.rglob("*.bin"))
    with pytest.raises(CheckpointError, match="not been fetched"):
        Checkpoint.open("miniflux", "384p")
    (out / VAE).write_bytes(weights)
    assert cli.main(["fetch", "miniflux", "--output", str(out)]) == 0
    Checkpoint.open("miniflux", "384p").check()
