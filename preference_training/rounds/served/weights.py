"""The weights of a vLLM that runs: replaced by those of a checkpoint, or an adapter loaded beside them.

Nothing is in progress while weights are replaced, and what it had cached under the former ones is dropped. Adapters have a name
for each content, under which nothing was cached before.
"""

import re
import time
from pathlib import Path
from typing import Any

from preference_training.core.errors import UserError
from preference_training.core.values import hash_values
from preference_training.generation.servers import OpenAIServer, ServerError

RELOAD, RESET, METRICS, INFO = "/collective_rpc", "/reset_prefix_cache", "/metrics", "/server_info"
LOAD_ADAPTER, UNLOAD_ADAPTER = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
# The names of adapters that rounds have loaded.
ADAPTER_PREFIX = "policy-"
# Seconds between two looks at a server that is to become idle.
BETWEEN_LOOKS = 0.2
RUNNING = re.compile(r"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? +([0-9.e+]+)", re.MULTILINE)


class Vllm:
    """A vLLM whose weights can be set. Its address ends in /v1. wait: seconds in which it is to become idle."""

    def __init__(self, server: OpenAIServer, wait: float):
        self.server, self.wait = server, wait
        self.root = server.base.removesuffix("/v1")

    def has(self, path: str) -> bool:
        """Whether it has an endpoint for POST: asked by GET, which is then not allowed. Raises UserError."""
        try:
            self.server.send("GET", self.root + path)
        except ServerError as error:
            if not error.has_answered:
                raise self._error(path, error.reason, "Start it first") from error
            return error.reason.startswith("status 405")
        return True

    def reload(self, directory: Path | str) -> None:
        """Replace its weights by those of a checkpoint, which it reads itself. Raises UserError."""
        self.become_idle()
        try:
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}}
            self.server.send("POST", self.root + RELOAD, body)
        except ServerError as error:
            remedy = f"Expected a vLLM that runs, with the model of the loop, and that sees the folder {directory}"
            raise self._error(RELOAD, error.reason, remedy) from error
        self.drop_cache()

    def become_idle(self) -> None:
        """Wait until it has no requests in progress. Raises UserError where it has some for too long."""
        end = time.monotonic() + self.wait
        while (count := self._in_progress()) > 0:
            if time.monotonic() > end:
                raise self._error(METRICS, f"{count} requests are in progress, not ours", "Stop its other clients")
            time.sleep(BETWEEN_LOOKS)

    def _in_progress(self) -> int:
        try:
            text = self.server.send("GET", self.root + METRICS).text
        except ServerError as error:
            raise self._error(METRICS, error.reason, "Its metrics say when it is idle: do not switch them off") from error
        found = RUNNING.findall(text)
        if not found:
            raise self._error(METRICS, "it does not say how many requests are in progress", "Expected a vLLM")
        return int(sum(map(float, found)))

    def drop_cache(self) -> None:
        """Drop what it has computed of earlier prompts. Raises UserError where it keeps that."""
        end = time.monotonic() + self.wait
        while True:
            try:
                reply = self.server.send("POST", self.root + RESET)
                # Older versions say nothing where it has worked.
                if not reply.content or reply.json().get("success") is True:
                    return
            except (ServerError, ValueError, AttributeError) as error:
                raise self._error(RESET, getattr(error, "reason", "its reply cannot be read"), "Restart it") from error
            if time.monotonic() > end:
                raise self._error(RESET, "it keeps what it computed under the former weights", "Stop its other clients")
            time.sleep(BETWEEN_LOOKS)

    def load_adapter(self, directory: Path, content: str) -> str:
        """Load an adapter, and unload those of earlier rounds; its name. content: a hash of all weights. Raises UserError."""
        name = ADAPTER_PREFIX + hash_values(content)[:16]
        try:
            loaded = [each for each in self.server.listed(self.server.models()) if each.startswith(ADAPTER_PREFIX)]
            if name not in loaded:
                body = {"lora_name": name, "lora_path": str(directory)}
                self.server.send("POST", self.root + LOAD_ADAPTER, body)
            for other in loaded:
                if other != name:
                    self.server.send("POST", self.root + UNLOAD_ADAPTER, {"lora_name": other})
        except (ServerError, ValueError, LookupError, TypeError) as error:
            remedy = (
                f"Expected a vLLM with --enable-lora and a --max-lora-rank of at least the adapter's, that sees {directory}"
            )
            raise self._error(LOAD_ADAPTER, getattr(error, "reason", "its models cannot be read"), remedy) from error
        return name

    def dtype(self) -> str | None:
        """The dtype that it computes in; None where it does not say."""
        try:
            found: Any = self.server.send("GET", f"{self.root}{INFO}?config_format=json").json()
            return str(found["vllm_config"]["model_config"]["dtype"]).removeprefix("torch.")
        except (ServerError, ValueError, LookupError, TypeError):
            return None

    def _error(self, path: str, reason: str, remedy: str) -> UserError:
        return UserError(f"rounds.sampler: {self.root}{path}: {reason}. {remedy}; then continue the loop with resume.")
