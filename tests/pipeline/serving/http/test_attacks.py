"""Attacks on the HTTP interface, each of which has worked once."""

import io
import json
import threading
from dataclasses import replace

import pytest
from PIL import Image
from pydantic import ValidationError
from sqlalchemy import func, select
from starlette.testclient import TestClient

from pipeline.serving.app import ServiceConfig
from pipeline.serving.http import body as fields
from pipeline.serving.http import submission as asking
from pipeline.serving.http import waits
from pipeline.serving.http.api import create_app
from pipeline.serving.http.keys import KeyFileError, Keys, hashed
from pipeline.serving.http.waits import LEASE_S, OpenWait
from pipeline.serving.queue.records import Wait
from pipeline.serving.queue.store import BusyError, QueueLimits, Store
from pipeline.tables.image_download import ImageError
from pipeline.tables.images import ImageRoot
from tests.pipeline.serving.queue.test_store import job
from tests.pipeline.serving.running import JSON, WAIT_S, run, service_in, until

NUMBERS = b"[" + b"1," * (3 * 2**20) + b"1]"
NESTED = b'{"prompt": ' + b'{"a":' * 500 + b"1" + b"}" * 500 + b"}"


HOSTILE = {
    "numbers": b'{"prompt": "a", "seed": ' + NUMBERS + b"}",
    "array": NUMBERS,
    "deep": NESTED,
    "unclosed": b'{"a":' * 2**20,
    "fields": json.dumps({f"field{number}": 1 for number in range(65)}).encode(),
    "list": json.dumps({"prompt": "a", "num_inference_steps": [1] * 65}).encode(),
    "nested list": json.dumps({"prompt": "a", "seed": [[1]]}).encode(),
    "nested object": json.dumps({"prompt": "a", "image_reference": {"image_url": {"a": 1}}}).encode(),
    "half a character": json.dumps({"\ud800": [[1]]}).encode(),
    "model": json.dumps({"prompt": "a", "model": "m" * 10_000}).encode(),
    "priority": json.dumps({"prompt": "a", "priority": "m" * 10_000}).encode(),
    "name": json.dumps({"prompt": "a", "m" * 10_000: 1}).encode(),
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_body_is_refused_and_counted(running, body):
    http = running.http()
    running.service.store.limits = QueueLimits(max_per_minute=1)
    answer = http.post("/v1/videos", content=body, headers=JSON)
    assert answer.status_code in (400, 404)
    assert len(answer.content) < 500
    assert http.post("/v1/videos", json={"prompt": "a"}).json()["error"]["code"] == "rate_limited"


def test_json_of_many_values_is_never_parsed(monkeypatch):
    monkeypatch.setattr(fields.json, "loads", lambda body: pytest.fail("parsed"))
    with pytest.raises(fields.APIError, match="more than 65536 values"):
        fields._parse("application/json", "application/json", NUMBERS)


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x", "text/plain"])
def test_the_body_of_a_refused_request_is_not_read(tmp_path, kind):
    service = service_in(tmp_path, QueueLimits(max_queued=0))

    def body():
        yield b"{"
        pytest.fail("more of the body was read")  # the test client sends what the interface asks for

    with TestClient(create_app(service)) as client:
        for headers, status in (({}, 401), ({"Authorization": "Bearer secret"}, 429)):
            answer = client.post("/v1/videos", content=b"x" * 2**20, headers={"Content-Type": kind} | headers)
            assert answer.status_code == status
    service.store.close()


def test_large_bodies_are_parsed_beside_the_event_loop(running, monkeypatch):
    parsing, answered = threading.Event(), threading.Event()
    parse = fields._parse

    def slow(*arguments: object) -> object:
        parsing.set()
        assert answered.wait(WAIT_S)
        return parse(*arguments)

    monkeypatch.setattr(fields, "_parse", slow)
    asking = threading.Thread(target=running.http().post, args=("/v1/videos",), kwargs={"json": {"prompt": "a"}})
    asking.start()
    assert parsing.wait(WAIT_S)
    assert running.http().get("/health").status_code == 200
    answered.set()
    asking.join()


@pytest.mark.parametrize("kind", ["data", "files"])
def test_forms_of_many_fields_are_refused(running, kind):
    sent = {f"field{number}": "1" for number in range(65)}
    answer = running.http().post("/v1/videos", **{kind: sent})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_body")


def test_urlencoded_forms_are_small(running):
    body = b"prompt=" + b"%41" * 2**17
    answer = running.http().post("/v1/videos", content=body, headers={"Content-Type": fields.URLENCODED})
    assert answer.status_code == 413


def test_a_client_that_reads_nothing_is_counted(running, monkeypatch):
    monkeypatch.setattr(waits, "RENEW_S", 0.01)
    renewed = threading.Event()
    monkeypatch.setattr(waits.OpenWait, "_renew", lambda wait: renewed.set())
    video = running.http().post("/v1/videos", json={"prompt": "a fox"}).json()
    with running.http().stream("GET", f"/v1/videos/{video['id']}/stream"):
        assert renewed.wait(WAIT_S)


def test_one_owner_reads_few_pictures_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "MAX_PICTURES", 1)
    reading, answered = threading.Event(), threading.Event()

    class SlowImages(ImageRoot):
        def read(self, uri: str) -> bytes:
            reading.set()
            answered.wait()
            raise ImageError("slow")

    bodies = [{"prompt": "a", name: "https://slow.example/a.png"} for name in ("image_reference", "input_reference")]
    with run(replace(service_in(tmp_path), images=SlowImages("nowhere"))) as running:
        asks = threading.Thread(target=running.http().post, args=("/v1/videos",), kwargs={"json": bodies[0]})
        asks.start()
        try:
            assert reading.wait(WAIT_S)
            for sent in (
                {"json": bodies[1]},
                {"data": {"prompt": "a", "input_reference[]": bodies[1]["input_reference"]}},
            ):
                refused = running.http().post("/v1/videos", **sent)
                assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_pictures")
        finally:
            answered.set()
            asks.join()
        assert not running.service.pictures


