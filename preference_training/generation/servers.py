"""Language models behind HTTP, in the protocols of OpenAI, which many servers implement, and of Ollama.

What a server says of an error is untrusted text: one line of it is kept, without the key.
"""

import json
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from time import time
from typing import Any, ClassVar

from preference_training.configuration.checks.evaluation import KEY_VARIABLE
from preference_training.core.errors import UserError, nearest
from preference_training.data.records.record import Prompt, Turn, message_of
from preference_training.data.rows.templates import turns_of

# Characters of a server's error message that are kept.
MAX_REASON_LENGTH = 200
# Seconds to wait for a connection, and for the next part of a response: large models load when they are first asked.
CONNECTING, RESPONDING = 10.0, 600.0
# Requests in progress at a time, where there are many.
WORKERS = 8
# The longest pause before a retry, whatever a server asks for. Unit: seconds.
MAX_PAUSE = 120.0
# The reason of an error: the server said nothing for as long as one waits for it.
TIMEOUT = "timeout"


class ServerError(Exception):
    """A server gave no reply, for a short `reason`. pause: how long it asks to wait, in seconds.

    has_answered: whether it responded at all. is_rejection: it does not accept the key, or does not have the model.
    """

    def __init__(
        self,
        reason: str,
        is_retryable: bool = True,
        pause: float | None = None,
        has_answered: bool = False,
        is_rejection: bool = False,
    ):
        super().__init__(reason)
        self.reason, self.is_retryable, self.pause, self.has_answered = reason, is_retryable, pause, has_answered
        self.is_rejection = is_rejection


@dataclass(frozen=True)
class Reply:
    """What a model says, or a part of it: its text, why it ended (stop, length, ...; None if unknown), whether it refuses.

    prompt_tokens, tokens: the lengths of prompt and response, where they are known.
    """

    text: str
    ended: str | None = None
    is_refusal: bool = False
    prompt_tokens: int = 0
    tokens: int = 0


class ChatServer(ABC):
    """A language model behind HTTP. Subclasses implement a protocol: paths, request bodies and replies."""

    kind = ""
    default_url = ""
    path = ""
    models_path = ""
    # The protocol's names of settings, where they are not those of GenerationSettings.
    names: ClassVar[dict[str, str]] = {}

    def __init__(self, model: str, url: str | None = None, timeout: float | tuple[float, float] = (CONNECTING, RESPONDING)):
        self.model, self.timeout = model, timeout
        self.base = (url or self.default_url).rstrip("/").removesuffix(self.path)
        self.url = f"{self.base}{self.path}"

    @abstractmethod
    def body(self, messages: list[dict], settings: dict[str, Any], is_streamed: bool = False) -> dict:
        """The body of a request for a reply to messages. settings: some of GenerationSettings, by their names there."""

    @abstractmethod
    def reply(self, found: dict) -> Reply:
        """A reply that came whole. Raises LookupError or TypeError where it is not one."""

    def replies(self, found: dict) -> list[Reply]:
        """The replies that came whole to a request for several: one, where the protocol has no more. Raises as `reply` does."""
        return [self.reply(found)]

    @abstractmethod
    def part(self, line: bytes) -> Reply | None:
        """The part of a reply in a line; None for its end. Raises ValueError, LookupError or TypeError."""

    @abstractmethod
    def listed(self, found: dict) -> list[str]:
        """The names in a list of models. Raises LookupError or TypeError where it is not one."""

    @abstractmethod
    def served(self, found: dict) -> list:
        """What a list of models says about this one, or about all if it is not listed, without values that change."""

    def key(self) -> str | None:
        """The API key of the environment, if there is one."""
        return None

    def send(self, method: str, url: str, body: dict | None = None, is_streamed: bool = False, session=None):
        """Send a request, in a session of requests if one is given, and return its reply. Raises ServerError."""
        import requests

        try:
            # No redirects: the prompts and the key are for this server only.
            reply = (session or requests).request(
                method,
                url,
                json=body,
                auth=self._authorize,
                timeout=self.timeout,
                allow_redirects=False,
                stream=is_streamed,
            )
        except requests.ConnectTimeout as error:
            raise ServerError("unreachable") from error
        except requests.Timeout as error:
            raise ServerError(TIMEOUT) from error
        except requests.RequestException as error:
            raise ServerError("unreachable") from error
        if reply.status_code != 200:
            status, detail = reply.status_code, self._error_detail(reply)
            # A server without a list of models will not get one.
            is_retryable = status in (408, 409, 425, 429) or (status >= 500 and status != 501)
            is_rejection = status in (401, 403) or (method == "POST" and status == 404)
            pause = parse_retry_after(reply.headers.get("Retry-After"))
            raise ServerError(f"status {status}{detail}", is_retryable, pause, True, is_rejection)
        return reply

    def models(self) -> dict:
        """The list of models. Raises ServerError, and ValueError where it cannot be read."""
        return self.send("GET", f"{self.base}{self.models_path}").json()

    def parts(self, turns: Sequence[Turn], settings: dict[str, Any], session=None) -> Iterator[Reply]:
        """The parts of the response to a conversation, as they come. Raises ServerError."""
        import requests

        body = self.body([message_of(turn) for turn in turns], settings, is_streamed=True)
        with self.send("POST", self.url, body, is_streamed=True, session=session) as reply:
            try:
                for line in filter(None, reply.iter_lines()):
                    part = self.part(line)
                    if part is None:
                        return
                    yield part
            except requests.RequestException as error:
                # requests reports a silence within a reply as a lost connection.
                is_silence = any("ReadTimeoutError" in type(cause).__name__ for cause in error.args)
                raise ServerError(TIMEOUT if is_silence else "the connection was lost", has_answered=True) from error
            except (ValueError, LookupError, TypeError) as error:
                raise ServerError("its reply cannot be read", has_answered=True) from error

    def _error_detail(self, reply) -> str:
        """The first line of an error message, after a colon and without the API key."""
        try:
            found = error_message(reply.json())
        except (ValueError, RecursionError):
            found = reply.text
        line = next((line.strip() for line in found.splitlines() if line.strip()), "")
        line = "".join(character for character in line if character.isprintable())
        line = line.replace(self.key() or "\0", "...")[:MAX_REASON_LENGTH]
        return f": {line}" if line else ""

    def _authorize(self, request):
        if key := self.key():
            request.headers["Authorization"] = f"Bearer {key}"
        return request

    def has(self, names: list[str]) -> bool:
        """Whether its model is among those of a list."""
        return self.model in names

    def key_hint(self) -> str:
        """The end of a sentence on what a server expects besides its model."""
        return ""


