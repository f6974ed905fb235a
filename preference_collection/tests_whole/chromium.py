"""Chromium for tests: keys, sizes, color schemes, and what a person could see, read and reach on a page.

Chromium and its driver come from the system (Debian: chromium, chromium-driver).
"""

import json
import shutil

import pytest
from selenium import webdriver
from selenium.common.exceptions import JavascriptException, TimeoutException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

# Timeout of every wait; machines may be busy. Unit: seconds.
WAIT = 40
SIZES = ((390, 844), (1280, 800), (1920, 1080))
SCHEMES = ("light", "dark")

# Visible text whose contrast with its background is below 4.5 (3 for large text): [text, contrast].
FAINT = """
const numbers = (color) => {
  const mixed = color.match(/^color\\(srgb ([\\d.e-]+) ([\\d.e-]+) ([\\d.e-]+)(?: \\/ ([\\d.]+))?\\)/);
  if (mixed) return [mixed[1] * 255, mixed[2] * 255, mixed[3] * 255, Number(mixed[4] ?? 1)];
  const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number);
  return [r, g, b, a];
};
const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
const light = (color) => {
  const [r, g, b] = color.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const paper = numbers(getComputedStyle(document.body).backgroundColor);
const background = (element) => {
  const layers = [];
  for (let each = element; each; each = each.parentElement) layers.push(numbers(getComputedStyle(each).backgroundColor));
  return layers.reverse().reduce((below, layer) => over(layer, below), paper);
};
const opacity = (element) => {
  let share = 1;
  for (let each = element; each; each = each.parentElement) share *= Number(getComputedStyle(each).opacity);
  return share;
};
const faint = [];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const element = walk.currentNode.parentElement;
  const style = getComputedStyle(element);
  const text = walk.currentNode.textContent.trim();
  if (!text || element.closest(":disabled, template, script, .past, .unseen") || !element.checkVisibility()) continue;
  const below = background(element);
  const [r, g, b, a] = numbers(style.color);
  const [one, other] = [light(over([r, g, b, a * opacity(element)], below)), light(below)].sort((x, y) => y - x);
  const contrast = (one + 0.05) / (other + 0.05);
  const size = parseFloat(style.fontSize);
  const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
  if (contrast < (large ? 3 : 4.5)) faint.push([text.slice(0, 60), Math.round(contrast * 100) / 100]);
}
return faint;
"""
# Elements that are not inside the window, or covered there by something else: [what, rectangle].
UNSEEN = """
return [...document.querySelectorAll(arguments[0])].filter((each) => {
  const box = each.getBoundingClientRect();
  const [x, y] = [box.left + box.width / 2, box.top + Math.min(box.height, 30) / 2];
  const there = document.elementFromPoint(x, y);
  const inside = box.left >= 0 && box.right <= innerWidth && box.top >= 0 && box.top + Math.min(box.height, 30) <= innerHeight;
  return !(inside && there && (each.contains(there) || there.contains(each)));
}).map((each) => [each.outerHTML.slice(0, 120), JSON.stringify(each.getBoundingClientRect())]);
"""


def open_chromium() -> webdriver.Chrome:
    """A browser without a window that logs its requests."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))


def ask(browser, expression: str):
    """The value of an expression in the page."""
    return browser.execute_script(f"return {expression}")


def wait_until(browser, condition: str) -> None:
    """Wait until a condition holds in the page."""

    def holds(_) -> bool:
        try:
            return bool(ask(browser, condition))
        except JavascriptException:
            return False

    try:
        WebDriverWait(browser, WAIT, 0.05).until(holds)
    except TimeoutException:
        pytest.fail(f"not true: {condition}, of:\n{text_of(browser)}")


def text_of(browser) -> str:
    """The visible text of the page."""
    return ask(browser, "document.body.innerText")


def wait_for(browser, text: str) -> None:
    """Wait until the page shows a text."""
    wait_until(browser, f"document.body.innerText.includes({json.dumps(text)})")


def press(browser, *keys: str) -> None:
    """Press keys, wherever the focus is, once the page takes keys."""
    wait_until(browser, "document.body.dataset.state !== 'waiting'")
    ActionChains(browser, duration=0).send_keys(*keys).perform()


def press_with_control(browser, key: str) -> None:
    """Press a key while Ctrl is held."""
    ActionChains(browser, duration=0).key_down(Keys.CONTROL).send_keys(key).key_up(Keys.CONTROL).perform()


def show(browser, width: int, height: int, colors: str) -> None:
    """Give the window a size, and the page a color scheme."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"features": [{"name": "prefers-color-scheme", "value": colors}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
    wait_until(browser, f"innerWidth === {width} && matchMedia('(prefers-color-scheme: {colors})').matches")


def overflow(browser) -> int:
    """By how much the page is wider than the window. Unit: pixels."""
    return ask(browser, "document.documentElement.scrollWidth - innerWidth")


def unseen(browser, selector: str) -> list:
    """Elements of a selector that are outside the window, or covered."""
    return browser.execute_script(UNSEEN, selector)


def faint(browser) -> list:
    """Visible text with too little contrast."""
    return browser.execute_script(FAINT)


def foreign_requests(browser) -> list[str]:
    """Addresses on other machines that the browser has asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked, "the log of requests is empty"
    return [address for address in asked if not address.startswith(("http://localhost:", "data:"))]


def accessible(browser) -> list[tuple[str, str]]:
    """What a screen reader finds: (role, name) of each node that is not ignored."""
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    return [
        (node.get("role", {}).get("value", ""), node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]
    ]
