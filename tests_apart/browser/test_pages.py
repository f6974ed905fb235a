"""report.html, of a run and of a loop of rounds, comparison.html and data_report.html in Chromium: on a phone, a desk and a
wide screen, light and dark, by keyboard, on paper.

What a person has to judge, pictures of every page, goes to SCREENSHOTS, or nowhere where that is not set. RUNS is a folder in
which the runs are kept for the next time.
"""

import os
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from preference_training.reporting.comparison import write_comparison
from preference_training.reporting.loops.page import write_loop_report
from preference_training.reporting.run_report import write_report
from tests.reporting.loops.made_up import POLICIES, made_up_loop
from tests_apart.browser.browser import HEIGHTS, asked_for, chromium, on_paper, open_page, photograph, printed, show
from tests_apart.browser.example_runs import data_report, long_run, many_runs, short_runs

PAGES = ("sft", "dpo", "beta_dpo", "long", "begun", "comparison", "many", "data", "loop", "long_loop")
# Fifteen rounds, which improve slowly.
LONG = [(0.2 + 0.02 * k, 0.5 + 0.02 * k if k else None, 20.0 + 5 * k, 3.0 * k) for k in range(16)]
# Of what is written and of what is drawn on what is behind it (WCAG 2.2, level AA).
WRITTEN, DRAWN = 4.5, 3.0


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """The pages by their names."""
    folder = Path(os.environ.get("RUNS") or tmp_path_factory.mktemp("runs"))
    runs = short_runs(folder)
    found = {name: write_report(run) for name, run in runs.items() if name != "sweep"}
    found["comparison"], _ = write_comparison([runs["sweep"]], runs["sweep"])
    found["many"], _ = write_comparison([many_runs(folder / "many")], folder / "many")
    found["data"] = data_report(folder / "data")
    # Written anew: its tables are small.
    for name, policies in (("loop", POLICIES), ("long_loop", LONG)):
        shutil.rmtree(folder / name, ignore_errors=True)
        found[name] = write_loop_report(made_up_loop(folder / name, policies))
    found["long"] = write_report(long_run(folder / "long"))
    (folder / "begun").mkdir(exist_ok=True)
    (folder / "begun" / "metrics.jsonl").touch()
    found["begun"] = write_report(folder / "begun")
    return found


@pytest.fixture(scope="module")
def browser():
    with chromium() as driver:
        yield driver


def kept(name: str) -> Path | None:
    """Where a picture is kept."""
    folder = os.environ.get("SCREENSHOTS")
    return Path(folder) / name if folder else None


# Texts that are not to be seen in whole, by what they say: cut by a box, behind the edge of the window, or over one another in
# a chart. Tables that are wider than the window are moved within their own boxes.
UNREADABLE = """
const found = [];
const edge = document.documentElement.clientWidth;
const walker = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const text = walker.currentNode, holder = text.parentElement;
  if (!text.data.trim() || holder.closest("script") || holder.closest(".wide")) continue;
  if (!holder.checkVisibility({visibilityProperty: true})) continue;
  const range = document.createRange();
  range.selectNodeContents(text);
  for (const box of range.getClientRects())
    if (box.width && (box.left < -0.5 || box.right > edge + 0.5)) found.push(`behind the edge: ${text.data}`);
}
for (const box of document.querySelectorAll("main *")) {
  const style = getComputedStyle(box);
  if (box.closest("svg") || style.overflowX === "visible" || box.matches(".wide")) continue;
  if (box.clientWidth && box.scrollWidth > box.clientWidth + 1) found.push(`cut: ${box.textContent}`);
}
for (const plot of document.querySelectorAll(".plot")) {
  const labels = [...plot.querySelectorAll(":scope > span")].filter((label) => label.checkVisibility());
  const boxes = labels.map((label) => label.getBoundingClientRect());
  boxes.forEach((one, k) => boxes.slice(k + 1).forEach((other, n) => {
    if (one.left < other.right && other.left < one.right && one.top < other.bottom && other.top < one.bottom)
      found.push(`over one another: ${labels[k].textContent} and ${labels[k + 1 + n].textContent}`);
  }));
}
return found;
"""


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_readable_at_every_width_and_asks_nobody_for_anything(browser, pages, name):
    for width in HEIGHTS:
        for colours in ("light", "dark"):
            show(browser, width, colours)
            times = open_page(browser, pages[name])
            print(f"{name} {width} {colours}: loaded after {times['loaded']:.2f} s, seen after {times['seen']:.2f} s")
            if picture := kept(f"{name}-{width}-{colours}.png"):
                photograph(browser, picture.with_stem(f"{picture.stem}-top"), whole=False)
            for details in browser.find_elements(By.CSS_SELECTOR, ".chart:first-child details, details.printed"):
                browser.execute_script("arguments[0].open = true", details)
            if picture:
                photograph(browser, picture)
            assert browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth") <= 0
            assert browser.execute_script(UNREADABLE) == []
            assert printed(browser) == []
            assert [address for address in asked_for(browser) if not address.startswith("data:")] == [pages[name].as_uri()]
            assert bright(background(browser)) is (colours == "light")
    if picture := kept(f"{name}.html"):
        shutil.copy(pages[name], picture)


