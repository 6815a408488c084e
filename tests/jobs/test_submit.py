"""`ray job submit` on a real head node: a job that runs through, what it shows meanwhile, and one that is stopped."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline import ledger
from pipeline.storage import Storage
from tests.pipeline.tables import write_table

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]

BIN = Path(sys.executable).parent
SHAPE = {"num_frames": 17, "num_inference_steps": 4, "video_num_inference_steps": 2}


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
        entrypoint = ["python", "-m", "jobs.render", "--device", "cpu", "--batch-size", "1", *flags]
        until(lambda: "submitted" in self.ray("submit", "--submission-id", name, "--no-wait", "--", *entrypoint), 60)

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
        time.sleep(0.5)


def free_ports(count: int) -> list[int]:
    """Return ports that are free now; the system gives none of those that Ray keeps for its workers."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in sockets]
    assert all(port > 20000 for port in ports)
    return ports


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("r")
    gcs, dashboard, agent, metrics, client = free_ports(5)
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "PATH": f"{BIN}:{os.environ['PATH']}"}
    ports = [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    ports += [f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}"]
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=4", *ports, f"--temp-dir={folder}"]
    with (folder / "start.log").open("w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    started = Head(folder, dashboard, metrics, env)
    try:
        until(lambda: "JobDetails" not in started.ray("list") and "Error" not in started.ray("list"), 90)
        yield started
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def flags(folder: Path, num_rows: int) -> list[str]:
    rows = [{"prompt": f"prompt {i}", **SHAPE} for i in range(num_rows)]
    table = write_table(folder / "in.parquet", rows)
    return ["--input", str(table), "--output", str(folder / "out"), "--model", "toy"]


def test_a_submitted_job_runs_on_the_cluster_and_can_be_watched(head, tmp_path):
    head.submit("whole", *flags(tmp_path, 60))
    until(lambda: "ray_pyramid_rows_total{" in head.counters() and 'stage="publish"' in head.counters(), 180)
    counters = head.counters()
    for name in ("batch_seconds_bucket", "busy_seconds_total", "published_bytes_total", "rows_left"):
        assert f"ray_pyramid_{name}" in counters
    until(lambda: "succeeded" in head.ray("status", "whole"), 240)
    assert "60 of 60 rows succeeded" in head.ray("logs", "whole")
    view = ledger.read(Storage(str(tmp_path / "out")))
    assert set(view["status"].to_pylist()) == {"succeeded"}
    logged = [record for record in head.log_records() if record.get("stage") == "sample"]
    assert {row for record in logged for row in record["rows"]} == set(view["id"].to_pylist())
    assert all(record["seconds"] > 0 and record["node"] for record in logged)


def test_auto_is_the_cluster_that_runs_on_this_machine(head, tmp_path):
    command = [sys.executable, "-m", "jobs.render", "--address", "auto", "--device", "cpu"]
    command += flags(tmp_path, 3)
    done = subprocess.run(command, env=head.env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ids = ledger.read(Storage(str(tmp_path / "out")), ["id"])["id"].to_pylist()
    logged = {row for record in head.log_records() if record.get("stage") == "sample" for row in record["rows"]}
    assert len(ids) == 3
    assert set(ids) <= logged


def test_a_stopped_job_keeps_what_is_done(head, tmp_path):
    head.submit("stopped", *flags(tmp_path, 500), "--ledger-rows", "1000", "--ledger-seconds", "1000")
    storage = Storage(str(tmp_path / "out"))
    until(lambda: len(storage.list("videos")) >= 5, 240)
    head.ray("stop", "stopped")
    until(lambda: "was stopped" in head.ray("status", "stopped"), 60)
    view = ledger.read(storage)
    assert 3 <= len(view) < 500
    assert all(storage.exists(uri) for uri in view["uri"].to_pylist())
