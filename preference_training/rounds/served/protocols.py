"""How each protocol asks a server for responses to a prompt, and how it returns them.

The policy is asked by token ids, so that it reads a prompt as training renders it, and its token ids and log-probs come back.
Another model is asked by messages, which its server renders as that model needs it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from preference_training.configuration.sections import RoundsConfig
from preference_training.core.errors import UserError
from preference_training.core.values import hash_values
from preference_training.data.records.record import message_of
from preference_training.data.rows.templates import turns_of
from preference_training.generation.chat_format import with_system
from preference_training.generation.servers import ChatServer, OllamaServer, OpenAIServer, ServerError
from preference_training.rounds.prompts import LoopPrompt

if TYPE_CHECKING:
    from preference_training.rounds.sampling import Policy

# Where each protocol lies below the address of a server.
OPENAI, OLLAMA = "/v1", "/api"
# Seconds to wait for a connection.
CONNECTING = 10.0


def server_at(rounds: RoundsConfig, model: str = "") -> ChatServer:
    """The server that `rounds.sampler` names, by a protocol that its address says, for a model there."""
    url, timeout = rounds.sampler.rstrip("/"), (CONNECTING, rounds.sampler_timeout)
    if url.endswith(OLLAMA):
        return OllamaServer(model, url.removesuffix(OLLAMA), timeout)
    return OpenAIServer(model, url if url.endswith(OPENAI) else url + OPENAI, timeout)


class Answer(NamedTuple):
    """A response. ended: by itself, not by its limit. token_ids, logp: None where the server does not say.

    logp: the log-prob of all its tokens at temperature 1.
    """

    text: str
    ended: bool
    n_tokens: int
    token_ids: list[int] | None = None
    logp: float | None = None


class Protocol(ABC):
    """Requests for responses, and what is read of replies. identity: of the model, for the column `model` of samples."""

    # Whether one request may be for several responses, `n`.
    takes_several: ClassVar[bool] = True
    server: ChatServer
    identity: str

    @property
    @abstractmethod
    def url(self) -> str:
        """Where requests go."""

    @abstractmethod
    def body(self, prompt: LoopPrompt, count: int, seed: int) -> dict[str, Any]:
        """The body of a request for `count` responses to a prompt."""

    @abstractmethod
    def answers(self, found: dict) -> list[Answer]:
        """The responses in a reply. Raises ServerError for what is none; LookupError, TypeError, ValueError for garbage."""


class TokenProtocol(Protocol):
    """The policy in a vLLM: its /v1/completions takes token ids, and returns token ids with their log-probs."""

    def __init__(self, server: ChatServer, policy: "Policy", longest: int | None):
        self.server, self.policy, self.identity = server, policy, policy.identity
        config = policy.config
        self.longest = min(policy.context or config.max_length, config.max_length, longest or config.max_length)

    @property
    def url(self) -> str:
        """Where requests go."""
        return f"{self.server.base}/completions"

    def body(self, prompt: LoopPrompt, count: int, seed: int) -> dict[str, Any]:
        """A request of /v1/completions. Raises UserError where a prompt leaves no room for a response."""
        rounds, ids = self.policy.config.rounds, self.policy.prompt_ids(prompt)
        room = self.longest - len(ids)
        if room < 1:
            raise UserError(
                f"rounds.sampler: prompt {prompt.prompt_id} has {len(ids):,} tokens, and {self.server.base} reads "
                f"{self.longest:,}. Start it with a larger --max-model-len, or remove the prompt."
            )
        limit = min(rounds.max_new_tokens, room)
        return self.request(ids, limit, seed, n=count, temperature=rounds.temperature, top_p=rounds.top_p)

    def request(self, ids: Sequence[int], limit: int, seed: int, **values: Any) -> dict[str, Any]:
        """A request for responses to token ids, from the model's own distribution but for `values`.

        What a model's generation_config.json advises is the server's default, and not wanted here.
        """
        neutral = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        stops = {"stop": list(self.policy.format.stops)} if self.policy.format.stops else {}
        asked = {"logprobs": 0, "return_token_ids": True, "stop_token_ids": sorted(self.policy.ends.tokens)}
        return {
            "model": self.server.model,
            "prompt": list(ids),
            "max_tokens": limit,
            "seed": seed,
            **neutral,
            **asked,
            **stops,
            **values,
        }

    def answers(self, found: dict) -> list[Answer]:
        """The choices of /v1/completions."""
        return [self._answer(choice) for choice in found["choices"]]

    def _answer(self, choice: dict) -> Answer:
        ids, logps = tokens_of(choice)
        text, ended = self.policy.text(ids)
        return Answer(text, ended or choice["finish_reason"] == "stop", len(ids), ids, math.fsum(logps))


def tokens_of(choice: dict) -> tuple[list[int], list[float]]:
    """The token ids of a choice, and their log-probs. Raises as `Protocol.answers` does."""
    ids, logps = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    if choice["finish_reason"] not in ("stop", "length"):
        raise ServerError(f"it ended a response with {str(choice['finish_reason'])[:40]}", has_answered=True)
    if not ids or len(ids) != len(logps) or not all(type(each) is int for each in ids):
        raise ValueError("no token ids with their log-probs")
    if not all(isinstance(each, int | float) and math.isfinite(each) for each in logps):
        raise ValueError("log-probs that are no numbers")
    return ids, logps


class ChatProtocol(Protocol):
    """Another model, behind a protocol for chats. tokenizer: the policy's, which counts the tokens of responses."""

    def __init__(self, server: ChatServer, policy: "Policy", served: list):
        self.server, self.policy = server, policy
        self.takes_several = isinstance(server, OpenAIServer)
        self.identity = f"{server.kind}:{server.model} {hash_values(served)}"

    @property
    def url(self) -> str:
        """Where requests go."""
        return self.server.url

    def body(self, prompt: LoopPrompt, count: int, seed: int) -> dict[str, Any]:
        """A request for replies to the messages of a prompt."""
        config = self.policy.config
        rounds = config.rounds
        settings = {
            "temperature": rounds.temperature,
            "top_p": rounds.top_p,
            "max_new_tokens": rounds.max_new_tokens,
            "seed": seed,
        }
        if stops := self.policy.format.stops:
            settings["stop"] = list(stops)
        if self.takes_several:
            settings["n"] = count
        else:
            # Ollama cuts the beginning of what is longer than its default, and says nothing.
            settings["num_ctx"] = config.max_length + rounds.max_new_tokens
        turns = turns_of(with_system(prompt.prompt, config.system_prompt))
        return self.server.body([message_of(turn) for turn in turns], settings)

    def answers(self, found: dict) -> list[Answer]:
        """The replies to a request."""
        return [self._answer(reply) for reply in self.server.replies(found)]

    def _answer(self, reply) -> Answer:
        if reply.is_refusal or reply.ended == "content_filter":
            raise ServerError("refused", is_retryable=False, has_answered=True)
        if not isinstance(reply.text, str):
            raise TypeError("no text")
        text, cut = self.policy.cut(reply.text)
        count = len(self.policy.tokenizer(text, add_special_tokens=False).input_ids)
        return Answer(text, cut or reply.ended != "length", count)