def test_a_request_that_claims_to_be_sent_again_finds_no_room_either(tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "new_video", lambda *_: pytest.fail("read"))
    with run(service_in(tmp_path, QueueLimits(max_queued=0))) as running:
        answer = running.http().post("/v1/videos", json={"prompt": "a"}, headers={"X-Stainless-Retry-Count": "1"})
        assert answer.json()["error"]["code"] == "queue_full"


def test_an_owner_keeps_so_many_videos(store):
    store.limits = QueueLimits(max_kept=1)
    kept = job(0)
    store.add(kept)
    store.cancel(kept.id, kept.owner)
    with pytest.raises(BusyError, match="1 of your videos are kept"):
        store.add(job(1))


def test_the_description_is_made_once(running):
    first, second = (running.http().get("/openapi.json").json() for _ in range(2))
    assert first == second
    assert create_app(running.service).openapi.cache_info().misses == 0


def test_waits_are_counted_across_replicas_and_end_with_them(database, clock, monkeypatch):
    monkeypatch.setattr(waits, "MAX_WAITS", 2)
    one, other = Store(database, clock=clock), Store(database, clock=clock)
    OpenWait(one, "me")
    OpenWait(other, "me")
    for replica in (one, other):
        with pytest.raises(BusyError) as caught:
            OpenWait(replica, "me")
        assert caught.value.code == "too_many_streams"
    OpenWait(one, "you")
    clock.now += LEASE_S + 1  # both replicas are lost
    OpenWait(other, "me")
    one.close()
    other.close()


def test_a_wait_that_goes_on_keeps_its_place(store, clock, monkeypatch):
    monkeypatch.setattr(waits, "MAX_WAITS", 1)
    wait = OpenWait(store, "me")
    clock.now += LEASE_S - 1
    wait._renew()
    clock.now += LEASE_S - 1
    with pytest.raises(BusyError):
        OpenWait(store, "me")


def num_waits(store: Store) -> int:
    with store.reader() as transaction:
        return transaction.scalar(select(func.count()).select_from(Wait))


def test_replays_of_one_request_wait_within_the_limit(running, monkeypatch):
    monkeypatch.setattr(waits, "MAX_WAITS", 2)
    ask = {"json": {"prompt": "a fox"}, "headers": {"Idempotency-Key": "1"}}
    first = running.http().post("/v1/videos", **ask).json()
    replies: list[int] = []

    def wait() -> None:
        replies.append(running.http().post("/v1/videos/sync", **ask, timeout=WAIT_S).status_code)

    threads = [threading.Thread(target=wait) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: num_waits(running.service.store) == 2)
    assert running.http().post("/v1/videos/sync", **ask).status_code == 429
    running.work()
    for thread in threads:
        thread.join()
    assert replies == [200, 200]
    assert running.http().get(f"/v1/videos/{first['id']}").json()["status"] == "completed"
    assert running.http().post("/v1/videos/sync", **ask).status_code == 200  # all places are free again


