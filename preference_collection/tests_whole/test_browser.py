"""The whole loop in a browser: generate, run tests, choose by key, undo, export, train, and use the trained model.

Chromium and its driver come from the system (Debian: chromium, chromium-driver). Screenshots at two widths, light and dark, go
to SCREENSHOTS, or nowhere where that is not set.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest
from selenium import webdriver
from selenium.common.exceptions import ElementClickInterceptedException, StaleElementReferenceException, TimeoutException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from preference_collection.tests.ollama_stand_in import Silence, ollama_stand_in

ROOT = Path(__file__).parent.parent.parent
# Timeout of every wait; machines may be busy. Unit: seconds.
WAIT = 180

GOOD = """Here:
```python
def ferry_pairs(weights, limit):
    waiting, crossings = sorted(weights), 0
    while waiting:
        if len(waiting) > 1 and waiting[0] + waiting[-1] <= limit:
            waiting.pop(0)
        waiting.pop()
        crossings += 1
    return crossings
```"""
WRONG = """```python
def ferry_pairs(weights, limit):
    while len(weights) == 1:
        pass
    return (len(weights) + 1) // 2
```"""


class Replies:
    """The first of two requests gets the right solution, the second the wrong one, each with a pause in the middle."""

    def __init__(self):
        self.count = 0

    def __call__(self, request):
        self.count += 1
        text = GOOD if self.count % 2 else WRONG
        return [text[:30], Silence(), text[30:]]


@pytest.fixture(scope="module")
def stand_in():
    with ollama_stand_in({"tiny-coder:1b": Replies(), "chatty:1b": lambda _: ["I would rather not."]}) as server:
        yield server


@contextmanager
def app(folder: Path, *overrides: str, **environment: str):
    """Serve the app; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "preference_collection", "serve", f"store={folder / 'collection.duckdb'}", f"port={port}"]
    command += [f"export={folder / 'export'}", *overrides]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, **environment})
        try:
            url = f"http://localhost:{port}"
            for _ in range(600):
                try:
                    urlopen(f"{url}/_stcore/health").read()
                    break
                except OSError:
                    assert process.poll() is None, (folder / "server.log").read_text()
                    time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            process.wait()
            said = (folder / "server.log").read_text()
            assert "Traceback" not in said, said


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900", "--disable-gpu"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def text_of(browser) -> str:
    return browser.execute_script("return document.body.innerText")


def wait_for(browser, text: str) -> None:
    try:
        WebDriverWait(browser, WAIT, 0.1).until(lambda _: text in text_of(browser))
    except TimeoutException:
        pytest.fail(f"no {text!r} in:\n{text_of(browser)}")


def wait_for_problem(browser, title: str) -> None:
    shown = "return document.querySelector('[data-testid=stMain] h3')?.innerText"
    WebDriverWait(browser, WAIT, 0.1).until(lambda _: browser.execute_script(shown) == title, title)
    settle(browser)


def press(browser, key: str) -> None:
    browser.find_element(By.TAG_NAME, "body").send_keys(key)


def settle(browser) -> None:
    """Wait until the page is drawn, that is, until the script is not running."""
    done = "return document.querySelector('[data-test-script-state]')?.getAttribute('data-test-script-state')"
    WebDriverWait(browser, WAIT, 0.1).until(lambda _: browser.execute_script(done) != "running")
    time.sleep(0.5)


def enter(browser, url: str, name: str = "Ada", password: str = "") -> None:
    browser.get(url)
    wait_for(browser, "Your name")
    fields = browser.find_elements(By.CSS_SELECTOR, "input")
    fields[0].send_keys(name)
    if password:
        fields[1].send_keys(password)
    fields[len(fields) - 1].send_keys(Keys.ENTER)


