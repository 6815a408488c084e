"""Requests to one service that runs, whose samplers go when they have no work."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs.head import until
from tests.jobs.services import QUICK, Running, service, until_done
from tests.pipeline.mp4 import probe

pytestmark = [
    pytest.mark.ray,
    pytest.mark.integration,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning"),
]

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Running]:
    flags = ["--min-sample-replicas", "0", "--scale-down-s", "2"]
    with service(tmp_path_factory.mktemp("service"), *flags) as running:
        yield running


def test_samplers_go_without_work_and_come_back_with_it(running):
    with running.client as client:
        for _ in range(2):
            until(lambda: not running.workers("sample"), 120)
            video = client.videos.create(prompt="rare", model="toy", extra_body=QUICK)
            assert until_done(client, [video.id], 180) == ["completed"]


def test_the_readmes_requests_work_as_they_stand(running, tmp_path):
    readme = README.read_text()
    [shell] = re.findall(r"```sh\n(curl.*?)```", readme, re.DOTALL)
    [script] = re.findall(r"```python\n(from openai.*?)```", readme, re.DOTALL)
    here = [text.replace("http://127.0.0.1:8000", running.url) for text in (shell, script)]
    answer = subprocess.run(here[0], shell=True, capture_output=True, check=True).stdout
    assert json.loads(answer)["status"] == "queued"
    subprocess.run([sys.executable, "-c", here[1]], cwd=tmp_path, check=True)
    assert probe(tmp_path / "circle.mp4").frames == 33
