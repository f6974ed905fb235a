"""The page in Chromium: judging by keys alone, everything in sight at three sizes, and the whole loop to a trained model.

Pictures go to SCREENSHOTS, or nowhere where that is not set.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from preference_collection.exchange.importing import CONVERSATIONS
from preference_collection.tests.ollama_stand_in import Silence, ollama_stand_in
from preference_collection.tests_whole.chromium import (
    SCHEMES,
    SIZES,
    accessible,
    ask,
    faint,
    foreign_requests,
    open_chromium,
    overflow,
    press,
    press_with_control,
    show,
    text_of,
    unseen,
    wait_for,
    wait_until,
)
from preference_collection.tests_whole.serving import ROOT, Server, app, command

GOOD = """def ferry_pairs(weights, limit):
    waiting, crossings = sorted(weights), 0
    while waiting:
        if len(waiting) > 1 and waiting[0] + waiting[-1] <= limit:
            waiting.pop(0)
        waiting.pop()
        crossings += 1
    return crossings"""
WRONG = """def ferry_pairs(weights, limit):
    while len(weights) == 1:
        pass
    return (len(weights) + 1) // 2"""
TESTS = [
    {"args": [[60, 40], 100], "expected": 1},
    {"args": [[90, 80], 100], "expected": 2},
    {"args": [[90, 80, 70, 10], 100], "expected": 3},
]
# Nothing of it may act.
HOSTILE = (
    "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">\x1b[31m \u202e " + "x" * 50_000
)

SHOWN = "document.querySelector('main.comparison').dataset.comparison"
TESTED = "document.querySelector('main.comparison').dataset.polled !== 'yes'"
SAID = "document.getElementById('said').innerText"
BAR_ENDS = "document.querySelector('.foot').getBoundingClientRect().bottom"
# All that a judgment needs.
NEEDED = "#progress, h1, .answer h2, .tests .passed, .choices button, #said"


@pytest.fixture(scope="module")
def browser():
    driver = open_chromium()
    yield driver
    driver.quit()


@pytest.fixture(autouse=True)
def at_the_usual_size(browser):
    show(browser, 1280, 800, "light")


@pytest.fixture
def filled(tmp_path):
    """A store with a pair of solutions, and the sample of conversations."""
    rows = tmp_path / "rows.jsonl"
    row = {
        "title": "Ferry pairs",
        "description": "The **fewest** crossings.",
        "function_name": "ferry_pairs",
        "difficulty": "easy",
    }
    rows.write_text(json.dumps(row | {"tests": TESTS, "version1": GOOD, "version2": WRONG}) + "\n")
    for file in (rows, CONVERSATIONS):
        command("import", str(file), f"store={tmp_path / 'collection.duckdb'}")
    return tmp_path


def sign_in(browser, url: str, name: str = "Ada", password: str = "") -> None:
    """Sign in by keys alone: the name has the focus."""
    browser.delete_all_cookies()
    browser.get(url)
    press(browser, name, *[Keys.TAB, password] * bool(password), Keys.ENTER)
    wait_until(browser, "document.body.dataset.labeler || document.querySelector('.fault')")


def open_task(browser, url: str, title: str) -> None:
    """Open a task from the list."""
    browser.get(f"{url}/tasks")
    browser.find_element(By.LINK_TEXT, title).click()
    wait_until(browser, f"document.querySelector('h1').innerText.startsWith({json.dumps(title)}) && {TESTED}")
    wait_until(browser, "document.body.dataset.state === 'ready'")


def next_after(browser, *keys: str) -> None:
    """Press keys, and wait for another comparison."""
    before = ask(browser, SHOWN)
    press(browser, *keys)
    wait_until(browser, f"{SHOWN} !== {json.dumps(before)} && document.body.dataset.state === 'ready'")


def export(browser, url: str) -> None:
    """Export on the page."""
    browser.get(f"{url}/export")
    # Keys in the first moments of a page were meant for the one before, and do nothing.
    wait_until(browser, "performance.now() > 500")
    browser.find_element(By.CSS_SELECTOR, "[data-does=export]").send_keys(Keys.ENTER)
    wait_for(browser, "1 preference")


def photograph(browser, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def test_everything_that_a_pick_needs_is_in_the_window_at_all_sizes_in_both_color_schemes(browser, filled):
    with app(filled) as server:
        sign_in(browser, server.url)
        for title, name in (("Ferry pairs", "code"), ("Why the sky is blue", "text"), ("Two trains", "ranking")):
            open_task(browser, server.url, title)
            for width, height in SIZES:
                for colors in SCHEMES:
                    show(browser, width, height, colors)
                    where = f"{name} {width} {colors}"
                    assert overflow(browser) <= 0, where
                    assert unseen(browser, NEEDED) == [], where
                    assert abs(ask(browser, BAR_ENDS) - height) < 1, where
                    assert faint(browser) == [], where
                    photograph(browser, f"{name}-{width}-{colors}")
        assert foreign_requests(browser) == []


def test_other_pages_fit_and_contrast_too(browser, filled):
    with app(filled) as server:
        sign_in(browser, server.url)
        for page in ("tasks", "agreement", "progress", "export"):
            browser.get(f"{server.url}/{page}")
            for width, height in SIZES:
                for colors in SCHEMES:
                    show(browser, width, height, colors)
                    assert overflow(browser) <= 0 and faint(browser) == [], (page, width, colors)
            photograph(browser, page)


def test_pairs_and_rankings_are_judged_by_keys_alone(browser, filled):
    with app(filled, "guidelines=Prefer *correct* answers.") as server:
        sign_in(browser, server.url)
        open_task(browser, server.url, "Ferry pairs")
        pair = ask(browser, SHOWN)
        assert "3 of 3 passed" in text_of(browser) and "1 of 3 passed" in text_of(browser)
        press(browser, "?")
        wait_for(browser, "Prefer correct answers.")
        press(browser, Keys.ESCAPE)
        press(browser, "d")
        wait_until(browser, "document.querySelector('.differences .added') && document.querySelector('.differences .removed')")
        photograph(browser, "differences")
        press(browser, "d")
        # In a text field, a key is a letter.
        press(browser, "c")
        press(browser, "12=sbu", Keys.ENTER)
        assert ask(browser, SHOWN) == pair
        next_after(browser, "1")
        assert "left is better" in ask(browser, SAID)
        next_after(browser, "u")
        assert ask(browser, SHOWN) == pair and ask(browser, "document.getElementById('comment').value") == "12=sbu"
        for key in ("2", "=", "b", "s"):
            open_task(browser, server.url, "Ferry pairs")
            next_after(browser, key)
        open_task(browser, server.url, "Two trains")
        press(browser, "3", "1", "4")
        next_after(browser, "2")
        before = ask(browser, SHOWN)
        press(browser, "n")
        wait_until(browser, f"{SHOWN} !== {json.dumps(before)}")
        browser.get(f"{server.url}/progress")
        wait_for(browser, "Ada judged 2 comparisons")


def test_digits_choose_reasons_while_these_have_the_focus_and_judge_nothing(browser, filled):
    with app(filled) as server:
        sign_in(browser, server.url)
        open_task(browser, server.url, "Ferry pairs")
        pair = ask(browser, SHOWN)
        press(browser, "r", "1", "2", "2", "9", "0")
        assert ask(browser, SHOWN) == pair
        chosen = "[...document.querySelectorAll('.reason')].map((each) => each.getAttribute('aria-pressed') === 'true')"
        assert ask(browser, chosen)[:2] == [True, False] and not any(ask(browser, chosen)[1:])
        press(browser, Keys.ENTER)
        assert ask(browser, "document.activeElement.tagName") == "H1"
        # With Caps Lock, letters are capital.
        next_after(browser, "B")
        assert "both are bad" in ask(browser, SAID)


def test_a_better_answer_is_written_and_kept_with_the_judgment(browser, filled):
    text = "document.getElementById('edited').value"
    with app(filled) as server:
        sign_in(browser, server.url)
        open_task(browser, server.url, "Why the sky is blue")
        press(browser, "e", "1 In short: ")
        assert ask(browser, text) == "1 In short: "
        browser.find_element(By.CSS_SELECTOR, "[data-does=begin][data-number='1']").click()
        wait_until(browser, f"{text}.length > 50 && {text}.startsWith('1 In short: ')")
        press(browser, Keys.ESCAPE)
        # What is not judged yet outlives the page.
        browser.refresh()
        wait_until(browser, f"{text}.startsWith('1 In short: ') && document.body.dataset.state === 'ready'")
        press(browser, "e")
        press_with_control(browser, Keys.ENTER)
        wait_until(browser, "!document.querySelector('dialog.edit').open && document.activeElement.tagName !== 'TEXTAREA'")
        next_after(browser, "1")
        next_after(browser, "u")
        assert ask(browser, text).startswith("1 In short: ")
        next_after(browser, "1")
        export(browser, server.url)
    command("export", str(filled / "records.jsonl"), f"store={filled / 'collection.duckdb'}")
    assert "1 In short: " in (filled / "records.jsonl").read_text()


def test_a_screen_reader_finds_names_for_everything(browser, filled):
    with app(filled) as server:
        sign_in(browser, server.url)
        open_task(browser, server.url, "Ferry pairs")
        found = accessible(browser)
        for role, name in found:
            assert name or role not in ("button", "link", "textbox", "heading", "region", "navigation"), (role, name)
        roles = [role for role, _ in found]
        assert {"main", "navigation", "status", "banner"} <= set(roles)
        headings = [name for role, name in found if role == "heading"]
        assert headings[0].startswith("Ferry pairs") and len(headings) >= 3
        buttons = " ".join(name for role, name in found if role == "button")
        for word in ("left", "right", "tie", "both bad", "skip", "undo", "next", "guidelines"):
            assert word in buttons
        assert ask(browser, "document.activeElement.tagName") in ("H1", "BODY")
        next_after(browser, "1")
        assert ask(browser, "document.activeElement.tagName") == "H1", "the next task is what is read next"
        assert ask(browser, "document.getElementById('said').getAttribute('aria-live')") == "polite"


def test_hostile_answers_are_text(browser, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": f"Hello {HOSTILE}", "responses": [HOSTILE, f"```html\n{HOSTILE}\n```"]}) + "\n")
    command("import", str(rows), f"store={tmp_path / 'collection.duckdb'}")
    with app(tmp_path) as server:
        sign_in(browser, server.url)
        wait_until(browser, SHOWN)
        press(browser, "f")
        assert browser.title != "owned" and "<script>" in text_of(browser) and "U+202E" in text_of(browser)
        assert overflow(browser) <= 0
        assert ask(browser, "document.querySelectorAll('main img, main script').length") == 0
        assert foreign_requests(browser) == []


def test_a_judgment_survives_a_server_that_is_away(browser, filled):
    server = Server(filled)
    try:
        sign_in(browser, server.url)
        open_task(browser, server.url, "Ferry pairs")
        server.kill()
        press(browser, "1")
        wait_until(browser, f"{SAID}.includes('sent again') || {SAID}.includes('kept')")
        server.start()
        wait_until(browser, f"{SAID}.includes('Saved')")
        browser.get(f"{server.url}/progress")
        wait_for(browser, "Ada judged 1 comparison")
        server.stop()
    finally:
        server.kill()


def test_nothing_is_readable_before_the_password(browser, filled):
    with app(filled, COLLECT_PASSWORD="sesame") as server:
        sign_in(browser, server.url, password="open")
        wait_for(browser, "Wrong password.")
        assert "Ferry" not in browser.page_source and "sky" not in browser.page_source
        sign_in(browser, server.url, password="sesame")
        wait_until(browser, SHOWN)


# ---- the whole loop ---------------------------------------------------------------------------------------------------------


class Replies:
    """The first of two requests gets the right solution, the second the wrong one, each with a pause in the middle."""

    def __init__(self):
        self.count = 0

    def __call__(self, request):
        self.count += 1
        text = f"Here:\n```python\n{GOOD if self.count % 2 else WRONG}\n```"
        return [text[:30], Silence(), text[30:]]


@pytest.fixture(scope="module")
def stand_in():
    with ollama_stand_in({"tiny-coder:1b": Replies(), "chatty:1b": lambda _: ["I would rather not."]}) as server:
        yield server


def generate(browser, model: str) -> None:
    """Ask a model for answers, by keys."""
    press(browser, "g")
    wait_until(browser, "document.getElementById('model')")
    field = browser.find_element(By.ID, "model")
    field.clear()
    field.send_keys(model)
    browser.find_element(By.CSS_SELECTOR, "[data-does=start]").send_keys(Keys.ENTER)


def test_the_whole_loop_from_a_model_over_a_pick_to_a_trained_model(browser, stand_in, tmp_path):
    stand_in.go_on.clear()
    runs = tmp_path / "runs"
    with app(tmp_path, f"ollama_host={stand_in.url}", "slow_seconds=0.5", "max_tokens=24", f"checkpoints=[{runs}]") as server:
        sign_in(browser, server.url)
        open_task_without_answers(browser, server.url, "Ferry pairs")
        generate(browser, "tiny-coder:1b")
        wait_for(browser, "No output for ")
        stand_in.go_on.set()
        wait_for(browser, "6 of 6 passed")
        wait_until(browser, TESTED)
        next_after(browser, "1")
        export(browser, server.url)
        train(tmp_path, runs)
        open_task_without_answers(browser, server.url, "The longest rise of the tide")
        press(browser, "g")
        wait_until(browser, "document.getElementById('source')")
        browser.find_element(By.ID, "source").send_keys("checkpoints")
        wait_until(browser, "document.getElementById('model').value.includes('dpo/LATEST')")
        browser.find_element(By.CSS_SELECTOR, "[data-does=start]").send_keys(Keys.ENTER)
        # The model is too small to write code; only that it generates text is checked.
        wait_for(browser, "generate again")


def open_task_without_answers(browser, url: str, title: str) -> None:
    """Open a task that has no answers; the page offers to generate some."""
    browser.get(f"{url}/tasks")
    browser.find_element(By.LINK_TEXT, title).click()
    wait_until(browser, "document.querySelector('main.empty')")
    wait_until(browser, "document.body.dataset.state === 'ready'")
    press(browser, Keys.ESCAPE)


def train(folder: Path, runs: Path) -> None:
    """Train the tiny model with SFT and DPO on the export, like `make collect-train`, for a few steps."""
    line = [sys.executable, "scripts/collect_train.py", "--exported", "--directory", str(runs / "collect")]
    line += [f"collect.export={folder / 'export'}", f"local_dirs=[{folder}]", "wandb.enabled=false", "batch_size=1"]
    line += ["eval_batch_size=1", "sample_during_eval=false", "do_first_eval=false"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"Trained: {runs / 'collect' / 'dpo' / 'LATEST'}" in done.stdout


def test_an_unusable_reply_is_shown_and_can_be_generated_again(browser, stand_in, tmp_path):
    with app(tmp_path, f"ollama_host={stand_in.url}") as server:
        sign_in(browser, server.url)
        open_task_without_answers(browser, server.url, "Ferry pairs")
        generate(browser, "chatty:1b")
        for text in ("The reply contains no code.", "generate again", "keep anyway"):
            wait_for(browser, text)


def test_a_missing_model_shows_the_download_command_and_a_silent_one_can_be_stopped(browser, stand_in, tmp_path):
    stand_in.go_on.clear()
    with app(tmp_path, f"ollama_host={stand_in.url}") as server:
        sign_in(browser, server.url)
        open_task_without_answers(browser, server.url, "Ferry pairs")
        generate(browser, "absent:1b")
        wait_for(browser, "Ollama has no model 'absent:1b'. Download it with:")
        wait_for(browser, "ollama pull absent:1b")
        press(browser, "x")
        wait_until(browser, "!document.getElementById('writing').open")
        generate(browser, "tiny-coder:1b")
        wait_for(browser, "writing, 30 characters")
        press(browser, "x")
        wait_for(browser, "The reply was stopped.")
    stand_in.go_on.set()


def test_an_unreachable_server_is_reported_on_the_page(browser, tmp_path):
    with app(tmp_path, "ollama_host=http://127.0.0.1:9") as server:
        sign_in(browser, server.url)
        open_task_without_answers(browser, server.url, "Ferry pairs")
        press(browser, "g")
        wait_for(browser, "cannot be reached. Start it, or set its address (ollama_host).")
