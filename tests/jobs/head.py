"""A Ray head node of a test's own, as on a cluster: what runs on it is submitted or connects to it."""

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    """A head node with its own folder, ports and token."""

    folder: Path
    dashboard: int
    metrics: int
    env: dict[str, str]

    def ray(self, *arguments: str) -> str:
        command = [str(BIN / "ray"), "job", arguments[0], "--address", f"http://127.0.0.1:{self.dashboard}"]
        done = subprocess.run([*command, *arguments[1:]], env=self.env, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    def submit(self, name: str, *flags: str) -> None:
        entrypoint = ["python", "-m", "jobs.cli", "render", "--device", "cpu", "--batch-size", "1", *flags]
        until(lambda: "submitted" in self.ray("submit", "--submission-id", name, "--no-wait", "--", *entrypoint), 60)

    def status(self, name: str) -> str:
        """Return a job's status; the command that prints it would take seconds of CPU."""
        return str(self.get(f"api/jobs/{name}")["status"])

    def get(self, path: str) -> Any:
        headers = {"Authorization": f"Bearer {self.env['RAY_AUTH_TOKEN']}"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.dashboard}/{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def has_started(self) -> bool:
        """Tell whether it lists jobs."""
        try:
            return self.get("api/jobs/") == []
        except OSError:
            return False

    def counters(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=10) as answer:
            return answer.read().decode()

    def log_records(self) -> list[dict[str, object]]:
        """Return the JSON lines of the workers' logs."""
        lines = [line for log in self.folder.rglob("worker-*.err") for line in log.read_text().splitlines()]
        return [json.loads(line) for line in lines if line.startswith("{")]


def until(happened: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Return ports that are free now; the system gives none of those that Ray keeps for its workers."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in sockets]
    assert all(port > 20000 for port in ports)
    return ports


@contextmanager
def head_node() -> Iterator[Head]:
    """Run a head node on this machine."""
    # not in pytest's own folder: its name is too long for Ray's sockets
    with tempfile.TemporaryDirectory(prefix="head-", ignore_cleanup_errors=True) as folder:
        yield from _head_node(Path(folder))


def _head_node(folder: Path) -> Iterator[Head]:
    gcs, dashboard, agent, metrics, client = free_ports(5)
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "PATH": f"{BIN}:{os.environ['PATH']}"}
    env["RAY_TMPDIR"] = str(folder)  # where `auto` finds this cluster, and no other of the machine
    env |= {"RAY_worker_niceness": "0", "RAY_metrics_report_interval_ms": "500"}
    ports = [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    ports += [f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}"]
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=4", *ports]
    with (folder / "start.log").open("w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    started = Head(folder, dashboard, metrics, env)
    try:
        until(started.has_started, 180)
        yield started
    finally:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                one.kill()  # asked to end, it would wait up to 30 s for what runs on it
        process.wait()
