"""Services that run in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from tests.jobs.head import free_ports

if TYPE_CHECKING:
    import openai


START_S = 240
"""Time limit of a service's start, which takes some 20 seconds of CPU."""

QUICK = {"num_frames": 9, "num_inference_steps": 2, "video_num_inference_steps": 1}
"""Fields of a video that is made in a moment."""


@dataclass
class Running:
    """A service in a process of its own."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self) -> "openai.OpenAI":
        import openai  # here, so that sessions without its tests do not load it

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none")

    def workers(self, name: str) -> list[int]:
        """Return the processes of a deployment's replicas, in this service and no other one on the machine."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):  # ended meanwhile
                title = " ".join(process.cmdline())
                if title.startswith("ray::ServeReplica:") and f":{name}" in title:
                    found.append(process.pid)
        return found


def start(folder: Path, *flags: str) -> Running:
    [port] = free_ports(1)
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "jobs.cli", "serve", "--output", str(folder / "out"), "--port", str(port), *flags]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    running = Running(folder, port, process)
    try:
        deadline = time.monotonic() + START_S
        while f":{port}/v1/videos" not in (folder / "log").read_text():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
    except BaseException:
        process.kill()  # its Ray ends with it
        process.wait()
        raise
    return running


def stop(running: Running) -> None:
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(120) == 130


@contextmanager
def service(folder: Path, *flags: str) -> Iterator[Running]:
    running = start(folder, *flags)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            stop(running)


def until_done(client: "openai.OpenAI", ids: list[str], seconds: float) -> list[str]:
    """Wait until videos have ended; returns their statuses."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        statuses = [client.videos.retrieve(video_id).status for video_id in ids]
        if all(status in ("completed", "failed", "cancelled") for status in statuses):
            return statuses
        time.sleep(0.25)
    raise AssertionError(statuses)
