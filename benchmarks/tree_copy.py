"""A copy of a git checkout, whose tests run with and without a mutant."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import psutil

from benchmarks.mutants import MutatedSource

MARK = "MUTATION_SAMPLE_RUN"
"""Environment variable that identifies the processes of a run."""

OBSERVER = """
import json
import os

def write(**event):
    with open(os.environ["OBSERVER_LOG"], "a") as log:
        log.write(json.dumps(event) + "\\n")

def pytest_deselected(items):
    write(deselected=[item.nodeid for item in items])

def pytest_collection_finish(session):
    write(selected=[item.nodeid for item in session.items])

def pytest_runtest_logstart(nodeid):
    write(started=nodeid)

def pytest_runtest_logreport(report):
    if report.failed:
        write(failed=report.nodeid)
"""
"""Pytest plugin that logs what runs, readable also after the time limit."""


@dataclass(frozen=True)
class TestRun:
    """Outcome of one pytest command."""

    __test__ = False  # for pytest, which collects classes by this name

    exit_status: int | None
    """None after the time limit."""
    events: tuple[Mapping[str, object], ...]
    """Events of the observer, in order."""

    @property
    def passed(self) -> bool:
        """Whether no test failed; exit status 5 means that all tests were deselected."""
        return self.exit_status in (0, 5)

    def ids(self, event: str) -> list[str]:
        """Return the test ids of one kind of event."""
        values = [entry[event] for entry in self.events if event in entry]
        return [str(test) for value in values for test in (value if isinstance(value, list) else [value])]


class TreeCopy:
    """A copy of a tree's HEAD in a temporary folder, whose tests run with and without a mutant."""

    def __init__(self, tree: Path, folder: Path, limit_s: float) -> None:
        self.root, self.folder, self.limit_s = folder / "tree", folder, limit_s
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=tree, check=True, capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(self.root, filter="data")
        (folder / "observer.py").write_text(OBSERVER)

    def source(self, module: str) -> str:
        """Return the text of a module, empty if the file does not exist."""
        path = self.root / module
        return path.read_text() if path.exists() else ""

    def tests(self) -> dict[str, str]:
        """Collect all tests; returns the tier of each: default or other."""
        run = self._pytest(["--collect-only"], limit_s=600)
        if not run.passed:
            raise SystemExit(f"pytest cannot collect the tests (exit status {run.exit_status}): {self.output_tail()}")
        return dict.fromkeys(run.ids("selected"), "default") | dict.fromkeys(run.ids("deselected"), "other")

    def run(self, tests: Sequence[str], module: str = "", mutated: MutatedSource | None = None) -> TestRun:
        """Run tests until the first failure, in a mutated tree if a mutant is given."""
        arguments = self.folder / "tests"
        arguments.write_text("\n".join(tests))
        if mutated is None:
            return self._pytest(["-x", "-m", "", f"@{arguments}"], self.limit_s)
        path = self.root / module
        original = path.read_text()
        try:
            _replace_module(path, mutated.source)
            return self._pytest(["-x", "-m", "", f"@{arguments}"], self.limit_s)
        finally:
            _replace_module(path, original)

    def output_tail(self) -> str:
        """Return the last lines that pytest printed."""
        return (self.folder / "output").read_text()[-2000:]

    def _pytest(self, arguments: Sequence[str], limit_s: float) -> TestRun:
        log, token = self.folder / "log", uuid4().hex
        log.write_text("")
        paths = os.pathsep.join(map(str, (self.root, self.folder)))
        environment = os.environ | {"PYTHONPATH": paths, "OBSERVER_LOG": str(log), MARK: token}
        options = ["-q", "-p", "no:cacheprovider", "-p", "observer", "--no-cov", f"--rootdir={self.root}"]
        with (self.folder / "output").open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "pytest", *options, f"--basetemp={self.folder / 't'}", *arguments],
                cwd=self.root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = _wait(process, limit_s)
            finally:
                _kill(process, token)
        return TestRun(status, tuple(map(json.loads, log.read_text().splitlines())))


def _replace_module(path: Path, text: str) -> None:
    """Write a module, and remove its bytecode, which could look newer than the text."""
    path.write_text(text)
    for bytecode in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        bytecode.unlink()


def _wait(process: subprocess.Popen[bytes], limit_s: float) -> int | None:
    """Return the exit status of a run, or None after the limit, which a busy machine extends."""
    started = time.monotonic()
    while time.monotonic() - started < limit_s + _starved_s(process.pid):
        with suppress(subprocess.TimeoutExpired):
            return process.wait(1.0)
    return None


def _starved_s(pid: int) -> float:
    """Return how long the most delayed process of a run has waited for a free CPU core, in its main thread."""
    delays_ns = [0]
    with suppress(psutil.Error):
        for child in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            with suppress(OSError, IndexError):  # ended meanwhile
                delays_ns.append(int(Path(f"/proc/{child.pid}/schedstat").read_text().split()[1]))
    return max(delays_ns) / 1e9


def _kill(process: subprocess.Popen[bytes], token: str) -> None:
    """End a run's process group, and those of its processes that have left the group, such as Ray's."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for other in psutil.process_iter():
        try:
            if other.environ().get(MARK) == token:
                other.kill()
        except psutil.Error:
            continue  # ended meanwhile, or of another user
