"""Services that are killed, stopped and deployed, under the openai client; each test starts its own."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress

import httpx2 as httpx
import pytest

from tests.jobs.head import BIN, free_ports, head_node, until
from tests.jobs.services import QUICK, service, stop, until_done

pytestmark = [
    pytest.mark.ray,
    pytest.mark.integration,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning"),
]


def is_ready(port: int) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/ready").is_success
    return False


def test_no_video_is_lost_whoever_is_killed(tmp_path):
    with service(tmp_path) as running, running.client.with_options(max_retries=20) as client:
        ids = [client.videos.create(prompt=f"prompt {i}", model="toy", extra_body=QUICK).id for i in range(20)]
        for name in ("sample", "dispatcher", "decode", "api", "encode", "publish"):
            until(lambda: any(video.status == "in_progress" for video in client.videos.list(limit=100)), 60)
            [worker] = running.workers(name)
            os.kill(worker, signal.SIGKILL)
        assert until_done(client, ids, 400) == ["completed"] * 20
        assert len({client.videos.retrieve(video_id).video_sha256 for video_id in ids}) == 20


@pytest.mark.database
def test_a_stopped_service_goes_on_where_it_was(tmp_path, postgres):
    flags = ["--database", postgres]
    with service(tmp_path, *flags) as running, running.client as client:
        ids = [client.videos.create(prompt=f"prompt {i}", model="toy", seconds="1").id for i in range(8)]
        until(lambda: client.videos.retrieve(ids[0]).status != "queued", 60)
        stop(running)
    with service(tmp_path, *flags) as again, again.client as client:
        assert until_done(client, ids, 300) == ["completed"] * 8
        shown = [client.videos.retrieve(video_id) for video_id in ids]
        assert len({video.video_sha256 for video in shown}) == 8
        assert json.loads(shown[0].to_json())["stage_seconds"]["sample"] > 0


def test_a_deployed_service_answers_on_its_cluster(tmp_path):
    import openai  # here, so that collecting does not load it

    [port] = free_ports(1)
    config = tmp_path / "serve.yaml"
    command = [sys.executable, "-m", "jobs.cli", "serve", "--output", str(tmp_path / "out"), "--port", str(port)]
    config.write_text(subprocess.run([*command, "--print-config"], capture_output=True, text=True, check=True).stdout)
    with head_node() as head:
        deploy = [str(BIN / "serve"), "deploy", str(config), "--address", f"http://127.0.0.1:{head.dashboard}"]
        subprocess.run(deploy, env=head.env, check=True)
        until(lambda: is_ready(port), 180)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
            video = client.videos.create(prompt="deployed", model="toy", extra_body=QUICK)
            assert until_done(client, [video.id], 180) == ["completed"]
        page = httpx.get(f"http://127.0.0.1:{port}/")
        assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
