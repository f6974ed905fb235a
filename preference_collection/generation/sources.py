"""Generating answers with Ollama, any OpenAI-compatible server, or a checkpoint of this framework.

A source lists its models and streams the reply to a prompt. A `Writing` is a reply in progress, in its own thread, so that the
page can show it as it streams and stop it. Both answers of a pair come from the same prompt with different seeds, and the
request is stored with each.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

import httpx
import ollama

from preference_collection.generation.checkpoint_source import CheckpointSource
from preference_collection.generation.replies import extract_code
from preference_collection.store.model import Answer, Comparison, Task, new_id
from preference_training.core.errors import UserError, first_line

# The text before a command that the page offers to copy.
PULL = " Download it with: "

# Timeout of a connection attempt. Unit: seconds.
CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class Request:
    """A request to a model. seed makes sampling reproducible if the server honors it."""

    model: str
    prompt: str
    temperature: float
    seed: int
    max_tokens: int


class Stop:
    """A request to stop: a flag, and actions that interrupt waiting for a server. It also takes effect if it comes early."""

    def __init__(self):
        """Not stopped yet."""
        self._lock = threading.Lock()
        self._actions = []
        self.asked = False

    def ask(self) -> None:
        """Stop, from any thread."""
        with self._lock:
            self.asked, actions = True, self._actions
            self._actions = []
        for action in actions:
            action()

    def also(self, action) -> None:
        """Call `action` when stopped, immediately if already stopped."""
        with self._lock:
            if not self.asked:
                self._actions.append(action)
                return
        action()


class Source(Protocol):
    """Where answers come from."""

    def models(self) -> list[str]:
        """The available models. Raises UserError if the source cannot be reached."""

    def stream(self, request: Request, stop: Stop) -> Iterator[str]:
        """Stream the reply in parts until it ends or is stopped. Raises UserError for what a user can fix."""


def prompt_of(task: Task) -> str:
    """The prompt for generation and training: the task and the required format of the reply."""
    if not task.function_name:
        return task.prompt
    return (
        f"{task.prompt.rstrip()}\n\nWrite it in Python, as a function named `{task.function_name}`. "
        "Answer with one fenced code block."
    )


# ---- a reply on its way -----------------------------------------------------------------------------------------------------


@dataclass
class Writing:
    """A reply in progress. state is waiting, writing, done, failed or stopped; message says why it failed."""

    source: Source
    request: Request
    text: str = ""
    state: str = "waiting"
    message: str = ""
    last_at: float = field(default_factory=time.monotonic)
    stop: Stop = field(default_factory=Stop)
    _thread: threading.Thread | None = None

    def start(self) -> "Writing":
        """Send the request."""
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()
        return self

    @property
    def over(self) -> bool:
        """Whether the reply is finished."""
        return self.state in ("done", "failed", "stopped")

    def quiet_seconds(self) -> float:
        """Seconds since the last output."""
        return 0.0 if self.over else time.monotonic() - self.last_at

    def cancel(self) -> None:
        """Stop, keeping the text so far. Closing the connection tells the server."""
        if not self.over:
            self.state = "stopped"
        self.stop.ask()

    def wait(self, seconds: float | None = None) -> "Writing":
        """Wait until the reply is finished."""
        self._thread.join(seconds)
        return self

    def _write(self) -> None:
        try:
            for piece in self.source.stream(self.request, self.stop):
                if self.stop.asked:
                    break
                self.text += piece.encode("utf-8", "replace").decode()
                self.state, self.last_at = "writing", time.monotonic()
            self._finish("done")
        except UserError as error:
            self._finish("failed", str(error))
        except Exception as error:  # show any error on the page, where a thread's traceback would be invisible
            self._finish("failed", f"{type(error).__name__}: {first_line(error)}")
            raise

    def _finish(self, state: str, message: str = "") -> None:
        if not self.stop.asked:
            self.state, self.message = state, message


def write_pair(source: Source, model: str, task: Task, temperature: float, max_tokens: int) -> tuple[Writing, Writing]:
    """Request two answers to a task: the same prompt with two seeds."""
    seeds = secrets.SystemRandom().sample(range(2**31), 2)
    requests = (Request(model, prompt_of(task), temperature, seed, max_tokens) for seed in seeds)
    return tuple(Writing(source, request).start() for request in requests)


def write_again(writing: Writing) -> Writing:
    """Repeat a request with another seed."""
    seed = secrets.SystemRandom().randrange(2**31)
    return Writing(writing.source, replace(writing.request, seed=seed)).start()


def as_pair(task: Task, writings: tuple[Writing, Writing]) -> Comparison:
    """Two replies as a comparison for the store."""
    answers = tuple(
        Answer(
            new_id(), w.request.model, w.request.prompt,
            {key: value for key, value in asdict(w.request).items() if key not in ("model", "prompt")},
            w.text, extract_code(w.text, task.function_name).code,
        )
        for w in writings
    )  # fmt: skip
    return Comparison(new_id(), task.id, answers)


# ---- servers ----------------------------------------------------------------------------------------------------------------


class Severable(httpx.HTTPTransport):
    """A transport whose connection another thread can close while this one waits for a response."""

    def __init__(self, stop: Stop):
        """stop: closes the connection."""
        super().__init__()
        self._stop = stop

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, and register its connection for closing."""
        request.extensions["trace"] = self._seen
        return super().handle_request(request)

    def _seen(self, event: str, info: dict) -> None:
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._stop.also(lambda: _sever(info["return_value"]))


