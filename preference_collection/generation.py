"""Solutions from a model: Ollama, any server that speaks OpenAI's protocol, or a checkpoint of this framework.

A source lists its models and streams one reply to one prompt. A `Writing` is such a reply on its way, in a thread of its own,
so that a page can show it as it comes and stop it. Both solutions of a pair are asked for by the same prompt, with seeds of
their own, and what was asked for is kept with each.
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

from preference_collection.checkpoint_source import CheckpointSource
from preference_collection.replies import extract_code
from preference_collection.store import Generation, Pair, Problem, new_id
from preference_training.core.errors import UserError, first_line

# What stands before a command that can be copied.
PULL = " Fetch it with: "

# How long a server may take to answer the door. Unit: seconds.
CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class Request:
    """What is asked of a model. seed makes its drawing repeatable where the model's server keeps to it."""

    model: str
    prompt: str
    temperature: float
    seed: int
    max_tokens: int


class Stop:
    """Asked to stop: a flag, and what to do at once where something waits for a server. A stop that comes early is kept."""

    def __init__(self):
        """Nobody has asked yet."""
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
        """Call this when a stop is asked for, at once if it was."""
        with self._lock:
            if not self.asked:
                self._actions.append(action)
                return
        action()


class Source(Protocol):
    """Where solutions come from."""

    def models(self) -> list[str]:
        """The models that can be asked. Raises UserError where the source does not answer."""

    def stream(self, request: Request, stop: Stop) -> Iterator[str]:
        """The reply, in pieces. Raises UserError for what a user can mend; ends where a stop is asked for."""


def prompt_of(problem: Problem) -> str:
    """What a model is asked, and what it is trained on: the problem, and the form that the answer is to have."""
    if not problem.function_name:
        return problem.description
    return (
        f"{problem.description.rstrip()}\n\nWrite it in Python, as a function named `{problem.function_name}`. "
        "Answer with one fenced code block."
    )


# ---- a reply on its way -----------------------------------------------------------------------------------------------------


@dataclass
class Writing:
    """One reply on its way. state is waiting, writing, done, failed or stopped; message says why it failed."""

    source: Source
    request: Request
    text: str = ""
    state: str = "waiting"
    message: str = ""
    last_at: float = field(default_factory=time.monotonic)
    stop: Stop = field(default_factory=Stop)
    _thread: threading.Thread | None = None

    def start(self) -> "Writing":
        """Ask the model."""
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()
        return self

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.state in ("done", "failed", "stopped")

    def quiet_seconds(self) -> float:
        """How long nothing has come."""
        return 0.0 if self.over else time.monotonic() - self.last_at

    def cancel(self) -> None:
        """Stop it; what has come stays. The server is told by the end of the connection."""
        if not self.over:
            self.state = "stopped"
        self.stop.ask()

    def wait(self, seconds: float | None = None) -> "Writing":
        """Wait until nothing more will come."""
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
        except Exception as error:  # whatever it is, the page has to say it: nobody sees a thread's traceback
            self._finish("failed", f"{type(error).__name__}: {first_line(error)}")
            raise

    def _finish(self, state: str, message: str = "") -> None:
        if not self.stop.asked:
            self.state, self.message = state, message


def write_pair(source: Source, model: str, problem: Problem, temperature: float, max_tokens: int) -> tuple[Writing, Writing]:
    """Ask for two solutions of a problem: the same prompt twice, with two seeds."""
    seeds = secrets.SystemRandom().sample(range(2**31), 2)
    requests = (Request(model, prompt_of(problem), temperature, seed, max_tokens) for seed in seeds)
    return tuple(Writing(source, request).start() for request in requests)


def write_again(writing: Writing) -> Writing:
    """Ask for the same with another seed."""
    seed = secrets.SystemRandom().randrange(2**31)
    return Writing(writing.source, replace(writing.request, seed=seed)).start()


def as_pair(problem: Problem, writings: tuple[Writing, Writing]) -> Pair:
    """Two replies as the pair that the store keeps."""
    first, second = (
        Generation(
            new_id(), w.request.model, w.request.prompt,
            {key: value for key, value in asdict(w.request).items() if key not in ("model", "prompt")},
            w.text, extract_code(w.text, problem.function_name).code,
        )
        for w in writings
    )  # fmt: skip
    return Pair(new_id(), problem.id, first, second)


# ---- servers ----------------------------------------------------------------------------------------------------------------


