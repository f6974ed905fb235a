"""What a judge is: it scores responses to prompts, many at once.

A new judge is a class with these attributes and a line in `choice.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from preference_training.data.records.record import Prompt, message_of


class JudgedInput(NamedTuple):
    """A response to score. prompt: a text, or the turns of a conversation. row: the other columns of the prompt's row.

    For a judge that compares, `among` has the responses of the same policy to the prompt, this one included, each once; of a
    held-out prompt, `against` has those of the model before the first round, and is empty where this one is that model's.
    """

    prompt: Prompt
    response: str
    row: dict[str, Any]
    among: tuple[str, ...] = ()
    against: tuple[str, ...] = ()

    @property
    def plain_prompt(self) -> str | list[dict]:
        """The prompt as users write it: a text, or messages with role and content."""
        return self.prompt if isinstance(self.prompt, str) else [message_of(turn) for turn in self.prompt]


class Score(NamedTuple):
    """What a judge says of a response: a finite number, the higher the better; None where it cannot judge. reason: why."""

    value: float | None
    reason: str | None = None


# Keeps the scores of samples.
Keep = Callable[[Sequence[JudgedInput], Sequence[Score]], None]


class PendingError(Exception):
    """A judge has no verdicts yet, as where people give them; the message says what to do. The loop stops, and can go on."""


class Judge(ABC):
    """Scores responses.

    name: as messages call it. identity: everything that a score depends on besides the response, as a text: scores of one
    identity are never asked for twice. at_once: the responses handed over together; their scores are kept before the next.
    compares: whether a score depends on the other responses to the prompt too.
    """

    at_once: int = 64
    compares = False
    name: str
    identity: str

    @abstractmethod
    def judge(self, samples: Sequence[JudgedInput]) -> list[Score]:
        """A score for each response. Raises UserError, and PendingError where the scores come later."""

    def judge_each(self, samples: Sequence[JudgedInput], keep: Keep) -> None:
        """Have each score kept as soon as it is known, at the latest after `at_once` of them. Raises what `judge` raises."""
        for start in range(0, len(samples), self.at_once):
            some = samples[start : start + self.at_once]
            keep(some, self.judge(some))

    def facts(self, samples: Sequence[JudgedInput]) -> dict[str, Any]:
        """What is to be known of the scores of these samples, all of which were judged, as plain values for the summary."""
        return {}

    def close(self) -> None:  # noqa: B027  most judges hold nothing
        """Release what the judge holds: processes, connections, memory."""
