"""The page in a browser, over a service that runs: what people do with it, at a desk and on a phone."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2 as httpx
import pytest
from PIL import Image, ImageChops, ImageStat
from yarl import URL

import jobs
from pipeline.serving.client import COOKIE
from pipeline.serving.keys import hashed
from tests.jobs.services import Running, service
from tests.viewports import DESK, PHONE, expect

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.browser, pytest.mark.ray, pytest.mark.integration, pytest.mark.timeout(300)]

KEY, PROMPT = "pr-secret", "a large red circle moves quickly up on a dark background"
OWNER = {"Authorization": f"Bearer {KEY}"}
PICTURE = Path(jobs.__file__).parent / "sample" / "first_frame.png"
WAIT_MS, MADE_MS = 15_000, 60_000


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Running]:
    with service(tmp_path_factory.mktemp("service"), "--api-keys", f"me:{hashed(KEY)}") as running:
        yield running


on_a_phone = pytest.mark.parametrize("door", [PHONE], ids=["phone"], indirect=True)
"""For what does not depend on the window; the narrow one shows what is too wide."""


@pytest.fixture(params=[DESK, PHONE], ids=["desk", "phone"])
def door(running, browser, request) -> Iterator["Page"]:
    """Yield the page before the sign-in; what it asks of other hosts, and what breaks in it, is an error."""
    from playwright import sync_api

    sync_api.expect.set_options(timeout=WAIT_MS)
    context = browser.new_context(viewport=request.param)
    context.set_default_timeout(WAIT_MS)
    page = context.new_page()
    hosts, errors = set(), []
    page.on("request", lambda request: hosts.add(URL(request.url).host))
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(f"{running.url}/")
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= request.param["width"]
    context.close()
    assert hosts <= {"127.0.0.1", None}  # data: and blob: have none
    assert errors == []


@pytest.fixture
def page(door) -> "Page":
    """Return the page as someone with a key has it."""
    door.get_by_label("API key").fill(KEY)
    door.get_by_role("button", name="Sign in").click()
    expect(door.get_by_label("Size").first).not_to_have_value("")
    return door


def ask(page: "Page", tab: str, prompt: str, duration: str = "0.333 s", seed: str = "") -> None:
    """Fill the form of a tab and press its button."""
    page.get_by_role("tab", name=tab).click()
    panel = page.get_by_role("tabpanel")
    panel.get_by_label("Prompt", exact=True).fill(prompt)
    panel.get_by_label("Seed").fill(seed)
    panel.get_by_label("Duration").click()
    page.get_by_role("option", name=duration, exact=True).click()
    panel.get_by_role("button", name="Make video").click()


def plays(page: "Page") -> bool:
    """Say whether the video in the player moves on."""
    handle = page.wait_for_function("() => document.querySelector('video')?.currentTime > 0")
    return bool(handle.json_value())


def test_the_right_key_lets_in_and_no_other(running, door):
    door.get_by_label("API key").fill("pr-wrong")
    door.get_by_role("button", name="Sign in").click()
    expect(door.get_by_role("alert")).to_have_text("This key is not known.")
    assert door.context.cookies() == []
    door.get_by_label("API key").fill(KEY)
    door.get_by_role("button", name="Sign in").click()
    expect(door.get_by_text("Your videos")).to_be_visible()
    [cookie] = door.context.cookies()
    assert (cookie["name"], cookie["path"]) == (COOKIE, "/page")
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    door.get_by_role("button", name="Sign out").click()
    expect(door.get_by_label("API key")).to_be_visible()
    assert door.context.cookies() == []


def test_a_video_from_text(page):
    ask(page, "Text to video", PROMPT, seed="9007199254740993")
    expect(page.get_by_role("progressbar")).to_be_visible()
    expect(page.get_by_text("Made in")).to_be_visible(timeout=MADE_MS)
    assert plays(page)
    expect(page.get_by_text("seed 9007199254740993")).to_be_visible()
    card = page.locator(".pr-card").first
    expect(card).to_have_attribute("data-status", "completed")
    page.wait_for_function("() => document.querySelector('.pr-card img').naturalWidth == 64")

    page.reload()
    card.click()
    expect(page.get_by_text("Made in")).to_be_visible()
    page.get_by_role("button", name="Settings").click()
    expect(page.locator(".cm-content")).to_contain_text('"seed": 9007199254740993')
    page.get_by_role("button", name="Reuse").click()
    expect(page.get_by_label("Prompt", exact=True).first).to_have_value(PROMPT)
    expect(page.get_by_label("Seed").first).to_have_value("9007199254740993")
    expect(page.get_by_label("Duration").first).to_have_value("0.333 s")
    name = card.get_attribute("data-id")
    page.get_by_role("button", name="Delete").click()
    expect(page.locator(f"[data-id={name}]")).to_have_count(0)


@on_a_phone
def test_a_still_from_text(page):
    ask(page, "Text to video", PROMPT, duration="still")
    expect(page.get_by_text("Made in")).to_be_visible(timeout=MADE_MS)
    page.wait_for_function("() => document.querySelector('img.pr-player').naturalWidth == 64")
    expect(page.locator(".pr-card").first).to_contain_text("completed, still, 64x64")


@on_a_phone
def test_a_video_from_an_image(page):
    page.get_by_role("tab", name="Image to video").click()
    page.locator("input[type=file]").set_input_files(PICTURE)
    expect(page.get_by_label("Remove Image")).to_be_visible()
    ask(page, "Image to video", PROMPT)
    expect(page.get_by_text("Made in")).to_be_visible(timeout=MADE_MS)
    assert plays(page)
    source = page.locator(".pr-card img").first.get_attribute("src")
    thumbnail = page.request.get(str(URL(page.url).join(URL(source)))).body()
    with Image.open(io.BytesIO(thumbnail)) as first, Image.open(PICTURE) as picture:
        change = ImageChops.difference(first.convert("RGB"), picture.convert("RGB").resize(first.size))
    assert max(ImageStat.Stat(change).mean) < 16


@on_a_phone
def test_a_video_is_found_again_and_cancelled(running, page):
    slow_video(running)
    page.reload()
    expect(page.get_by_role("progressbar")).to_be_visible()
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(page.get_by_text("Cancelled", exact=True)).to_be_visible()
    expect(page.locator(".pr-card").first).to_have_attribute("data-status", "cancelled")


@on_a_phone
def test_what_is_wrong_is_said(page):
    ask(page, "Text to video", "")
    expect(page.get_by_text("prompt '' is empty")).to_be_visible()
    ask(page, "Image to video", PROMPT)
    expect(page.get_by_text("choose a picture first")).to_be_visible()


def slow_video(running: Running) -> str:
    """Ask for a video that takes a while; returns its path."""
    body = {"prompt": PROMPT, "num_inference_steps": 60, "video_num_inference_steps": 60}
    answer = httpx.post(f"{running.url}/v1/videos", json=body, headers=OWNER)
    return f"/v1/videos/{answer.json()['id']}"


def test_a_video_plays_while_it_is_made(running, browser):
    path = running.url + slow_video(running)
    link = httpx.post(f"{path}/links", headers=OWNER).json()["stream"]
    page = browser.new_page(bypass_csp=True)  # to look into the player
    page.goto(running.url + link, wait_until="commit")
    page.wait_for_function("document.querySelector('video').readyState >= 2", timeout=MADE_MS)
    assert httpx.get(path, headers=OWNER).json()["status"] == "in_progress"
    page.close()


@on_a_phone
def test_the_page_shows_a_video_while_it_is_made(running, page):
    slow_video(running)
    page.reload()
    player = page.locator(".pr-player")
    expect(player).to_have_attribute("src", re.compile("/stream"), timeout=MADE_MS)
    expect(page.get_by_text("Made in")).to_be_visible(timeout=MADE_MS)
    expect(player).to_have_attribute("src", re.compile("/content"))
