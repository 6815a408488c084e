"""The web page in a browser, over the real API: with the bundled model, and with a worker that a test plays by hand."""

import asyncio
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageStat
from yarl import URL

import jobs
from pipeline.media.video import ThumbnailStrip, VideoWriter
from pipeline.serving.http.access import Polling, Service
from pipeline.serving.http.parsing import new_video
from pipeline.serving.http.sessions import COOKIE
from pipeline.serving.queue.records import Status, VideoRecord
from tests.pipeline.serving.farm import Farm, Models
from tests.pipeline.serving.running import KEYS, PRESET, Running, run, service_in, until
from tests.viewports import DESK, NARROW, PHONE, expect

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Locator, Page

pytestmark = [pytest.mark.browser, pytest.mark.integration]

KEY, OWNER = "secret", "me"
PROMPT = "a large red circle moves quickly up on a dark background"
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><b>bold</b> " + "w" * 300
PICTURE = Path(jobs.__file__).parent / "sample" / "first_frame.png"
POLLING = Polling(client_s=0.2, events_s=0.05, stream_s=0.05)
WAIT_MS, MADE_MS, HELD_S = 15_000, 60_000, 60
SEED = "9007199254740993"
"""2^53 + 1, which a number in JavaScript cannot hold."""


@dataclass
class Studio:
    """A service that a browser visits."""

    running: Running

    @property
    def url(self) -> str:
        return f"{self.running.url}/"

    @property
    def jobs(self) -> tuple[VideoRecord, ...]:
        """The owner's jobs, newest first."""
        return self.running.service.store.list(OWNER, limit=100).jobs

    def ask(self, prompt: str = PROMPT, **fields: object) -> VideoRecord:
        """Add a request to the queue."""
        service = self.running.service
        video = new_video({"prompt": prompt, **fields}, None, service.preset, "toy")
        job = video.job(service.preset, owner=OWNER, model="toy", created_at=service.store.clock())
        return service.store.add(job)

    def claim(self, progress: int = 0) -> VideoRecord:
        """Take the next request as a worker does."""
        [job] = self.running.service.store.claim(1, HELD_S)
        self.running.service.store.report([job.claim], progress)
        return job

    def finish(self, job: VideoRecord) -> None:
        """Complete a claimed job with a small video."""
        assert self.running.service.store.complete(job.claim, self.result)

    @property
    def result(self) -> dict[str, Any]:
        video, strip = files()
        storage = self.running.service.storage
        storage.put("videos/a.mp4", video)
        storage.put("thumbnails/a.webp", strip)
        facts = {"media_type": "video/mp4", "bytes": len(video), "sha256": "ab" * 32, "seconds": {"sample": 1.5}}
        return {"uri": "videos/a.mp4", "thumbnail_uri": "thumbnails/a.webp"} | facts

    def add_completed(self, count: int) -> None:
        """Add finished videos, each a second older than the one before; the first has a hostile prompt."""
        store, result = self.running.service.store, self.result
        now = store.clock()
        with store.writer.begin() as session:
            for number in range(count):
                video = new_video({"prompt": f"fox {number}" if number else HOSTILE}, None, PRESET, "toy")
                times = {"created_at": now - number, "completed_at": now - number + 1}
                facts = {"status": Status.COMPLETED, "progress": 100, "result": result}
                session.add(video.job(PRESET, owner=OWNER, model="toy", **facts, **times))


@cache
def files() -> tuple[bytes, bytes]:
    """Return a small video of 33 frames and its thumbnails."""
    frames = np.zeros((33, 64, 64, 3), np.uint8)
    frames[..., 0] = np.linspace(80, 255, 33, dtype=np.uint8)[:, None, None]
    frames[..., 2] = np.linspace(255, 80, 64, dtype=np.uint8)
    strip = ThumbnailStrip(33)
    strip.add(frames)
    with TemporaryDirectory() as folder:
        with VideoWriter(target := Path(folder, "video.mp4"), width=64, height=64, fps=24) as video:
            video.write(frames)
        return target.read_bytes(), strip.webp()


