"""The page over HTTP: sign-in, judging, undoing, passing on, tests, and what hostile answers may not do."""

import json
import re
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from types import SimpleNamespace
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from preference_collection.generation.sources import sources_of
from preference_collection.running import TestRun
from preference_collection.settings import load_settings
from preference_collection.store.model import Comparison, Judgment, Task, Verdict, new_id, shown_order
from preference_collection.store.queue import Queue
from preference_collection.store.store import open_store
from preference_collection.tests.conftest import a_comparison, a_task
from preference_collection.web import server
from preference_collection.web.security import HEADERS
from preference_collection.web.server import build_app
from preference_collection.web.shared import Shared

ORIGIN = {"Origin": "http://localhost"}
SENT = {"Content-Type": "application/json"}


@dataclass
class Runs:
    """In place of the runner of tests: what it has of each answer, by the answer's text."""

    known: dict[str, TestRun]

    def start_tests(self, answer, _task):
        return self.known.get(answer.text)


def client_of(store, password="", runs=None, **changed) -> TestClient:
    """A browser at the page of a store."""
    overrides = [f"{key}={value}" for key, value in changed.items()]
    loaded = load_settings([f"store={store.address}", *overrides])
    queue = Queue(store, loaded.overlap, loaded.order, loaded.lease_minutes * 60)
    shared = Shared(loaded, store, queue, Runs(runs or {}), sources_of(loaded), password)
    client = TestClient(build_app(shared), "http://localhost", follow_redirects=False, headers=ORIGIN)
    client.shared = shared
    return client


def signed_in(store, name="Ada", **more) -> TestClient:
    client = client_of(store, **more)
    assert client.post("/sign-in", data={"name": name}).headers["location"] == "/label"
    return client


def filled(store, *ids: str, texts=("one", "two")):
    """A store with a task and its comparison for each id."""
    store.add_tasks([a_task(id) for id in ids])
    store.add_comparisons([a_comparison(id, texts, id=f"pair-{id}") for id in ids])


def a_choice(of: str, name="Ada", n=2, **changed) -> dict:
    """What the page sends when the answer shown first is picked."""
    order = shown_order(name, of, n)
    ranks = [1 if index == order[0] else 2 for index in range(n)]
    values = {"id": new_id(), "labeler": name, "comparison": of, "choice": "ranked", "order": list(order), "ranks": ranks}
    return values | {"seconds": 2.5} | changed


def shown_in(page: str) -> str | None:
    found = re.search(r'data-comparison="([^"]*)"', page)
    return found and found[1]


# ---- sign-in ----------------------------------------------------------------------------------------------------------------


PAGES = ("/label", "/label/pair-a", "/task/a", "/tasks", "/export", "/agreement", "/progress", "/text/pair-a/0", "/nowhere")


@pytest.mark.parametrize("path", PAGES)
def test_nothing_is_read_before_sign_in(store, path):
    filled(store, "a")
    answer = client_of(store).get(path)
    assert (answer.status_code, answer.headers["location"], answer.text) == (303, "/", "")


@pytest.mark.parametrize("path", ["/api/judge", "/api/undo", "/api/next", "/api/export", "/api/generate"])
def test_nothing_is_done_before_sign_in(store, path):
    filled(store, "a")
    assert client_of(store).post(path, json=a_choice("pair-a")).status_code == 401
    assert not store.standing("pair-a")


def test_a_name_signs_in_and_signing_out_forgets_it(store):
    client = client_of(store)
    assert "Your name" in client.get("/").text
    assert "Please enter your name." in client.post("/sign-in", data={"name": " \t"}).text
    assert client.post("/sign-in", data={"name": "  Ada \x1b[31m  Lovelace "}).status_code == 303
    assert "Ada [31m Lovelace" in client.get("/label").text
    assert client.get("/").headers["location"] == "/label"
    client.post("/sign-out")
    assert client.get("/label").headers["location"] == "/"


def test_a_title_that_is_the_beginning_of_the_prompt_is_seen_once(store):
    titles = {"a": "Add two…", "b": "Another"}
    store.add_tasks([a_task(id, title=title, prompt="Add  two numbers.", difficulty="") for id, title in titles.items()])
    store.add_comparisons([a_comparison(id, id=f"pair-{id}") for id in titles])
    pages = [signed_in(store).get(f"/label/pair-{id}").text for id in titles]
    assert ['tabindex="-1" class="unseen">' in page for page in pages] == [True, False]


