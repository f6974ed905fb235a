"""Where answers come from: Ollama, any server of the OpenAI protocol, or a checkpoint of this framework.

A source lists its models and streams the reply to a request. The protocols are those of `preference_training.generation`.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from preference_collection.generation.asking import Request, SourceError
from preference_collection.generation.checkpoint_source import CheckpointSource, checkpoint_at
from preference_collection.generation.stopping import Stop, severable_session
from preference_training.core.errors import UserError, first_line, nearest
from preference_training.data.rows.templates import turns_of
from preference_training.generation.servers import SERVERS, TIMEOUT, ChatServer, Reply, ServerError

# The text before a command that the page offers to copy.
PULL = " Download it with: "

# Timeout of a connection attempt. Unit: seconds.
CONNECT_SECONDS = 5.0

OLLAMA_PORT = 11434


class Source(Protocol):
    """Where answers come from."""

    def models(self) -> list[str]:
        """The available models. Raises UserError if the source cannot be reached."""

    def stream(self, request: Request, stop: Stop) -> Iterator[Reply]:
        """Stream the reply in parts until it ends or is stopped. Raises UserError: SourceError where a retry may help."""


@dataclass(frozen=True)
class Model:
    """A model of a source; name is what the user calls it: ollama:NAME, openai:NAME, or a path."""

    source: Source
    model: str
    name: str

    def check(self) -> None:
        """Raise UserError if the source cannot be reached, or refuses. One without a list of models passes."""
        try:
            self.source.models()
        except SourceError as error:
            if error.is_final:
                raise


# ---- servers ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ServerSource:
    """A server of a protocol: kind is ollama or openai (vLLM, llama.cpp, LM Studio, ...).

    url: its address; None is the protocol's own. An API key for openai is read from the environment variable OPENAI_API_KEY.
    """

    kind: str
    url: str | None
    silence_seconds: float

    def models(self) -> list[str]:
        """The models that the server offers."""
        server = self._server("")
        try:
            return sorted(str(name) for name in server.listed(server.models()))
        except ServerError as error:
            raise self._source_error(server, error) from error
        except (ValueError, LookupError, TypeError) as error:
            raise SourceError(f"{self._said(server)} sent no list of models. Expected a compatible server.") from error

    def stream(self, request: Request, stop: Stop) -> Iterator[Reply]:
        """Stream the reply in parts."""
        server = self._server(request.model)
        settings = {"temperature": request.temperature, "seed": request.seed, "max_new_tokens": request.max_tokens}
        with severable_session(stop) as session:
            try:
                for part in server.parts(turns_of(request.prompt), settings, session):
                    yield part if isinstance(part.text, str) else replace(part, text="")
            except ServerError as error:
                # Closing the connection is an error like any other.
                if not stop.asked:
                    raise self._source_error(server, error) from error

    def _server(self, model: str) -> ChatServer:
        return SERVERS[self.kind](model, self.url, (CONNECT_SECONDS, self.silence_seconds))

    def _said(self, server: ChatServer) -> str:
        return f"{'Ollama' if self.kind == 'ollama' else 'The server'} at {server.base}"

    def _source_error(self, server: ChatServer, error: ServerError) -> SourceError:
        name, model = self._said(server), server.model
        if error.reason == TIMEOUT:
            return SourceError(f"{name} sent nothing for {self.silence_seconds:g} s. Try a smaller model.", is_retryable=True)
        if not error.has_answered:
            setting = "ollama_host" if self.kind == "ollama" else "openai_url"
            said = f"{name} cannot be reached. Start it, or set its address ({setting})."
            return SourceError(said, is_retryable=True, is_final=True)
        if self.kind == "ollama" and model and error.is_rejection and error.reason.startswith("status 404"):
            return SourceError(f"Ollama has no model {model!r}.{PULL}ollama pull {model}", is_final=True)
        hint = f" Expected one that has the model{server.key_hint()}." if error.is_rejection else ""
        said = f"{name} reports: {first_line(error, 300)}{f' (model {model!r})' if model else ''}.{hint}"
        return SourceError(said, error.is_retryable, error.pause, error.is_rejection)


def ollama_url(host: str | None) -> str:
    """The URL of Ollama from HOST, HOST:PORT or a URL; None is OLLAMA_HOST, or this machine. Raises UserError."""
    given = host or os.environ.get("OLLAMA_HOST") or "localhost"
    if given.startswith(("http://", "https://")):
        return given.rstrip("/")
    try:
        parts = urlsplit(f"//{given}")
        address, port = parts.hostname, parts.port or OLLAMA_PORT
    except ValueError:
        address = None
    if not address or "://" in given:
        raise UserError(f"ollama_host: found {given!r}, expected HOST:PORT or http://... or https://...")
    return f"http://{f'[{address}]' if ':' in address else address}:{port}{parts.path.rstrip('/')}"


# ---- by name ----------------------------------------------------------------------------------------------------------------


def sources_of(settings) -> dict[str, Source]:
    """The configured sources, by the names shown on the page."""
    sources: dict[str, Source] = {"Ollama": _server_source("ollama", settings)}
    if settings.openai_url:
        sources["OpenAI-compatible server"] = _server_source("openai", settings)
    return {**sources, "checkpoints": CheckpointSource(tuple(Path(folder) for folder in settings.checkpoints))}


def model_named(name: str, settings) -> Model:
    """The model that a name means: ollama:MODEL, openai:MODEL, or the path of a checkpoint or run.

    Sends nothing. Raises UserError for anything else.
    """
    kind, colon, model = name.partition(":")
    if not Path(name).exists() and colon and kind in SERVERS:
        if not model.strip():
            raise UserError(f"{name}: found no model, expected {kind}:MODEL, as the server names it.")
        server = _server_source(kind, settings)
        if kind == "openai" and server.url is None and not SERVERS[kind]("").key():
            raise UserError(f"{name}: expected the address of a server, openai_url=http://..., or a key in OPENAI_API_KEY.")
        return Model(server, model, name)
    if Path(name).exists():
        return Model(CheckpointSource(()), str(checkpoint_at(Path(name))), name)
    hint = nearest(kind, SERVERS, "") if colon else ""
    raise UserError(
        f"{name}: no such file{f'; {hint}' if hint else '.'} "
        "Expected ollama:MODEL, openai:MODEL, or the directory of a checkpoint or run."
    )


def _server_source(kind: str, settings) -> ServerSource:
    url = ollama_url(settings.ollama_host) if kind == "ollama" else settings.openai_url
    return ServerSource(kind, url, settings.silence_seconds)
