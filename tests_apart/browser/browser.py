"""Chromium without a window, as tests and measurements of pages use it: sizes, light and dark, what it asked for and said.

Chromium and its driver come from the system (Debian: chromium, chromium-driver), selenium from
preference_collection/requirements-test.txt.
"""

import base64
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver

# Of a window, by its width. Unit: pixels.
HEIGHTS = {390: 844, 1280: 900, 1920: 1080}


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """A browser that keeps what pages print and ask for."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def show(browser, width: int, colours: str = "light", media: str = "") -> None:
    """Be a window of a width, light or dark; media: "print" shows the page as it is printed."""
    size = {"width": width, "height": HEIGHTS[width], "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": colours}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [feature]})


def open_page(browser, path: Path) -> dict[str, float]:
    """Open a file; returns when it was loaded and when it was first seen. Unit: seconds from the start."""
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(path.resolve().as_uri())
    return browser.execute_script(
        "const [page] = performance.getEntriesByType('navigation');"
        "const [seen] = performance.getEntriesByName('first-contentful-paint');"
        "return {loaded: page.loadEventEnd / 1000, seen: (seen ? seen.startTime : page.loadEventEnd) / 1000};"
    )


def printed(browser) -> list[str]:
    """What pages have said on the console since the last time, or the browser of them, from warnings upwards."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def asked_for(browser) -> list[str]:
    """The addresses that were asked for since the last time."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]


def photograph(browser, path: Path, whole: bool = True) -> None:
    """A picture of the whole page, or of what the window shows of it, as PNG."""
    sent = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": whole} | (
        {"clip": _whole(browser)} if whole else {}))  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(base64.b64decode(sent["data"]))


def _whole(browser) -> dict:
    size = browser.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    return {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}


def on_paper(browser, path: Path) -> None:
    """The page as PDF, A4 with its colours."""
    paper = {"paperWidth": 8.27, "paperHeight": 11.69, "printBackground": True}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", paper)["data"]))