class OpenAIServer(ChatServer):
    """A model behind the OpenAI protocol, which many servers implement."""

    kind = "openai"
    default_url = "https://api.openai.com/v1"
    path = "/chat/completions"
    models_path = "/models"
    # What OpenAI itself does not have is vLLM's.
    names: ClassVar = {"max_new_tokens": "max_tokens"}

    def body(self, messages: list[dict], settings: dict[str, Any], is_streamed: bool = False) -> dict:
        """A request of /chat/completions."""
        given = {self.names.get(name, name): value for name, value in settings.items()}
        return {"model": self.model, **given, "messages": messages} | ({"stream": True} if is_streamed else {})

    def reply(self, found: dict) -> Reply:
        """A reply of /chat/completions."""
        return self.replies(found)[0]

    def replies(self, found: dict) -> list[Reply]:
        """The choices of /chat/completions."""
        return [
            Reply(choice["message"]["content"], choice.get("finish_reason"), bool(choice["message"].get("refusal")))
            for choice in found["choices"]
        ]

    def part(self, line: bytes) -> Reply | None:
        """The part in a line of server-sent events; comments and other fields have no text."""
        field, _, value = line.partition(b":")
        if field != b"data":
            return Reply("")
        if value.strip() == b"[DONE]":
            return None
        found = json.loads(value)
        if error := error_message(found):
            raise ServerError(error[:MAX_REASON_LENGTH], has_answered=True)
        # The last one may have no choices, but usage.
        choice = found["choices"][0] if found["choices"] else {"delta": {}}
        return Reply(choice["delta"].get("content") or "", choice.get("finish_reason"))

    def listed(self, found: dict) -> list[str]:
        """The names in /models."""
        return [each["id"] for each in found["data"]]

    def served(self, found: dict) -> list:
        """What /models says, without the time and the permission ids that vLLM generates for each call."""
        models = [{key: value for key, value in each.items() if key not in ("created", "permission")} for each in found["data"]]
        return [each for each in models if each["id"] == self.model] or models

    def key(self) -> str | None:
        """The environment's OPENAI_API_KEY."""
        return os.environ.get(KEY_VARIABLE)

    def key_hint(self) -> str:
        """Where the key is looked for."""
        return f" and accepts the key in {KEY_VARIABLE}" + ("" if self.key() else ", which is not set")


class OllamaServer(ChatServer):
    """A model behind the protocol of Ollama."""

    kind = "ollama"
    default_url = "http://localhost:11434"
    path = "/api/chat"
    models_path = "/api/tags"
    names: ClassVar = {"max_new_tokens": "num_predict", "repetition_penalty": "repeat_penalty"}

    def body(self, messages: list[dict], settings: dict[str, Any], is_streamed: bool = False) -> dict:
        """A request of /api/chat."""
        options = {self.names.get(name, name): value for name, value in settings.items()}
        return {"model": self.model, "stream": is_streamed, "options": options, "messages": messages}

    def reply(self, found: dict) -> Reply:
        """A reply of /api/chat."""
        return Reply(found["message"]["content"], found.get("done_reason"))

    def part(self, line: bytes) -> Reply | None:
        """The part in a line of JSON."""
        found = json.loads(line)
        if error := error_message(found):
            raise ServerError(error[:MAX_REASON_LENGTH], has_answered=True)
        return self.reply(found)

    def listed(self, found: dict) -> list[str]:
        """The names in /api/tags."""
        return [each["name"] for each in found["models"]]

    def has(self, names: list[str]) -> bool:
        """Whether its model is among those of a list; a name without a tag means latest."""
        return self.model in names or f"{self.model}:latest" in names

    def served(self, found: dict) -> list:
        """The digests in /api/tags: hashes of weights, template and parameters."""
        digests = {each["name"]: each["digest"] for each in found["models"]}
        name = self.model if ":" in self.model else f"{self.model}:latest"
        return [digests[name]] if name in digests else sorted(digests.items())


