"""A service that runs, under the openai client and SIGKILL."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx2 as httpx
import openai
import pytest

from tests.jobs.head import BIN, free_ports, head_node, until
from tests.jobs.services import service, stop
from tests.pipeline.mp4 import probe

pytestmark = [
    pytest.mark.ray,
    pytest.mark.integration,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning"),
]

ROOT = Path(__file__).parents[2]
QUICK = {"num_frames": 9, "num_inference_steps": 2, "video_num_inference_steps": 1}


def is_ready(port: int) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/ready").is_success
    return False


def until_done(client: openai.OpenAI, ids: list[str], seconds: float) -> list[str]:
    """Wait until videos have ended; returns their statuses."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        statuses = [client.videos.retrieve(video_id).status for video_id in ids]
        if all(status in ("completed", "failed", "cancelled") for status in statuses):
            return statuses
        time.sleep(0.5)
    raise AssertionError(statuses)


def test_no_video_is_lost_whoever_is_killed(tmp_path):
    with service(tmp_path) as running, running.client.with_options(max_retries=20) as client:
        ids = [client.videos.create(prompt=f"prompt {i}", model="toy", extra_body=QUICK).id for i in range(30)]
        for name in ("sample", "dispatcher", "decode", "api", "encode", "publish"):
            time.sleep(1)
            [worker] = running.workers(name)
            os.kill(worker, signal.SIGKILL)
        assert until_done(client, ids, 400) == ["completed"] * 30
        assert len({client.videos.retrieve(video_id).video_sha256 for video_id in ids}) == 30


def test_the_readmes_requests_work_as_they_stand(tmp_path):
    readme = (ROOT / "README.md").read_text()
    [shell] = re.findall(r"```sh\n(curl.*?)```", readme, re.DOTALL)
    [script] = re.findall(r"```python\n(from openai.*?)```", readme, re.DOTALL)
    with service(tmp_path) as running:
        here = [text.replace("http://127.0.0.1:8000", running.url) for text in (shell, script)]
        answer = subprocess.run(here[0], shell=True, capture_output=True, check=True).stdout
        assert json.loads(answer)["status"] == "queued"
        subprocess.run([sys.executable, "-c", here[1]], cwd=tmp_path, check=True)
        assert probe(tmp_path / "circle.mp4").frames == 33


@pytest.mark.database
def test_a_stopped_service_goes_on_where_it_was(tmp_path, postgres):
    flags = ["--database", postgres]
    with service(tmp_path, *flags) as running, running.client as client:
        ids = [client.videos.create(prompt=f"prompt {i}", model="toy", seconds="1").id for i in range(8)]
        time.sleep(2)
        stop(running)
    with service(tmp_path, *flags) as again, again.client as client:
        assert until_done(client, ids, 300) == ["completed"] * 8
        shown = [client.videos.retrieve(video_id) for video_id in ids]
        assert len({video.video_sha256 for video in shown}) == 8
        assert json.loads(shown[0].to_json())["stage_seconds"]["sample"] > 0


def test_samplers_go_without_work_and_come_back_with_it(tmp_path):
    with service(tmp_path, "--min-sample-replicas", "0", "--scale-down-s", "2") as running, running.client as client:
        for _ in range(2):
            until(lambda: not running.workers("sample"), 120)
            video = client.videos.create(prompt="rare", model="toy", extra_body=QUICK)
            assert until_done(client, [video.id], 180) == ["completed"]


def test_a_deployed_service_answers_on_its_cluster(tmp_path, tmp_path_factory):
    [port] = free_ports(1)
    config = tmp_path / "serve.yaml"
    command = [sys.executable, "-m", "jobs.cli", "serve", "--output", str(tmp_path / "out"), "--port", str(port)]
    config.write_text(subprocess.run([*command, "--print-config"], capture_output=True, text=True, check=True).stdout)
    with head_node(tmp_path_factory.mktemp("r")) as head:
        deploy = [str(BIN / "serve"), "deploy", str(config), "--address", f"http://127.0.0.1:{head.dashboard}"]
        subprocess.run(deploy, env=head.env, check=True)
        until(lambda: is_ready(port), 180)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
            video = client.videos.create(prompt="deployed", model="toy", extra_body=QUICK)
            assert until_done(client, [video.id], 180) == ["completed"]
