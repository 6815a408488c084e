"""Services that run in processes of their own."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai

from tests.jobs.head import free_ports


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
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none")

    def workers(self, name: str) -> list[int]:
        """Return the processes of a deployment's replicas."""
        lines = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
        return [int(pid) for pid in re.findall(rf"^\s*(\d+) ray::ServeReplica:[^\n]*:{name}", lines, re.MULTILINE)]


def start(folder: Path, *flags: str) -> Running:
    [port] = free_ports(1)
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "jobs.cli", "serve", "--output", str(folder / "out"), "--port", str(port), *flags]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    running = Running(folder, port, process)
    deadline = time.monotonic() + 180
    while f":{port}/v1/videos" not in (folder / "log").read_text():
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.5)
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