def background(browser) -> str:
    return browser.execute_script("return getComputedStyle(document.body).backgroundColor")


def bright(colour: str) -> bool:
    return luminance(tuple(int(each) for each in re.findall(r"\d+", colour)[:3])) > 0.5


# ---- contrast ---------------------------------------------------------------------------------------------------------------


def luminance(colour: tuple[int, ...]) -> float:
    """The relative luminance of an sRGB colour of three bytes, as WCAG defines it."""
    parts = [part / 255 for part in colour]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """The contrast of two colours like #fff or #0064a4, from 1 to 21."""
    color_bytes = lambda text: bytes.fromhex(text[1:] if len(text) == 7 else "".join(2 * digit for digit in text[1:]))  # noqa: E731
    darker, lighter = sorted(luminance(tuple(color_bytes(colour))) for colour in (one, other))
    return (lighter + 0.05) / (darker + 0.05)


def test_black_on_white_has_the_largest_contrast_there_is():
    assert contrast("#000", "#ffffff") == pytest.approx(21) and contrast("#777", "#777777") == 1


@pytest.mark.parametrize("colours", ["light", "dark", "print"])
def test_what_is_written_and_drawn_stands_out_from_what_is_behind_it(browser, pages, colours):
    show(browser, 1280, "light" if colours == "print" else colours, "print" if colours == "print" else "")
    open_page(browser, pages["dpo"])
    value = lambda name: browser.execute_script(  # noqa: E731
        "return getComputedStyle(document.documentElement).getPropertyValue(arguments[0]).trim()", f"--{name}")  # fmt: skip
    for text in ("ink", "quiet"):
        for behind in ("paper", "box", "marked", "wrong"):
            assert contrast(value(text), value(behind)) >= WRITTEN, (text, behind)
    for line in range(6):
        assert contrast(value(f"c{line}"), value("paper")) >= DRAWN, line


# ---- keys and pointer -------------------------------------------------------------------------------------------------------


def readout(browser, number: int = 0) -> str:
    return browser.find_elements(By.CSS_SELECTOR, ".chart .readout")[number].text


def test_tab_reaches_what_can_be_used_from_top_to_bottom(browser, pages):
    for name in ("dpo", "comparison"):
        show(browser, 1280)
        open_page(browser, pages[name])
        wanted = browser.execute_script(
            "window.stops = [...document.querySelectorAll('main :is(a[href], .plot, summary, .wide)')]"
            "  .filter((each) => each.checkVisibility());"
            "return window.stops.length"
        )
        reached = []
        for _ in range(wanted):
            ActionChains(browser).send_keys(Keys.TAB).perform()
            reached.append(browser.execute_script("return window.stops.indexOf(document.activeElement)"))
        assert reached == list(range(wanted)), name
        focused = browser.execute_script(
            "document.querySelector('.plot').focus({focusVisible: true});"
            "return getComputedStyle(document.activeElement).outlineStyle"
        )
        assert focused == "solid", "what has the focus is marked"


