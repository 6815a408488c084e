"""Names of published checkpoints stand for the folders that were fetched."""

import shutil

import pytest

from pyramid_flow import Checkpoint, CheckpointError
from pyramid_flow.checkpoints.published import REPOSITORIES, record_fetched
from pyramid_flow.checkpoints.user_cache import cache_folder
from tests.pyramid_flow.goldens import TINY_MINIFLUX


@pytest.fixture(autouse=True)
def _nothing_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))


@pytest.mark.parametrize("name", REPOSITORIES)
def test_a_name_stands_for_the_folder_that_was_recorded_last(name, tmp_path):
    for folder in (tmp_path / "first", tmp_path / "second"):
        record_fetched(name, shutil.copytree(TINY_MINIFLUX, folder))
        assert Checkpoint.open(name).root == folder
    assert Checkpoint.open(name).path == str(tmp_path / "second")


@pytest.mark.parametrize("name", REPOSITORIES)
def test_a_name_that_was_not_fetched_says_the_command(name):
    with pytest.raises(CheckpointError, match=f"{name} has not been fetched .* run `pyramid-render fetch {name}`"):
        Checkpoint.open(name)


def test_a_fetched_folder_that_is_gone_says_the_command(tmp_path):
    record_fetched("sd3", tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"fetched to .*/gone, which is gone: run `pyramid-render fetch sd3`"):
        Checkpoint.open("sd3")


def test_a_folder_of_that_name_is_still_reached_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY_MINIFLUX, "sd3")
    assert Checkpoint.open("./sd3").root == tmp_path / "sd3"


def test_a_snapshot_in_the_hubs_cache_is_called_by_its_repository(tmp_path):
    folder = tmp_path / "models--rain1011--pyramid-flow-miniflux" / "snapshots" / "0123abc"
    shutil.copytree(TINY_MINIFLUX, folder)
    assert Checkpoint.open(folder).name == "pyramid-flow-miniflux/384p"


def test_a_record_that_cannot_be_written_leaves_nothing_behind():
    (cache_folder() / "fetched" / "sd3").mkdir(parents=True)
    with pytest.raises(OSError, match="sd3"):
        record_fetched("sd3", TINY_MINIFLUX)
    assert [path.name for path in (cache_folder() / "fetched").iterdir()] == ["sd3"]
