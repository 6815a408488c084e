"""The fingerprint: its value, and that a remembered one is used as long as nothing changes and never longer."""

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyramid_flow import Checkpoint, CheckpointError
from pyramid_flow.checkpoints.fingerprint import SETTLED_S, _hash, fingerprint
from tests.pyramid_flow.goldens import TINY_MINIFLUX

DIT = "diffusion_transformer_384p"
WEIGHTS = f"{DIT}/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a checkpoint whose files were written long ago."""
    folder = shutil.copytree(TINY_MINIFLUX, tmp_path / "checkpoint")
    for file in folder.rglob("*.safetensors"):
        aged(file)
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return a list that grows by one whenever the weights are read."""
    calls: list[object] = []
    original = _hash

    def counted(*arguments: object) -> str:
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr("pyramid_flow.checkpoints.fingerprint._hash", counted)
    return calls


def aged(file: Path) -> None:
    then = time.time() - 10 * SETTLED_S
    os.utime(file, (then, then))


def taken(folder: Path, cache: Path, settings: bytes = b"") -> str:
    return fingerprint(Checkpoint.open(folder).folders, settings, cache)


def flip_last_byte(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last[0] ^ 1]))


# The value


@pytest.mark.parametrize(("model", "value"), [("toy", "840299a44bf06ef0"), (str(TINY_MINIFLUX), "6b88cf642030a2f4")])
def test_the_value_stays_what_ledgers_have_recorded(model, value):
    assert Checkpoint.open(model).fingerprint == value


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float8_e4m3fn])
def test_tensors_of_any_type_count(tmp_path, dtype):
    for name, value in (("a", 0), ("b", 1)):
        (tmp_path / name / "part").mkdir(parents=True)
        save_file({"t": torch.full((3,), value).to(dtype)}, tmp_path / name / "part" / "model.safetensors")
    first, second = (fingerprint([tmp_path / name / "part"], cache=tmp_path) for name in ("a", "b"))
    assert first != second


# Remembered


def test_an_unchanged_checkpoint_is_read_once(folder, tmp_path, reads):
    assert len({taken(folder, tmp_path / "cache") for _ in range(3)}) == 1
    assert len(reads) == 1


@pytest.mark.parametrize("restore", [False, True])
def test_one_byte_changed_in_place_is_seen_even_if_its_time_is_put_back(folder, tmp_path, restore):
    file = folder / WEIGHTS
    before, status = taken(folder, tmp_path / "cache"), file.stat()
    flip_last_byte(file)
    if restore:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert file.stat().st_mtime_ns == status.st_mtime_ns
    assert file.stat().st_size == status.st_size
    assert taken(folder, tmp_path / "cache") != before


def test_a_file_put_in_the_place_of_another_is_seen(folder, tmp_path):
    before = taken(folder, tmp_path / "cache")
    other = shutil.copy2(folder / WEIGHTS, tmp_path / "other")
    flip_last_byte(Path(other))
    os.replace(other, folder / WEIGHTS)
    assert taken(folder, tmp_path / "cache") != before


def test_a_link_that_points_elsewhere_is_seen(folder, tmp_path):
    file, other = folder / WEIGHTS, tmp_path / "other.safetensors"
    shutil.copy2(file, other)
    flip_last_byte(other)
    aged(other)
    target = tmp_path / "blob.safetensors"
    shutil.move(file, target)
    file.symlink_to(target)
    before = taken(folder, tmp_path / "cache")
    file.unlink()
    file.symlink_to(other)
    assert taken(folder, tmp_path / "cache") != before


def test_other_settings_are_not_taken_for_these(folder, tmp_path):
    values = [taken(folder, tmp_path / "cache", settings) for settings in (b"", b"{}", b"")]
    assert values[0] == values[2] != values[1]


def test_weights_that_were_just_written_are_not_remembered(folder, tmp_path, reads):
    os.utime(folder / WEIGHTS)
    for _ in range(2):
        taken(folder, tmp_path / "cache")
    assert len(reads) == 2


def test_weights_that_change_while_they_are_read_are_not_remembered(folder, tmp_path, monkeypatch):
    def meddled(*_: object) -> str:
        flip_last_byte(folder / WEIGHTS)
        aged(folder / WEIGHTS)
        return "0" * 16

    with monkeypatch.context() as patched:
        patched.setattr("pyramid_flow.checkpoints.fingerprint._hash", meddled)
        assert taken(folder, tmp_path / "cache") == "0" * 16
    assert taken(folder, tmp_path / "cache") != "0" * 16


# A cache that does not work


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"identity": 1}', "\ufffd"])
def test_a_damaged_entry_is_replaced(folder, tmp_path, reads, text):
    value = taken(folder, tmp_path / "cache")
    [entry] = (tmp_path / "cache").iterdir()
    entry.write_text(text)
    assert taken(folder, tmp_path / "cache") == taken(folder, tmp_path / "cache") == value
    assert len(reads) == 2


@pytest.mark.parametrize("break_it", [lambda cache: cache.write_text("a file"), lambda cache: cache.symlink_to(cache)])
def test_a_cache_that_cannot_be_used_is_no_error(folder, tmp_path, break_it: Callable[[Path], object]):
    break_it(tmp_path / "cache")
    assert taken(folder, tmp_path / "cache") == Checkpoint.open(TINY_MINIFLUX).fingerprint


def test_many_at_once_agree_and_leave_one_entry(folder, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        values = list(pool.map(lambda _: taken(folder, tmp_path / "cache"), range(32)))
    assert len(set(values)) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_changed_checkpoint_takes_the_place_of_its_old_entry(folder, tmp_path):
    taken(folder, tmp_path / "cache")
    weights = load_file(folder / WEIGHTS)
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / WEIGHTS)
    aged(folder / WEIGHTS)
    taken(folder, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_file_that_ends_too_early_is_named(folder, tmp_path):
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=DIT):
        taken(folder, tmp_path / "cache")