class Severable(httpx.HTTPTransport):
    """A connection that another thread can end while this one waits for an answer."""

    def __init__(self, stop: Stop):
        """stop: who asks for that."""
        super().__init__()
        self._stop = stop

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, and remember the connection it goes by."""
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
    """Make messages of what can go wrong on the way to a server; what a stop has broken is no fault."""
    try:
        yield
    except (ConnectionError, httpx.HTTPError, ValueError) as error:
        if stop.asked:
            return
        if isinstance(error, httpx.ReadTimeout):
            raise UserError(f"{name} at {url} sent nothing for {silence_seconds:g} s. Try a smaller model.") from error
        if isinstance(error, ConnectionError | httpx.ConnectError | httpx.ConnectTimeout):
            raise UserError(f"{name} at {url} cannot be reached. Start it, or say where it is.") from error
        raise UserError(f"{name} at {url}: {first_line(error)}. Expected a server that speaks its protocol.") from error


@dataclass(frozen=True)
class OllamaSource:
    """Ollama, through its own client. host None is what OLLAMA_HOST says, or this machine."""

    host: str | None
    silence_seconds: float

    def models(self) -> list[str]:
        """The models that are installed."""
        with self._client(Stop()) as client:
            return sorted(model.model for model in client.list().models if model.model)

    def stream(self, request: Request, stop: Stop) -> Iterator[str]:
        """The reply, in pieces."""
        options = {"temperature": request.temperature, "seed": request.seed, "num_predict": request.max_tokens}
        messages = [{"role": "user", "content": request.prompt}]
        with self._client(stop, request.model) as client:
            for part in client.chat(request.model, messages, stream=True, options=options):
                yield part.message.content or ""

    @contextmanager
    def _client(self, stop: Stop, model: str = ""):
        timeout = httpx.Timeout(self.silence_seconds, connect=CONNECT_SECONDS)
        # A prompt goes to the server that was named, and not where that redirects to.
        with ollama.Client(self.host, timeout=timeout, transport=Severable(stop), follow_redirects=False) as client:
            url = self.host or os.environ.get("OLLAMA_HOST") or "127.0.0.1:11434"
            with _faults_of_a_server("Ollama", url, self.silence_seconds, stop):
                try:
                    yield client
                except ollama.ResponseError as error:
                    if error.status_code == 404 and model:
                        raise UserError(f"Ollama has no model {model!r}.{PULL}ollama pull {model}") from error
                    raise UserError(f"Ollama at {url} says: {first_line(error)}.") from error


@dataclass(frozen=True)
class OpenAISource:
    """A server with OpenAI's /models and /chat/completions below url: vLLM, llama.cpp, LM Studio, ...

    The key, if it wants one, comes from the environment: OPENAI_API_KEY.
    """

    url: str
    silence_seconds: float

    def models(self) -> list[str]:
        """The models that it serves."""
        stop = Stop()
        with self._client(stop) as client:
            answer = client.get("models")
            _complain(answer, "")
            return sorted(str(model["id"]) for model in answer.json()["data"])

    def stream(self, request: Request, stop: Stop) -> Iterator[str]:
        """The reply, in pieces."""
        body = {
            "model": request.model, "messages": [{"role": "user", "content": request.prompt}], "stream": True,
            "temperature": request.temperature, "seed": request.seed, "max_tokens": request.max_tokens,
        }  # fmt: skip
        with self._client(stop) as client, client.stream("POST", "chat/completions", json=body) as answer:
            if not answer.is_success:
                answer.read()
            _complain(answer, request.model)
            for line in answer.iter_lines():
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
        raise UserError(f"The server says: {_said(event)}.")
    for choice in event.get("choices", []):
        yield (choice.get("delta") or {}).get("content") or ""


def _complain(answer: httpx.Response, model: str) -> None:
    """Raise UserError for an answer that is none."""
    if not answer.is_success:
        with suppress(ValueError):
            raise UserError(f"The server says: {_said(answer.json())} (status {answer.status_code}, model {model!r}).")
        raise UserError(f"The server answers with status {answer.status_code} (model {model!r}).")


def _said(event) -> str:
    error = event.get("error", event) if isinstance(event, dict) else event
    return str(error.get("message", error) if isinstance(error, dict) else error)[:300].rstrip(".")


def sources_of(config) -> dict[str, Source]:
    """The sources of a configuration, by the names that people choose from."""
    sources = {"Ollama": OllamaSource(config.ollama_host, config.silence_seconds)}
    if config.openai_url:
        sources["OpenAI's protocol"] = OpenAISource(config.openai_url, config.silence_seconds)
    return {**sources, "checkpoints": CheckpointSource(tuple(Path(folder) for folder in config.checkpoints))}