def test_the_password_is_asked_for_and_a_wrong_one_waits(store, monkeypatch):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr(server, "sleep", sleep)
    client = client_of(store, password="sésame")
    assert 'type="password"' in client.get("/").text
    for wrong in ("", "sesame", "sésame "):
        answer = client.post("/sign-in", data={"name": "Ada", "password": wrong})
        assert answer.status_code == 403 and "Wrong password." in answer.text
    assert waits == [1.0, 1.0, 1.0]
    assert client.post("/sign-in", data={"name": "Ada", "password": "sésame"}).status_code == 303
    assert len(waits) == 3


def test_a_restart_signs_nobody_out_and_another_password_does(store):
    client = client_of(store, password="one")
    client.post("/sign-in", data={"name": "Ada", "password": "one"})
    cookies = dict(client.cookies)
    again, other = client_of(store, password="one"), client_of(store, password="two")
    again.cookies.update(cookies)
    other.cookies.update(cookies)
    assert (again.get("/label").status_code, other.get("/label").status_code) == (200, 303)


# ---- labeling ---------------------------------------------------------------------------------------------------------------


def test_a_judgment_is_saved_and_the_next_comparison_comes_with_the_answer(store):
    filled(store, "a", "b")
    client = signed_in(store)
    page = client.get("/label").text
    assert shown_in(page) == "pair-a" and "0 judged by you · up to 2 left" in page
    sent = a_choice("pair-a", reasons=["faster"], comment="good", edited="better", edited_from=1)
    answer = client.post("/api/judge", json=sent).json()
    assert answer["saved"] and shown_in(answer["next"]["html"]) == answer["next"]["id"] == "pair-b"
    assert answer["progress"] == "1 judged by you · up to 1 left"
    [judgment] = store.standing("pair-a")
    assert (judgment.labeler, judgment.choice, judgment.ranks) == ("Ada", "ranked", tuple(sent["ranks"]))
    assert (judgment.order, judgment.seconds) == (tuple(sent["order"]), 2.5)
    assert (judgment.reasons, judgment.comment, judgment.edited, judgment.edited_from) == (("faster",), "good", "better", 1)


@pytest.mark.parametrize("choice", ["tie", "bad", "skip"])
def test_choices_without_ranks_are_saved_with_the_better_answer(store, choice):
    filled(store, "a")
    client = signed_in(store)
    answer = client.post("/api/judge", json=a_choice("pair-a", choice=choice, ranks=[], edited="mine")).json()
    assert [(judgment.choice, judgment.edited) for judgment in store.standing("pair-a")] == [(choice, "mine")]
    assert answer["next"]["id"] == "" and "Nothing left to judge" in answer["next"]["html"]


def test_a_judgment_that_is_sent_twice_counts_once_and_both_times_the_next_comes(store):
    filled(store, "a", "b")
    client = signed_in(store)
    sent = a_choice("pair-a")
    answers = [client.post("/api/judge", json=sent).json() for _ in range(2)]
    assert [answer["next"]["id"] for answer in answers] == ["pair-b", "pair-b"]
    assert len(list(store.judgments())) == 1


def test_five_answers_are_ranked(store):
    filled(store, "a", texts=tuple("abcde"))
    client = signed_in(store)
    page = client.get("/label").text
    assert page.count('data-does="pick"') == 5 and "all bad" in page
    sent = a_choice("pair-a", n=5, ranks=[2, 1, 3, 5, 4])
    assert client.post("/api/judge", json=sent).json()["saved"]
    assert store.standing("pair-a")[0].ranks == (2, 1, 3, 5, 4)


def test_next_leaves_a_comparison_unjudged(store):
    filled(store, "a", "b")
    client = signed_in(store)
    answer = client.post("/api/next", json={"comparison": "pair-a"}).json()
    assert answer["next"]["id"] == "pair-b" and answer["next"]["progress"] == "0 judged by you · up to 2 left"


