"""A service that runs, under the openai client and SIGKILL."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning"),
]

QUICK = {"num_frames": 9, "num_inference_steps": 2, "video_num_inference_steps": 1}


@dataclass
class Running:
    """A service in a process of its own."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none")

    def workers(self, name: str) -> list[int]:
        """Return the processes of a deployment's replicas."""
        lines = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
        return [int(pid) for pid in re.findall(rf"^\s*(\d+) ray::ServeReplica:[^\n]*:{name}", lines, re.MULTILINE)]


def start(folder: Path) -> Running:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "jobs.serve", "--output", str(folder / "out"), "--port", str(port)]
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


@pytest.fixture
def running(tmp_path) -> Iterator[Running]:
    running = start(tmp_path)
    yield running
    if running.process.poll() is None:
        stop(running)


def until_done(client: openai.OpenAI, ids: list[str], seconds: float) -> list[str]:
    """Wait until videos have ended; returns their statuses."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        statuses = [client.videos.retrieve(video_id).status for video_id in ids]
        if all(status in ("completed", "failed", "cancelled") for status in statuses):
            return statuses
        time.sleep(0.5)
    raise AssertionError(statuses)


def test_no_video_is_lost_whoever_is_killed(running):
    with running.client as client:
        ids = [client.videos.create(prompt=f"prompt {i}", model="toy", extra_body=QUICK).id for i in range(12)]
        for name in ("sample", "dispatcher"):
            time.sleep(1)
            [worker] = running.workers(name)
            os.kill(worker, signal.SIGKILL)
        assert until_done(client, ids, 300) == ["completed"] * 12
        assert len(list((running.folder / "out" / "videos").rglob("*.mp4"))) == 12


def test_a_stopped_service_goes_on_where_it_was(running):
    with running.client as client:
        ids = [client.videos.create(prompt=f"prompt {i}", model="toy", seconds="1").id for i in range(8)]
        time.sleep(2)
    stop(running)
    again = start(running.folder)
    try:
        with again.client as client:
            assert until_done(client, ids, 300) == ["completed"] * 8
            shown = [client.videos.retrieve(video_id) for video_id in ids]
            assert len({video.video_sha256 for video in shown}) == 8
            assert json.loads(shown[0].to_json())["stage_seconds"]["sample"] > 0
    finally:
        stop(again)
