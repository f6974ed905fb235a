"""Unit tests of the prompt's row as a judge of code: the share of them that a response passes, in the sandbox."""

import json
import os
from collections.abc import Sequence

from preference_training.configuration.sections import JudgingConfig
from preference_training.core.errors import UserError
from preference_training.rounds.judges.base import Judge, JudgedInput, Score
from preference_training.sandbox.assertions import read_tests
from preference_training.sandbox.pass_rates import Outcome, isolated_sandbox, run_tests
from preference_training.sandbox.sandbox import Limits

# A program that waits uses no CPU time; one that computes gets less of it where others run beside it.
WALL_PER_CPU_SECOND = 5
FILES_MB, OUTPUT_KB = 4, 256
# The column with the name of the function, where there is one; tests may say it too.
FUNCTION = "function_name"


class TestsJudge(Judge):
    """The share of a row's unit tests that a response passes, 0 to 1; the reason is the first that it does not pass.

    options: the keys tests_*; with prefer_fast a response that uses up its time loses half of what one test is worth, and
    others in proportion, so that time decides among equals only.
    """

    __test__ = False  # not a pytest class

    at_once = 256

    def __init__(self, options: JudgingConfig):
        self.name, self.column = "tests", options.tests_column
        self.prefer_fast = options.prefer_fast
        self.workers = options.tests_workers or len(os.sched_getaffinity(0))
        seconds = options.tests_seconds
        self.limits = Limits(seconds, WALL_PER_CPU_SECOND * seconds, options.tests_memory_mb, FILES_MB, OUTPUT_KB)
        # The rows with their tests are part of what a score is known by.
        self.identity = f"tests {self.column} {self.limits} {self.prefer_fast}"

    def judge(self, samples: Sequence[JudgedInput]) -> list[Score]:
        """The pass rate of each response. Raises UserError for faulty tests, and where this machine cannot isolate programs."""
        tests = [self.tests_of(sample) for sample in samples]
        names = [str(sample.row.get(FUNCTION) or "") for sample in samples]
        outcomes = run_tests([sample.response for sample in samples], tests, self.workers, self.limits, names)
        return [Score(self._value(outcome), outcome.reason or None) for outcome in outcomes]

    def tests_of(self, sample: JudgedInput) -> list[str | dict]:
        """The tests of a row: a list, or its JSON. Raises UserError where there are none, or they are faulty."""
        found = sample.row.get(self.column)
        if isinstance(found, str):
            try:
                found = json.loads(found)
            except ValueError:
                found = [line for line in found.splitlines() if line.strip()]
        about = f"the prompt {sample.plain_prompt if isinstance(sample.prompt, str) else sample.prompt[-1].content!r:.80}"
        if not isinstance(found, list) or not found:
            columns = ", ".join(sample.row) or "none"
            raise UserError(
                f"rounds.judging.tests_column: no tests in {self.column!r} of the row of {about}; its other columns are: "
                f"{columns}. Expected a list of assertions, or of objects with args and expected."
            )
        try:
            read_tests(found, str(sample.row.get(FUNCTION) or ""))
        except ValueError as error:
            raise UserError(f"rounds.judging.tests_column: {self.column!r} in the row of {about}: {error}.") from error
        return found

    def check(self) -> None:
        """Raise UserError where this machine cannot isolate programs."""
        isolated_sandbox(self.limits)

    def _value(self, outcome: Outcome) -> float:
        if not self.prefer_fast:
            return outcome.rate
        used = min(1.0, outcome.seconds / self.limits.wall_seconds)
        return outcome.rate - 0.5 * used / outcome.total
