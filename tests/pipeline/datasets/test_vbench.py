"""Suites for VBench: prompts as names of files, in one folder and nowhere else, gathered again at no cost."""

import json
import os
from pathlib import Path

import pytest

from pipeline.datasets import vbench
from pipeline.storage.faults import StorageError
from pipeline.storage.storage import Storage


@pytest.fixture
def output(tmp_path: Path) -> Storage:
    storage = Storage(str(tmp_path / "out"))
    storage.put("videos/ab/ab.mp4", b"a video")
    return storage


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "named" / "videos").mkdir(parents=True)
    return tmp_path / "named" / "videos"


def test_a_text_file_holds_a_prompt_per_line(tmp_path):
    (tmp_path / "suite.txt").write_bytes("a fox\r\n\n  a café  \na fox\nlast".encode())
    assert vbench.read_suite(tmp_path / "suite.txt") == ["a fox", "a café", "last"]


def test_a_json_list_holds_prompts_as_they_are(tmp_path):
    entries = [{"prompt_en": "a fox ", "dimension": ["color"]}, "In 1980, a person", {"prompt_en": "a fox "}]
    (tmp_path / "suite.json").write_text(json.dumps(entries))
    assert vbench.read_suite(tmp_path / "suite.json") == ["a fox ", "In 1980, a person"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("suite.txt", "", "has no prompts"),
        ("suite.txt", "fine\nblack/white", "'black/white' has a '/'"),
        ("suite.txt", "../up", "has a '/'"),
        ("suite.txt", "a\0b", "control character"),
        ("suite.txt", "é" * 130, "makes a file name of 268 bytes, more than 255"),
        ("suite.json", '["a\\nb"]', "control character"),
        ("suite.json", '["\\ud800"]', "control character"),
        ("suite.json", "[", "neither lines of text nor a JSON list"),
        ("suite.json", "3", "neither lines of text nor a JSON list"),
        ("suite.json", '[{"prompt": "a"}]', "neither lines of text nor a JSON list with prompt_en: KeyError"),
        ("suite.json", '[{"prompt_en": 3}]', "neither lines of text nor a JSON list"),
        ("suite.json", "[[1]]", "neither lines of text nor a JSON list"),
    ],
)
def test_a_suite_that_cannot_be_used_is_one_line(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(vbench.SuiteError) as caught:
        vbench.read_suite(tmp_path / name)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompt", [".", "..", ".hidden", "~", "C:", "-", "a" * 247])
def test_every_prompt_that_is_taken_is_a_name_in_the_folder(folder, output, prompt, tmp_path):
    (tmp_path / "suite.txt").write_text(prompt)
    [read] = vbench.read_suite(tmp_path / "suite.txt")
    target = folder / vbench.file_name(read, 0)
    vbench.place(output, "videos/ab/ab.mp4", target)
    assert [file.name for file in folder.iterdir()] == [f"{prompt}-0.mp4"]


def test_the_table_has_a_row_per_sample_whose_seed_is_its_number():
    table = vbench.suite_table(["a fox", "a dog"], 3, {"num_frames": 9})
    assert table.column_names == ["prompt", "seed", "sample", "num_frames"]
    assert table["prompt"].to_pylist() == ["a fox"] * 3 + ["a dog"] * 3
    assert table["seed"].to_pylist() == table["sample"].to_pylist() == [0, 1, 2] * 2
    assert table["num_frames"].to_pylist() == [9] * 6


def test_a_video_is_linked_once(folder, output):
    target = folder / "a fox-0.mp4"
    for _ in range(2):
        vbench.place(output, "videos/ab/ab.mp4", target)
        assert target.samefile(Path(output.root) / "videos/ab/ab.mp4")
    assert list(folder.parent.iterdir()) == [folder]


def test_a_path_in_the_ledger_leads_nowhere_out_of_the_output(folder, output, tmp_path):
    (tmp_path / "private").write_bytes(b"secret")
    with pytest.raises(StorageError, match=r"has a '\.' or '\.\.' part"):
        vbench.place(output, os.path.relpath(tmp_path / "private", vbench.local_path(output)), folder / "a fox-0.mp4")
    assert not (folder / "a fox-0.mp4").exists()


def test_a_video_is_copied_where_there_are_no_links_and_only_once(folder, output, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    target = folder / "a fox-0.mp4"
    target.write_bytes(b"half")
    vbench.place(output, "videos/ab/ab.mp4", target)
    assert target.read_bytes() == b"a video"
    copied = target.stat()
    vbench.place(output, "videos/ab/ab.mp4", target)
    assert (target.stat().st_ino, target.stat().st_mtime_ns) == (copied.st_ino, copied.st_mtime_ns)
    assert list(folder.parent.iterdir()) == [folder]


def test_another_video_of_that_name_is_replaced_and_kept_where_it_came_from(folder, output):
    output.put("videos/cd/cd.mp4", b"another video")
    target = folder / "a fox-0.mp4"
    vbench.place(output, "videos/ab/ab.mp4", target)
    vbench.place(output, "videos/cd/cd.mp4", target)
    assert target.read_bytes() == b"another video"
    assert output.get("videos/ab/ab.mp4") == b"a video"


def test_a_video_in_a_store_is_copied_within_the_folder(folder, monkeypatch):
    storage = Storage("memory://vbench")
    storage.put("videos/ab/ab.mp4", b"a video")
    seen = []
    monkeypatch.setattr(Storage, "download", lambda self, path, target: seen.append(target) or target.write_bytes(b"x"))
    monkeypatch.chdir(folder)
    vbench.place(storage, "videos/ab/ab.mp4", Path("a fox-0.mp4"))
    assert Path("a fox-0.mp4").read_bytes() == b"x"
    assert folder in seen[0].absolute().parents
    assert [file.name for file in folder.iterdir()] == ["a fox-0.mp4"]


def test_a_video_in_a_store_is_copied(folder):
    storage = Storage("memory://vbench")
    storage.put("videos/ab/ab.mp4", b"a video")
    vbench.place(storage, "videos/ab/ab.mp4", folder / "a fox-0.mp4")
    assert (folder / "a fox-0.mp4").read_bytes() == b"a video"
    with pytest.raises(vbench.SuiteError, match="--videos must say where"):
        vbench.default_folder(storage)
