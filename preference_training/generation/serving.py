"""Models of this process behind HTTP, in OpenAI's protocol: /v1/chat/completions, also streamed, and /v1/models.

For one person on one machine: requests are answered one after another, each from where the kept cache ends.
"""

import json
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from preference_training.core.errors import UserError
from preference_training.data.records.record import Turn
from preference_training.data.records.validation import turn_error
from preference_training.generation.chat import BEFORE_TRAINING, ChatModel, Responder
from preference_training.generation.chat_format import with_system
from preference_training.generation.servers import Reply

CHAT, MODELS, HEALTH = "/v1/chat/completions", "/v1/models", "/health"
# Most bytes in a request.
MAX_BODY = 16 * 2**20
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
# The settings that a request may have, and their names here.
SETTINGS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "repetition_penalty": "repetition_penalty",
    "seed": "seed",
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
}


class RequestError(Exception):
    """A request that is refused, with an HTTP status."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class ChatRequest:
    """A request for a response. with_usage: a stream ends with the numbers of tokens."""

    model: ChatModel
    name: str
    turns: tuple[Turn, ...]
    changes: dict[str, Any]
    stops: tuple[str, ...] = ()
    is_streamed: bool = False
    with_usage: bool = False

    @classmethod
    def read(cls, body: Any, models: dict[str, ChatModel]) -> "ChatRequest":
        """The request in a body. Raises RequestError."""
        if not isinstance(body, dict):
            raise RequestError("the body is not a JSON object")
        name = body.get("model") or next(iter(models))
        if name not in models:
            raise RequestError(f"model {name!r} is not served here, but {', '.join(models)}", 404)
        if body.get("n") not in (None, 1):
            raise RequestError("n: only one response to a request is supported")
        for unsupported in ("tools", "logprobs"):
            if body.get(unsupported):
                raise RequestError(f"{unsupported} is not supported")
        changes = {ours: body[theirs] for theirs, ours in SETTINGS.items() if body.get(theirs) is not None}
        try:
            models[name].settings.changed(changes)
        except (UserError, TypeError) as error:
            raise RequestError(str(error)) from error
        stops = body.get("stop") or ()
        stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise RequestError("stop: expected a text, or a list of texts")
        turns = with_system(_turns(body.get("messages")), models[name].system_prompt)
        wants = body.get("stream_options") or {}
        return cls(models[name], name, turns, changes, stops, bool(body.get("stream")), bool(wants.get("include_usage")))


def _turns(messages: Any) -> tuple[Turn, ...]:
    """The turns of a request's messages. Raises RequestError."""
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages: expected a list of {role, content}")
    turns = []
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise RequestError(f"messages[{number}]: expected one of the roles {', '.join(ROLES)}")
        turn = Turn(ROLES[role], _content(message.get("content")))
        if problem := turn_error(turn):
            raise RequestError(f"messages[{number}] {problem}")
        turns.append(turn)
    return tuple(turns)


def _content(content: Any) -> Any:
    """The content of a message: a text, or parts of type text."""
    if not isinstance(content, list):
        return content
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        raise RequestError("content: expected a text, or parts of type text")
    return "".join(str(part.get("text", "")) for part in content)


