"""Solutions stream in, can be stopped, and errors are reported in one line."""

import socket
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_collection.generation.asking import Request, Sampling, instruction_for, with_instruction
from preference_collection.generation.sources import ServerSource, model_named, ollama_url
from preference_collection.generation.writing import Writing, as_comparison, write_again, write_answers
from preference_collection.settings import load_settings
from preference_collection.tests.conftest import a_task
from preference_collection.tests.ollama_stand_in import Broken, Silence, ollama_stand_in
from preference_training.core.errors import UserError
from preference_training.data.records.record import Turn

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
    return at(server.url, request.param)


def at(url: str, kind: str = "ollama", seconds: float = 20.0) -> ServerSource:
    return ServerSource(kind, url if kind == "ollama" else f"{url}/v1", seconds)


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
    written(at(server.url))
    request = server.requests[-1]
    assert request["options"] == OLLAMA and request["stream"] is True
    assert request["messages"] == [{"role": "user", "content": "Add two numbers."}]
    written(at(server.url, "openai"))
    request = server.requests[-1]
    assert (request["temperature"], request["seed"], request["max_tokens"]) == (0.5, 11, 99)


def test_the_answers_of_a_comparison_have_the_same_prompt_and_different_seeds(server):
    task = a_task()
    instruction = "Write it as `{function_name}`."
    writings = write_answers(at(server.url), "seeded", task, Sampling(0.8, 64, instruction), count=3)
    comparison = as_comparison(task, [writing.wait(30) for writing in writings])
    seeds = [answer.parameters["seed"] for answer in comparison.answers]
    assert len(set(seeds)) == 3
    for answer, seed in zip(comparison.answers, seeds, strict=True):
        assert answer.code == f"{CODE}  # {seed}"
        assert answer.parameters == {
            "temperature": 0.8, "seed": seed, "max_tokens": 64, "instruction": "Write it as `add`.", "finish": "stop",
        }  # fmt: skip
        assert answer.prompt == "Add two numbers (sum).\n\nWrite it as `add`."


def test_a_repeated_request_differs_only_in_its_seed(server):
    [writing] = write_answers(at(server.url), "seeded", a_task(), Sampling(0.8, 64, "Be brief."), count=1)
    again = write_again(writing.wait(30)).wait(30)
    assert again.request.seed != writing.request.seed
    assert (again.request.prompt, again.instruction) == (writing.request.prompt, "Be brief.")


# ---- what is asked ----------------------------------------------------------------------------------------------------------


def test_the_instruction_of_the_settings_is_for_code_whose_function_has_a_name():
    instruction = load_settings().instruction
    assert instruction_for(a_task(), instruction) == (
        "Write it in Python, as a function named `add`. Answer with one fenced code block."
    )
    assert instruction_for(a_task(function_name="", tests=()), instruction) == ""
    assert instruction_for(a_task(function_name="", tests=()), "Answer in Python.") == "Answer in Python."
    assert instruction_for(a_task(kind="text", function_name="", tests=()), "Answer in Python.") == ""
    assert instruction_for(a_task(), None) == ""


TURNS = (Turn("system", "You are terse."), Turn("user", "Hi"), Turn("assistant", "Yes?"), Turn("user", "Add 1 and 2."))


def test_a_conversation_is_sent_as_its_turns_and_the_last_of_the_user_gets_the_instruction(server, source):
    task = a_task(prompt=TURNS, kind="text", function_name="", tests=())
    [writing] = write_answers(source, "good", task, Sampling(0, 9, "In one word."), count=1)
    writing.wait(30)
    sent = server.requests[-1]["messages"]
    assert sent[:3] == [{"role": turn.role, "content": turn.content} for turn in TURNS[:3]]
    assert sent[3] == {"role": "user", "content": "Add 1 and 2.\n\nIn one word."}
    assert writing.request.prompt == (*TURNS[:3], Turn("user", "Add 1 and 2.\n\nIn one word."))


def test_a_dialogue_in_one_text_is_sent_as_its_turns(server, source):
    written(source, prompt="\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Add.\n\nAssistant:")
    assert [(m["role"], m["content"]) for m in server.requests[-1]["messages"]] == [
        ("user", "Hi"), ("assistant", "Yes?"), ("user", "Add."),
    ]  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20))
