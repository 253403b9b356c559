"""Debian's Chromium, without a window, by Playwright's client: for the tests of pages, and for pictures of them.

Without one of the two the tests that need them are skipped, with what is missing; where CLUSTERKV_BROWSER_TESTS is "required",
as in CI, they fail. `make browser` installs Chromium; the client is one of the development tools.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

# Ignored by git. Where the tests leave pictures of what they saw.
PICTURES = Path(__file__).parents[2] / "build" / "pictures"


def missing() -> str:
    """What a browser test lacks here; empty where it can run."""
    if find_spec("playwright") is None:
        return "Playwright's Python client is not installed: `make dev-env` brings it"
    if shutil.which("chromium") is None:
        return "there is no chromium on the path: `make browser` installs Debian's"
    return ""


def require_browser() -> None:
    """Skip the test that lacks a browser, or fail it where it must not be skipped."""
    lacks = missing()
    if lacks and os.environ.get("CLUSTERKV_BROWSER_TESTS") == "required":
        pytest.fail(f"CLUSTERKV_BROWSER_TESTS=required, but {lacks}")
    if lacks:
        pytest.skip(lacks)


@contextmanager
def browser() -> Iterator[Browser]:
    """A Chromium, until the block ends."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # A container's root has no sandbox, and its /dev/shm is small.
        flags = ["--no-sandbox", "--disable-dev-shm-usage"]
        running = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        try:
            yield running
        finally:
            running.close()


class Watched:
    """A page with what it said to the console and asked for.

    Args:
        page: not yet anywhere.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.said: list[str] = []
        self.asked: list[str] = []
        page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        page.on("request", lambda request: self.asked.append(request.url))

    def open(self, file: Path) -> None:
        """Open a page of `write_page` from disk and wait until it is drawn."""
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("body[data-ready]")

    def keep_picture(self, name: str) -> None:
        """A picture of what is to be seen, in a file whose path is printed."""
        PICTURES.mkdir(parents=True, exist_ok=True)
        path = PICTURES / f"{name}.png"
        self.page.screenshot(path=path)
        print(f"picture: {path}")