def test_a_judged_comparison_says_so_and_judging_again_replaces(store):
    filled(store, "a")
    client = signed_in(store)
    client.post("/api/judge", json=a_choice("pair-a", choice="tie", ranks=[]))
    assert "You judged: a tie. Judging again replaces it." in client.get("/label/pair-a").text
    client.post("/api/judge", json=a_choice("pair-a"))
    assert [judgment.choice for judgment in store.standing("pair-a")] == ["ranked"]


def test_verdicts_of_models_are_told_after_the_judgment_and_never_before(store):
    filled(store, "a", "b")
    order = shown_order("Ada", "pair-a", 2)
    ranks = tuple(1 if index == order[1] else 2 for index in range(2))
    reason = f"{{answer {order[1]}}} is short, {{answer {order[0]}}} is not"
    store.add_verdicts([Verdict("pair-a", "judge-9", ranks, reason, {})])
    client = signed_in(store)
    before = client.get("/label").text + client.get("/label/pair-a").text + client.get("/tasks").text
    assert "judge-9" not in before and "is short" not in before
    [verdict] = client.post("/api/judge", json=a_choice("pair-a")).json()["verdicts"]
    assert verdict == {
        "judge": "judge-9",
        "words": "answer 2 is better",
        "number": 2,
        "reason": "answer 2 is short, answer 1 is not",
    }


@pytest.mark.parametrize(
    "changed",
    [
        {"choice": "best"}, {"order": [0]}, {"order": [0, 0]}, {"order": "01"}, {"ranks": [1, 1]}, {"ranks": [1, True]},
        {"ranks": []}, {"seconds": -1}, {"seconds": "2"}, {"comparison": "none"}, {"id": ""}, {"id": "x" * 65},
        {"reasons": "faster"}, {"reasons": [1]}, {"comment": 3}, {"edited_from": 7, "edited": "x"}, {"edited_from": "0"},
    ],
)  # fmt: skip
def test_an_invalid_judgment_is_refused(store, changed):
    filled(store, "a")
    answer = signed_in(store).post("/api/judge", json=a_choice("pair-a", **changed))
    assert answer.status_code == 400 and answer.json()["error"].startswith("Invalid request: ")
    assert not store.standing("pair-a")


def test_a_tab_of_another_labeler_judges_nothing(store):
    filled(store, "a")
    client = signed_in(store, "Bob")
    answer = client.post("/api/judge", json=a_choice("pair-a"))
    assert answer.status_code == 409 and "signed in as Bob now" in answer.json()["error"]
    assert not store.standing("pair-a")


def test_a_read_only_store_is_viewed_and_not_judged(store):
    filled(store, "a")
    store.close()
    reading = open_store(store.address, read_only=True)
    client = signed_in(reading)
    assert client.get("/label").text.count(" disabled") > 5
    answer = client.post("/api/judge", json=a_choice("pair-a"))
    assert answer.status_code == 409 and "open read-only" in answer.json()["error"]
    reading.close()


def test_two_labelers_get_different_comparisons_and_signing_out_frees_one(store):
    filled(store, "a", "b")
    ada, bob = signed_in(store), signed_in(store, "Bob")
    bob.shared.queue = ada.shared.queue
    assert [shown_in(client.get("/label").text) for client in (ada, bob)] == ["pair-a", "pair-b"]
    assert shown_in(ada.get("/label").text) == "pair-a"
    ada.post("/sign-out")
    assert bob.post("/api/next", json={"comparison": "pair-b"}).json()["next"]["id"] == "pair-a"


def test_differences_are_of_the_answers_in_the_order_shown(store):
    filled(store, "a", texts=("x = 1", "x = 2"))
    client = signed_in(store)
    html = client.get("/api/differences/pair-a").json()["html"]
    first, second = (("x = 1", "x = 2")[index] for index in shown_order("Ada", "pair-a", 2))
    assert f"removed line: </span>{first}" in html and f"added line: </span>{second}" in html
    assert "From left to right" in html


