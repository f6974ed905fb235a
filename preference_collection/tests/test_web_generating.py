"""Asking a model on the page: replies stream in, can be stopped, asked for again, kept and discarded."""

import pytest

from preference_collection.tests.conftest import a_comparison, a_task
from preference_collection.tests.ollama_stand_in import Silence, ollama_stand_in
from preference_collection.tests.test_web import shown_in, signed_in

CODE = "```python\ndef add(a, b):\n    return a + b\n```"
TASK = {"task": "sum", "source": "Ollama", "model": "good", "temperature": 0.5}


@pytest.fixture
def server():
    replies = {
        "good": lambda _: [CODE],
        "slow": lambda _: ["def ", Silence(), "add"],
        "chatty": lambda _: ["I <b>would</b> not."],
    }
    with ollama_stand_in(replies) as stand_in:
        yield stand_in


@pytest.fixture
def client(store, server):
    store.add_tasks([a_task()])
    return signed_in(store, ollama_host=server.url)


def state(client) -> dict:
    """What the page is told about the replies."""
    return client.get("/api/writing/sum").json()


def finished(client) -> dict:
    """The same, once all replies are over."""
    for writing in client.shared.writings["Ada", "sum"]:
        writing.wait(30)
    return state(client)


def test_a_task_without_answers_opens_what_asks_a_model(client):
    page = client.get("/task/sum").text
    assert 'data-open="generate"' in page and "This task has no answers yet." in page
    form = client.get("/api/generate/sum").json()["html"]
    assert 'value="good"' in form and "{function_name}</code> stands for <code>add</code>" in form
    assert "as a function named `{function_name}`." in form


def test_two_usable_replies_become_a_comparison_that_is_shown(client, store, server):
    client.post("/api/generate", json={**TASK, "instruction": "Name it {function_name}."})
    answer = finished(client)
    assert answer["said"] == "The answers are kept." and shown_in(answer["next"]["html"]) == answer["next"]["id"]
    [comparison] = store.comparisons_of("sum")
    assert [each.code for each in comparison.answers] == ["def add(a, b):\n    return a + b"] * 2
    assert comparison.answers[0].parameters["instruction"] == "Name it add."
    assert [request["messages"][-1]["content"] for request in server.requests] == ["Add two numbers (sum).\n\nName it add."] * 2
    assert client.shared.queue.next("Ada") == comparison.id
    assert state(client) == {"closed": True} and len(store.comparisons_of("sum")) == 1
    form = client.get("/api/generate/sum").json()["html"]
    assert "Name it {function_name}." in form and 'value="0.5"' in form


def test_replies_can_be_stopped_and_discarded(client, store):
    html = client.post("/api/generate", json={**TASK, "model": "slow"}).json()["html"]
    assert 'data-writing="on"' in html and 'data-does="stop"' in html
    html = client.post("/api/writing/sum/stop", json={}).json()["html"]
    assert html.count("The reply was stopped.") == 2 and 'data-writing="over"' in html
    assert client.post("/api/writing/sum/discard", json={}).json() == {"closed": True}
    assert not store.comparisons_of("sum") and state(client) == {"closed": True}


def test_useless_replies_are_asked_for_again_or_kept_anyway(client, store):
    client.post("/api/generate", json={**TASK, "model": "chatty"})
    html = finished(client)["html"]
    assert html.count("The reply contains no code.") == 2 and "I &lt;b&gt;would&lt;/b&gt; not." in html
    seeds = [writing.request.seed for writing in client.shared.writings["Ada", "sum"]]
    client.post("/api/writing/sum/again", json={"number": 1})
    again = [writing.request.seed for writing in client.shared.writings["Ada", "sum"]]
    assert again[0] == seeds[0] and again[1] != seeds[1]
    finished(client)
    assert client.post("/api/writing/sum/again", json={"number": 7}).status_code == 400
    assert "next" in client.post("/api/writing/sum/keep", json={}).json()
    assert [answer.text for answer in store.comparisons_of("sum")[0].answers] == ["I <b>would</b> not."] * 2
    assert "This reply contains no code." in client.get("/task/sum").text


def test_a_missing_model_is_said_with_the_command_that_gets_it(client):
    client.post("/api/generate", json={**TASK, "model": "big:70b"})
    html = finished(client)["html"]
    assert "Ollama has no model" in html and "<pre><code>ollama pull big:70b</code></pre>" in html


def test_a_server_that_is_away_is_said(store):
    store.add_tasks([a_task()])
    client = signed_in(store, ollama_host="localhost:9")
    assert "cannot be reached. Start it, or set its address (ollama_host)." in client.get("/api/generate/sum").json()["html"]


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"task": "none"}, 404),
        ({"source": "x"}, 400),
        ({"temperature": "hot"}, 400),
        ({"temperature": 11}, 409),
        ({"model": " "}, 409),
    ],
)
def test_an_invalid_request_asks_nothing(client, server, changed, status):
    assert client.post("/api/generate", json={**TASK, **changed}).status_code == status
    assert not server.requests


def test_the_page_says_which_function_the_tests_call_where_it_is_not_the_tasks(store):
    store.add_tasks([a_task("a")])
    store.add_comparisons([a_comparison("a", parameters={"function_name": "plus"})])
    assert signed_in(store).get("/label").text.count("The tests call its function <code>plus</code>.") == 2
