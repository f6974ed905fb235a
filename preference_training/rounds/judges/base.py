"""What a judge is: it scores responses to prompts, many at once.

A new judge is a class with these attributes and a line in `choice.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from preference_training.data.rows.records import Prompt, message_of


class JudgedInput(NamedTuple):
    """A response to score. prompt: a text, or the turns of a conversation. row: the other columns of the prompt's row."""

    prompt: Prompt
    response: str
    row: dict[str, Any]

    @property
    def plain_prompt(self) -> str | list[dict]:
        """The prompt as users write it: a text, or messages with role and content."""
        return self.prompt if isinstance(self.prompt, str) else [message_of(turn) for turn in self.prompt]


class Score(NamedTuple):
    """What a judge says of a response: a finite number, the higher the better; None where it cannot judge. reason: why."""

    value: float | None
    reason: str | None = None


class PendingError(Exception):
    """A judge has no verdicts yet, as where people give them; the message says what to do. The loop stops, and can go on."""


class Judge(ABC):
    """Scores responses.

    name: as messages call it. identity: everything that a score depends on besides the response, as a text: scores of one
    identity are never asked for twice. at_once: the responses handed over together; their scores are kept before the next.
    """

    at_once: ClassVar[int] = 64
    name: str
    identity: str

    @abstractmethod
    def judge(self, samples: Sequence[JudgedInput]) -> list[Score]:
        """A score for each response. Raises UserError, and PendingError where the scores come later."""

    def close(self) -> None:  # noqa: B027  most judges hold nothing
        """Let go of what the judge holds: processes, connections, memory."""
