"""The HTTP interface under the real `openai` client and under attack; a worker is played by hand on the table."""

import base64
import io
import json
import logging
import re
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace

import httpx2 as httpx
import pytest
from PIL import Image
from starlette.testclient import TestClient
from yarl import URL

from pipeline.media.fragments import padded
from pipeline.monitoring.logs import with_fields
from pipeline.serving.http import api, waits
from pipeline.serving.http import body as fields
from pipeline.serving.http import submission as asking
from pipeline.serving.http.access import Polling
from pipeline.serving.http.api import create_app
from pipeline.serving.http.files import fragment_path
from pipeline.serving.http.middleware import SECURITY_HEADERS
from pipeline.serving.queue.store import QueueLimits
from pipeline.tables.images import ImageRoot
from tests.pipeline.serving.running import JSON, PRESET, VIDEO, WAIT_S, Running, run, service_in, until

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")  # of the service the client is for


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (70, 90), (1, 2, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_openai_client_makes_a_video(running):
    client = running.client()
    video = client.videos.create(prompt="a fox", model="toy", seconds="1", size="64x64", extra_body={"seed": 7})
    assert (video.status, video.progress, video.seconds, video.size) == ("queued", 0, "1", "64x64")
    assert (video.seed, video.seed_text, video.position, video.num_frames) == (7, "7", 0, 25)
    running.work()
    video = client.videos.retrieve(video.id)
    assert (video.status, video.progress) == ("completed", 100)
    assert video.video_sha256 == "ab" * 32
    assert video.expires_at > video.completed_at >= video.created_at
    assert client.videos.download_content(video.id).read() == VIDEO
    strip = client.videos.download_content(video.id, variant="spritesheet").read()
    assert Image.open(io.BytesIO(strip)).size == (80, 10)
    thumbnail = client.videos.download_content(video.id, variant="thumbnail").read()
    assert Image.open(io.BytesIO(thumbnail)).size == (20, 10)


def test_the_openai_client_polls_until_the_end(running):
    with running.after("get", running.work):
        video = running.client().videos.create_and_poll(prompt="a fox", model="toy")
    assert video.status == "completed"


def test_the_openai_client_uploads_remixes_lists_and_deletes(running):
    from openai import NotFoundError

    client = running.client()
    first = client.videos.create(
        prompt="a fox", model="toy", input_reference=picture(), extra_body={"guidance_scale": 3}
    )
    remix = client.videos.remix(first.id, prompt="a wolf")
    assert (remix.remixed_from_video_id, remix.prompt, remix.seed) == (first.id, "a wolf", first.seed)
    assert remix.guidance_scale == 3
    job = running.service.store.get(remix.id, "me")
    assert running.service.storage.get(job.image) == picture()
    others = [client.videos.create(prompt=f"{number}", model="toy").id for number in range(3)]
    assert [video.id for video in client.videos.list(limit=2)] == [*reversed(others), remix.id, first.id]
    assert client.videos.list(limit=2, order="asc").data[0].id == first.id
    running.work()
    assert client.videos.delete(first.id).deleted
    with pytest.raises(NotFoundError):
        client.videos.retrieve(first.id)
    assert len(running.service.storage.list("uploads")) == 1
    assert len(running.service.storage.list("videos")) == 4


def test_json_works_as_forms_do(running):
    url = "data:image/png;base64," + base64.b64encode(picture()).decode()
    body = {"prompt": "a fox", "num_inference_steps": [3, 2, 1], "image_reference": url}
    video = running.http().post("/v1/videos", json=body).json()
    assert video["num_inference_steps"] == [3, 2, 1]
    assert running.service.store.get(video["id"], "me").image


def test_a_cancelled_video_is_not_made(running):
    http = running.http()
    video = http.post("/v1/videos", json={"prompt": "a fox"}).json()
    assert http.post(f"/v1/videos/{video['id']}/cancel").json()["status"] == "cancelled"
    running.work()
    answer = http.get(f"/v1/videos/{video['id']}/content")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "video_not_completed")


