"""Links to files: who has one reads this file for a while, and nothing else."""

from collections.abc import Iterator

import pytest

from pipeline.serving.http.links import VALID_S, Links
from tests.pipeline.serving.running import VIDEO, Running, run, service_in

PATH, NOW = "/v1/videos/video_a/content", 1000.0


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Running]:
    with run(service_in(tmp_path_factory.mktemp("service"))) as running:
        yield running


@pytest.fixture
def video(running) -> str:
    video_id = running.http().post("/v1/videos", json={"prompt": "a fox"}).json()["id"]
    running.work()
    return f"/v1/videos/{video_id}"


def parts(link: str) -> tuple[int, str]:
    query = dict(pair.split("=") for pair in link.partition("?")[2].split("&"))
    return int(query["expires"]), query["signature"]


def test_a_link_is_good_for_its_file_until_it_is_over():
    links = Links()
    expires, signature = parts(links.signed(PATH, "video", NOW))
    assert VALID_S < expires - NOW <= VALID_S + 60
    assert links.is_good(PATH, "video", expires, signature, expires - 1)
    assert not links.is_good(PATH, "video", expires, signature, expires)
    assert not links.is_good(PATH, "video", expires + 60, signature, NOW)
    assert not links.is_good(PATH, "thumbnail", expires, signature, NOW)
    assert not links.is_good(PATH, None, expires, signature, NOW)
    assert not links.is_good(PATH.replace("_a", "_b"), "video", expires, signature, NOW)
    assert not links.is_good(PATH, "video", expires, "é", NOW)
    assert not Links().is_good(PATH, "video", expires, signature, NOW)


def test_a_link_that_is_asked_for_again_is_the_same_for_a_while():
    links = Links()
    assert links.signed(PATH, "video", 60) == links.signed(PATH, "video", 119) != links.signed(PATH, "video", 120)


def test_the_secret_is_not_shown():
    assert repr(Links()) == "Links()"


def test_links_work_without_a_key(running, video):
    links = running.http().post(f"{video}/links").json()
    anyone = running.http(None)
    assert anyone.get(links["video"]).content == anyone.get(links["stream"]).content == VIDEO
    for name in ("thumbnail", "spritesheet"):
        assert anyone.get(links[name]).headers["content-type"] == "image/webp"
    part = anyone.get(links["video"], headers={"Range": "bytes=0-9"})
    assert (part.status_code, part.content) == (206, VIDEO[:10])


def test_a_link_opens_nothing_else(running, video):
    links = running.http().post(f"{video}/links").json()
    anyone = running.http(None)
    query = links["stream"].partition("?")[2]
    for path in (
        links["video"].replace("variant=video", "variant=thumbnail"),
        links["video"].replace("variant=video&", ""),
        links["video"][:-1] + ("0" if links["video"][-1] != "0" else "1"),
        f"{video}/content?{query}",
        f"{video[:-1]}-/stream?{query}",
        f"{video}/stream?signature={parts(links['stream'])[1]}",
    ):
        answer = anyone.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), path
        assert running.http("other").get(path).status_code == 404, path
    for path in ("", "/events"):
        assert anyone.get(f"{video}{path}?{query}").status_code == 401
    assert anyone.delete(f"{video}?{query}").status_code == 401


def test_a_link_that_is_over_is_refused(running, video, monkeypatch):
    link = running.http().post(f"{video}/links").json()["video"]
    clock = running.service.store.clock
    monkeypatch.setattr(running.service.store, "clock", lambda: clock() + VALID_S + 60)
    assert running.http(None).get(link).status_code == 401


def test_links_are_for_the_owner_to_make(running, video):
    assert running.http("other").post(f"{video}/links").status_code == 404
    assert running.http(None).post(f"{video}/links").status_code == 401


def test_a_link_to_a_video_that_was_deleted_leads_nowhere(running, video):
    mine = running.http()
    links = mine.post(f"{video}/links").json()
    mine.delete(video)
    assert running.http(None).get(links["video"]).status_code == 404
