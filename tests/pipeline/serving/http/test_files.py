"""Files over HTTP: streamed in parts, known by their hash, and few at a time."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from pipeline.serving.http.api import create_app
from pipeline.serving.http.files import CHUNK_BYTES, FileAnswer, MediaFile
from pipeline.serving.http.schemas import APIError
from pipeline.storage.storage import Storage
from tests.pipeline.serving.running import VIDEO, Running, run, service_in


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Running]:
    with run(service_in(tmp_path_factory.mktemp("service"))) as running:
        yield running


@pytest.fixture(scope="module")
def url(running) -> str:
    """Return the address of a finished video's file."""
    video = running.http().post("/v1/videos", json={"prompt": "a fox"}).json()
    running.work()
    return f"/v1/videos/{video['id']}/content"


def test_head_answers_like_get_without_the_file(running, url):
    http = running.http()
    whole, head = http.get(url), http.head(url)
    assert head.content == b""
    for name in ("content-length", "content-type", "etag", "accept-ranges", "last-modified"):
        assert head.headers[name] == whole.headers[name]
    assert head.headers["content-length"] == str(len(VIDEO))
    assert http.head(url, headers={"Range": "bytes=0-9"}).headers["content-length"] == "10"


@pytest.mark.parametrize("variant", ["video", "thumbnail", "spritesheet"])
def test_a_client_that_has_a_file_is_not_sent_it_again(running, url, variant):
    http, path = running.http(), f"{url}?variant={variant}"
    etag = http.get(path).headers["etag"]
    for known in (etag, f'"x", W/{etag}', "*"):
        answer = http.get(path, headers={"If-None-Match": known})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
    assert http.get(path, headers={"If-None-Match": '"x"'}).status_code == 200


def test_the_hash_of_a_video_is_its_etag(running, url):
    assert running.http().get(url).headers["etag"] == f'"{"ab" * 32}"'


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=100-", 100, len(VIDEO)),
        ("bytes=-5", len(VIDEO) - 5, len(VIDEO)),
        ("bytes=5-999999", 5, len(VIDEO)),
        ("bytes=-999999", 0, len(VIDEO)),
        ("BYTES = 1-2", 1, 3),
    ],
)
def test_a_part_is_sent(running, url, asked, start, stop):
    answer = running.http().get(url, headers={"Range": asked})
    assert answer.content == VIDEO[start:stop]
    if stop - start < len(VIDEO):
        assert answer.status_code == 206
        assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(VIDEO)}"


@pytest.mark.parametrize(
    "asked", ["bytes=99999-", "bytes=9-3", "bytes=-0", "bytes=-", "bytes=x", "bytes=" + "9" * 5000]
)
def test_an_invalid_range_is_an_error_of_the_dialect(running, url, asked):
    answer = running.http().get(url, headers={"Range": asked})
    assert (answer.status_code, answer.json()["error"]["code"]) == (416, "invalid_range")
    assert answer.headers["content-range"] == f"bytes */{len(VIDEO)}"


@pytest.mark.parametrize("asked", ["bytes=0-1,5-6", "lines=1-2"])
def test_what_a_server_may_ignore_is_answered_with_the_whole_file(running, url, asked):
    answer = running.http().get(url, headers={"Range": asked})
    assert (answer.status_code, answer.content) == (200, VIDEO)


def test_a_part_of_another_version_is_not_sent(running, url):
    answer = running.http().get(url, headers={"Range": "bytes=0-9", "If-Range": '"other"'})
    assert (answer.status_code, answer.content) == (200, VIDEO)


def test_a_lost_file_is_an_error_before_anything_is_sent(running):
    http = running.http()
    video = http.post("/v1/videos", json={"prompt": "a fox"}).json()
    running.work()
    running.service.storage.delete(f"videos/{video['id']}.mp4")
    assert http.get(f"/v1/videos/{video['id']}/content").status_code == 500


class CountedStorage(Storage):
    """Notes the size of each read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.sizes: list[int] = []

    def get(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        data = super().get(path, start, stop)
        self.sizes.append(len(data))
        return data


def large(folder: Path) -> tuple[CountedStorage, MediaFile]:
    storage, size = CountedStorage(folder), 5 * CHUNK_BYTES + 1
    storage.put("a.mp4", bytes(size))
    return storage, MediaFile("a.mp4", size, "video/mp4", "a.mp4", '"a"', 0.0)


SCOPE = {"type": "http", "method": "GET", "headers": [], "http_version": "1.1"}


def test_a_large_file_is_never_in_memory_whole_and_a_part_is_not_read_around(tmp_path):
    storage, file = large(tmp_path)
    sent: list[int] = []

    async def send(message):
        sent.append(len(message.get("body", b"")))

    async def receive():
        await asyncio.Event().wait()

    def answer(**headers: str) -> list[int]:
        storage.sizes, sent[:] = [], []
        scope = SCOPE | {"headers": [(name.encode(), value.encode()) for name, value in headers.items()]}
        asyncio.run(FileAnswer(lambda: file, storage, Counter(), {"key me": 1})(scope, receive, send))
        assert sum(sent) == sum(storage.sizes)
        return storage.sizes

    assert answer() == [CHUNK_BYTES] * 5 + [1]
    assert answer(range="bytes=10-19") == [10]


def test_one_reader_downloads_few_files_at_once(tmp_path):
    storage, file = large(tmp_path)
    downloads: Counter[str] = Counter()

    async def slow_clients() -> None:
        begun, never = asyncio.Semaphore(0), asyncio.Event()

        async def send(message):
            begun.release()
            await never.wait()

        def download(**limits: int) -> asyncio.Task[None]:
            return asyncio.create_task(FileAnswer(lambda: file, storage, downloads, limits)(SCOPE, never.wait, send))

        tasks = [download(me=3), download(me=3, link=1), download(you=1)]
        for _ in tasks:
            await begun.acquire()
        for refused in ({"me": 3, "link": 1}, {"me": 2}):
            with pytest.raises(APIError) as caught:
                await download(**refused)
            assert (caught.value.status, caught.value.headers["Retry-After"]) == (429, "1")
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    asyncio.run(slow_clients())
    assert not downloads


class SigningStorage(Storage):
    """Stands in for an object store, whose URLs can be signed."""

    def signed_url(self, path: str, valid_s: int) -> str | None:
        return f"https://bucket.example/{path}?X-Amz-Expires={valid_s}"


def test_where_the_store_signs_urls_videos_come_from_there(running, url):
    storage = SigningStorage(running.service.storage.uri)
    app = create_app(replace(running.service, storage=storage, redirects=True))
    with TestClient(app, headers={"Authorization": "Bearer secret"}, follow_redirects=False) as client:
        answer = client.get(url)
        assert answer.status_code == 307
        assert answer.headers["location"].startswith("https://bucket.example/videos/video_")
        assert client.get(f"{url}?variant=thumbnail").headers["content-type"] == "image/webp"
        policy = client.get("/").headers["content-security-policy"]
        assert "media-src 'self' blob: https://bucket.example;" in policy
