"""Models behind HTTP, over a real socket: what other programs ask for, and this project's own client."""

import http.client
import json
import socket
import threading
from contextlib import contextmanager

import pytest
import requests
from transformers import AutoTokenizer

from preference_training.core.errors import UserError
from preference_training.data.records.record import Turn
from preference_training.generation.chat import LoadOptions, load_for_chat, open_responders
from preference_training.generation.servers import OllamaServer, OpenAIServer, served_model
from preference_training.generation.serving import ModelServer, example, served_names
from tests.architectures.tiny_models import make
from tests.support.chat_templates import PHI
from tests.support.judge_servers import Reply as StandInReply
from tests.support.judge_servers import serving as stand_in

QUESTION = [{"role": "user", "content": "Why is it wet?"}]
TURNS = [Turn("user", "Why is it wet?")]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    make("llama", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = PHI
    tokenizer.save_pretrained(folder)
    return load_for_chat(str(folder))


@contextmanager
def listening(*models):
    server = ModelServer(served_names(models, None), "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def server(chat):
    with listening(chat) as running:
        yield running


def ask(server, **body):
    return requests.post(f"{server.url}/chat/completions", json={"messages": QUESTION, **body}, timeout=60)


def test_a_response_is_that_of_the_model(server, chat):
    expected = chat.respond(TURNS, {"max_new_tokens": 6}, lambda _: None)
    found = ask(server, model="tiny", max_tokens=6).json()
    assert found["object"] == "chat.completion" and found["model"] == "tiny"
    [choice] = found["choices"]
    assert choice == {"index": 0, "message": {"role": "assistant", "content": expected.text}, "finish_reason": expected.ended}
    assert found["usage"] == {
        "prompt_tokens": expected.prompt_tokens, "completion_tokens": 6, "total_tokens": expected.prompt_tokens + 6,
    }  # fmt: skip


def test_settings_are_those_of_the_request(server, chat):
    asked = {"temperature": 1.5, "top_p": 0.9, "top_k": 30, "seed": 4}
    expected = chat.respond(TURNS, asked | {"max_new_tokens": 9}, lambda _: None).text
    assert ask(server, **asked, max_completion_tokens=9).json()["choices"][0]["message"]["content"] == expected
    stop = expected[3]
    cut = ask(server, **asked, max_tokens=9, stop=stop).json()["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == (expected[: expected.index(stop)], "stop")


def test_a_streamed_response_has_the_same_text_in_events(server, chat):
    expected = chat.respond(TURNS, {"max_new_tokens": 8}, lambda _: None)
    with requests.post(
        f"{server.url}/chat/completions", stream=True, timeout=60,
        json={"messages": QUESTION, "max_tokens": 8, "stream": True, "stream_options": {"include_usage": True}},
    ) as reply:  # fmt: skip
        assert reply.headers["Content-Type"] == "text/event-stream"
        lines = [line.decode() for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    assert deltas[0]["role"] == "assistant" and len(deltas) > 4
    assert "".join(delta.get("content", "") for delta in deltas) == expected.text
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 8


def test_models_are_listed_and_the_server_is_well(server):
    [model] = requests.get(f"{server.url}/models", timeout=60).json()["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")
    assert requests.get(f"{server.url.removesuffix('/v1')}/health", timeout=60).json() == {"status": "ok"}
    assert '"model": "tiny"' in example(server) and server.url in example(server)


REFUSED = [
    ({"model": "other"}, 404, "model 'other' is not served here, but tiny"),
    ({"messages": []}, 400, "messages: expected a list"),
    ({"messages": [{"role": "poet", "content": "x"}]}, 400, "messages[0]: expected one of the roles"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "parts of type text"),
    ({"messages": [{"role": "user", "content": "word " * 800}]}, 400, "reads at most 512"),
    ({"messages": [{"role": "user", "content": "word " * 800}], "stream": True}, 400, "reads at most 512"),
    ({"temperature": -1}, 400, "temperature: found -1"),
    ({"temperature": [1]}, 400, "float"),
    ({"n": 2}, 400, "only one response"),
    ({"tools": [{}]}, 400, "tools is not supported"),
    ({"stop": [1]}, 400, "stop: expected"),
]


@pytest.mark.parametrize(("body", "status", "said"), REFUSED, ids=[said for _, _, said in REFUSED])
def test_a_wrong_request_is_told_what_is_wrong(server, body, status, said):
    reply = ask(server, **body)
    assert reply.status_code == status and said in reply.json()["error"]["message"]


def test_what_is_no_request_is_refused(server):
    for content, path, status in (
        (b"{", "/v1/chat/completions", 400),
        (b"[]", "/v1/chat/completions", 400),
        (b"{}", "/v2", 404),
    ):
        reply = requests.post(f"{server.url.removesuffix('/v1')}{path}", data=content, timeout=60)
        assert reply.status_code == status and "error" in reply.json()
    assert requests.get(f"{server.url}/nothing", timeout=60).status_code == 404
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Length", str(10**9))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_a_client_that_leaves_ends_its_response(server, chat):
    with requests.post(
        f"{server.url}/chat/completions",
        json={"messages": QUESTION, "max_tokens": 450, "stream": True},
        stream=True,
        timeout=60,
    ) as reply:
        next(reply.iter_lines())
    # The next one is answered, and right.
    expected = chat.respond(TURNS, {"max_new_tokens": 6}, lambda _: None).text
    assert ask(server, max_tokens=6).json()["choices"][0]["message"]["content"] == expected


def test_a_taken_port_is_one_message(server, chat):
    with pytest.raises(UserError, match=r"--port: cannot listen at 127.0.0.1:\d+: Address already in use"):
        ModelServer({"tiny": chat}, "127.0.0.1", server.server_port)
    with pytest.raises(UserError, match="--port: cannot listen"):
        ModelServer({"tiny": chat}, "127.0.0.1", 70000)


# ---- this project's client --------------------------------------------------------------------------------------------------


def test_the_client_says_what_the_server_says(server, chat):
    [client] = open_responders("openai:tiny", None, server.url, LoadOptions())
    heard = []
    reply = client.respond(TURNS, {"max_new_tokens": 7, "temperature": 1.0, "seed": 2}, heard.append)
    expected = chat.respond(TURNS, {"max_new_tokens": 7, "temperature": 1.0, "seed": 2}, lambda _: None)
    assert (reply.text, reply.ended) == (expected.text, "length") == ("".join(heard), "length") and len(heard) > 3
    prompts = ["Why is it wet?", (Turn("user", "And cold?"),)]
    assert client.responses(prompts, {"max_new_tokens": 5}) == chat.responses(
        [(Turn("user", "Why is it wet?"),), prompts[1]], {"max_new_tokens": 5}
    )


def test_an_unknown_model_suggests_a_near_one(server):
    with pytest.raises(UserError, match=r"openai:tinny: http://.*/v1 has no such model; did you mean tiny\?"):
        open_responders("openai:tinny", None, server.url, LoadOptions())


@pytest.mark.parametrize("kind", ["openai", "ollama"])
def test_nobody_who_answers_is_one_message(kind):
    with socket.socket() as taken:
        # Bound, and not listening: connections are refused.
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match=rf"{kind}:m: .*unreachable\. Start the server, or name another one with --url"):
            open_responders(f"{kind}:m", None, f"http://127.0.0.1:{taken.getsockname()[1]}", LoadOptions())


def test_a_missing_or_wrong_key_is_one_message(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="openai needs a key in the environment, OPENAI_API_KEY, or the address of a server"):
        served_model("openai:gpt")
    with pytest.raises(UserError, match="found no model"):
        served_model("ollama:")
    with pytest.raises(UserError, match="--url: found 'here'"):
        served_model("ollama:m", "here")
    assert served_model("runs/mine") is None
    monkeypatch.setattr("tests.support.judge_servers.read_question", lambda _: ("c", "p", "a", "b"))
    refusing = StandInReply(status=401, body='{"error": {"message": "no"}}')
    said = r"status 401: no\. Expected a server that has .* OPENAI_API_KEY, which is not set"
    with stand_in(lambda _: refusing) as server, pytest.raises(UserError, match=said):
        served_model("openai:m", f"{server.url}/v1").respond(TURNS, {}, lambda _: None)


def test_settings_have_the_names_of_each_protocol():
    settings = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.1, "max_new_tokens": 7, "seed": 1}
    assert OpenAIServer("m").body([], settings, True) == {
        "model": "m", "temperature": 0.5, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.1, "max_tokens": 7, "seed": 1,
        "messages": [], "stream": True,
    }  # fmt: skip
    assert OllamaServer("m").body([], settings, True) == {
        "model": "m", "stream": True, "messages": [],
        "options": {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "repeat_penalty": 1.1, "num_predict": 7, "seed": 1},
    }  # fmt: skip


PARTS = {
    "ollama": [
        {"message": {"role": "assistant", "content": "It "}, "done": False},
        {"message": {"role": "assistant", "content": "rains."}, "done": False},
        {"message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "stop"},
    ],
    "openai": [
        {"choices": [{"delta": {"role": "assistant"}}]}, {"choices": [{"delta": {"content": "It "}}]},
        {"choices": [{"delta": {"content": "rains."}, "finish_reason": "stop"}]}, {"choices": [], "usage": {}},
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", PARTS)
def test_the_parts_of_each_protocol_are_one_reply(kind, monkeypatch):
    lines = [json.dumps(part) for part in PARTS[kind]]
    body = (
        "\n".join(lines)
        if kind == "ollama"
        else ": ping\n\n" + "".join(f"data: {line}\n\n" for line in lines) + "data: [DONE]\n\n"
    )
    monkeypatch.setattr("tests.support.judge_servers.read_question", lambda _: ("c", "p", "a", "b"))
    with stand_in(lambda _: StandInReply(body=body)) as server:
        client = served_model(f"{kind}:m", f"{server.url}/v1" if kind == "openai" else server.url)
        heard = []
        reply = client.respond(TURNS, {}, heard.append)
        assert (reply.text, reply.ended) == ("It rains.", "stop") and "".join(heard) == "It rains."
        # An error in the middle of a reply.
        broken = '{"error": "out of memory"}'
        server.answer = lambda _: StandInReply(body=broken if kind == "ollama" else f"data: {broken}\n\n")
        with pytest.raises(UserError, match="out of memory"):
            client.respond(TURNS, {}, heard.append)
        server.answer = lambda _: StandInReply(body="data: what?" if kind == "openai" else "what?")
        with pytest.raises(UserError, match="its reply cannot be read"):
            client.respond(TURNS, {}, heard.append)
