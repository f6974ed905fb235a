"""How many of its unit tests each of many programs passes: the judge of code."""

import json
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from preference_training.core.errors import UserError
from preference_training.sandbox.assertions import read_tests
from preference_training.sandbox.replies import extract_code
from preference_training.sandbox.sandbox import Limits, Sandbox, TestResult, open_sandbox


@dataclass(frozen=True)
class Outcome:
    """The tests of one program. seconds: wall-clock time in the sandbox. reason: why it fails; "" if it passes all tests."""

    passed: int
    total: int
    seconds: float
    reason: str = ""

    @property
    def rate(self) -> float:
        """The share of the tests that it passes, 0 to 1."""
        return self.passed / self.total


def isolated_sandbox(limits: Limits) -> Sandbox:
    """A sandbox for untrusted code. Raises UserError where this machine cannot isolate it."""
    sandbox = open_sandbox(limits)
    if not sandbox.isolation.enough:
        raise UserError(
            f"{sandbox.isolation.line()} Unit tests of generated code run only where it can be isolated: on Linux with "
            "bubblewrap (bwrap), or with unshare and setpriv and the right to create namespaces."
        )
    return sandbox


def run_tests(
    programs: Sequence[str], tests: Sequence[Sequence[str | dict]], workers: int, limits: Limits, names: Sequence[str] = ()
) -> list[Outcome]:
    """The outcome of each program under its own tests, as `read_tests` reads them.

    programs: code, or replies with code in a Markdown block. workers: how many run at once; each runs in an isolated process
    of its own, and none is used twice. limits: those of all tests of a program. names: the function of each program's tests,
    where the tests do not say it. Equal programs with equal tests run once. Raises ValueError for faulty tests, and UserError
    where this machine cannot isolate programs; both before any program runs.
    """
    read = [read_tests(some, name) for some, name in zip(tests, names or [""] * len(programs), strict=True)]
    if empty := [number for number, (_, some) in enumerate(read, start=1) if not some]:
        raise ValueError(f"program {empty[0]} has no tests")
    sandbox = isolated_sandbox(limits)
    with warnings.catch_warnings():
        # Python warns of much that models write.
        warnings.simplefilter("ignore", SyntaxWarning)
        code = [extract_code(program, name) for program, (name, _) in zip(programs, read, strict=True)]
    keys = [(each.code, json.dumps(key)) for each, key in zip(code, read, strict=True)]
    work = {key: (each, *of_tests) for key, each, of_tests in zip(keys, code, read, strict=True)}
    with ThreadPoolExecutor(workers, thread_name_prefix="tests") as threads:
        try:
            outcomes = dict(zip(work, threads.map(lambda each: _outcome(sandbox, *each), work.values()), strict=True))
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    return [outcomes[key] for key in keys]


def _outcome(sandbox: Sandbox, extracted, name: str, tests: tuple[dict, ...]) -> Outcome:
    if extracted.fault is not None:
        return Outcome(0, len(tests), 0.0, extracted.fault)
    started = time.monotonic()
    results = sandbox.run_together(extracted.code, name, tests)
    failed = [result for result in results if result.status != "passed"]
    seconds = time.monotonic() - started
    return Outcome(len(results) - len(failed), len(results), seconds, _reason(failed[0]) if failed else "")


def _reason(result: TestResult) -> str:
    """What is wrong with a test that has not passed."""
    return f"{result.call}: " + (result.message or f"{result.got}, expected {result.expected}")
