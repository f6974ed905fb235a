"""Tests on their way: each solution's once, whoever looks at it, a few at a time."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from preference_collection.sandbox import Sandbox
from preference_collection.store import Generation, Problem, Store

# Solutions whose tests run at the same time, and finished runs that are remembered beside the store.
AT_ONCE = 2
REMEMBERED = 1000


@dataclass
class TestRun:
    """The tests of one solution: results as they come, the dicts of `TestResult`; of `total` tests; until it is over."""

    __test__ = False  # no test of pytest's

    total: int
    results: list[dict] = field(default_factory=list)
    over: bool = False

    @property
    def passed(self) -> int:
        """How many have passed so far."""
        return sum(result["status"] == "passed" for result in self.results)


class TestRunner:
    """Runs the tests of solutions in the background, and keeps their results in the store."""

    __test__ = False

    def __init__(self, sandbox: Sandbox, store: Store, run_unisolated: bool):
        """run_unisolated: run also what this machine cannot hold back."""
        self.sandbox = sandbox
        self.enabled = sandbox.isolation.enough or run_unisolated
        self._store = store
        self._runs: dict[str, TestRun] = {}
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="tests")

    def run_of(self, generation: Generation, problem: Problem) -> TestRun | None:
        """The tests of a solution, which begin now if they never have; None where there is nothing to run, or it is off."""
        if not generation.code or not problem.tests:
            return None
        with self._lock:
            if generation.id in self._runs:
                return self._runs[generation.id]
            kept = self._store.test_run(generation.id)
            if kept is None and not self.enabled:
                return None
            run = self._runs[generation.id] = TestRun(len(problem.tests), kept or [], kept is not None)
            while len(self._runs) > REMEMBERED:
                del self._runs[next(iter(self._runs))]
        if kept is None:
            self._threads.submit(self._work, run, generation, problem)
        return run

    def _work(self, run: TestRun, generation: Generation, problem: Problem) -> None:
        try:
            for result in self.sandbox.run(generation.code, problem.function_name, problem.tests):
                run.results.append(result.as_dict())
            if not self._store.read_only:
                self._store.add_test_run(generation.id, run.results)
        finally:
            run.over = True
