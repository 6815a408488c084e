"""The page's client: what the service answers and refuses, as one key."""

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from pipeline.serving.client import ServiceError, VideosClient
from tests.pipeline.serving.running import PRESET, Running, run, service_in


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Running]:
    with run(service_in(tmp_path_factory.mktemp("service"))) as running:
        yield running


@pytest.fixture
def client(running) -> VideosClient:
    return VideosClient(running.url)


def call(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


def test_a_key_that_was_accepted_is_not_asked_for_again(client):
    assert [call(client.accepts(key)) for key in ("secret", "wrong", "half\n")] == [True, False, False]
    silent = VideosClient("http://127.0.0.1:9", client.accepted)
    assert call(silent.accepts("secret"))
    with pytest.raises(ServiceError, match="does not answer"):
        call(silent.accepts("wrong"))


def test_a_video_is_made_listed_linked_cancelled_and_deleted(client):
    assert call(client.model("secret"))["max_num_frames"] == PRESET.max_num_frames
    first, second = (call(client.create("secret", {"prompt": prompt})) for prompt in ("a fox", "a wolf"))
    assert call(client.retrieve("secret", first["id"]))["prompt"] == "a fox"
    newest = call(client.list("secret", 1, None))
    assert ([video["id"] for video in newest["data"]], newest["has_more"]) == ([second["id"]], True)
    assert [video["id"] for video in call(client.list("secret", 1, second["id"]))["data"]] == [first["id"]]
    assert call(client.links("secret", first["id"]))["stream"].startswith(f"/v1/videos/{first['id']}/stream?")
    assert call(client.cancel("secret", first["id"]))["status"] == "cancelled"
    call(client.delete("secret", first["id"]))
    with pytest.raises(ServiceError) as caught:
        call(client.retrieve("secret", first["id"]))
    assert caught.value.status == 404


@pytest.mark.parametrize(
    ("fields", "image", "message"),
    [({"prompt": " "}, None, "prompt ' ' is empty"), ({"prompt": "a"}, b"#!", "picture format")],
)
def test_what_breaks_a_rule_is_said_in_the_services_words(client, fields, image, message):
    with pytest.raises(ServiceError, match=message) as caught:
        call(client.create("secret", fields, image))
    assert caught.value.status == 400
