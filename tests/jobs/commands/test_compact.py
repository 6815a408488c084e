"""The command: what it says, and its exit codes."""

import os
import signal
import subprocess
import sys
from datetime import timedelta

import pytest

from jobs import cli
from pipeline.ledger.ledger import read
from pipeline.storage.faults import StorageError
from pipeline.storage.storage import Storage
from tests.pipeline.sample_ledgers import recorded, rows, written


@pytest.fixture
def storage(tmp_path):
    """Return an output of two ended runs and one that is alive, with two orphans."""
    storage = Storage(str(tmp_path / "out"))
    for run, state in (("1", "finished"), ("2", "broken"), ("3", "running")):
        recorded(storage, run, state)
        written(storage, rows("a", run=run), rows(run, run=run), run=run)
    storage.put("videos/old.mp4", b"x")
    storage.put("videos/new.mp4", b"x")
    os.utime(f"{storage.root}/videos/old.mp4", (0, 0))
    return storage


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    output = capsys.readouterr()
    assert output.err == ""
    return output.out.splitlines()


def the_error(capsys: pytest.CaptureFixture[str]) -> str:
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("pyramid-render compact: ")
    return line


def test_it_says_what_it_did(storage, capsys):
    before = read(storage)
    assert cli.main(["compact", storage.root]) == 0
    merged, left, *orphans = lines(capsys)
    assert merged == "4 parts of the ledger became 1"
    assert left.startswith("  left alone: 2 of run 3: it is running, last sign of life ")
    assert orphans == ["2 files that no row names", "  videos/new.mp4", "  videos/old.mp4"]
    assert read(storage).equals(before)
    assert len(storage.list("metadata")) == 3


def test_a_second_time_there_is_nothing_to_do(storage, capsys):
    cli.main(["compact", storage.root])
    names = storage.list()
    capsys.readouterr()
    assert cli.main(["compact", storage.root]) == 0
    assert lines(capsys)[0] == "nothing to merge"
    assert storage.list() == names


def test_orphans_are_deleted_when_asked_for(storage, capsys):
    assert cli.main(["compact", storage.root, "--delete-orphans"]) == 0
    assert lines(capsys)[-1] == "deleted 1 of them, left 1 that are younger than 24 hours"
    assert storage.list("videos") == ["videos/new.mp4"]


def test_only_some_orphans_are_named(storage, capsys):
    for number in range(30):
        storage.put(f"images/{number:02d}.png", b"x")
    assert cli.main(["compact", storage.root]) == 0
    printed = lines(capsys)
    assert "32 files that no row names" in printed
    assert printed[-2:] == ["  images/19.png", "  and 12 more"]


def test_orphans_may_have_any_name(storage, capsys):
    with open(os.fsencode(storage.root) + b"/videos/\xe9", "wb"):
        pass
    assert cli.main(["compact", storage.root]) == 0
    assert lines(capsys)[-1] == "  videos/\\udce9"


def test_without_orphans_none_are_deleted(tmp_path, capsys):
    storage = Storage(str(tmp_path))
    recorded(storage, "1", "finished", timedelta(days=1))
    written(storage, rows("a", run="1"), run="1")
    assert cli.main(["compact", str(tmp_path), "--delete-orphans"]) == 0
    assert lines(capsys) == ["nothing to merge", "0 files that no row names"]


@pytest.mark.parametrize("url", ["{}/absent", "nope://a", "{}/file"])
def test_a_place_without_a_ledger_exits_2_and_is_left_as_it_is(tmp_path, capsys, url):
    (tmp_path / "file").write_bytes(b"")
    assert cli.main(["compact", url.format(tmp_path)]) == 2
    assert the_error(capsys)
    assert os.listdir(tmp_path) == ["file"]


def test_without_a_ledger_no_file_is_taken_for_an_orphan(tmp_path, capsys):
    storage = Storage(str(tmp_path))
    storage.put("videos/a.mp4", b"x")
    recorded(storage, "1", "broken")
    os.utime(tmp_path / "videos" / "a.mp4", (0, 0))
    assert cli.main(["compact", str(tmp_path), "--delete-orphans"]) == 2
    assert "there is no ledger in file://" in the_error(capsys)
    assert storage.exists("videos/a.mp4")


def test_a_damaged_part_exits_2(storage, capsys):
    storage.put("metadata/part-1-000007.parquet", b"junk")
    names = storage.list()
    assert cli.main(["compact", storage.root, "--delete-orphans"]) == 2
    assert "part-1-000007.parquet cannot be read" in the_error(capsys)
    assert storage.list() == names


@pytest.mark.parametrize("method", ["put", "delete", "modified"])
def test_storage_that_breaks_midway_exits_1(storage, capsys, monkeypatch, method):
    before = read(storage)
    monkeypatch.setattr(Storage, method, lambda *_: (_ for _ in ()).throw(StorageError("the disk is gone")))
    assert cli.main(["compact", storage.root, "--delete-orphans"]) == 1
    assert the_error(capsys).endswith("the disk is gone; nothing is lost, run it again")
    assert read(storage).sort_by("id").equals(before.sort_by("id"))


def test_a_full_disk_for_temporary_files_exits_1(storage, capsys, monkeypatch):
    monkeypatch.setattr(
        "pipeline.ledger.compact.TemporaryDirectory", lambda **_: (_ for _ in ()).throw(OSError("no space left"))
    )
    assert cli.main(["compact", storage.root]) == 1
    assert the_error(capsys).endswith("no space left; nothing is lost, run it again")


@pytest.mark.parametrize("method", ["put", "delete", "modified"])
def test_an_interrupt_exits_130(storage, capsys, monkeypatch, method):
    monkeypatch.setattr(Storage, method, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["compact", storage.root, "--delete-orphans"]) == 130
    assert the_error(capsys).endswith("interrupted; nothing is lost, run it again")


SLOW = """
import os, signal, sys, threading
from jobs import cli
from pipeline.storage.storage import Storage

real, interrupted = Storage.get, threading.Event()

def note(*arguments):
    interrupted.set()
    signal.default_int_handler(*arguments)

def get(self, path):
    if path.startswith("metadata"):
        os.write(1, b"reading\\n")
        interrupted.wait(60)
    return real(self, path)

signal.signal(signal.SIGINT, note)
Storage.get = get
sys.exit(cli.main(["compact", sys.argv[1]]))
"""


def test_ctrl_c_leaves_no_traceback(storage):
    names = storage.list()
    command = [sys.executable, "-c", SLOW, storage.root]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        assert [process.stdout.readline() for _ in range(4)] == ["reading\n"] * 4  # the parts of ended runs
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert errors == "pyramid-render compact: interrupted; nothing is lost, run it again\n"
    assert storage.list() == names


def test_the_help_explains_the_exit_codes(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        cli.main(["compact", "--help"])
    assert caught.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith("usage: pyramid-render compact")
    assert all(text in output for text in ("--delete-orphans", "0 done", "1 it broke", "2 there is no", "130"))


@pytest.mark.parametrize(("flags", "word"), [([], "OUTPUT"), ([""], "output ''"), (["a", "--nope"], "--nope")])
def test_wrong_settings_are_one_line_and_exit_code_2(capsys, flags, word):
    with pytest.raises(SystemExit) as caught:
        cli.main(["compact", *flags])
    assert caught.value.code == 2
    assert word in the_error(capsys)
