"""Kills workers, nodes and drivers as drawn, has the store fail meanwhile, and notes what each kill put at stake."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from tests.chaos.cluster import Nodes
from tests.chaos.scenario import Blow
from tests.chaos.stages import read_log

if TYPE_CHECKING:  # pytest wants to be the first to import a plugin
    from tests.pipeline.s3_server import S3Server

TICK_S = 0.1
MOST_PENDING = 3
"""So few requests in a row can fail, and the next fault waits for another video: one publisher gives no file up."""

FAULTS = (
    ((503, "SlowDown"), "PUT", "/videos/"),
    ((500, "InternalError"), "PUT", "/thumbnails/"),
    ((503, "SlowDown"), "PUT", "/metadata/"),
    ((503, "SlowDown"), "GET", ""),
    ((503, "SlowDown"), "HEAD", "/videos/"),
    ("resets", "PUT", "/videos/"),
    ("resets", "PUT", "/metadata/"),
    ("resets in answer", "GET", ""),
    ("loses answer", "PUT", "/videos/"),
    ("loses answer", "PUT", "/metadata/"),
)


@dataclass(frozen=True)
class Struck:
    """A blow that fell: when, and whom it hit: a process or a node."""

    target: str
    begin: float
    end: float
    victim: str


@dataclass
class Monkey:
    """Strikes the drivers of one folder, which run one after another, and everything below them.

    node: resources of a node that comes for one that is killed; faults: of the store, that are left.
    """

    folder: Path
    nodes: Nodes
    node: dict[str, float]
    store: "S3Server | None"
    faults: int
    rng: Random
    struck: list[Struck] = field(default_factory=list)
    _files_before: int = -1

    def live(self, blows: Sequence[Blow], timeout_s: float) -> int:
        """Run a driver until it ends, by itself or by one of the blows; returns its exit code."""
        begun_at = time.time()
        deadline = begun_at + timeout_s
        with (self.folder / "driver.log").open("a") as log:
            command = [sys.executable, "-m", "tests.chaos.driver", str(self.folder)]
            driver = subprocess.Popen(command, env=self.nodes.environment, stderr=log, stdout=log)
            try:
                for blow in blows:
                    self._wait(driver, deadline, partial(self._have_arrived, blow.rows))
                    self._wait(driver, deadline, partial(_is_past, time.time() + blow.delay_s))
                    self._wait(driver, deadline, partial(self._strike, blow, driver, begun_at))
                self._wait(driver, deadline, lambda: False)
            finally:
                driver.kill()
                driver.wait()
        return driver.returncode

    def _wait(self, driver: subprocess.Popen[bytes], deadline: float, is_met: Callable[[], bool]) -> None:
        """Wait until a condition is met or the driver has ended."""
        while driver.poll() is None and not is_met():
            self._tick(deadline)

    def _have_arrived(self, rows: int) -> bool:
        return len({row for record in read_log(self.folder / "arrivals") for row in record["rows"]}) >= rows

    def _tick(self, deadline: float) -> None:
        assert time.time() < deadline, f"the driver is stuck; blows so far: {self.struck}"
        if self.store and self.faults and self.store.pending() < MOST_PENDING:
            files = len({request for request in self.store.requests if request[:4] == "PUT " and "/videos/" in request})
            if files > self._files_before:
                self.store.fail(*self.rng.choice(FAULTS), times=self.rng.randint(1, 3))
                self._files_before, self.faults = files, self.faults - 1
        time.sleep(TICK_S)

    def _strike(self, blow: Blow, driver: subprocess.Popen[bytes], since: float) -> bool:
        """Kill something of the kind; False if there is nothing of the kind now."""
        begin = time.time()
        if blow.target == "driver":
            driver.kill()
            driver.wait()
            victim = str(driver.pid)
        elif blow.target == "node":
            victim = self.rng.choice(self.nodes.ids[1:])
            self.nodes.remove(victim)
        else:
            workers = self._workers(since)
            if not workers:
                return False
            process = self.rng.choice(workers)
            os.kill(process, signal.SIGKILL)
            victim = str(process)
        self.struck.append(Struck(blow.target, begin, time.time(), victim))
        if blow.target == "node":
            self.nodes.add(**self.node)
        return True

    def _workers(self, since: float) -> list[int]:
        """Return the processes of this driver's workers."""
        files = [path for path in (self.folder / "workers").iterdir() if path.stat().st_mtime > since]
        processes = sorted(int(path.name.partition("-")[2]) for path in files)
        return [process for process in processes if _is_worker(process)]


def _is_past(moment: float) -> bool:
    return time.time() >= moment


def _is_worker(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().startswith(b"ray::")
    except OSError:
        return False