def test_everything_that_can_be_reached_has_a_name(browser, pages):
    show(browser, 1280)
    for name in ("dpo", "comparison"):
        open_page(browser, pages[name])
        nameless = browser.execute_script(
            "return [...document.querySelectorAll('[tabindex]')].filter((each) => !each.ariaLabel || !each.role).length"
        )
        assert nameless == 0


def test_arrow_keys_move_along_a_chart_and_say_its_values(browser, pages):
    show(browser, 1280)
    open_page(browser, pages["long"])
    plot = browser.find_element(By.CSS_SELECTOR, ".plot")
    assert readout(browser) == ""
    plot.send_keys(Keys.HOME)
    first = readout(browser)
    plot.send_keys(Keys.ARROW_RIGHT)
    second = readout(browser)
    plot.send_keys(Keys.ARROW_LEFT)
    assert readout(browser) == first != second
    plot.send_keys(Keys.END)
    assert readout(browser).startswith("examples 6,400,000")
    assert re.search(r"held out\s+0\.\d+", readout(browser))
    plot.send_keys(Keys.ESCAPE)
    assert readout(browser) == ""


def test_the_pointer_shows_the_values_under_it_and_takes_them_along(browser, pages):
    for width in HEIGHTS:
        show(browser, width)
        open_page(browser, pages["dpo"])
        for number, plot in enumerate(browser.find_elements(By.CSS_SELECTOR, ".plot")):
            browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
            for share in (-0.45, 0.0, 0.45):
                ActionChains(browser).move_to_element_with_offset(plot, int(share * plot.size["width"]), 0).perform()
                assert re.search(r"examples[\s\S]*\d", readout(browser, number))
                assert browser.execute_script(UNREADABLE) == []
            if number == 1 and (picture := kept(f"pointer-{width}.png")):
                photograph(browser, picture, whole=False)
        ActionChains(browser).move_to_element(browser.find_element(By.CSS_SELECTOR, "h1")).perform()
        assert readout(browser) == ""


def test_of_many_lines_those_nearest_to_the_pointer_are_read(browser, pages):
    show(browser, 1280)
    open_page(browser, pages["many"])
    number = next(k for k, each in enumerate(browser.find_elements(By.CSS_SELECTOR, ".chart")) if "Held-out loss" in each.text)
    plot = browser.find_elements(By.CSS_SELECTOR, ".plot")[number]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    ActionChains(browser).move_to_element(plot).perform()
    lines = readout(browser, number).splitlines()
    assert len(lines) == 10 and lines[-1] == "and 12 more lines"
    values = [float(re.search(r"=[\d.]+ ([\d.]+)", line)[1]) for line in lines[1:-1]]
    assert values == sorted(values, reverse=True)
    assert browser.execute_script(UNREADABLE) == []


# ---- links ------------------------------------------------------------------------------------------------------------------


def test_links_lead_to_files_that_are_there(browser, pages):
    show(browser, 1280)
    for name in ("dpo", "comparison"):
        open_page(browser, pages[name])
        links = [link.get_attribute("href") for link in browser.find_elements(By.CSS_SELECTOR, "main a")]
        assert any(not link.partition("#")[2] for link in links)
        for link in links:
            path, _, section = link.removeprefix("file://").partition("#")
            assert Path(unquote(path)).is_file(), link
            assert not section or browser.find_elements(By.ID, section), link
    browser.find_element(By.CSS_SELECTOR, "table a").click()
    assert browser.find_element(By.TAG_NAME, "h1").text == browser.title, "the report of the first run"


# ---- paper ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_on_paper_it_is_dark_on_white_and_nothing_is_closed_or_cut(browser, pages, name, tmp_path):
    show(browser, 1280, "dark", "print")
    open_page(browser, pages[name])
    assert background(browser) == "rgb(255, 255, 255)"
    if picture := kept(f"{name}-print.png"):
        photograph(browser, picture)
    show(browser, 1280, "dark")
    paper = kept(f"{name}.pdf") or tmp_path / "page.pdf"
    on_paper(browser, paper)
    assert paper.read_bytes().startswith(b"%PDF")
    assert browser.execute_script("return [...document.querySelectorAll('details.printed')].every((each) => each.open)")