def test_content_comes_in_ranges(running):
    http = running.http()
    video = http.post("/v1/videos", json={"prompt": "a fox"}).json()
    running.work()
    url = f"/v1/videos/{video['id']}/content"
    part = http.get(url, headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, VIDEO[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(VIDEO)}"
    again = http.get(url, headers={"Range": "bytes=-5", "If-Range": part.headers["etag"]})
    assert (again.status_code, again.content) == (206, VIDEO[-5:])
    assert http.get(url, headers={"Range": "bytes=99999-"}).status_code == 416
    assert http.get(f"{url}?variant=audio").status_code == 400


def test_events_tell_each_change(running):
    http = running.http()
    video = http.post("/v1/videos", json={"prompt": "a fox"}).json()
    events = []
    with http.stream("GET", f"/v1/videos/{video['id']}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data:"):
                events.append(json.loads(line[5:]))
                running.work()
    assert [event["status"] for event in events if event["status"] != "in_progress"] == ["queued", "completed"]
    assert http.get("/v1/videos/video_none/events").status_code == 404


@pytest.mark.parametrize("key", [None, "wrong", ""])
def test_without_a_key_nothing_is_told(running, key):
    http = running.http(key)
    for method, path in (
        ("GET", "/v1/models"),
        ("GET", "/v1/videos"),
        ("POST", "/v1/videos"),
        ("GET", "/v1/videos/x"),
        ("GET", "/v1/videos/x/content"),
        ("GET", "/v1/videos/x/events"),
        ("DELETE", "/v1/videos/x"),
        ("POST", "/v1/videos/x/cancel"),
    ):
        answer = http.request(method, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), path
        assert answer.headers["www-authenticate"] == "Bearer"
    assert http.get("/health").status_code == http.get("/ready").status_code == 200


def test_one_key_does_not_see_anothers_videos(running):
    mine, yours = running.http(), running.http("other")
    video = mine.post("/v1/videos", json={"prompt": "a fox"}).json()
    running.work()
    path = f"/v1/videos/{video['id']}"
    assert mine.get(path).status_code == 200
    for method, suffix in (("GET", ""), ("GET", "/content"), ("GET", "/events"), ("POST", "/cancel"), ("DELETE", "")):
        assert yours.request(method, path + suffix).status_code == 404
    assert yours.post(f"{path}/remix", json={"prompt": "a"}).status_code == 404
    assert yours.get("/v1/videos").json()["data"] == []
    assert mine.get(path).status_code == 200


def test_a_full_queue_says_when_to_come_again(running):
    from openai import RateLimitError

    running.service.store.limits = QueueLimits(max_queued=1)
    http = running.http()
    assert http.post("/v1/videos", json={"prompt": "a fox"}).status_code == 200
    answer = http.post("/v1/videos", files={"input_reference": picture()}, data={"prompt": "a fox"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
    assert int(answer.headers["retry-after"]) > 0
    with pytest.raises(RateLimitError):
        running.client().videos.create(prompt="a fox", model="toy")


def test_clients_are_asked_to_poll_less_often_the_more_videos_wait_before_theirs(tmp_path):
    with run(replace(service_in(tmp_path), polling=Polling(max_client_s=2.5))) as running:
        http = running.http()
        answers = [http.post("/v1/videos", json={"prompt": f"{number}"}) for number in range(4)]
        assert [answer.headers["openai-poll-after-ms"] for answer in answers] == ["1000", "2000", "2500", "2500"]
        running.work()
        assert "openai-poll-after-ms" not in http.get(f"/v1/videos/{answers[0].json()['id']}").headers


def test_a_queue_that_fills_up_meanwhile_keeps_no_picture(running, monkeypatch):
    running.service.store.limits = QueueLimits(max_queued=0)
    monkeypatch.setattr(running.service.store, "count_request", lambda owner, is_new: None)
    answer = running.http().post("/v1/videos", files={"input_reference": picture()}, data={"prompt": "a fox"})
    assert answer.status_code == 429
    assert running.service.storage.list("uploads") == []


def test_requests_are_counted_before_their_body_is_read(running):
    running.service.store.limits = QueueLimits(max_per_minute=3)
    http, key = running.http(), {"Idempotency-Key": "k"}
    made = http.post("/v1/videos", json={"prompt": "a fox"}, headers=key).json()
    broken = {"files": {"input_reference": b"no picture"}, "data": {"prompt": "a fox"}}
    assert http.post("/v1/videos", **broken).json()["error"]["code"] == "invalid_value"
    assert http.post("/v1/videos", json={"prompt": "a fox"}, headers=key).json()["id"] == made["id"]
    for headers in ({}, key):
        refused = http.post("/v1/videos", content=b"not read", headers=JSON | headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limited")


def test_a_request_that_is_sent_again_makes_no_second_video(running):
    http = running.http()
    first = http.post("/v1/videos", json={"prompt": "a fox"}, headers={"Idempotency-Key": "k"}).json()
    again = http.post("/v1/videos", json={"prompt": "a fox"}, headers={"Idempotency-Key": "k"}).json()
    assert again["id"] == first["id"]
    other = http.post("/v1/videos", json={"prompt": "a wolf"}, headers={"Idempotency-Key": "k"})
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")
    plain = http.post("/v1/videos", json={"prompt": "a fox"}).json()
    retried = http.post("/v1/videos", json={"prompt": "a fox"}, headers={"x-stainless-retry-count": "1"}).json()
    assert plain["id"] != first["id"]
    assert retried["id"] == plain["id"]


FORM = {"content-type": "multipart/form-data; boundary=x"}


@pytest.fixture(scope="module")
def refusing(tmp_path_factory) -> Iterator[httpx.Client]:
    """Yield a client of a service that is only asked for what it refuses."""
    limits = QueueLimits(max_per_minute=10**6)
    with run(service_in(tmp_path_factory.mktemp("service"), limits)) as running:
        yield running.http()
        assert sum(running.service.store.counts().values()) == 0


@pytest.mark.parametrize(
    ("sent", "param"),
    [
        ({"content": b"{", "headers": JSON}, None),
        ({"content": b"[1]", "headers": JSON}, None),
        ({"content": b"[" * 100_000, "headers": JSON}, None),
        ({"content": b"\xff\xfe", "headers": {"content-type": "text/plain"}}, None),
        ({"content": b"garbage", "headers": FORM}, None),
        ({"content": b"garbage", "headers": {"content-type": "multipart/form-data"}}, None),
        ({"content": b'{"prompt": "\\ud800"}', "headers": JSON}, "prompt"),
        ({"content": b'{"prompt": "a", "seed": 1e400}', "headers": JSON}, "seed"),
        ({"data": {"prompt": ["a", "b"]}}, "prompt"),
        ({"data": {"prompt": "a"}, "files": {"other": b"x"}}, "other"),
        ({"data": {"prompt": "a"}, "files": {"input_reference": b"x"}}, "input_reference"),
        (
            {"data": {"prompt": "a"}, "files": [("input_reference", picture()), ("input_reference", picture())]},
            "input_reference",
        ),
    ],
)
def test_a_body_that_is_not_understood_is_a_clear_error(refusing, sent, param):
    answer = refusing.post("/v1/videos", **sent)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["code"]
    assert error["message"]
    assert error["param"] == param


@pytest.mark.parametrize("kind", ["json", "data"])
@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": "a", "num_frames": "100"}, "num_frames", "num_frames 100 is not 1 + 8k"),
        ({"prompt": "a", "size": "64x65"}, "size", "size '64x65' is not one of this model's: 64x64"),
        ({"prompt": "a", "colour": "red"}, "colour", "no field 'colour'"),
        ({"seed": "1"}, "prompt", "prompt is missing"),
    ],
)
def test_a_broken_rule_arrives_with_its_field(refusing, kind, fields, param, message):
    for path in ("/v1/videos", "/v1/videos/sync"):
        answer = refusing.post(path, **{kind: fields})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"] != "http_error", error["param"]) == (400, True, param)
        assert message in error["message"]


def test_large_bodies_are_refused_however_they_are_sent(running):
    size = fields.MAX_BODY_BYTES + 1
    http = running.http()
    said = http.post("/v1/videos", content=b"x" * size, headers={"content-type": "application/json"})
    chunks = (b"x" * 2**20 for _ in range(size // 2**20 + 1))
    unsaid = http.post("/v1/videos", content=chunks, headers={"content-type": "application/json"})
    assert [answer.status_code for answer in (said, unsaid)] == [413, 413]


def test_unknown_paths_and_values_are_errors_of_the_dialect(running):
    http = running.http()
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/videos/video_none", 404),
        ("PUT", "/v1/videos", 405),
        ("GET", "/v1/videos?limit=0", 400),
        ("GET", "/v1/videos?order=up", 400),
    ):
        answer = http.request(method, path)
        assert answer.status_code == status
        assert answer.json()["error"]["message"]
    assert http.get("/v1/videos?after=video_none").status_code == 404


def test_answers_are_safe_in_a_browser(running):
    http = running.http()
    video = http.post("/v1/videos", json={"prompt": "a fox"}).json()
    running.work()
    foreign = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    for method, path, status in (
        ("GET", "/health", 200),
        ("GET", f"/v1/videos/{video['id']}/content", 200),
        ("GET", "/v1/videos/none", 404),
        ("OPTIONS", "/v1/videos", 405),
    ):
        answer = http.request(method, path, headers=foreign)
        assert answer.status_code == status
        expected = SECURITY_HEADERS | {"Cache-Control": answer.headers["cache-control"]}
        assert {name: answer.headers[name] for name in SECURITY_HEADERS} == expected
        assert answer.headers["cache-control"] == ("private, max-age=3600" if "content" in path else "no-store")
        assert "access-control-allow-origin" not in answer.headers


def test_the_model_is_listed_and_retrieved(running):
    from openai import NotFoundError

    [model] = running.client().models.list().data
    assert (model.id, model.object) == ("toy", "model")
    assert (model.sizes, model.max_num_frames, model.fps) == (["64x64"], PRESET.max_num_frames, PRESET.fps)
    assert running.client().models.retrieve("toy") == model
    with pytest.raises(NotFoundError, match="this service has 'toy'"):
        running.client().models.retrieve("sora")


def test_sync_answers_with_the_file(running):
    with running.after("get", running.work):
        answer = running.http().post("/v1/videos/sync", json={"prompt": "a fox"})
    assert (answer.status_code, answer.content) == (200, VIDEO)
    assert answer.headers["content-type"] == "video/mp4"
    assert running.http().post("/v1/videos/sync", json={"prompt": " "}).status_code == 400


def test_a_sync_client_is_told_that_its_video_was_cancelled(running):
    store = running.service.store
    with running.after("get", lambda: [store.cancel(job.id, "me") for job in store.list("me").jobs]):
        answer = running.http().post("/v1/videos/sync", json={"prompt": "a fox"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "cancelled")


def ask_and_go_away(running: Running, **headers: str) -> None:
    """Ask for a video, and close the connection as soon as the service knows of it."""
    body = b'{"prompt": "a fox"}'
    given = {"Host": "a", "Authorization": "Bearer secret", "Content-Length": str(len(body)), **JSON, **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    address = ("127.0.0.1", URL(running.url).port)
    with running.after("get") as looked, socket.create_connection(address, timeout=WAIT_S) as connection:
        connection.sendall(f"POST /v1/videos/sync HTTP/1.1\r\n{head}\r\n".encode() + body)
        assert looked.wait(WAIT_S)


def test_a_sync_client_that_goes_away_cancels_its_video(running):
    with running.after("cancel") as cancelled:
        ask_and_go_away(running)
        assert cancelled.wait(WAIT_S)
    assert running.service.store.counts()["cancelled"] == 1


def test_a_sync_request_that_is_sent_again_makes_another_video(running):
    ask = {"json": {"prompt": "a fox"}, "headers": {"Idempotency-Key": "1"}}
    with running.after("cancel") as cancelled:
        ask_and_go_away(running, **ask["headers"])
        assert cancelled.wait(WAIT_S)
    with running.after("get", running.work):
        answer = running.http().post("/v1/videos/sync", **ask)
    assert (answer.status_code, answer.content) == (200, VIDEO)


def test_a_sync_client_that_goes_away_leaves_a_video_that_was_asked_for_before(running, monkeypatch):
    given_up, give_up = threading.Event(), api.give_up

    def noticed(*arguments: object) -> None:
        give_up(*arguments)
        given_up.set()

    monkeypatch.setattr(api, "give_up", noticed)
    http, ask = running.http(), {"json": {"prompt": "a fox"}, "headers": {"Idempotency-Key": "1"}}
    video = http.post("/v1/videos", **ask).json()
    ask_and_go_away(running, **ask["headers"])
    assert given_up.wait(WAIT_S)
    assert http.get(f"/v1/videos/{video['id']}").json()["status"] == "queued"


def test_a_slow_host_of_pictures_holds_up_no_other_request(tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "MAX_PICTURES", 10)
    asked, answered = threading.Semaphore(0), threading.Event()

    class SlowImages(ImageRoot):
        def read(self, uri: str) -> bytes:
            asked.release()
            answered.wait()
            return picture()

    body = {"prompt": "a fox", "image_reference": "https://slow.example/a.png"}
    with run(replace(service_in(tmp_path), images=SlowImages("nowhere"))) as running:
        waiting = [
            threading.Thread(target=running.http().post, args=("/v1/videos",), kwargs={"json": body}) for _ in range(10)
        ]
        for thread in waiting:
            thread.start()
        try:
            assert all(asked.acquire(timeout=WAIT_S) for _ in range(8))  # as many as are read at once
            assert running.http().post("/v1/videos", json={"prompt": "a wolf"}, timeout=WAIT_S).status_code == 200
        finally:
            answered.set()
            for thread in waiting:
                thread.join()
        assert running.service.store.counts()["queued"] == 11


def test_half_a_character_as_a_fields_name_is_a_400(running):
    answer = running.http().post("/v1/videos", content=b'{"\\ud800": 1}', headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unknown_parameter")


def test_forms_hold_objects_and_large_data_urls(running):
    url = "data:image/png;base64," + base64.b64encode(noise()).decode()
    assert len(url) > 2 * 2**20
    client = running.client()
    video = client.videos.create(prompt="a fox", model="toy", extra_body={"image_reference": {"image_url": url}})
    assert running.service.store.get(video.id, "me").image


def test_a_field_that_is_a_text_and_an_object_is_refused(running):
    answer = running.http().post("/v1/videos", data={"prompt": "a", "image_reference": "x", "image_reference[k]": "y"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "image_reference"


def fragment(running, job, index: int) -> None:
    running.service.storage.put(fragment_path(job.claim, index), f"{job.attempts}:{index};".encode())
    assert running.service.store.show(job.claim, index + 1)


def test_a_video_streams_while_it_is_made_and_a_new_attempt_goes_on_where_it_was(running):
    store, http = running.service.store, running.http()
    video = http.post("/v1/videos", json={"prompt": "a fox", "num_frames": 17}).json()
    with http.stream("GET", f"/v1/videos/{video['id']}/stream") as answer:
        assert answer.headers["content-type"] == "video/mp4"
        parts = answer.iter_raw()
        [job] = store.claim(1, 60)
        assert store.report([job.claim], 10) == {job.claim: True}
        fragment(running, job, 0)
        assert next(parts) == padded(b"1:0;")
        fragment(running, job, 1)
        assert next(parts) == padded(b"1:1;")
        fragment(running, job, 2)
        assert store.lose(job.claim, alone=True, max_deaths=3)
        with running.after("get") as looked:
            assert looked.wait(WAIT_S)
        [job] = store.claim(1, 60)
        for index in range(3):
            fragment(running, job, index)
        assert next(parts) in (padded(b"1:2;"), padded(b"2:2;"))
        store.complete(job.claim, {"uri": "videos/a.mp4"})
        assert list(parts) == []
    assert http.get(f"/v1/videos/{video['id']}/stream").content == padded(b"2:0;") + padded(b"2:1;") + padded(b"2:2;")
    http.delete(f"/v1/videos/{video['id']}")
    assert running.service.storage.list("stream") == []


@pytest.mark.parametrize("shown", [0, 2])
def test_a_finished_video_that_was_not_all_shown_streams_whole(running, shown):
    http, store = running.http(), running.service.store
    video = http.post("/v1/videos", json={"prompt": "a fox"}).json()
    [job] = store.claim(1, 60)
    for index in range(shown):
        fragment(running, job, index)
    running.service.storage.put("videos/a.mp4", VIDEO)
    store.complete(job.claim, {"uri": "videos/a.mp4", "media_type": "video/mp4", "sha256": "ab" * 32})
    assert http.get(f"/v1/videos/{video['id']}/stream").content == VIDEO


def test_one_key_may_have_so_many_streams_open(running, monkeypatch):
    monkeypatch.setattr(waits, "MAX_WAITS", 1)
    http = running.http()
    video = http.post("/v1/videos", json={"prompt": "a fox"}).json()
    path = f"/v1/videos/{video['id']}"
    with http.stream("GET", f"{path}/events") as answer:
        lines = answer.iter_lines()
        next(lines)
        for name in ("events", "stream"):
            refused = http.get(f"{path}/{name}")
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
    running.work()
    until(lambda: http.get(f"{path}/stream").status_code == 200)  # the stream that was left is noticed


def test_a_still_is_a_picture_and_does_not_stream(running):
    client, http, service = running.client(), running.http(), running.service
    video = client.videos.create(prompt="a fox", model="toy", extra_body={"num_frames": 1, "image_format": "webp"})
    path = f"/v1/videos/{video.id}"
    assert (video.image_format, video.seconds) == ("webp", "0")
    refused = http.get(f"{path}/stream")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "still_image")
    [job] = service.store.claim(1, 60)
    assert not job.followed
    files = {"uri": "images/a.webp", "thumbnail_uri": "thumbnails/a.webp", "media_type": "image/webp", "sha256": "0"}
    service.storage.put(files["uri"], b"picture")
    service.storage.put(files["thumbnail_uri"], picture())
    service.store.complete(job.claim, files)
    answer = http.get(f"{path}/content")
    assert (answer.content, answer.headers["content-type"]) == (b"picture", "image/webp")
    assert f"{video.id}.webp" in answer.headers["content-disposition"]
    for variant in ("thumbnail", "spritesheet"):
        answer = http.get(f"{path}/content?variant={variant}")
        assert Image.open(io.BytesIO(answer.content)).size == (70, 90)
    http.delete(path)
    assert service.storage.list("images") == service.storage.list("thumbnails") == []


def test_what_will_never_be_seen_does_not_stream(running):
    http = running.http()
    video = http.post("/v1/videos", json={"prompt": "a fox"}).json()
    http.post(f"/v1/videos/{video['id']}/cancel")
    assert http.get(f"/v1/videos/{video['id']}/stream").status_code == 409
    assert running.http("other").get(f"/v1/videos/{video['id']}/stream").status_code == 404


def noise() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((1500, 1500), 90).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(running):
    buffer = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(buffer, "PNG")
    answer = running.http().post("/v1/videos", data={"prompt": "a"}, files={"input_reference": buffer.getvalue()})
    assert answer.status_code == 400
    assert "pixels" in answer.json()["error"]["message"]


def test_a_body_that_never_comes_is_not_waited_for(running, monkeypatch):
    monkeypatch.setattr(fields, "BODY_TIMEOUT_S", 0.3)
    port = int(running.url.rpartition(":")[2])
    head = "POST /v1/videos HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer secret\r\nContent-Length: 10\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head.encode())
        assert b" 408 " in connection.recv(1000)


def test_a_remix_without_a_key_is_not_read(running):
    answer = running.http(None).post("/v1/videos/x/remix", content=b"not json at all")
    assert answer.status_code == 401
    http = running.http()
    video = http.post("/v1/videos", json={"prompt": "a fox"}).json()
    for body in ({}, {"prompt": ""}, {"prompt": "a", "seed": 1}):
        assert http.post(f"/v1/videos/{video['id']}/remix", json=body).status_code == 400


def test_no_file_is_left_behind_by_a_bad_range(running, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(tmp_path.iterdir())
    http = running.http()
    video = http.post("/v1/videos", json={"prompt": "a fox"}).json()
    running.work()
    for value in ("bytes=99999-", "nonsense", "bytes=0-9"):
        http.get(f"/v1/videos/{video['id']}/content", headers={"Range": value})
    until(lambda: not [path for path in set(tmp_path.iterdir()) - before if path.name.startswith("tmp")])


def test_without_keys_only_this_machines_own_pages_may_ask(running):
    app = create_app(replace(running.service, keys=None))
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        assert client.get("/v1/videos").status_code == 200
        assert client.get("/v1/videos", headers={"Host": "evil.example"}).status_code == 400
        assert client.get("/metrics", headers={"Host": "evil.example"}).status_code == 400
        assert client.get("/v1/videos", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
        assert client.get("/v1/videos", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200


@pytest.fixture
def log(caplog) -> pytest.LogCaptureFixture:
    """Catch what the interface logs, with the fields of its requests."""
    caplog.set_level("INFO", "pipeline.serving")
    caplog.handler.addFilter(with_fields)
    return caplog


def requests(log: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in log.records if record.message == "request"]


def test_each_request_is_logged_with_its_id_and_owner(running, log):
    http = running.http()
    video = http.post("/v1/videos?a=b", json={"prompt": "a secret"}, headers={"X-Request-ID": "mine-1"})
    assert video.headers["x-request-id"] == "mine-1"
    [created] = [record for record in log.records if record.message == "created"]
    assert (created.video, created.request_id) == (video.json()["id"], "mine-1")
    drawn = running.http("wrong").get("/v1/videos").headers["x-request-id"]
    first, second = requests(log)
    assert (first.method, first.path, first.status, first.owner) == ("POST", "/v1/videos", 200, "me")
    assert (second.status, second.owner, second.request_id) == (401, None, drawn)
    assert first.milliseconds > 0
    assert "secret" not in str([vars(record) for record in log.records])


@pytest.mark.parametrize("given", ["", "a" * 65, "a b", "a\tb", "a/b"])
def test_an_id_that_is_not_plain_is_replaced(running, given):
    told = running.http().get("/health", headers={"X-Request-ID": given}).headers["x-request-id"]
    assert len(told) == 32
    assert told != given


def test_what_breaks_is_a_500_with_its_id(running, log, monkeypatch):
    monkeypatch.setattr(running.service.store, "check", lambda: 1 / 0)
    answer = running.http().get("/ready", headers={"X-Request-ID": "mine-1"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.headers["x-content-type-options"] == "nosniff"
    [broken] = [record for record in log.records if record.levelname == "ERROR"]
    assert (broken.request_id, broken.exc_info[0]) == ("mine-1", ZeroDivisionError)
    assert requests(log)[-1].status == 500


def test_metrics_tell_what_waits_and_of_whom_nothing(running):
    running.http().post("/v1/videos", json={"prompt": "a secret", "priority": "batch"})
    for key, status in ((None, 401), ("secret", 403)):
        assert running.http(key).get("/metrics").status_code == status
    answer = running.http("scraper").get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'pyramid_service_videos{priority="batch",status="queued"} 1.0' in answer.text
    assert "secret" not in answer.text
    assert "me" not in re.findall(r'"([^"]*)"', answer.text)