def test_what_comes_next_is_read_before_it_is_asked_for(store, monkeypatch):
    filled(store, "a", "b", "c")
    client = signed_in(store)
    client.shared.ahead = SimpleNamespace(seen=lambda _: None, status=lambda: "")
    assert shown_in(client.get("/label").text) == "pair-a"
    client.shared.close()  # waits for what was begun
    monkeypatch.setattr(type(store), "comparison", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(type(store), "task", lambda *_: pytest.fail("read again"))
    client.shared.ahead = None
    assert client.post("/api/judge", json=a_choice("pair-a")).json()["next"]["id"] == "pair-b"


def test_who_has_nothing_left_is_told_what_comes(store):
    store.add_tasks([a_task("a")])
    client = signed_in(store)
    assert "Nothing to judge yet" in client.get("/label").text and "Press g" in client.get("/label").text
    client = signed_in(store, generator="ollama:tiny")
    client.shared.ahead = SimpleNamespace(seen=lambda _: None, status=lambda: "Ollama is away.")
    page = client.get("/label").text
    assert "data-waits" in page and "ollama:tiny is asked for more answers." in page and "Ollama is away." in page
    store.add_comparisons([a_comparison("a", id="pair-a")])
    client.shared.queue.added(["pair-a"])
    assert client.post("/api/next", json={"comparison": ""}).json()["next"]["id"] == "pair-a"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda one: st.lists(one, max_size=3), max_leaves=4
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    changed=st.dictionaries(
        st.sampled_from(sorted([*a_choice("pair-a"), "reasons", "edited", "edited_from"])), JSON, min_size=1
    )
)
def test_whatever_is_sent_is_refused_or_is_a_judgment(store, changed):
    if store.task("a") is None:
        filled(store, "a")
    before = len(list(store.judgments()))
    answer = signed_in(store).post("/api/judge", content=json.dumps(a_choice("pair-a") | changed), headers=SENT)
    kept = list(store.judgments())
    assert answer.status_code in (200, 400, 409)
    assert len(kept) == (1 if answer.status_code == 200 else before)
    assert all(each.judgment.labeler == "Ada" and each.comparison.id == "pair-a" for each in kept)


# ---- tests of code ----------------------------------------------------------------------------------------------------------


def result(status: str, **more) -> dict:
    return {"status": status, "call": "add(1, 2)", "got": "4", "expected": "3", "message": "", **more}


def test_badges_show_running_tests_and_are_asked_for_until_they_are_over(store):
    filled(store, "a")
    running = TestRun(2, [result("passed")], False)
    client = signed_in(store, runs={"one": running, "two": TestRun(2, [result("failed"), result("passed")], True)})
    assert 'data-polled="yes"' in client.get("/label").text
    state = client.get("/api/tests/pair-a").json()
    first = shown_order("Ada", "pair-a", 2).index(0)
    assert not state["over"] and "testing… 1 of 2 done" in state["tests"][first] and "passed<" not in state["tests"][first]
    assert "got 4, expected 3" in state["tests"][1 - first]
    running.results.append(result("passed"))
    running.over = True
    state = client.get("/api/tests/pair-a").json()
    assert state["over"] and "2 of 2" in state["tests"][first] and "…" not in state["tests"][first]


# ---- hostile text -----------------------------------------------------------------------------------------------------------


class Seen(HTMLParser):
    """What a browser would find in a page."""

    def __init__(self):
        super().__init__()
        self.scripts, self.attributes, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attributes]
        if tag == "script":
            self.scripts.append(dict(attributes).get("src"))


HOSTILE = "</template></script><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[31m\u202e<!-- \" ' onfocus=x {{ 7*7 }}"


def test_hostile_text_anywhere_is_text(store):
    evil = result("failed", call=HOSTILE, got=HOSTILE, expected=HOSTILE)
    task = Task(HOSTILE, HOSTILE, HOSTILE, HOSTILE, "", ({"args": [HOSTILE], "expected": HOSTILE},), "code")
    chat = Task("chat", "Chat", "", (("system", HOSTILE), ("user", HOSTILE)), kind="text")
    store.add_tasks([task, chat])
    spoken = tuple(replace(answer, code=None) for answer in a_comparison("chat", (HOSTILE, "x")).answers)
    store.add_comparisons([a_comparison(HOSTILE, (HOSTILE, "two"), id="p"), Comparison("q", "chat", spoken)])
    client = signed_in(store, HOSTILE[:40], runs={HOSTILE: TestRun(1, [evil], True)})
    paths = ("/label", "/label/p", "/label/q", "/tasks", "/export", "/tasks?search=" + quote(HOSTILE))
    bodies = [client.get(path).text for path in paths]
    for body in bodies:
        seen = Seen()
        seen.feed(body)
        assert seen.scripts == ["/static/generating.js", "/static/app.js"] and "img" not in seen.tags
        assert not any(name.startswith("on") or name == "style" for name in seen.attributes)
    assert "49" not in bodies[1]
    plain = client.get("/text/p/0")
    assert plain.text == HOSTILE and plain.headers["content-type"].startswith("text/plain")


