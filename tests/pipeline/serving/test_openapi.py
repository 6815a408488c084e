"""The interface keeps what its OpenAPI description promises, whatever it is asked; a worker makes what waits."""

import threading
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    negative_data_rejection,
    positive_data_acceptance,
)

from pipeline.serving.access import Service
from pipeline.serving.api import create_app
from pipeline.serving.store import Limits
from pyramid_flow import Preset
from tests.pipeline.serving.running import Running, run, service_in

PRESET = Preset(sizes=((64, 64), (64, 128)), max_num_frames=33)
DESCRIPTION = schemathesis.openapi.from_dict(create_app(Service(None, None, PRESET, "toy", "f00d", None)).openapi())
NOT_PROMISED = [
    allow_header_conformance,  # Starlette names the methods of one of a path's routes only
    negative_data_rejection,  # unknown query parameters are ignored, as is usual
    positive_data_acceptance,  # a schema does not say that height 700 is no multiple of 64
]
KEY = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("service")
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.05):
            running.work()

    with run(service_in(folder, Limits(10**6, 10**6, 10**6), preset=PRESET)) as running:
        worker = threading.Thread(target=work)
        worker.start()
        yield running
        over.set()
        worker.join()


@DESCRIPTION.parametrize()
@settings(max_examples=10, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_answer_breaks_a_promise(case, running):
    case.call_and_validate(running.url, headers=KEY, excluded_checks=NOT_PROMISED)
    if "video_id" in case.path_parameters:
        case.path_parameters["video_id"] = running.http().post("/v1/videos", json={"prompt": "a fox"}).json()["id"]
        case.call_and_validate(running.url, headers=KEY, excluded_checks=NOT_PROMISED)
