"""The interface keeps what its OpenAPI description promises, whatever it is asked; a worker makes what waits."""

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from pipeline.serving.http.access import Service
from pipeline.serving.http.api import create_app
from pipeline.serving.queue.store import QueueLimits
from pyramid_flow import Preset
from tests.pipeline.serving.running import Running, run, service_in

if TYPE_CHECKING:
    from schemathesis import Case

PRESET = Preset(sizes=((64, 64), (64, 128)), max_num_frames=33)
KEY = {"Authorization": "Bearer secret"}


DESCRIPTION = create_app(Service(None, None, PRESET, "toy", "f00d", None)).openapi()
OPERATIONS = [f"{method.upper()} {path}" for path, methods in DESCRIPTION["paths"].items() for method in methods]


def test_bodies_that_are_read_by_hand_and_errors_are_described():
    paths, schemas = DESCRIPTION["paths"], DESCRIPTION["components"]["schemas"]
    for path in ("/v1/videos", "/v1/videos/sync"):
        bodies = paths[path]["post"]["requestBody"]["content"]
        json, form = (bodies[kind]["schema"] for kind in ("application/json", "multipart/form-data"))
        assert json["required"] == ["prompt"]
        assert form["properties"]["input_reference"] == {"type": "string", "format": "binary"}
        assert form["properties"].keys() == json["properties"].keys()
        assert json["properties"]["size"]["enum"] == ["64x64", "128x64"]
        assert json["properties"]["num_frames"]["enum"] == [1, 9, 17, 25, 33]
        assert json["properties"]["model"]["enum"] == ["toy"]
    assert paths["/v1/videos/{video_id}/remix"]["post"]["requestBody"]["content"].keys() == bodies.keys()
    answers = [each["responses"] for methods in paths.values() for each in methods.values()]
    refusals = [answer for each in answers for status, answer in each.items() if status != "200"]
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
    assert [answer["content"] for answer in refusals] == [error] * len(refusals)
    assert not any("422" in each for each in answers)
    assert not {"HTTPValidationError", "ValidationError"} & schemas.keys()


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("service")
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.05):
            running.work()

    with run(service_in(folder, QueueLimits(10**6, 10**6, 10**6), preset=PRESET)) as running:
        worker = threading.Thread(target=work)
        worker.start()
        yield running
        over.set()
        worker.join()


@pytest.fixture(scope="module")
def checks_of() -> dict[str, Callable[..., None]]:
    """Return a test of each operation, by its name: of examples, of edge cases and of random requests."""
    import schemathesis  # here, so that sessions without these tests do not load it
    from hypothesis import HealthCheck, settings
    from schemathesis.pytest.lazy import get_all_tests
    from schemathesis.specs.openapi import checks

    not_promised = [
        checks.allow_header_conformance,  # Starlette names the methods of one of a path's routes only
        checks.negative_data_rejection,  # unknown query parameters are ignored, as is usual
        checks.positive_data_acceptance,  # a schema does not say that height 700 is no multiple of 64
    ]

    @settings(max_examples=10, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    def check(case: "Case", running: Running) -> None:
        case.call_and_validate(running.url, headers=KEY, excluded_checks=not_promised)
        if "video_id" in case.path_parameters:
            case.path_parameters["video_id"] = running.http().post("/v1/videos", json={"prompt": "a fox"}).json()["id"]
            case.call_and_validate(running.url, headers=KEY, excluded_checks=not_promised)

    schema = schemathesis.openapi.from_dict(DESCRIPTION)
    found = get_all_tests(schema=schema, test_func=check, settings=None, given_kwargs=None)
    return {operation.label: test for operation, test in (result.ok() for result in found)}


@pytest.mark.integration
@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_answer_breaks_a_promise(operation, checks_of, running):
    assert checks_of.keys() == set(OPERATIONS)
    checks_of[operation](running=running)