def test_a_line_of_a_megabyte_is_shown_within_bounds(store):
    filled(store, "a", texts=("x" * 2**20, "two"))
    page = signed_in(store).get("/label")
    assert page.status_code == 200 and len(page.text) < 4 * 2**20


# ---- pages ------------------------------------------------------------------------------------------------------------------


def test_the_list_has_filters_and_pages(store):
    store.add_tasks([a_task(f"t{n}", title=f"Task {n}") for n in range(120)])
    client = signed_in(store)
    first = client.get("/tasks").text
    assert first.count('<th scope="row">') == 50 and "1 to 50 of 120" in first and "start=50" in first
    assert client.get("/tasks?start=100").text.count('<th scope="row">') == 20
    assert client.get("/tasks?search=Task+7").text.count('<th scope="row">') == 11
    assert "No task matches" in client.get("/tasks?difficulty=hard").text
    for odd in ("start=-1", "start=x", "start=99999999999", "only=x", "order=x", "search=%00"):
        assert client.get(f"/tasks?{odd}").status_code == 200


def test_a_task_with_a_slash_in_its_id_has_a_page(store):
    store.add_tasks([a_task("a/b c?d")])
    client = signed_in(store)
    assert 'href="/task/a/b%20c%3Fd"' in client.get("/tasks").text
    assert "This task has no answers yet." in client.get("/task/a/b%20c%3Fd").text


def test_what_does_not_exist_is_said(store):
    client = signed_in(store)
    for path in ("/label/none", "/task/none", "/text/none/0", "/nowhere"):
        answer = client.get(path)
        assert answer.status_code == 404 and "<h1>" in answer.text
    assert client.get("/api/tests/none").json()["error"] == "There is no such comparison."


def test_the_page_exports(store, tmp_path):
    filled(store, "a")
    client = signed_in(store, export=tmp_path / "out")
    client.post("/api/judge", json=a_choice("pair-a"))
    answer = client.post("/api/export", json={}).json()
    assert "1 preference, " in answer["said"] and (tmp_path / "out").is_dir()


def test_the_page_exports_without_disagreements_if_asked(store, tmp_path):
    filled(store, "a", "b")
    client = signed_in(store, export=tmp_path / "out")
    client.post("/api/judge", json=a_choice("pair-a"))
    client.post("/api/judge", json=a_choice("pair-b", ranks=[1, 2]))
    store.judge(Judgment(new_id(), "pair-b", "Ben", "ranked", (0, 1), (2, 1)))
    assert 'id="agreed"' in client.get("/export").text
    said = [client.post("/api/export", json={"agreed": agreed}).json()["said"] for agreed in (False, True)]
    assert ": 3 preferences, " in said[0] and ": 1 preference, " in said[1]


def test_every_response_has_the_headers_those_to_errors_included(store, monkeypatch):
    filled(store, "a")
    client = signed_in(store)
    broken = TestClient(client.app, "http://localhost", raise_server_exceptions=False, cookies=client.cookies, headers=ORIGIN)
    answers = [client.get(path) for path in ("/", "/label", "/static/app.js", "/nowhere", "/api/tests/x")]
    answers += [client.get("/label", headers={"Host": "evil.example"}), client.post("/api/judge", content="{")]
    monkeypatch.setattr(client.shared.queue, "next", lambda *_, **__: 1 / 0)
    answers.append(broken.get("/label"))
    assert [answer.status_code for answer in answers] == [303, 200, 200, 404, 404, 400, 415, 500]
    for answer in answers:
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
