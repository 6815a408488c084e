"""The report in a browser, from disk: filters, pages, player, hostile prompts, a job that runs."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pytest
from yarl import URL

from pipeline.media.still import encode_still
from pipeline.media.video import ThumbnailStrip, VideoWriter
from pipeline.reports.report import REPORT, write_report
from pipeline.storage.storage import Storage
from tests.pipeline.sample_ledgers import recorded, recorded_rows, written
from tests.viewports import DESK, PHONE, expect

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.browser, pytest.mark.integration]

BEGAN = datetime(2026, 1, 1, 12, tzinfo=UTC)
HOSTILE = "</script><img src=x onerror=\"document.title='taken'\"><b>bold</b>"
SEED = 2**63 - 1
NUM_FOXES = 60


def rendered(name: str, number: int, **values: object) -> dict[str, object]:
    start = BEGAN + timedelta(seconds=10 * (number // 4))
    times = {"started_at": start, "finished_at": start + timedelta(seconds=9)}
    size = {"height": 64, "width": 64, "num_frames": 17, "fps": 24}
    files = {"uri": f"videos/{name}.mp4", "thumbnail_uri": f"thumbnails/{name}.webp", "media_type": "video/mp4"}
    seconds = [("encode", 0.1), ("sample", 1 + number / 100), ("decode", 0.5), ("publish", 0.01)]
    return {"id": name, "prompt": f"fox {number}", "node": "n", "device": "cpu", "seconds": seconds} | (
        times | size | files | values
    )


def failure(name: str, stage: str, message: str) -> dict[str, object]:
    error = {"error_stage": stage, "error_type": "ValueError", "error_message": message}
    return {"id": name, "prompt": f"{name} prompt", "status": "failed", **error}


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Storage:
    """Return an output of 60 videos of which two have files, a still, and two failed rows."""
    storage = Storage(str(tmp_path_factory.mktemp("page") / "an out#put"))
    frames = np.zeros((17, 64, 64, 3), np.uint8)
    frames[:, :, :, 0] = np.linspace(0, 255, 17, dtype=np.uint8)[:, None, None]
    strip = ThumbnailStrip(17)
    strip.add(frames)
    for name in ("hostile #1", "fox-59"):
        folder = Path(storage.root, "videos")
        folder.mkdir(parents=True, exist_ok=True)
        with VideoWriter(folder / f"{name}.mp4", width=64, height=64, fps=24) as video:
            video.write(frames)
        storage.put(f"thumbnails/{name}.webp", strip.webp())
    storage.put("images/still.png", encode_still(frames[8], "png", {}))
    records = [rendered(f"fox-{number}", number, motion=0.1 if number == 7 else None) for number in range(NUM_FOXES)]
    still = {"uri": "images/still.png", "media_type": "image/png", "num_frames": 1, "thumbnail_uri": None}
    records += [
        rendered(
            "hostile #1",
            60,
            prompt=HOSTILE,
            seed=SEED,
            num_inference_steps="[10, 5]",
            motion=0.5,
            rerolls=1,
            first_seed=7,
        ),
        rendered("still", 61, **still),
        failure("bad-1", "read", "height 65 is not a multiple of 64"),
        failure("bad-2", "sample", HOSTILE),
    ]
    flags = [
        ["dark", "blurred"] if record["id"] == "still" else ["dark"] if i < 5 else None
        for i, record in enumerate(records)
    ]
    written(storage, recorded_rows(*records, flags=pa.array(flags, pa.list_(pa.string()))))
    return storage


@pytest.fixture(params=[DESK, PHONE], ids=["desk", "phone"])
def page(output, browser, request) -> Iterator["Page"]:
    """Yield the report as it is on disk; what breaks in it, and whatever it asks of the network, is an error."""
    write_report(output)
    page = browser.new_page(viewport=request.param, reduced_motion="reduce")
    page.set_default_timeout(10_000)
    schemes, errors = set(), []
    page.on("request", lambda request: schemes.add(URL(request.url).scheme))
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(Path(output.root, REPORT).as_uri())
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= request.param["width"]
    assert page.title() == "an out#put - report"
    page.close()
    assert schemes <= {"file", "data"}
    assert errors == []


def until(page: "Page", condition: str) -> None:
    """Wait for a condition; the page's own rules forbid what `wait_for_function` does."""
    page.evaluate(
        f"() => new Promise(done => {{ const look = () => {condition} ? done() : setTimeout(look, 50); look(); }})"
    )


def ids(page: "Page") -> list[str | None]:
    return [tile.get_attribute("data-id") for tile in page.locator(".tile").all()]


def test_videos_come_in_pages(page):
    expect(page.locator(".tile")).to_have_count(48)
    assert ids(page)[:3] == ["bad-2", "bad-1", "still"]
    page.get_by_role("button", name="Next page").first.click()
    expect(page.locator(".tile")).to_have_count(16)
    page.get_by_label("Order").select_option("fastest first")
    expect(page.locator(".tile").first).to_have_attribute("data-id", "fox-0")
    expect(page.get_by_role("button", name="Previous page").first).to_be_disabled()