def test_a_key_in_a_comment_is_no_key():
    commented = f"me:{hashed('good')}\n# revoked, was you:{hashed('bad')}, them:{hashed('worse')}\n"
    keys = Keys.parse(commented + f"a:{hashed('a')}, b:{hashed('b')} # , c:{hashed('c')}\n")
    assert set(keys.names.values()) == {"me", "a", "b"}
    with pytest.raises(KeyFileError, match="line 1"):
        Keys.parse(f"me:{hashed('good')} you:{hashed('bad')}")


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"host": "127.0.0.1"},
        {"allow_anonymous": True},
        {"allow_anonymous": True, "host": "0.0.0.0"},
        {"allow_anonymous": True, "host": "::"},
        {"allow_anonymous": True, "host": "render.example"},
        {"allow_anonymous": True, "host": "127.0.0.1.evil.example"},
    ],
)
def test_a_configuration_without_keys_is_for_this_machine_only(values):
    places = {"database": "sqlite:///videos.db", "output": "out"}
    with pytest.raises(ValidationError, match="set keys, or allow_anonymous"):
        ServiceConfig(**places, **values)
    assert ServiceConfig(**places, allow_anonymous=True, host="127.0.0.1").keys is None
    assert ServiceConfig(**places, keys={}, host="0.0.0.0").keys == {}


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:8001", "https://127.0.0.1.evil:8000"]
)
def test_without_keys_other_origins_send_nothing(running, origin):
    app = create_app(replace(running.service, keys=None))
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        for method, path in (("POST", "/v1/videos"), ("DELETE", "/v1/videos/x"), ("GET", "/v1/videos")):
            assert client.request(method, path, headers={"Origin": origin}).status_code == 403
        own = {"Origin": "http://127.0.0.1:8000"}
        assert client.post("/v1/videos", json={"prompt": "a fox"}, headers=own).status_code == 200
        assert client.get("/v1/session").json()["requires_key"] is False


def test_texts_that_databases_refuse_are_client_errors(tmp_path, database):
    service = replace(service_in(tmp_path), store=Store(database))
    with TestClient(create_app(service), headers={"Authorization": "Bearer secret"}) as client:
        for path in ("/v1/videos/a%00b", "/v1/videos/%00/content", "/v1/videos?after=%00", "/v1/videos/%00/events"):
            assert client.get(path).status_code == 400
        for path in ("/v1/videos/%ff", "/v1/videos/%F0%9F%A6%8A", "/v1/videos/" + "a" * 5000):
            assert client.get(path).status_code == 404
        body = {"prompt": "a fox", "image_reference": "data:image/png;base64,\u00e4"}
        assert client.post("/v1/videos", json=body).status_code == 400
        body = {"prompt": "a\0fox", "id": "a\0b"}
        assert client.post("/v1/videos", json=body).status_code in (200, 400)
    service.store.close()


def test_pictures_of_a_request_have_fewer_pixels_than_those_of_a_job(running):
    buffer = io.BytesIO()
    Image.new("1", (5000, 5000)).save(buffer, "PNG")
    answer = running.http().post("/v1/videos", data={"prompt": "a"}, files={"input_reference": buffer.getvalue()})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input_reference")


def test_metrics_are_counted_once_in_a_while(running, monkeypatch):
    counted = []
    census = running.service.store.census
    monkeypatch.setattr(running.service.store, "census", lambda: counted.append(1) or census())
    for _ in range(5):
        assert running.http("scraper").get("/metrics").status_code == 200
    assert len(counted) == 1


def test_the_page_loads_nothing_from_elsewhere_and_runs_no_inline_script(running):
    answer = running.http(None).get("/")
    policy = answer.headers["content-security-policy"]
    assert policy == (
        "default-src 'self'; img-src 'self' blob:; media-src 'self' blob:; object-src 'none'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    )
    for path in ("/static/index.html", "/static/../api.py", "/static/%2e%2e/api.py", "/static//etc/passwd"):
        found = running.http(None).get(path)
        assert found.status_code == 404 or found.text == answer.text
    assert running.http(None).get("/page/").status_code == 404
