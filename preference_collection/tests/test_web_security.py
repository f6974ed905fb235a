"""What protects the page: hosts, origins, cookies, headers, keys; and that its look is that of the reports."""

import re
import stat
from pathlib import Path

import pytest

from preference_collection.tests.test_web import a_choice, client_of, filled, signed_in
from preference_collection.web.security import LONGEST_BODY, POLICY, is_local, session_key
from preference_training.core.errors import UserError

WEB = Path(__file__).parent.parent / "web"
REPORT = Path(__file__).parents[2] / "preference_training" / "reporting" / "pages" / "page.css"


@pytest.mark.parametrize(
    ("name", "local"),
    [("localhost", True), ("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("[::1]", True), ("app.localhost", True),
     ("evil.example", False), ("localhost.evil.example", False), ("0.0.0.0", False), ("10.0.0.1", False), ("", False)],
)  # fmt: skip
def test_only_names_of_this_machine_are_local(name, local):
    assert is_local(name) == local


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:8501", "", "10.0.0.1"])
def test_a_page_of_this_machine_answers_to_no_other_name(store, host):
    assert client_of(store).get("/", headers={"Host": host}).status_code == 400


@pytest.mark.parametrize("host", ["localhost", "localhost:8501", "127.0.0.1:1", "[::1]:8501"])
def test_a_page_of_this_machine_answers_to_its_names(store, host):
    assert client_of(store).get("/", headers={"Host": host}).status_code == 200


def test_a_page_for_other_machines_answers_to_any_name(store):
    assert client_of(store, address="0.0.0.0", password="x").get("/", headers={"Host": "labels.example"}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "", "http://localhost:1", "http://localhost.evil.example"])
def test_a_request_of_another_page_changes_nothing(store, origin):
    filled(store, "a")
    client = signed_in(store)
    for path in ("/api/judge", "/api/undo", "/sign-out", "/sign-in"):
        assert client.post(path, json=a_choice("pair-a"), headers={"Origin": origin}).status_code == 403
    assert not store.standing("pair-a") and client.get("/label").status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_form_cannot_judge(store, kind):
    filled(store, "a")
    answer = signed_in(store).post("/api/judge", content="{}", headers={"Content-Type": kind})
    assert answer.status_code == 415


def test_a_request_that_is_no_object_or_too_long_is_refused(store):
    client, kind = signed_in(store), {"Content-Type": "application/json"}
    for body in (b"", b"[]", b"{", b"\xff", b"[" * 100_000):
        assert client.post("/api/judge", content=body, headers=kind).status_code == 400
    assert client.post("/api/judge", content=b" " * (LONGEST_BODY + 1), headers=kind).status_code == 413
    assert client.post("/api/judge", content=iter([b"{}"]), headers=kind).status_code == 411


def test_the_cookie_is_for_this_page_only(store):
    answer = client_of(store).post("/sign-in", data={"name": "Ada"})
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie


def test_a_cookie_that_was_changed_signs_in_nobody(store):
    client = signed_in(store)
    cookie = client.cookies["labeler"]
    client.cookies.clear()
    client.cookies.set("labeler", ("A" if cookie[0] != "A" else "B") + cookie[1:])
    assert client.get("/label").status_code == 303


def test_the_key_of_sessions_is_kept_beside_the_store_for_its_owner(tmp_path):
    store = str(tmp_path / "a.duckdb")
    key = session_key(store, "")
    file = tmp_path / "a.duckdb.key"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and len(file.read_bytes()) == 32
    assert session_key(store, "") == key != session_key(store, "password")
    assert session_key("md:mine", "") != session_key("md:mine", "")
    file.write_bytes(b"short")
    with pytest.raises(UserError, match="has 5 bytes instead of 32"):
        session_key(store, "")


def test_the_policy_allows_nothing_inline_and_nothing_from_elsewhere():
    assert "unsafe" not in POLICY and "default-src 'none'" in POLICY and "http" not in POLICY
    for path in (WEB / "templates").glob("*.html"):
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! src=\"/static/)|javascript:|https?://", path.read_text()), (
            path
        )


def test_the_palette_is_that_of_the_reports():
    def palettes(path):
        text = path.read_text()
        return [re.findall(r"--[\w]+: [^;]+", block) for block in re.findall(r":root \{(.*?)\}", text, re.DOTALL)][:2]

    mine = palettes(WEB / "static" / "app.css")
    assert mine == palettes(REPORT) and len(mine) == 2 and len(mine[0]) == 13


def test_names_that_differ_in_capitals_only_are_one_person(store):
    filled(store, "a")
    ada = signed_in(store, "Ada")
    ada.post("/sign-out")
    ada.post("/sign-in", data={"name": "ADA"})
    ada.post("/api/judge", json=a_choice("pair-a"))
    again = client_of(store)
    assert '<option value="Ada">' in again.get("/").text
    again.post("/sign-in", data={"name": "ada"})
    assert 'data-labeler="Ada"' in again.get("/label").text and store.standing("pair-a")[0].labeler == "Ada"
    assert "Ada" not in client_of(store, password="x").get("/").text


def test_every_key_of_the_bar_is_shown_and_announced():
    text = (WEB / "templates" / "bar.html").read_text()
    keys = re.findall(r'press\("([^"]+)"', text)
    assert keys == ["Backspace", "Enter", "=", "b", "s", "u", "n", "c", "e", "?", "r", "d", "v", "f", "g"]
    texts = "".join(path.read_text() for path in (WEB / "templates").glob("*.html"))
    does = set(re.findall(r'data-does="([\w-]+)"', texts)) | set(re.findall(r'press\("[^"]+", "(\w+)"', texts))
    script = (WEB / "static" / "app.js").read_text()
    table = script[script.index("const does = {") :].partition("\n};")[0]
    for name in does:
        assert re.search(rf'^  "?{name}"?[:,]', table, re.MULTILINE), name