@pytest.fixture
def studio(tmp_path) -> Iterator[Studio]:
    """Yield a service without a worker."""
    with run(replace(service_in(tmp_path), polling=POLLING)) as running:
        yield Studio(running)


@dataclass
class RenderingStudio(Studio):
    """A service with the bundled model, which makes each frame in one step."""

    farm: Farm

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold back the next batch."""
        go_on = threading.Event()
        self.farm.local.before = lambda prompts: go_on.wait(HELD_S)
        try:
            yield
        finally:
            self.farm.local.before = lambda prompts: None
            go_on.set()


@pytest.fixture(scope="module")
def rendering_studio(tmp_path_factory) -> Iterator[RenderingStudio]:
    farm = Farm(folder := tmp_path_factory.mktemp("farm"), Models(folder))
    preset = replace(farm.preset, num_inference_steps=(1, 1, 1), video_num_inference_steps=(1, 1, 1))
    service = Service(farm.store, farm.storage, preset, "toy", "f00d", KEYS, polling=POLLING)
    with run(service) as running, dispatching(farm):
        yield RenderingStudio(running, farm)


@contextmanager
def dispatching(farm: Farm) -> Iterator[None]:
    """Let the dispatcher work in a thread."""
    stop = threading.Event()

    async def dispatch() -> None:
        task = asyncio.create_task(farm.dispatcher.run())
        await asyncio.to_thread(stop.wait)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    thread = threading.Thread(target=asyncio.run, args=(dispatch(),))
    thread.start()
    yield
    stop.set()
    thread.join()


class Visitor:
    """A browser window on the page; what it loads from other hosts, and what breaks in it, is an error."""

    def __init__(self, context: "BrowserContext") -> None:
        self.context, self.page = context, context.new_page()
        self.hosts: set[str | None] = set()
        self.paths: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", self._note_request)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._note_message)

    def _note_request(self, request: Any) -> None:
        url = URL(request.url)
        self.hosts.add(url.host)
        self.paths.append(f"{request.method} {url.path_qs}")

    def _note_message(self, message: Any) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.errors.append(message.text)

    def check(self) -> None:
        """Assert that nothing broke, that nothing came from elsewhere, and that nothing is too wide."""
        assert self.errors == []
        assert self.hosts <= {"127.0.0.1", None}  # blob: has none
        width = self.page.viewport_size["width"]
        assert self.page.evaluate("document.documentElement.scrollWidth") <= width


Visit = Callable[..., "Page"]


@pytest.fixture(params=[DESK, PHONE], ids=["desk", "phone"])
def visit(browser, request) -> Iterator[Visit]:
    """Yield a function that opens a studio in a window and signs in unless told otherwise."""
    from playwright import sync_api

    sync_api.expect.set_options(timeout=WAIT_MS)
    visitors: list[Visitor] = []
    contexts: list[BrowserContext] = []

    def open_page(studio: Studio, *, signs_in: bool = True, window: "BrowserContext | None" = None, **options: Any):
        if window is None:
            window = browser.new_context(viewport=request.param, **options)
            window.set_default_timeout(WAIT_MS)
            contexts.append(window)
        visitors.append(Visitor(window))
        page = visitors[-1].page
        page.visitor = visitors[-1]
        page.goto(studio.url)
        if signs_in:
            sign_in(page)
        return page

    try:
        yield open_page
        for visitor in visitors:
            visitor.check()
    finally:
        for context in contexts:  # and with them the events that the services still send
            context.close()


on_a_desk = pytest.mark.parametrize("visit", [DESK], ids=["desk"], indirect=True)
on_a_phone = pytest.mark.parametrize("visit", [PHONE], ids=["phone"], indirect=True)
"""For what does not depend on the window; the narrow one shows what is too wide."""


def sign_in(page: "Page", key: str = KEY) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_label("Prompt", exact=True)).to_be_visible()


def make(page: "Page", prompt: str = PROMPT, tab: str = "Text to video", duration: str = "0.333 s") -> None:
    """Fill the form and submit it."""
    page.get_by_role("tab", name=tab).click()
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Duration", exact=True).select_option(duration)
    page.get_by_role("button", name="Make video").click()


def card(page: "Page", number: int = 0) -> "Locator":
    return page.locator("#cards button").nth(number)


def expect_finished(page: "Page") -> None:
    expect(page.locator("#state")).to_contain_text("Finished in", timeout=MADE_MS)


def expect_playing(page: "Page", path: str) -> None:
    """Assert that the player shows a file of a video, and that its time passes."""
    expect(page.locator("#stage video")).to_have_attribute("src", re.compile(f"/{path}$"), timeout=MADE_MS)
    page.locator("#stage").scroll_into_view_if_needed()  # a video that is not in view does not start
    assert page.evaluate(
        """async (deadline_ms) => {
            const began = performance.now();
            while (!(document.querySelector("#stage video")?.currentTime > 0)) {
                if (performance.now() - began > deadline_ms) return false;
                await new Promise((done) => setTimeout(done, 20));
            }
            return true;
        }""",
        MADE_MS,
    )


@on_a_desk
def test_the_right_key_lets_in_and_no_other(studio, visit):
    page = visit(studio, signs_in=False)
    key = page.get_by_label("API key")
    key.fill("wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert").first).to_have_text("This key is not valid. Check it and try again.")
    expect(key).to_have_attribute("aria-invalid", "true")
    expect(key).to_be_focused()
    assert page.context.cookies() == []
    sign_in(page)
    expect(page.get_by_role("heading", name="Your videos")).to_be_visible()
    expect(page.get_by_text("No videos yet.")).to_be_visible()
    [cookie] = page.context.cookies()
    assert (cookie["name"], cookie["httpOnly"], cookie["sameSite"]) == (COOKIE, True, "Strict")
    page.get_by_role("button", name="Sign out").click()
    expect(key).to_be_visible()
    assert page.context.cookies() == []


@on_a_phone
def test_without_keys_nobody_signs_in(tmp_path, visit):
    with run(replace(service_in(tmp_path), keys=None)) as running:
        page = visit(Studio(running), signs_in=False)
        expect(page.get_by_label("Prompt", exact=True)).to_be_visible()
        expect(page.get_by_role("button", name="Sign out")).to_be_hidden()
        page.goto("about:blank")


def test_a_video_from_text(rendering_studio, visit):
    page = visit(rendering_studio, permissions=["clipboard-read", "clipboard-write"])
    page.get_by_label("Seed").fill(SEED)
    with rendering_studio.held():
        make(page)
        expect(page.get_by_role("progressbar")).to_be_visible()
        expect(page.locator("#state")).to_have_text("Making the video")
    expect_finished(page)
    expect_playing(page, "content")
    expect(card(page)).to_have_attribute("data-status", "completed")
    expect(card(page).locator("img")).to_have_js_property("naturalWidth", 64)

    page.reload()
    card(page).click()
    expect_finished(page)
    page.get_by_text("Settings of this video").click()
    expect(page.get_by_role("definition").filter(has_text=SEED)).to_be_visible()
    page.get_by_role("button", name="Copy settings").click()
    expect(page.get_by_text("Settings copied as JSON.")).to_be_visible()
    copied = json.loads(page.evaluate("navigator.clipboard.readText()"))
    assert (copied["prompt"], copied["seed"], copied["num_frames"]) == (PROMPT, int(SEED), 9)
    page.get_by_role("button", name="Use settings").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(PROMPT)
    expect(page.get_by_label("Seed")).to_have_value(SEED)
    expect(page.get_by_label("Duration", exact=True)).to_have_value("9")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename.endswith(".mp4")
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.get_by_text("Video deleted.")).to_be_visible()
    expect(page.locator("#cards li")).to_have_count(0)
    assert rendering_studio.jobs == ()


@on_a_phone
def test_settings_that_are_copied_make_the_same_video(studio, visit):
    given = studio.ask(seed=int(SEED), num_frames=17, num_inference_steps=[3, 2, 1], quality="high", guidance_scale=2.5)
    page = visit(studio)
    page.get_by_role("button", name="Use settings").click()
    page.get_by_role("button", name="Make video").click()
    expect(page.locator("#cards li")).to_have_count(2)
    new = studio.jobs[0]
    assert new.id != given.id
    assert {**new.request, "id": None} == {**given.request, "id": None}
    page.get_by_role("radio", name="Draft").check()  # a preset: sets the steps anew
    page.get_by_role("button", name="1 s", exact=True).click()
    page.get_by_role("button", name="Make video").click()
    expect(page.locator("#cards li")).to_have_count(3)
    assert {"quality": "draft", "num_frames": 25}.items() <= studio.jobs[0].given.items()
    assert not {"num_inference_steps", "skip_last_step"} & studio.jobs[0].given.keys()


@on_a_phone
def test_a_still_from_text(rendering_studio, visit):
    page = visit(rendering_studio)
    make(page, duration="Still")
    expect_finished(page)
    expect(page.locator("#stage img")).to_have_js_property("naturalWidth", 64)
    expect(card(page)).to_contain_text("Still · 64 × 64")


@on_a_phone
def test_a_video_from_an_image(rendering_studio, visit):
    page = visit(rendering_studio)
    page.get_by_role("tab", name="Image to video").click()
    page.get_by_label("First frame", exact=True).set_input_files(PICTURE)
    expect(page.get_by_alt_text("Preview of the first frame")).to_be_visible()
    make(page, tab="Image to video")
    expect_finished(page)
    expect_playing(page, "content")
    source = card(page).locator("img").get_attribute("src")
    thumbnail = page.request.get(str(URL(page.url).join(URL(source)))).body()
    with Image.open(io.BytesIO(thumbnail)) as first, Image.open(PICTURE) as picture:
        change = ImageChops.difference(first.convert("RGB"), picture.convert("RGB").resize(first.size))
    assert max(ImageStat.Stat(change).mean) < 16


GIVE = """(target, [event, name, type]) => {
    const files = new DataTransfer();
    files.items.add(new File(["data"], name, { type }));
    const options = { bubbles: true, cancelable: true, dataTransfer: files, clipboardData: files };
    target.dispatchEvent(new (event === "drop" ? DragEvent : ClipboardEvent)(event, options));
}"""
"""Drops or pastes a file."""


@on_a_phone
def test_a_picture_is_dropped_or_pasted(studio, visit):
    page = visit(studio)
    prompt, zone = page.get_by_label("Prompt", exact=True), page.locator(".drop")
    prompt.evaluate(GIVE, ["paste", "pasted.png", "image/png"])
    expect(page.get_by_role("tab", name="Image to video")).to_have_attribute("aria-selected", "true")
    expect(zone).to_have_text("pasted.png")
    page.get_by_role("button", name="Remove picture").click()
    zone.evaluate(GIVE, ["drop", "notes.txt", "text/plain"])
    expect(page.get_by_text("This file is not a picture.")).to_be_visible()
    zone.evaluate(GIVE, ["drop", "dropped.png", "image/png"])
    expect(page.get_by_text("This file is not a picture.")).to_be_hidden()
    expect(zone).to_have_text("dropped.png")
    make(page, tab="Image to video")
    expect(page.get_by_label("First frame", exact=True)).to_have_attribute("aria-invalid", "true")  # it does not decode


@on_a_phone
def test_a_video_is_found_again_and_cancelled(studio, visit):
    studio.ask("the first one")
    job = studio.ask("the last one")
    page = visit(studio)
    expect(page.locator("#state")).to_have_text("In the queue, 1 video ahead")
    first = studio.claim(40)
    expect(page.locator("#state")).to_have_text("Next in the queue")
    expect(card(page, 1)).to_contain_text("40 %")
    page.reload()
    expect(page.locator("#shown-prompt")).to_have_text("the last one")
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(page.locator("#state")).to_have_text("Cancelled")
    expect(card(page)).to_have_attribute("data-status", "cancelled")
    studio.finish(first)
    expect(card(page, 1)).to_have_attribute("data-status", "completed")
    assert studio.running.service.store.get(job.id).status == Status.CANCELLED


@on_a_phone
def test_a_video_that_fails_says_what_to_do(studio, visit):
    studio.ask()
    page = visit(studio)
    job = studio.claim()
    studio.running.service.store.fail(job.claim, "worker_lost", "its worker was lost 3 times")
    expect(page.locator("#state")).to_have_text("Failed: its worker was lost 3 times")
    expect(page.locator("#advice")).to_contain_text("Select “Use settings” to try again.")
    expect(card(page)).to_contain_text("Failed")


@on_a_phone
def test_an_error_is_shown_at_its_field(studio, visit):
    page = visit(studio)

    def expect_error(label: str, message: str) -> None:
        field = page.get_by_label(label, exact=True)
        expect(field).to_be_focused()
        expect(field).to_have_attribute("aria-invalid", "true")
        expect(field).to_have_accessible_description(re.compile(message))

    make(page, "")
    expect_error("Prompt", "Describe the video first.")
    make(page, tab="Image to video")
    expect_error("First frame", "Choose a picture first.")
    page.get_by_role("tab", name="Text to video").click()
    page.get_by_label("Seed").fill("red")
    page.get_by_role("button", name="Make video").click()
    expect_error("Seed", "seed 'red'")
    page.get_by_label("Seed").fill("1")
    expect(page.get_by_label("Seed")).not_to_have_attribute("aria-invalid", "true")
    page.locator("#more summary").click()
    page.get_by_label("Guidance decay").fill("99")
    page.locator("#more summary").click()
    page.get_by_role("button", name="Make video").click()
    expect_error("Guidance decay", "guidance_decay 99.0 is not between 0 and 30")
    page.get_by_role("button", name="Reset").click()
    expect(page.get_by_label("Guidance decay")).to_have_value("")
    assert studio.jobs == ()


@on_a_phone
def test_a_field_of_the_api_needs_no_change_of_the_page(studio, visit):
    page = visit(studio, signs_in=False)

    def with_field(route: Any) -> None:
        description = route.fetch().json()
        form = description["paths"]["/v1/videos"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
        form["properties"]["film_grain"] = {
            "anyOf": [{"enum": ["fine", "coarse"]}, {"type": "null"}],
            "description": "Noise",
        }
        route.fulfill(json=description)

    page.route("**/openapi.json", with_field)
    sign_in(page)
    page.locator("#more summary").click()
    grain = page.get_by_label("Film grain")
    expect(grain).to_have_accessible_description("Noise")
    grain.select_option("Coarse")
    make(page)
    expect(grain).to_have_accessible_description("Noise there is no field 'film_grain'")


@on_a_phone
def test_a_video_plays_while_it_is_made(rendering_studio, visit, monkeypatch):
    decode = rendering_studio.farm.local.decode
    show, go_on = decode.show, threading.Event()

    def show_and_wait(item: Any, start: int) -> int:
        unit = show(item, start)
        if unit == 4:
            go_on.wait(HELD_S)
        return unit

    monkeypatch.setattr(decode, "show", show_and_wait)
    rendering_studio.farm.local.before = lambda prompts: until(lambda: rendering_studio.jobs[0].followed)
    page = visit(rendering_studio)
    make(page, duration="1.33 s")
    expect_playing(page, "stream")
    assert rendering_studio.jobs[0].status == Status.IN_PROGRESS
    rendering_studio.farm.local.before = lambda prompts: None
    go_on.set()
    expect_finished(page)
    expect_playing(page, "content")


@on_a_phone
def test_two_tabs_show_the_same_videos(studio, visit):
    studio.add_completed(2)
    studio.ask("made in both tabs")
    page = visit(studio)
    other = visit(studio, window=page.context, signs_in=False)
    expect(other.locator("#cards li")).to_have_count(3)
    page.bring_to_front()
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(other.locator("#state")).to_have_text("Cancelled")
    card(page, 1).click()
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator("#cards li")).to_have_count(2)
    other.bring_to_front()
    card(other, 1).click()
    other.get_by_role("button", name="Delete").click()
    other.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(other.locator("#cards li")).to_have_count(2)
    other.evaluate("document.dispatchEvent(new Event('visibilitychange'))")  # as when the tab is looked at again
    page.bring_to_front()
    make(page, "made in one tab")
    expect(page.locator("#cards li")).to_have_count(3)
    other.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(other.locator("#cards li")).to_have_count(3)
    expect(card(other)).to_contain_text("made in one tab")


@on_a_phone
def test_a_lost_connection_is_found_again(studio, visit):
    studio.ask()
    page = visit(studio)
    lost = page.get_by_text("Connection lost, retrying")
    expect(page.locator("#state")).to_have_text("Next in the queue")
    page.context.set_offline(True)
    expect(lost).to_be_visible()
    page.get_by_label("Prompt", exact=True).fill("typed meanwhile")
    page.get_by_role("button", name="Make video").click()
    expect(page.locator("#form-error")).to_contain_text("The service does not answer.")
    studio.finish(studio.claim())
    page.context.set_offline(False)
    expect(lost).to_be_hidden()
    expect_finished(page)
    expect_playing(page, "content")
    page.get_by_role("button", name="Make video").click()
    expect(page.locator("#cards li")).to_have_count(2)
    assert studio.jobs[0].request["prompt"] == "typed meanwhile"


@on_a_phone
def test_a_service_that_is_away_at_first_is_found(studio, visit):
    page = visit(studio, signs_in=False)
    page.route("**/v1/session", lambda route: route.fulfill(status=503))
    page.reload()
    expect(page.get_by_text("Connection lost, retrying")).to_be_visible()
    page.unroute("**/v1/session")
    sign_in(page)


@on_a_phone
def test_events_that_are_refused_are_polled(studio, visit):
    studio.ask()
    page = visit(studio, signs_in=False)
    page.route("**/events", lambda route: route.fulfill(status=429, json={}))
    sign_in(page)
    expect(page.locator("#state")).to_have_text("Next in the queue")
    studio.finish(studio.claim())
    expect_finished(page)


@on_a_phone
def test_an_expired_session_loses_nothing(studio, visit):
    page = visit(studio)
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Prompt", exact=True).fill("half of a promp")
    page.context.clear_cookies()
    page.get_by_role("button", name="Make video").click()
    expect(page.get_by_text("Your session has ended.")).to_be_visible()
    expect(page.get_by_label("API key")).to_be_focused()
    sign_in(page)
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("half of a promp")
    expect(page.get_by_role("button", name="Make video")).to_be_focused()
    page.get_by_role("button", name="Make video").click()
    expect(page.locator("#cards li")).to_have_count(1)
    assert (studio.jobs[0].request["prompt"], studio.jobs[0].request["seed"]) == ("half of a promp", 7)
    page.context.clear_cookies()  # noticed by what reads the unfinished video
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(page.get_by_label("API key")).to_be_focused()


@on_a_desk
def test_a_gallery_of_200_videos(studio, visit):
    studio.add_completed(200)
    page = visit(studio)
    expect(card(page).locator(".card-prompt")).to_have_text(HOSTILE)
    cards, more = page.locator("#cards li"), page.get_by_role("button", name="Load more")
    for count in range(24, 200, 24):
        expect(cards).to_have_count(count)
        page.locator("#cards").evaluate("list => list.firstChild.kept = true")
        more.click()
    expect(cards).to_have_count(200)
    expect(more).to_be_hidden()
    expect(card(page, 192)).to_be_focused()  # the first one that was loaded last
    assert page.locator("#cards").evaluate("list => list.firstChild.kept")
    card(page, 199).click()
    expect(page.locator("#shown-prompt")).to_have_text("fox 199")
    expect_playing(page, "content")
    paths = page.visitor.paths
    assert not [path for path in paths if re.fullmatch(r"GET /v1/videos/[^/?]+", path)]  # nothing is polled
    thumbnails = [path for path in paths if "thumbnail" in path]
    assert len(thumbnails) == len(set(thumbnails))
    assert page.title() == "pyramid-render"


@pytest.mark.parametrize("visit", [NARROW], ids=["narrow"], indirect=True)
def test_nothing_is_too_wide_for_a_narrow_window(studio, visit):
    studio.add_completed(3)
    page = visit(studio)
    card(page).click()
    expect(page.locator("#shown-prompt")).to_have_text(HOSTILE)
    for summary in page.locator("summary").all():
        summary.click()
    page.get_by_role("tab", name="Image to video").click()
    page.get_by_label("First frame", exact=True).set_input_files(PICTURE)
    page.get_by_role("button", name="Delete").click()
    expect(page.get_by_role("dialog")).to_be_visible()


@on_a_desk
def test_the_keyboard_is_enough(studio, visit):
    page = visit(studio, signs_in=False)
    keys = page.keyboard

    def tab_to(target: "Locator", key: str = "Tab") -> None:
        for _ in range(40):
            if target.evaluate("element => element === document.activeElement"):
                return
            keys.press(key)
        expect(target).to_be_focused()

    expect(page.get_by_label("API key")).to_be_focused()
    keys.type(KEY)
    keys.press("Enter")
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    tab_to(page.get_by_role("tab", name="Text to video"), "Shift+Tab")
    keys.press("ArrowRight")
    expect(page.get_by_role("tab", name="Image to video")).to_be_focused()
    expect(page.get_by_label("First frame", exact=True)).to_be_visible()
    keys.press("ArrowRight")
    expect(page.get_by_role("tab", name="Text to video")).to_have_attribute("aria-selected", "true")
    tab_to(page.get_by_label("Prompt", exact=True))
    keys.type(PROMPT)
    tab_to(page.get_by_role("radio", name="Standard"))
    keys.press("ArrowLeft")
    expect(page.get_by_role("radio", name="Draft")).to_be_checked()
    tab_to(page.get_by_role("button", name="Still"))
    keys.press("Space")
    expect(page.get_by_label("Duration", exact=True)).to_have_value("1")
    tab_to(page.get_by_role("button", name="Make video"))
    keys.press("Enter")
    expect(card(page)).to_be_visible()
    assert {"quality": "draft", "num_frames": 1}.items() <= studio.jobs[0].given.items()
    studio.ask("another one")
    page.reload()
    expect(card(page, 1)).to_be_visible()
    tab_to(page.get_by_role("link", name="Skip to your videos"))
    keys.press("Enter")
    tab_to(card(page, 1))
    keys.press("Enter")
    expect(page.locator("#shown-prompt")).to_have_text(PROMPT)
    expect(card(page, 1)).to_have_attribute("aria-current", "true")
    delete, dialog = page.locator("#delete"), page.get_by_role("dialog")
    tab_to(delete, "Shift+Tab")
    keys.press("Enter")
    expect(dialog.get_by_role("button", name="Keep it")).to_be_focused()
    keys.press("Escape")
    expect(dialog).to_be_hidden()
    expect(delete).to_be_focused()
    keys.press("Enter")
    tab_to(dialog.get_by_role("button", name="Delete"))
    keys.press("Enter")
    expect(page.locator("#cards li")).to_have_count(1)
    expect(page.locator("#videos")).to_be_focused()


def test_the_policy_allows_own_files_only(studio):
    headers = studio.running.http(None).get("/").headers
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'self'; ")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy


@pytest.mark.parametrize(("visit", "scheme"), [(DESK, "light"), (PHONE, "dark")], indirect=["visit"])
def test_accessibility(studio, visit, scheme):
    from axe_playwright_python.sync_playwright import Axe

    def check() -> None:
        found = Axe().run(page).response["violations"]
        serious = [each for each in found if each["impact"] in ("serious", "critical")]
        assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in serious] == []

    studio.add_completed(4)
    studio.ask()
    studio.running.service.store.fail(studio.claim().claim, "worker_lost", "its worker was lost")
    studio.ask()
    page = visit(studio, signs_in=False, color_scheme=scheme, reduced_motion="reduce")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_text("This key is not valid.")).to_be_visible()
    check()
    sign_in(page)
    studio.claim(40)
    expect(card(page)).to_contain_text("40 %")
    for summary in page.locator("summary").all():
        summary.click()
    check()
    make(page, "", tab="Image to video")
    expect(page.get_by_text("Choose a picture first.")).to_be_visible()
    card(page, 1).click()
    expect(page.locator("#state")).to_contain_text("Failed")
    check()
    card(page, 2).click()
    expect_finished(page)
    page.get_by_role("button", name="Use settings").click()
    page.get_by_role("button", name="Delete").click()
    check()
