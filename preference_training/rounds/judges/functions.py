"""A user's function as a judge, FILE.py:NAME; and the ground truth of the toy data.

    def score(prompt, response): ...              # a number, the higher the better; None: cannot judge
    def score(prompt, response, row): ...         # row: the other columns of the prompt's row
    def score_batch(prompts, responses): ...      # lists; also with rows; a number for each

A function may give (number, reason) in place of a number.
"""

import inspect
import math
import traceback
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from preference_training.core.errors import UserError, first_line, nearest
from preference_training.core.files import hash_file, run_file
from preference_training.data.toy_preferences import response_kind
from preference_training.rounds.judges.base import Judge, JudgedInput, Score

EXPECTED = "score(prompt, response), score(prompt, response, row), or score_batch(prompts, responses), perhaps with rows"


class FunctionJudge(Judge):
    """A user's function. Raises UserError where the file has no such function, or one with other parameters."""

    def __init__(self, function: str):
        file, _, name = function.rpartition(":")
        self.path = Path(file).expanduser().absolute()
        if not self.path.is_file():
            raise UserError(f"rounds.judge: {file}: no such file. Expected FILE.py:NAME; paths are relative to {Path.cwd()}.")
        defined = self._run(file)
        if not callable(defined.get(name)):
            functions = [key for key, value in defined.items() if getattr(value, "__module__", None) == defined["__name__"]]
            raise UserError(f"rounds.judge: {file} has no function {name!r}; {nearest(name, functions)}")
        self.function: Callable[..., Any] = defined[name]
        # A file that has changed since gives other scores.
        self.name, self.identity = f"{self.path.name}:{name}", f"{name} of {hash_file(self.path)}"
        parameters = [each.name for each in inspect.signature(self.function).parameters.values() if each.default is each.empty]
        self.takes_many = parameters[:1] == ["prompts"]
        self.takes_rows = len(parameters) == 3
        known = ("prompts", "responses", "rows") if self.takes_many else ("prompt", "response", "row")
        if len(parameters) not in (2, 3) or (self.takes_many and parameters != list(known[: len(parameters)])):
            raise UserError(f"rounds.judge: {function} takes ({', '.join(parameters)}). Expected {EXPECTED}.")

    def judge(self, samples: Sequence[JudgedInput]) -> list[Score]:
        """A score for each response. Raises UserError, with the line of the user's file and the response that it failed on."""
        if not self.takes_many:
            return [
                self._score(self._call([sample.plain_prompt, sample.response], sample.row, sample), sample)
                for sample in samples
            ]
        columns = [[sample.plain_prompt for sample in samples], [sample.response for sample in samples]]
        found = self._call(columns, [sample.row for sample in samples], samples[0])
        values = list(found) if hasattr(found, "__iter__") else [found]
        if len(values) != len(samples):
            raise UserError(
                f"rounds.judge: {self.name} gave {len(values)} scores for {len(samples)} responses. Expected one each."
            )
        return [self._score(value, sample) for value, sample in zip(values, samples, strict=True)]

    def _run(self, file: str) -> dict[str, Any]:
        try:
            return vars(run_file(self.path, "round_judge"))
        except Exception as error:
            raise UserError(f"rounds.judge: {file}{self._line_of(error)}: {_words(error)}.") from error

    def _call(self, given: list, row: Any, first: JudgedInput) -> Any:
        try:
            return self.function(*given, row) if self.takes_rows else self.function(*given)
        except Exception as error:
            among = "one of the responses from " if self.takes_many else ""
            raise UserError(
                f"rounds.judge: {self.name}{self._line_of(error)}: {_words(error)}, for {among}{_shown(first)}. Fix the "
                "function, or have it give None where it cannot judge."
            ) from error

    def _line_of(self, error: Exception) -> str:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(self.path)]
        return f", line {lines[-1]}" if lines else ""

    def _score(self, found: Any, sample: JudgedInput) -> Score:
        value, reason = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
        if value is None:
            return Score(None, None if reason is None else str(reason))
        # Numbers of numpy and torch are none of Python's until they are asked.
        value = value.item() if hasattr(value, "item") else value
        if not isinstance(value, Real) or not math.isfinite(value):
            raise UserError(
                f"rounds.judge: {self.name} gives {value!r} for {_shown(sample)}. Expected a finite number, true or false, or "
                "None where it cannot judge."
            )
        return Score(float(value), None if reason is None else str(reason))


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _shown(sample: JudgedInput) -> str:
    prompt = sample.prompt if isinstance(sample.prompt, str) else sample.prompt[-1].content
    return f"the response {sample.response[:60]!r} to {prompt[-60:]!r}"


class ToyJudge(Judge):
    """The ground truth of the toy data: 1 for a response of the preferred kind, 0 for a rude one, 0.5 for neither."""

    name, identity = "toy", "toy"

    def judge(self, samples: Sequence[JudgedInput]) -> list[Score]:
        """A score for each response."""
        values = {"preferred": 1.0, "rude": 0.0}
        return [Score(values.get(str(response_kind(sample.response)), 0.5)) for sample in samples]
