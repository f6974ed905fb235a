"""What models are asked: a task with an instruction, and how to sample the reply."""

import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from preference_training.core.errors import UserError
from preference_training.data.records.record import Prompt, Turn
from preference_training.data.rows.templates import turns_of

# The part of an instruction that stands for the name of the task's function.
FUNCTION_NAME = "{function_name}"


@dataclass(frozen=True)
class Request:
    """A request to a model. prompt: exactly what it is given. seed makes sampling reproducible if the server honors it."""

    model: str
    prompt: Prompt
    temperature: float
    seed: int
    max_tokens: int


@dataclass(frozen=True)
class Sampling:
    """How answers are asked for. instruction: the text that is added to a task; {function_name} is the name of its function."""

    temperature: float
    max_tokens: int
    instruction: str


class SourceError(UserError):
    """A source gave no reply. is_retryable: a repetition may succeed, after a pause (in seconds) if the server asks for one.

    is_final: the error is not of this request; if it remains, no other request will do better.
    """

    def __init__(self, message: str, is_retryable: bool = False, pause: float | None = None, is_final: bool = False):
        """message: for the user."""
        super().__init__(message)
        self.is_retryable, self.pause, self.is_final = is_retryable, pause, is_final


def instruction_for(task, instruction: str | None) -> str:
    """The instruction of the settings as it is for a task: with the name of its function.

    Tasks of text have none, nor have tasks without a function name if it asks for one.
    """
    if task.kind != "code" or not instruction or (FUNCTION_NAME in instruction and not task.function_name):
        return ""
    return filled(instruction, task)


def filled(instruction: str, task) -> str:
    """An instruction with the name of a task's function."""
    return instruction.replace(FUNCTION_NAME, task.function_name).strip()


def with_instruction(prompt: Prompt, instruction: str) -> Prompt:
    """A prompt that ends with an instruction. In a conversation the last turn of the user gets it.

    Without such a turn it becomes the system turn. Other turns stay as they are.
    """
    if not instruction.strip():
        return prompt
    turns = turns_of(prompt)
    if isinstance(prompt, str) and turns == (Turn("user", prompt),):
        return _joined(prompt, instruction)
    users = [place for place, turn in enumerate(turns) if turn.role == "user"]
    if not users:
        return (Turn("system", instruction), *turns)
    last = users[-1]
    return (*turns[:last], turns[last]._replace(content=_joined(turns[last].content, instruction)), *turns[last + 1 :])


def _joined(text: str, instruction: str) -> str:
    return f"{text.rstrip()}\n\n{instruction}"


def new_seeds(count: int) -> list[int]:
    """Different seeds, at random."""
    return secrets.SystemRandom().sample(range(2**31), count)


def requests_for(task, model: str, sampling: Sampling, seeds: Iterable[int]) -> list[Request]:
    """Requests for answers to a task: the same prompt with each seed."""
    prompt = with_instruction(task.prompt, filled(sampling.instruction, task))
    return [Request(model, prompt, sampling.temperature, seed, sampling.max_tokens) for seed in seeds]
