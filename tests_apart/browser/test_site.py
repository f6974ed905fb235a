"""The site of docs/, opened from the disk: its search finds pages, and it asks no other host for anything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests_apart.browser.browser import asked_for, chromium, open_page, printed, show

ROOT = Path(__file__).parents[2]
SEARCHED = {"overfitting": "reading-the-curves.html", "load_in_4bit": "coming-from.html", "label_smoothing": "losses.html"}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, check=True)
    return folder


@pytest.mark.parametrize("width", [390, 1280])
def test_what_is_typed_into_search_is_found_from_the_disk(width, site):
    with chromium() as browser:
        show(browser, width)
        for word, page in SEARCHED.items():
            open_page(browser, site / "index.html")
            # A field on a desk, a button on a phone.
            search = browser.find_elements(By.CSS_SELECTOR, "input.md-search__input, header label[for=__search]")
            next(each for each in search if each.is_displayed()).click()
            browser.find_element(By.CSS_SELECTOR, "input.md-search__input").send_keys(word)
            WebDriverWait(browser, 30).until(lambda there: there.find_elements(By.CSS_SELECTOR, "a.md-search-result__link"))
            links = [each.get_attribute("href") for each in browser.find_elements(By.CSS_SELECTOR, "a.md-search-result__link")]
            assert any(f"/{page}" in link for link in links), f"{word}: {links}"
            assert {address.split(":")[0] for address in asked_for(browser)} <= {"file", "data", "about"}
            assert not printed(browser)
            # A result leads to its page.
            browser.get(next(link for link in links if f"/{page}" in link))
            assert browser.find_element(By.TAG_NAME, "h1").text
