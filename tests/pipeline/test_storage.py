"""Storage writes whole files, lists what is there, and lets no path out of its root."""

import os
import pickle
import stat
from pathlib import Path

import pytest

from pipeline import storage as storage_module
from pipeline.storage import TEMPORARY_PREFIX, Storage, StorageError

ATTACKS = [
    "",
    "/",
    "/etc/passwd",
    "..",
    "../a",
    "a/../../b",
    "a/..",
    ".",
    "./a",
    "a//b",
    "a/",
    "\\\\host\\share",
    "a\\..\\b",
    "C:\\a",
    "s3://bucket/a",
    "file:///etc/passwd",
    "a\0b",
    "a\nb",
    f"{TEMPORARY_PREFIX}a",
    f"a/{TEMPORARY_PREFIX}b/c",
]


@pytest.fixture(params=["local", "memory"])
def storage(request, tmp_path):
    return Storage(str(tmp_path / "out") if request.param == "local" else f"memory://{tmp_path.name}/out")


def test_what_is_put_is_what_is_got(storage):
    storage.put("videos/0f/a.mp4", b"first")
    storage.put("videos/0f/a.mp4", b"second, longer")
    assert storage.get("videos/0f/a.mp4") == b"second, longer"
    assert storage.exists("videos/0f/a.mp4")
    assert not storage.exists("videos/0f/b.mp4")


def test_a_local_file_can_be_put(storage, tmp_path):
    source = tmp_path / "source.mp4"
    source.write_bytes(b"x" * 100_000)
    storage.put("a.mp4", source)
    assert storage.get("a.mp4") == source.read_bytes()


def test_list_is_sorted_recursive_and_relative(storage):
    paths = [
        "metadata/part-1.parquet",
        "videos/0f/b.mp4",
        "videos/0f/a.mp4",
        "videos2/c.mp4",
        "job.json",
        "with blank/é.txt",
    ]
    for path in paths:
        storage.put(path, b"x")
    assert storage.list() == sorted(paths)
    assert storage.list("videos") == ["videos/0f/a.mp4", "videos/0f/b.mp4"]
    assert all(storage.get(path) == b"x" for path in storage.list())


def test_an_absent_folder_lists_as_empty(storage):
    assert storage.list() == []
    assert storage.list("videos/0f") == []


def test_a_file_is_no_folder_to_list(storage):
    storage.put("a", b"x")
    assert storage.list("a") == []


def test_deleting_twice_is_fine(storage):
    storage.put("a/b", b"x")
    storage.delete("a/b")
    storage.delete("a/b")
    assert not storage.exists("a/b")


def test_reading_an_absent_file_is_an_error_with_its_cause(storage):
    with pytest.raises(StorageError, match=r"cannot read .*absent") as caught:
        storage.get("absent")
    assert isinstance(caught.value.__cause__, FileNotFoundError)


@pytest.mark.parametrize("path", ATTACKS)
@pytest.mark.parametrize("method", ["put", "get", "exists", "delete", "url"])
def test_paths_that_lead_elsewhere_are_refused(storage, method, path):
    arguments = (path, b"x") if method == "put" else (path,)
    with pytest.raises(StorageError, match="path"):
        getattr(storage, method)(*arguments)


@pytest.mark.parametrize("path", [path for path in ATTACKS if path])
def test_prefixes_that_lead_elsewhere_are_refused(storage, path):
    with pytest.raises(StorageError, match="path"):
        storage.list(path)


@pytest.mark.parametrize("path", ["a..b", "...", "~", "$HOME", "*", "a:b", "-rf", ".hidden", "a#?[0]"])
def test_names_without_a_meaning_are_just_names(storage, path):
    storage.put(path, b"x")
    assert storage.list() == [path]
    assert storage.get(path) == b"x"
    storage.delete(path)
    assert storage.list() == []


def test_probe_leaves_nothing(storage):
    storage.probe()
    assert storage.list() == []


def test_storage_travels(storage):
    copy = pickle.loads(pickle.dumps(storage))
    copy.put("a", b"x")
    assert storage.get("a") == b"x"
    assert copy.url("a") == storage.url("a")
    assert repr(copy) == repr(storage)


def test_a_relative_folder_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage = Storage("out")
    monkeypatch.chdir("/")
    storage.put("a", b"x")
    assert (tmp_path / "out" / "a").read_bytes() == b"x"


def test_urls_are_full(tmp_path):
    assert Storage(str(tmp_path)).url("v/a.mp4") == f"file://{tmp_path}/v/a.mp4"
    assert Storage(f"file://{tmp_path}/").url("a") == f"file://{tmp_path}/a"
    assert Storage("memory://m/out").url("a") == "memory:///m/out/a"


def test_a_write_that_fails_half_way_shows_nothing_and_keeps_the_old_file(tmp_path, monkeypatch):
    storage = Storage(str(tmp_path))
    storage.put("a", b"old")

    def breaks_half_way(source, target):
        Path(target).write_bytes(b"hal")
        raise OSError("no space left on device")

    monkeypatch.setattr(storage_module.shutil, "copyfile", breaks_half_way)
    with pytest.raises(StorageError, match="no space left"):
        storage.put("a", tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]
    assert storage.get("a") == b"old"


def test_what_a_killed_process_left_is_not_listed(tmp_path):
    storage = Storage(str(tmp_path))
    storage.put("videos/a.mp4", b"x")
    (tmp_path / "videos" / f"{TEMPORARY_PREFIX}0123").write_bytes(b"half")
    assert storage.list() == ["videos/a.mp4"]


def test_written_files_are_readable_as_the_umask_says(tmp_path):
    Storage(str(tmp_path)).put("a", b"x")
    (tmp_path / "plain").write_bytes(b"x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_deleting_a_folder_is_an_error(tmp_path):
    storage = Storage(str(tmp_path))
    storage.put("videos/a", b"x")
    with pytest.raises(StorageError, match="cannot delete"):
        storage.delete("videos")
    assert storage.list() == ["videos/a"]


def test_probe_says_in_one_line_why_output_is_not_writable(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="not writable") as caught:
        Storage(str(tmp_path / "file")).probe()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("url", "reason"), [("", "empty"), ("nope://a/b", "nope"), ("/", "names no folder")])
def test_unusable_urls_are_refused(url, reason):
    with pytest.raises(StorageError, match=reason):
        Storage(url)
