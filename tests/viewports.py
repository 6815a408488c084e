"""Windows of the browser tests, and assertions that wait."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

DESK, PHONE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}, {"width": 320, "height": 640}


def expect(shown: "Page | Locator") -> Any:
    """Return Playwright's assertions, which wait; it is loaded here, so that collecting the tests does not."""
    from playwright import sync_api

    return sync_api.expect(shown)
