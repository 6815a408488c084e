"""Sign-ins of browsers: what a cookie allows, and what ends a session."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from starlette.testclient import TestClient

from pipeline.serving.http import sessions
from pipeline.serving.http.api import create_app
from pipeline.serving.http.keys import Keys
from pipeline.serving.http.sessions import COOKIE, SESSION_S, Sessions
from tests.pipeline.serving.running import KEYS, service_in

ORIGIN = "http://127.0.0.1:8000"
OWN = {"Origin": ORIGIN}


@pytest.fixture
def browser(tmp_path, clock) -> Iterator[TestClient]:
    """Yield a client that keeps cookies, of a service whose clock is set by hand."""
    service = service_in(tmp_path)
    service.store.clock = clock
    with TestClient(create_app(service), base_url=ORIGIN) as client:
        yield client
    service.store.close()


def sign_in(browser: TestClient, **headers: str) -> None:
    answer = browser.post("/v1/session", json={"api_key": "secret"}, headers=OWN | headers)
    assert answer.json() == {"object": "session", "requires_key": True, "signed_in": True, "owner": "me"}


def test_a_session_stands_for_its_key_without_holding_it(browser):
    assert browser.get("/v1/session").json()["signed_in"] is False
    assert browser.get("/v1/videos").status_code == 401
    sign_in(browser)
    assert "secret" not in browser.cookies[COOKIE]
    video = browser.post("/v1/videos", json={"prompt": "a fox"}, headers=OWN).json()
    assert browser.get(f"/v1/videos/{video['id']}").status_code == 200
    assert browser.get("/v1/videos", headers={"Authorization": "Bearer other"}).json()["data"] == []
    assert browser.delete("/v1/session", headers=OWN).json()["signed_in"] is False
    assert browser.get("/v1/videos").status_code == 401


def test_sign_ins_are_small(browser):
    for kind, body in (("application/json", b"[" * 5000), ("application/x-www-form-urlencoded", b"%41" * 2000)):
        answer = browser.post("/v1/session", content=body, headers=OWN | {"Content-Type": kind})
        assert answer.status_code == 413


def test_a_wrong_key_starts_no_session(browser):
    half = browser.post("/v1/session", content=b'{"api_key": "\\ud800"}', headers=OWN)
    assert half.status_code == 401
    for body in ({"api_key": "wrong"}, {"api_key": ["secret"]}, {}, {"key": "secret"}):
        answer = browser.post("/v1/session", json=body, headers=OWN)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert not browser.cookies


@pytest.mark.parametrize(
    ("scheme", "is_secure"), [("http", False), ("https", True), ("HTTPS", True), ("https, http", True)]
)
def test_scripts_and_other_sites_never_get_the_cookie(browser, scheme, is_secure):
    headers = {"X-Forwarded-Proto": scheme, **OWN}
    cookie = browser.post("/v1/session", json={"api_key": "secret"}, headers=headers).headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
    assert ("Secure" in cookie) is cookie.startswith("__Host-") is is_secure


def test_a_session_ends_with_its_time(browser, clock):
    sign_in(browser)
    clock.now += SESSION_S - 1
    assert browser.get("/v1/videos").status_code == 200
    clock.now += 2
    assert browser.get("/v1/videos").status_code == 401
    assert browser.get("/v1/session").json()["signed_in"] is False


def test_a_session_ends_with_its_key(store):
    held = Sessions(store, KEYS)
    session_id = held.begin("secret")
    assert held.owner(session_id) == "me"
    others = Keys({digest: name for digest, name in KEYS.names.items() if name != "me"})
    assert replace(held, keys=others).owner(session_id) is None
    assert held.owner("guessed") is None


def test_a_key_has_so_many_sessions(store, clock, monkeypatch):
    monkeypatch.setattr(sessions, "MAX_SESSIONS", 2)
    held = Sessions(store, KEYS)
    other = held.begin("other")
    begun = []
    for _ in range(3):
        clock.now += 1
        begun.append(held.begin("secret"))
    assert [held.owner(session_id) for session_id in begun] == [None, "me", "me"]
    assert held.owner(other) == "you"


@pytest.mark.parametrize(
    "origin",
    [None, "null", "http://evil.example", "http://127.0.0.1:8001", f"{ORIGIN}.evil.example", "file://", "http://["],
)
def test_a_cookie_alone_changes_nothing(browser, origin):
    sign_in(browser)
    headers = {} if origin is None else {"Origin": origin}
    for method, path in (
        ("POST", "/v1/videos"),
        ("POST", "/v1/videos/sync"),
        ("POST", "/v1/videos/x/cancel"),
        ("POST", "/v1/videos/x/links"),
        ("DELETE", "/v1/videos/x"),
        ("DELETE", "/v1/session"),
    ):
        answer = browser.request(method, path, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_origin")
    assert browser.get("/v1/videos", headers=headers).json()["data"] == []


def test_another_site_signs_nobody_in(browser):
    answer = browser.post("/v1/session", json={"api_key": "secret"}, headers={"Origin": "http://evil.example"})
    assert answer.status_code == 403
    assert not browser.cookies


@pytest.mark.parametrize("host", ["render.example", "render.example, inner.example"])
def test_behind_a_proxy_the_origin_is_that_of_the_outermost_proxy(browser, host):
    forwarded = {"X-Forwarded-Host": host, "Origin": "https://render.example"}
    sign_in(browser, **forwarded)
    assert browser.post("/v1/videos", json={"prompt": "a fox"}, headers=forwarded).status_code == 200