def show(browser, width: int, colors: str) -> None:
    browser.set_window_size(width, 1000 if width == 1280 else 1080)
    feature = {"features": [{"name": "prefers-color-scheme", "value": colors}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)


def overflow(browser) -> int:
    """The number of pixels by which the page is wider than the window."""
    return browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")


def photograph(browser, name: str) -> None:
    """Check and photograph both widths, light and dark: both solutions fit, and text contrasts with its background."""
    for width in (1280, 1920):
        for colors in ("light", "dark"):
            show(browser, width, colors)
            settle(browser)
            assert overflow(browser) <= 0
            left, right = (browser.find_element(By.CSS_SELECTOR, f".st-key-side_{side}").rect for side in ("left", "right"))
            assert left["width"] > 300 and left["x"] + left["width"] <= right["x"] + 1 and abs(left["y"] - right["y"]) < 2
            background = browser.execute_script(
                "return getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor")  # fmt: skip
            bright = sum(map(int, re.findall(r"\d+", background)[:3])) / 3
            assert bright > 200 if colors == "light" else bright < 80
            if folder := os.environ.get("SCREENSHOTS"):
                Path(folder).mkdir(parents=True, exist_ok=True)
                browser.save_screenshot(str(Path(folder) / f"{name}-{width}-{colors}.png"))
    show(browser, 1280, "light")


def test_the_whole_loop(browser, stand_in, tmp_path):
    stand_in.go_on.clear()
    runs = tmp_path / "runs"
    with app(tmp_path, f"ollama_host={stand_in.url}", "slow_seconds=0.5", "max_tokens=24", f"checkpoints=[{runs}]") as url:
        enter(browser, url)
        wait_for(browser, "Ferry pairs")
        wait_for(browser, "g · generate")
        choose(browser, "model-Ollama", "tiny-coder:1b")
        press(browser, "g")
        wait_for(browser, "No output for ")  # the silence is said
        assert "def ferry" in text_of(browser) or "```python" in text_of(browser), "both are seen as they come"
        stand_in.go_on.set()
        wait_for(browser, "6 of 6 passed")
        wait_for(browser, "✗ 6")
        wait_for(browser, "Failures")
        photograph(browser, "pair")
        click(browser, ".st-key-view button", "difference")
        wait_for(browser, "+++ right")
        assert re.search(r"[-+]    while len\(weights\) == 1:", text_of(browser))
        click(browser, ".st-key-view button", "side by side")
        # Choose left by key: the next problem opens. Undo returns to this one.
        press(browser, "1")
        wait_for_problem(browser, "The longest rise of the tide")
        assert "Your judgments: 1 of" in text_of(browser)
        press(browser, "u")
        wait_for_problem(browser, "Ferry pairs")
        assert "Your judgments: 0 of" in text_of(browser)
        wait_for(browser, "6 of 6 passed")
        press(browser, "n")
        wait_for_problem(browser, "The longest rise of the tide")
        open_problem(browser, "Ferry pairs")
        for key, said in (("=", "tie"), ("s", "skip"), ("2", "right")):
            press(browser, key)
            wait_for_problem(browser, "The longest rise of the tide")
            open_problem(browser, "Ferry pairs")
            wait_for(browser, f"Your choice: {said}")
            assert "Your judgments: 1 of" in text_of(browser)
        # In a text field, a key is a letter.
        field = browser.find_element(By.CSS_SELECTOR, "[class*='st-key-comment'] input")
        field.send_keys("12=su")
        assert "Your choice: right" in text_of(browser) and field.get_attribute("value") == "12=su"
        export(browser)
        train(tmp_path, runs)
        browser.refresh()
        enter(browser, url)
        wait_for(browser, "g · generate")
        choose(browser, "source", "checkpoints")
        model = "return document.querySelector('.st-key-model-checkpoints input')?.value"
        WebDriverWait(browser, WAIT, 0.1).until(lambda _: "dpo/LATEST" in (browser.execute_script(model) or ""))
        # The model is too small to write code; only that it generates text is checked.
        press(browser, "g")
        wait_for(browser, "Unusable: the reply")


def click(browser, selector: str, text: str = "") -> None:
    """Click the element with a selector and text, retrying if the page is redrawn meanwhile."""

    def clicked(_) -> bool:
        found = [element for element in browser.find_elements(By.CSS_SELECTOR, selector) if text in element.text]
        found[0].click()
        return True

    errors = (StaleElementReferenceException, ElementClickInterceptedException, IndexError)
    WebDriverWait(browser, WAIT, 0.1, errors).until(clicked, f"{selector} {text}")
    settle(browser)


def open_problem(browser, title: str) -> None:
    click(browser, "[data-testid=stSidebar] [role=radiogroup] label", title)
    wait_for_problem(browser, title)


def choose(browser, key: str, value: str) -> None:
    browser.find_element(By.CSS_SELECTOR, f".st-key-{key} input").send_keys(value, Keys.ENTER)
    settle(browser)


def export(browser) -> None:
    click(browser, "[data-testid=stSidebar] details summary", "Export")
    click(browser, ".st-key-export button")
    wait_for(browser, "1 preferences, 0 ties, 0 skips")


def train(folder: Path, runs: Path) -> None:
    """Train the tiny model with SFT and DPO on the export, like `make collect-train`, for a few steps."""
    command = [sys.executable, "scripts/collect_train.py", "--exported", "--directory", str(runs / "collect")]
    command += [f"collect.export={folder / 'export'}", f"local_dirs=[{folder}]", "wandb.enabled=false", "batch_size=1"]
    command += ["eval_batch_size=1", "sample_during_eval=false", "do_first_eval=false"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"Trained: {runs / 'collect' / 'dpo' / 'LATEST'}" in done.stdout


def test_an_unusable_reply_is_shown_and_can_be_generated_again(browser, stand_in, tmp_path):
    with app(tmp_path, f"ollama_host={stand_in.url}") as url:
        enter(browser, url)
        wait_for(browser, "g · generate")
        choose(browser, "model-Ollama", "chatty:1b")
        press(browser, "g")
        # Buttons are drawn after the text, which may be read in between.
        for text in ("Unusable: the reply contains no code.", "Generate again", "Keep anyway"):
            wait_for(browser, text)


def test_a_missing_model_shows_the_download_command_and_a_silent_one_can_be_stopped(browser, stand_in, tmp_path):
    stand_in.go_on.clear()
    with app(tmp_path, f"ollama_host={stand_in.url}") as url:
        enter(browser, url)
        wait_for(browser, "g · generate")
        choose(browser, "model-Ollama", "absent:1b")
        press(browser, "g")
        wait_for(browser, "Ollama has no model 'absent:1b'. Download it with:")
        wait_for(browser, "ollama pull absent:1b")
        click(browser, ".st-key-discard button")
        choose(browser, "model-Ollama", "tiny-coder:1b")
        press(browser, "g")
        wait_for(browser, "writing, 30 characters")
        click(browser, ".st-key-stop button")
        wait_for(browser, "Unusable: the reply was stopped.")


def test_an_unreachable_server_is_reported_on_the_page(browser, tmp_path):
    with app(tmp_path, "ollama_host=http://127.0.0.1:9") as url:
        enter(browser, url)
        wait_for(browser, "cannot be reached. Start it, or set its address.")


def test_nothing_is_readable_before_the_password(browser, stand_in, tmp_path):
    with app(tmp_path, f"ollama_host={stand_in.url}", COLLECT_PASSWORD="sesame") as url:
        enter(browser, url, password="open")
        wait_for(browser, "Wrong password.")
        source = browser.page_source
        assert "Ferry" not in source and "tiny-coder" not in source
        enter(browser, url, password="sesame")
        wait_for(browser, "Ferry pairs")