# ---- again ------------------------------------------------------------------------------------------------------------------


def retrying(attempts: int, first_pause: float, stopped: threading.Event, count: Callable[[Any], None]):
    """What calls a function again where it raises an error with `is_retryable`, after exponential backoff with jitter.

    An error's `pause`, in seconds, is waited for too. stopped: set, it ends waiting and further attempts. count: gets the error
    before each retry. The last error is raised.
    """
    import tenacity

    backoff = tenacity.wait_exponential_jitter(first_pause, MAX_PAUSE, jitter=first_pause)
    requested = tenacity.wait_exception(lambda error: min(getattr(error, "pause", None) or 0.0, MAX_PAUSE))
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: getattr(error, "is_retryable", False)),
        wait=lambda state: max(backoff(state), requested(state)),
        stop=tenacity.stop_after_attempt(attempts) | tenacity.stop_when_event_set(stopped),
        sleep=tenacity.sleep_using_event(stopped),
        before_sleep=lambda state: count(state.outcome.exception()),
        reraise=True,
    )


# ---- to talk to ------------------------------------------------------------------------------------------------------------


class ServedModel:
    """A model behind a server, to talk to. A server that gives no reply is a UserError, which says what to do."""

    def __init__(self, server: ChatServer):
        self.server, self.name = server, f"{server.kind}:{server.model}"

    def check(self) -> None:
        """Raise UserError where nobody listens, or where the server lists its models without this one."""
        with self._user_errors():
            try:
                names = self.server.listed(self.server.models())
            except ServerError as error:
                if error.has_answered and not error.is_rejection:
                    return
                raise
            except (ValueError, LookupError, TypeError):
                return
        if names and not self.server.has(names):
            raise UserError(f"{self.name}: {self.server.base} has no such model; {nearest(self.server.model, names)}")

    def respond(self, turns: Sequence[Turn], changes: dict[str, Any], say: Callable[[str], None]) -> Reply:
        """The response to a conversation, each part of which goes to `say` as it comes. Raises UserError."""
        text, ended = "", None
        with self._user_errors():
            for part in self.server.parts(turns, changes):
                text, ended = text + part.text, part.ended or ended
                say(part.text)
        return Reply(text, ended)

    def responses(self, prompts: Sequence[Prompt], changes: dict[str, Any]) -> list[str]:
        """The responses to several prompts, some of which are asked for at a time. Raises UserError."""
        with ThreadPoolExecutor(WORKERS) as pool:
            return list(pool.map(lambda prompt: self.respond(turns_of(prompt), changes, lambda _: None).text, prompts))

    @contextmanager
    def _user_errors(self):
        """Context in which a server that gives no reply is the user's to mend: one message says what to do."""
        try:
            yield
        except ServerError as error:
            raise UserError(f"{self.name}: {self.server.url}: {error.reason}. {self._remedy(error)}") from error

    def _remedy(self, error: ServerError) -> str:
        if not error.has_answered:
            return "Start the server, or name another one with --url."
        if error.is_rejection:
            return f"Expected a server that has the model{self.server.key_hint()}."
        return "Check the server's log, the model, and the settings (/set)."


SERVERS: dict[str, type[ChatServer]] = {server.kind: server for server in (OpenAIServer, OllamaServer)}


def served_model(name: str, url: str | None = None) -> ServedModel | None:
    """The model that a name such as ollama:llama3.1 means; None for other names. Raises UserError where it lacks a part."""
    kind, _, model = name.partition(":")
    if kind not in SERVERS or Path(name).exists():
        return None
    if not model:
        raise UserError(f"{name}: found no model, expected {kind}:MODEL, as the server names it.")
    if url is not None and not url.startswith(("http://", "https://")):
        raise UserError(f"--url: found {url!r}, expected http://... or https://...")
    if kind == "openai" and url is None and not os.environ.get(KEY_VARIABLE):
        raise UserError(f"{name}: openai needs a key in the environment, {KEY_VARIABLE}, or the address of a server, --url.")
    return ServedModel(SERVERS[kind](model, url))


# ---- replies ----------------------------------------------------------------------------------------------------------------


def error_message(reply) -> str:
    """The error message in a reply, in any of the formats that servers use; empty without one."""
    if not isinstance(reply, dict):
        return json.dumps(reply)
    error = reply.get("error")
    found = error.get("message") if isinstance(error, dict) else error
    for text in (found, reply.get("message"), reply.get("detail")):
        if isinstance(text, str):
            return text
    return ""


def parse_retry_after(header: str | None) -> float | None:
    """The pause in a Retry-After header, in seconds, from a number or a date; None for anything else."""
    try:
        return max(0.0, float(header))
    except (TypeError, ValueError):
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time())
    except (TypeError, ValueError):
        return None