def _sever(stream) -> None:
    with suppress(OSError, AttributeError):
        stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


@contextmanager
def _faults_of_a_server(name: str, url: str, silence_seconds: float, stop: Stop):
    """Turn connection errors into messages; errors caused by a stop are ignored."""
    try:
        yield
    except (ConnectionError, httpx.HTTPError, ValueError) as error:
        if stop.asked:
            return
        if isinstance(error, httpx.ReadTimeout):
            raise UserError(f"{name} at {url} sent nothing for {silence_seconds:g} s. Try a smaller model.") from error
        if isinstance(error, ConnectionError | httpx.ConnectError | httpx.ConnectTimeout):
            raise UserError(f"{name} at {url} cannot be reached. Start it, or set its address.") from error
        raise UserError(f"{name} at {url}: {first_line(error)}. Expected a compatible server.") from error


@dataclass(frozen=True)
class OllamaSource:
    """Ollama, through its own client. host None means OLLAMA_HOST, or this machine."""

    host: str | None
    silence_seconds: float

    def models(self) -> list[str]:
        """The installed models."""
        with self._client(Stop()) as client:
            return sorted(model.model for model in client.list().models if model.model)

    def stream(self, request: Request, stop: Stop) -> Iterator[str]:
        """Stream the reply in parts."""
        options = {"temperature": request.temperature, "seed": request.seed, "num_predict": request.max_tokens}
        messages = [{"role": "user", "content": request.prompt}]
        with self._client(stop, request.model) as client:
            for part in client.chat(request.model, messages, stream=True, options=options):
                yield part.message.content or ""

    @contextmanager
    def _client(self, stop: Stop, model: str = ""):
        timeout = httpx.Timeout(self.silence_seconds, connect=CONNECT_SECONDS)
        # Prompts are sent only to the configured server, not to redirects.
        with ollama.Client(self.host, timeout=timeout, transport=Severable(stop), follow_redirects=False) as client:
            url = self.host or os.environ.get("OLLAMA_HOST") or "127.0.0.1:11434"
            with _faults_of_a_server("Ollama", url, self.silence_seconds, stop):
                try:
                    yield client
                except ollama.ResponseError as error:
                    if error.status_code == 404 and model:
                        raise UserError(f"Ollama has no model {model!r}.{PULL}ollama pull {model}") from error
                    raise UserError(f"Ollama at {url} reports: {first_line(error)}.") from error


@dataclass(frozen=True)
class OpenAISource:
    """An OpenAI-compatible server, with /models and /chat/completions at url: vLLM, llama.cpp, LM Studio, ...

    An API key is read from the environment variable OPENAI_API_KEY.
    """

    url: str
    silence_seconds: float

    def models(self) -> list[str]:
        """The models that the server offers."""
        stop = Stop()
        with self._client(stop) as client:
            response = client.get("models")
            _raise_for_status(response, "")
            return sorted(str(model["id"]) for model in response.json()["data"])

    def stream(self, request: Request, stop: Stop) -> Iterator[str]:
        """Stream the reply in parts."""
        body = {
            "model": request.model, "messages": [{"role": "user", "content": request.prompt}], "stream": True,
            "temperature": request.temperature, "seed": request.seed, "max_tokens": request.max_tokens,
        }  # fmt: skip
        with self._client(stop) as client, client.stream("POST", "chat/completions", json=body) as response:
            if not response.is_success:
                response.read()
            _raise_for_status(response, request.model)
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip()
                if line.startswith("data:") and data != "[DONE]":
                    yield from _pieces(json.loads(data))

    @contextmanager
    def _client(self, stop: Stop):
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = httpx.Timeout(self.silence_seconds, connect=CONNECT_SECONDS)
        with (
            _faults_of_a_server("The server", self.url, self.silence_seconds, stop),
            httpx.Client(base_url=self.url, headers=headers, timeout=timeout, transport=Severable(stop)) as client,
        ):
            yield client


def _pieces(event: dict) -> Iterator[str]:
    if event.get("error"):
        raise UserError(f"The server reports: {_error_message(event)}.")
    for choice in event.get("choices", []):
        yield (choice.get("delta") or {}).get("content") or ""


def _raise_for_status(response: httpx.Response, model: str) -> None:
    """Raise UserError for an error response."""
    if not response.is_success:
        with suppress(ValueError):
            raise UserError(
                f"The server reports: {_error_message(response.json())} (status {response.status_code}, model {model!r})."
            )
        raise UserError(f"The server responds with status {response.status_code} (model {model!r}).")


def _error_message(event) -> str:
    error = event.get("error", event) if isinstance(event, dict) else event
    return str(error.get("message", error) if isinstance(error, dict) else error)[:300].rstrip(".")


def sources_of(config) -> dict[str, Source]:
    """The configured sources, by the names shown on the page."""
    sources = {"Ollama": OllamaSource(config.ollama_host, config.silence_seconds)}
    if config.openai_url:
        sources["OpenAI-compatible server"] = OpenAISource(config.openai_url, config.silence_seconds)
    return {**sources, "checkpoints": CheckpointSource(tuple(Path(folder) for folder in config.checkpoints))}
