"""Responses by many requests at a time; what fails for a while is tried again, and what a server does not answer is counted."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from preference_training.configuration.schema import RunConfig
from preference_training.core.errors import UserError
from preference_training.generation.servers import ServerError, retrying
from preference_training.rounds.prompts import LoopPrompt, as_json
from preference_training.rounds.served.notes import note_unanswered
from preference_training.rounds.served.protocols import Answer, Protocol

# How often a request is tried, and the pause before the first retry, in seconds.
ATTEMPTS, FIRST_PAUSE = 6, 1.0
# How a server says that it does not know what a request has: here n, for more than one response.
UNKNOWN = ("status 400", "status 422", "status 501")


# What gives the rows of samples: see ServedSampler.rows.
Rows = Callable[[Sequence[LoopPrompt], int, str, Path], Iterator[dict[str, Any]]]


class _Missing(NamedTuple):
    """Responses that a server did not give, for a reason; those from `first` to `count` of a prompt."""

    first: int
    reason: str


class ServedSampler:
    """Samples by a server.

    The seed of a response depends on the configured one, the round, the prompt and its number among the prompt's responses.
    """

    def __init__(self, protocol: Protocol, config: RunConfig):
        self.protocol, self.config = protocol, config
        self.takes_several = protocol.takes_several
        self.retries: Counter = Counter()
        # Of what threads share: the counts, and the tokenizer.
        self.sharing = threading.Lock()

    def rows(self, prompts: Sequence[LoopPrompt], count: int, stream: str, table: Path) -> Iterator[dict[str, Any]]:
        """The rows of `count` responses to each prompt, for a table. stream: the name of the round.

        What the server does not give is noted beside the table.

        Raises UserError where the server rejects requests, does not answer in time or at all, or answers no prompt.
        """
        self.retries.clear()
        found = self._all(prompts, partial(self._responses, count=count, stream=stream))
        missing = Counter()
        for prompt, (answers, lack) in zip(prompts, found, strict=True):
            if lack is not None:
                missing[lack.reason] += count - lack.first
                note_unanswered(table, prompt.prompt_id, range(lack.first, count), lack.reason)
            yield from (self._row(prompt, number, answer) for number, answer in enumerate(answers))
        for counter, what in ((self.retries, "requests were sent again"), (missing, "responses were not given")):
            if counter:
                reasons = "; ".join(f"{reason} ({number:,})" for reason, number in counter.most_common(3))
                print(f"{stream}: {counter.total():,} {what}: {reasons}", flush=True)
        if prompts and missing.total() == count * len(prompts):
            raise self._error(f"it answers none of {len(prompts):,} prompts: {missing.most_common(1)[0][0]}", "Check its log")

    def _all(self, prompts: Sequence[LoopPrompt], ask) -> list[tuple[list[Answer], _Missing | None]]:
        stopped = threading.Event()
        again = retrying(ATTEMPTS, FIRST_PAUSE, stopped, self._count_retry)
        # Its threads end with the process: one that is stopped does not wait for requests in progress.
        with ThreadPool(min(self.config.rounds.sampler_workers, max(1, len(prompts)))) as pool:
            try:
                return list(pool.imap(partial(ask, again), prompts))
            finally:
                stopped.set()

    def _responses(self, again: Any, prompt: LoopPrompt, count: int, stream: str) -> tuple[list[Answer], _Missing | None]:
        """The responses to a prompt, and what is missing of them."""
        seed = seed_of(self.config.seed, stream, prompt)
        answers: list[Answer] = []
        several, was_refused = self.takes_several, False
        while len(answers) < count:
            wanted = count - len(answers) if several else 1
            try:
                given = self._ask(again, prompt, wanted, seed + len(answers))
            except ServerError as error:
                if wanted > 1 and error.reason.startswith(UNKNOWN):
                    # Perhaps it is n that it does not know.
                    several, was_refused = False, True
                    continue
                return answers, _Missing(len(answers), error.reason)
            if len(given) < wanted or was_refused:
                self.takes_several = several = False
            answers += given[:wanted]
        return answers, None

    def _ask(self, again: Any, prompt: LoopPrompt, count: int, seed: int) -> list[Answer]:
        """What one request gives. Raises ServerError where another prompt may fare better, UserError where none can."""
        with self.sharing:
            body = self.protocol.body(prompt, count, seed)
        try:
            return again(self._once, body)
        except ServerError as error:
            if error.is_rejection:
                has = f"Expected a server that has the model {self.protocol.server.model}{self.protocol.server.key_hint()}"
                raise self._error(error.reason, has) from error
            if error.is_retryable:
                raise self._error(f"{error.reason}, {ATTEMPTS} times", "Start it, or name another one") from error
            raise

    def _once(self, body: dict) -> list[Answer]:
        server = self.protocol.server
        reply = server.send("POST", self.protocol.url, body)
        try:
            found = reply.json()
            with self.sharing:
                answers = self.protocol.answers(found)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ServerError("its reply cannot be read", is_retryable=False, has_answered=True) from error
        if not answers:
            raise ServerError("its reply has no response", is_retryable=False, has_answered=True)
        return answers

    def _row(self, prompt: LoopPrompt, number: int, answer: Answer) -> dict[str, Any]:
        return {
            "prompt_id": prompt.prompt_id,
            "number": number,
            **answer._asdict(),
            "logp_first": None,
            "model": self.protocol.identity,
        }

    def _count_retry(self, error: Any) -> None:
        with self.sharing:
            self.retries[error.reason] += 1

    def _error(self, reason: str, remedy: str) -> UserError:
        kept = "What has been sampled is kept: continue the loop with resume"
        return UserError(f"rounds.sampler: {self.protocol.url}: {reason}. {remedy}. {kept}.")


def seed_of(seed: int, stream: str, prompt: LoopPrompt) -> int:
    """The seed of a prompt's first response; the next ones have the next seeds. Below 2^31, which every server takes."""
    return xxhash.xxh3_64_intdigest(repr((seed, stream, as_json(prompt.prompt))).encode()) % 2**30
