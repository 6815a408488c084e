"""The page without a browser: who is let in, with what cookie, and what other sites may do."""

import asyncio
from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from starlette.routing import Mount
from starlette.testclient import TestClient

from pipeline.serving.client import COOKIE
from pipeline.serving.fields import MAX_BODY_BYTES
from tests.pipeline.serving.running import Running, run, service_in

pytestmark = pytest.mark.integration  # loading Gradio takes seconds

LOCAL = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Running]:
    with run(service_in(tmp_path_factory.mktemp("service"))) as running:
        yield running


def page_of(url: str, *, asks_keys: bool = True) -> FastAPI:
    """Return a page that is made in an event loop, as in Serve: without one Gradio makes some and leaves them open."""
    from pipeline.serving.page import create_page  # here, so that sessions without these tests do not load Gradio

    async def make() -> FastAPI:
        return create_page(url, asks_keys=asks_keys)

    return asyncio.run(make())


@pytest.fixture
def visitor(running) -> Iterator[TestClient]:
    with TestClient(
        page_of(running.url), base_url="https://farm.example", root_path="/page", follow_redirects=False
    ) as visitor:
        yield visitor


def test_the_start_of_the_service_leads_to_the_page(running):
    answer = running.http(None).get("/")
    assert (answer.status_code, answer.headers["location"]) == (307, "./page/")


def test_who_has_no_key_is_led_to_the_form(visitor):
    answer = visitor.get("/page/")
    assert (answer.status_code, answer.headers["location"]) == (303, "sign-in")
    assert 'name="key"' in visitor.get("/page/sign-in").text
    paths = (("GET", "config"), ("POST", "gradio_api/upload"), ("POST", "gradio_api/queue/join"))
    for method, path in (*paths, ("GET", "gradio_api/heartbeat/x"), ("GET", "gradio_api/queue/data?session_hash=x")):
        assert visitor.request(method, f"/page/{path}", json={}).status_code == 401, path


@pytest.mark.parametrize("path", [__file__, "http://127.0.0.1:9/a.png", "https://example.com/a.png"])
def test_no_file_is_read_and_no_url_fetched_for_a_visitor(running, path):
    import gradio
    from gradio.context import LocalContext
    from gradio.exceptions import InvalidPathError

    [mount] = [route for route in page_of(running.url).routes if isinstance(route, Mount)]
    blocks = mount.app.get_blocks()
    [make] = [block for block in blocks.fns.values() if block.name == "create_from_text"]

    named = {"path": path, "meta": {"_type": "gradio.FileData"}}

    async def send() -> None:
        LocalContext.blocks.set(blocks)  # as Gradio's routes do
        await blocks.preprocess_data(make, [named] * len(make.inputs), None)

    with pytest.raises((InvalidPathError, gradio.Error), match=r"not uploaded by a user|uploaded, not fetched"):
        asyncio.run(send())


@pytest.mark.parametrize("is_said", [True, False])
def test_large_uploads_are_refused_however_they_are_sent(visitor, is_said):
    size = MAX_BODY_BYTES + 1
    body = b"x" * size if is_said else (b"x" * 2**20 for _ in range(size // 2**20 + 1))
    headers = {"content-type": "multipart/form-data; boundary=b", "cookie": f"{COOKIE}=secret"}
    assert visitor.post("/page/gradio_api/upload", content=body, headers=headers).status_code == 413


@pytest.mark.parametrize("key", ["wrong", "", " ", "wr\nong", "schlüssel"])
def test_a_key_that_is_not_known_sets_no_cookie(visitor, key):
    answer = visitor.post("/page/sign-in", data={"key": key})
    assert answer.status_code == 401
    assert "not known" in answer.text
    assert "set-cookie" not in answer.headers


def test_a_key_becomes_a_cookie_that_no_script_and_no_other_site_gets(visitor):
    answer = visitor.post("/page/sign-in", data={"key": " secret "})
    assert (answer.status_code, answer.headers["location"]) == (303, "./")
    value, *flags = answer.headers["set-cookie"].lower().split("; ")
    assert value == f"{COOKIE}=secret"
    assert set(flags) == {"httponly", "samesite=strict", "secure", "path=/page"}
    page = visitor.get("/page/")
    assert page.status_code == 200
    assert "secret" not in page.text


def test_the_cookie_is_for_https_only_where_there_is_https(visitor):
    plain = {"X-Forwarded-Proto": "http"}
    assert "Secure" not in visitor.post("/page/sign-in", data={"key": "secret"}, headers=plain).headers["set-cookie"]


def test_who_signs_out_is_out(visitor):
    visitor.post("/page/sign-in", data={"key": "secret"})
    answer = visitor.post("/page/sign-out")
    assert (answer.status_code, answer.headers["location"]) == (303, "sign-in")
    assert visitor.get("/page/").status_code == 303


def test_a_service_that_does_not_answer_is_said_so():
    with TestClient(page_of("http://127.0.0.1:9")) as visitor:
        answer = visitor.post("/sign-in", data={"key": "secret"})
        assert (answer.status_code, "does not answer" in answer.text) == (503, True)
        assert visitor.get("/", headers={"Cookie": f"{COOKIE}=secret"}).status_code == 503


def test_other_sites_may_follow_a_link_and_nothing_else(visitor):
    other = {"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}
    assert visitor.get("/page/sign-in", headers=other | {"Sec-Fetch-Mode": "navigate"}).status_code == 200
    assert visitor.post("/page/sign-in", data={"key": "secret"}, headers=other).status_code == 403
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    for answer in (
        visitor.get("/page/sign-in", headers={"Origin": "https://evil.example"}),
        visitor.options("/page/gradio_api/queue/join", headers=preflight),
    ):
        assert "access-control-allow-origin" not in answer.headers


def test_the_page_may_load_its_own_files_only(visitor):
    for path in ("sign-in", "theme.css"):
        headers = visitor.get(f"/page/{path}").headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-frame-options"] == "DENY"


def test_without_keys_the_page_is_open_to_this_machine_only(running):
    with TestClient(page_of(running.url, asks_keys=False), base_url=LOCAL) as visitor:
        assert visitor.get("/").status_code == 200
        assert visitor.get("/", headers={"Host": "evil.example"}).status_code == 400
        assert visitor.post("/gradio_api/upload", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
