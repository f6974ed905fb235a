"""Solutions stream in, can be stopped, and errors are reported in one line."""

import socket
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_collection.generation.sources import (
    OllamaSource,
    OpenAISource,
    Request,
    Writing,
    as_pair,
    prompt_of,
    write_pair,
)
from preference_collection.tests.conftest import a_task
from preference_collection.tests.ollama_stand_in import Broken, Silence, ollama_stand_in
from preference_training.core.errors import UserError

CODE = "def add(a, b):\n    return a + b"
WORDS = ["Here:\n```py", "thon\n", CODE, "\n```", " é…"]
REPLIES = {
    "good": lambda _: WORDS,
    "seeded": lambda request: [f"```python\n{CODE}  # {request['options']['seed']}\n```"],
    "slow": lambda _: ["def ", Silence(), "add"],
    "broken": lambda _: ["def ", Broken("out of memory")],
    "silent": lambda _: [Silence()],
    "empty": lambda _: [],
}


@pytest.fixture(scope="module")
def server():
    with ollama_stand_in(REPLIES) as stand_in:
        yield stand_in


@pytest.fixture(params=["ollama", "openai"])
def source(request, server):
    """Both kinds of servers, which must behave the same."""
    seconds = 20.0
    return OllamaSource(server.url, seconds) if request.param == "ollama" else OpenAISource(f"{server.url}/v1", seconds)


def asked(model: str = "good", **changed) -> Request:
    values = {"prompt": "Add two numbers.", "temperature": 0.5, "seed": 11, "max_tokens": 99}
    return Request(model, **{**values, **changed})


def written(source, model: str = "good", **changed) -> Writing:
    return Writing(source, asked(model, **changed)).start().wait(30)


def test_the_installed_models_are_listed(source):
    assert source.models() == sorted(REPLIES)


def test_a_reply_streams_in_and_is_complete_at_the_end(source):
    writing = written(source)
    assert (writing.state, writing.text) == ("done", "".join(WORDS))
    assert written(source, "empty").state == "done"


def test_temperature_seed_and_length_are_requested_and_stored(server):
    OLLAMA = {"temperature": 0.5, "seed": 11, "num_predict": 99}  # noqa: N806  as documented
    written(OllamaSource(server.url, 20))
    request = server.requests[-1]
    assert request["options"] == OLLAMA and request["stream"] is True
    assert request["messages"] == [{"role": "user", "content": "Add two numbers."}]
    written(OpenAISource(f"{server.url}/v1", 20))
    request = server.requests[-1]
    assert (request["temperature"], request["seed"], request["max_tokens"]) == (0.5, 11, 99)


def test_the_two_solutions_of_a_pair_have_the_same_prompt_and_different_seeds(server):
    task = a_task()
    writings = write_pair(OllamaSource(server.url, 20), "seeded", task, 0.8, 64)
    comparison = as_pair(task, tuple(writing.wait(30) for writing in writings))
    seeds = [answer.parameters["seed"] for answer in comparison.answers]
    assert seeds[0] != seeds[1]
    for answer, seed in zip(comparison.answers, seeds, strict=True):
        assert answer.code == f"{CODE}  # {seed}"
        assert answer.parameters == {"temperature": 0.8, "seed": seed, "max_tokens": 64}
        assert answer.prompt == prompt_of(task) and "`add`" in answer.prompt


def test_a_stopped_reply_ends_at_once_and_closes_the_connection(source, server):
    server.left.clear()
    writing = Writing(source, asked("slow")).start()
    while writing.text != "def ":
        threading.Event().wait(0.005)
    writing.cancel()
    assert writing.over and writing.wait(10).state == "stopped" and writing.text == "def "
    assert not writing._thread.is_alive()
    assert server.left.wait(10)


def test_a_reply_stopped_before_its_first_output_ends_too(source):
    writing = Writing(source, asked("silent")).start()
    writing.cancel()
    assert not writing.wait(10)._thread.is_alive()
    assert (writing.state, writing.message) == ("stopped", "")


def test_the_time_without_output_is_measured(source, server):
    writing = Writing(source, asked("silent")).start()
    while writing.quiet_seconds() < 0.02:
        threading.Event().wait(0.01)
    assert writing.state == "waiting"
    writing.cancel()
    assert writing.quiet_seconds() == 0


def failed(source, model: str = "good") -> str:
    writing = written(source, model)
    assert writing.state == "failed"
    return writing.message


def test_a_missing_model_comes_with_the_download_command(server):
    message = failed(OllamaSource(server.url, 20), "qwen9:1b")
    assert message == "Ollama has no model 'qwen9:1b'. Download it with: ollama pull qwen9:1b"
    message = failed(OpenAISource(f"{server.url}/v1", 20), "qwen9:1b")
    assert message == "The server reports: model 'qwen9:1b' not found (status 404, model 'qwen9:1b')."


def test_an_error_in_the_middle_of_a_reply_is_reported_and_the_text_so_far_is_kept(source):
    writing = written(source, "broken")
    assert (writing.state, writing.text) == ("failed", "def ")
    assert "reports: out of memory" in writing.message


def test_a_server_that_is_silent_too_long_times_out(server):
    assert "sent nothing for 0.2 s" in failed(OllamaSource(server.url, 0.2), "silent")
    assert "sent nothing for 0.2 s" in failed(OpenAISource(f"{server.url}/v1", 0.2), "silent")


def test_an_unreachable_server_is_reported():
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    for source, name in ((OllamaSource(url, 5), "Ollama"), (OpenAISource(url, 5), "The server")):
        with pytest.raises(UserError) as caught:
            source.models()
        assert str(caught.value) == f"{name} at {url} cannot be reached. Start it, or set its address."
        assert "cannot be reached" in failed(source)


def test_a_server_that_fails_or_is_incompatible_gives_one_message(server, source):
    server.status = 500
    try:
        with pytest.raises(UserError, match="the stand-in was told to fail"):
            source.models()
    finally:
        server.status = 200


def test_a_prompt_is_not_sent_to_a_redirect(server, source):
    server.status = 307
    try:
        before = len(server.requests)
        assert written(source).state == "failed"
        assert len(server.requests) == before + 1
    finally:
        server.status = 200


def test_the_api_key_comes_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    written(OpenAISource(f"{server.url}/v1", 20))
    assert server.requests[-1]["authorization"] == "Bearer secret"


@settings(max_examples=15, deadline=None)
@given(st.lists(st.text(max_size=10), max_size=4))
def test_any_text_is_kept_as_the_server_sends_it(server, pieces):
    server.replies["any"] = lambda _: pieces
    assert written(OllamaSource(server.url, 20), "any").text == "".join(pieces).encode("utf-8", "replace").decode()
    del server.replies["any"]