class ModelServer(ThreadingHTTPServer):
    """Listens for requests. models: by the names that clients ask for; the first one answers those without a name."""

    daemon_threads = True

    def __init__(self, models: dict[str, ChatModel], host: str, port: int):
        self.models, self.started = models, int(time.time())
        self.computing = threading.Lock()
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--port: cannot listen at {host}:{port}: {reason}. Choose another port.") from error

    @property
    def url(self) -> str:
        """The address for clients."""
        return f"http://{self.server_address[0]!s}:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    """Answers a request."""

    server: ModelServer

    def do_GET(self) -> None:
        """Say which models are served."""
        path = self.path.partition("?")[0].rstrip("/")
        if path == HEALTH:
            self._send({"status": "ok"})
        elif path == MODELS:
            facts = {"object": "model", "created": self.server.started, "owned_by": "preference_training"}
            self._send({"object": "list", "data": [{"id": name, **facts} for name in self.server.models]})
        else:
            self._refuse(RequestError(f"no such page; there are {CHAT} and {MODELS}", 404))

    def do_POST(self) -> None:
        """Respond to a conversation."""
        try:
            request = self._request()
            with self.server.computing:
                self._respond(request)
        except RequestError as error:
            self._refuse(error)
        except UserError as error:
            self._refuse(RequestError(str(error)))
        except ConnectionError:
            # The client has left, which ends the response.
            self.close_connection = True

    def _request(self) -> ChatRequest:
        if self.path.partition("?")[0].rstrip("/") != CHAT:
            raise RequestError(f"no such page; there are {CHAT} and {MODELS}", 404)
        try:
            length = int(self.headers.get("Content-Length") or 0)
            if not 0 <= length <= MAX_BODY:
                raise RequestError(f"the body is larger than {MAX_BODY:,} bytes", 413)
            body = json.loads(self.rfile.read(length))
        except (ValueError, RecursionError) as error:
            raise RequestError("the body is not JSON") from error
        return ChatRequest.read(body, self.server.models)

    def _respond(self, request: ChatRequest) -> None:
        answer = _Answer(request)
        if not request.is_streamed:
            self._send(answer.whole(request.model.respond(request.turns, request.changes, lambda _: None, request.stops)))
            return
        # Before the head of a response, so that what cannot be asked for has its status.
        request.model.prompt_ids(request.turns)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        self._event(answer.part({"role": "assistant", "content": ""}))

        def say(text: str) -> None:
            if text:
                self._event(answer.part({"content": text}))

        reply = request.model.respond(request.turns, request.changes, say, request.stops)
        self._event(answer.part({}, reply.ended))
        if request.with_usage:
            self._event(answer.part(None) | {"usage": usage(reply)})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, found: dict) -> None:
        self.wfile.write(f"data: {json.dumps(found, ensure_ascii=False)}\n\n".encode())
        self.wfile.flush()

    def _refuse(self, error: RequestError) -> None:
        self._send({"error": {"message": str(error), "type": "invalid_request_error", "code": error.status}}, error.status)

    def _send(self, found: dict, status: int = 200) -> None:
        content = json.dumps(found, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: prompts are the user's."""


class _Answer:
    """The JSON of a response, whole or in parts."""

    def __init__(self, request: ChatRequest):
        self.facts = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.name}

    def whole(self, reply: Reply) -> dict:
        """A response."""
        message = {"role": "assistant", "content": reply.text}
        choices = [{"index": 0, "message": message, "finish_reason": reply.ended}]
        return {**self.facts, "object": "chat.completion", "choices": choices, "usage": usage(reply)}

    def part(self, delta: dict | None, ended: str | None = None) -> dict:
        """A part of a response; None is one without any text."""
        choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": ended}]
        return {**self.facts, "object": "chat.completion.chunk", "choices": choices}


def usage(reply: Reply) -> dict:
    """The numbers of tokens of a response."""
    total = reply.prompt_tokens + reply.tokens
    return {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.tokens, "total_tokens": total}


def served_names(responders: Sequence[Responder], name: str | None) -> dict[str, ChatModel]:
    """Models by the names that clients ask for: `name`, or else their own; the last one first. Raises UserError for servers."""
    found = {}
    for each in reversed(responders):
        if not isinstance(each, ChatModel):
            raise UserError(f"{each.name} is served already. Expected a model of this machine.")
        own = "reference" if each.name == BEFORE_TRAINING else each.name.partition(" ")[0]
        found[own if found or name is None else name] = each
    return found


def example(server: ModelServer) -> str:
    """What is served, and how to ask for it."""
    [name, *_] = server.models
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello!"}]})
    command = f"curl {server.url}/chat/completions -H 'Content-Type: application/json' -d '{body}'"
    return f"serving {' and '.join(server.models)} at {server.url}, Ctrl-C ends it\n{command}"