def test_what_is_measured_orders_the_videos_that_have_it(page):
    order = page.get_by_label("Order")
    order.select_option("highest motion")
    expect(page.locator(".tile").first).to_have_attribute("data-id", "hostile #1")
    order.select_option("lowest motion")
    expect(page.locator(".tile")).to_have_count(2)
    assert ids(page) == ["fox-7", "hostile #1"]
    assert not any("contrast" in name for name in order.locator("option").all_inner_texts())


def test_filters_narrow_what_is_shown_and_stay_after_a_reload(page):
    page.get_by_label("Status").select_option("failed")
    expect(page.locator(".tile")).to_have_count(2)
    page.get_by_label("Failed in").select_option("read (1)")
    expect(page.locator("#count")).to_have_text("1 of 64 rows")
    page.reload()
    expect(page.get_by_label("Failed in")).to_have_value("read")
    assert ids(page) == ["bad-1"]
    page.get_by_label("Search").fill("nothing like it")
    page.get_by_role("button", name="Clear the filters").click()
    expect(page.locator(".tile")).to_have_count(48)

    page.get_by_label("Flag").select_option("dark (6)")
    expect(page.locator(".tile")).to_have_count(6)
    page.get_by_label("Search").fill("FOX 4")
    expect(page.locator(".tile")).to_have_count(1)
    assert ids(page) == ["fox-4"]


def test_charts_show_stages_and_lead_to_failures(page):
    if not page.locator("#timeline").is_visible():
        page.get_by_text("Charts").click()
    expect(page.get_by_role("img", name="When nodes were in which stage")).to_be_visible()
    expect(page.get_by_role("img", name="Videos per hour")).to_be_visible()
    assert page.locator("#timeline rect.sample").count() == 16  # batches
    assert page.locator("#seconds svg").count() == 4
    page.get_by_role("button", name="1 height 65").click()
    expect(page.locator(".tile")).to_have_count(1)


def test_a_video_plays_with_its_settings_beside_it(page):
    page.get_by_label("Search").fill("bold")
    expect(page.locator(".tile")).to_have_count(2)
    until(page, "document.querySelector('.poster')?.naturalWidth == 256")
    page.locator(".tile").last.press("Enter")
    until(page, "document.querySelector('video')?.currentTime > 0.1")
    player = page.get_by_role("dialog")
    expect(player.get_by_text(HOSTILE, exact=True)).to_be_visible()
    expect(player.locator("pre")).to_contain_text(f'"seed": {SEED}')
    expect(player.locator("dl")).to_contain_text("motion 0.5")
    expect(player.locator("dl")).to_contain_text("1 x, at first with seed 7")
    expect(player.locator("pre")).to_contain_text('"num_inference_steps": [10,5]')
    player.get_by_role("button", name="Copy").click()
    expect(
        player.get_by_role("button", name="Copied").or_(player.get_by_role("button", name="Selected"))
    ).to_be_visible()
    for _ in range(2):
        page.keyboard.press("ArrowLeft")
        expect(player.get_by_text("ValueError in sample")).to_be_visible()
        page.keyboard.press("ArrowRight")
        expect(player.get_by_text("17 frames").first).to_be_visible()
    page.keyboard.press("Escape")
    expect(player).not_to_be_visible()
    assert page.locator("b", has_text="bold").count() == 0


def test_a_still_is_shown_and_a_lost_file_is_said(page):
    page.locator("[data-id=still]").click()
    until(page, "document.querySelector('img.screen')?.naturalWidth == 64")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).not_to_be_visible()
    page.locator("[data-id=fox-30]").click()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).not_to_be_visible()
    assert page.evaluate("scrollY") > 0
    page.locator("[data-id=fox-58]").click()
    expect(page.get_by_role("alert")).to_contain_text("cannot be shown")


def test_the_report_of_a_running_job_loads_itself_again_and_keeps_its_filters(output, browser):
    recorded(output, "r", "running", done=3, total=8)
    write_report(output)
    page = browser.new_page(color_scheme="dark")
    page.clock.install()
    page.goto(f"{Path(output.root, REPORT).as_uri()}#status=failed")
    expect(page.get_by_text("3 of 8 rows")).to_be_visible()
    recorded(output, "r", "finished", done=8, total=8)
    write_report(output)
    page.clock.run_for(31_000)
    expect(page.get_by_text("as of")).not_to_contain_text("running")
    assert ids(page) == ["bad-2", "bad-1"]
    page.close()


def test_an_output_without_rows_says_so(browser, tmp_path):
    write_report(Storage(str(tmp_path / "none")))
    page = browser.new_page()
    page.goto((tmp_path / "none" / REPORT).as_uri())
    expect(page.get_by_text("No rows yet")).to_be_visible()
    expect(page.get_by_text("Nothing yet.").first).to_be_visible()
    page.close()