def test_an_instruction_follows_a_text_and_an_empty_one_changes_nothing(prompt, instruction):
    assert with_instruction(prompt, " ") == prompt
    if instruction.strip() and not prompt.rstrip().endswith("Assistant:"):
        assert with_instruction(prompt, instruction) == f"{prompt.rstrip()}\n\n{instruction}"


def test_without_a_turn_of_the_user_the_instruction_is_the_system_turn():
    turn = Turn("assistant", "Once upon a time")
    assert with_instruction((turn,), "Go on.") == (Turn("system", "Go on."), turn)


# ---- names of models --------------------------------------------------------------------------------------------------------


def test_a_name_means_a_model_of_a_source(monkeypatch):
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    settings = load_settings(["openai_url=http://gpu:8000/v1", "silence_seconds=7"])
    found = model_named("ollama:qwen2.5-coder:1.5b", settings)
    assert (found.model, found.source) == ("qwen2.5-coder:1.5b", ServerSource("ollama", "http://localhost:11434", 7))
    found = model_named("openai:org/name", settings)
    assert (found.model, found.source) == ("org/name", ServerSource("openai", "http://gpu:8000/v1", 7))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ollama:", "ollama:: found no model, expected ollama:MODEL, as the server names it."),
        ("olama:x", "olama:x: no such file; did you mean ollama? Expected ollama:MODEL, openai:MODEL, or the directory"),
        ("runs/absent", "runs/absent: no such file. Expected ollama:MODEL"),
        ("openai:x", "openai:x: expected the address of a server, openai_url=http://..., or a key in OPENAI_API_KEY."),
    ],
)
def test_a_name_that_means_nothing_gives_one_message(name, said, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError) as caught:
        model_named(name, load_settings())
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        (None, "http://localhost:11434"), ("gpu", "http://gpu:11434"), ("gpu:80", "http://gpu:80"),
        ("[::1]:5", "http://[::1]:5"), ("https://gpu/ollama/", "https://gpu/ollama"), ("gpu:x", None), ("ftp://gpu", None),
    ],
)  # fmt: skip
def test_the_address_of_ollama_may_lack_scheme_and_port(host, url, monkeypatch):
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    if url:
        assert ollama_url(host) == url
        monkeypatch.setenv("OLLAMA_HOST", host or "")
        assert ollama_url(None) == url
    else:
        with pytest.raises(UserError, match="ollama_host: found"):
            ollama_url(host)


# ---- stopping ---------------------------------------------------------------------------------------------------------------


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
    message = failed(at(server.url), "qwen9:1b")
    assert message == "Ollama has no model 'qwen9:1b'. Download it with: ollama pull qwen9:1b"
    message = failed(at(server.url, "openai"), "qwen9:1b")
    assert message.startswith(
        f"The server at {server.url}/v1 reports: status 404: model 'qwen9:1b' not found (model 'qwen9:1b'). Expected"
    )


def test_an_error_in_the_middle_of_a_reply_is_reported_and_the_text_so_far_is_kept(source):
    writing = written(source, "broken")
    assert (writing.state, writing.text) == ("failed", "def ")
    assert "reports: out of memory" in writing.message


def test_a_server_that_is_silent_too_long_times_out(server):
    for kind in ("ollama", "openai"):
        for model in ("silent", "slow"):
            assert "sent nothing for 0.2 s" in failed(at(server.url, kind, 0.2), model)


def test_an_unreachable_server_is_reported():
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    ollama, other = ServerSource("ollama", url, 5), ServerSource("openai", url, 5)
    for source, name, setting in ((ollama, "Ollama", "ollama_host"), (other, "The server", "openai_url")):
        with pytest.raises(UserError) as caught:
            source.models()
        assert str(caught.value) == f"{name} at {url} cannot be reached. Start it, or set its address ({setting})."
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
    written(at(server.url, "openai"))
    assert server.requests[-1]["authorization"] == "Bearer secret"


@settings(max_examples=15, deadline=None)
@given(st.lists(st.text(max_size=10), max_size=4))
def test_any_text_is_kept_as_the_server_sends_it(server, pieces):
    server.replies["any"] = lambda _: pieces
    assert written(at(server.url), "any").text == "".join(pieces).encode("utf-8", "replace").decode()
    del server.replies["any"]
