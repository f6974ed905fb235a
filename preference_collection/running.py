"""Running tests in the background: once per answer, whoever views it, and a few at a time."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from preference_collection.store.model import Answer, Task
from preference_collection.store.store import Store
from preference_training.core.processes import usable_cores
from preference_training.sandbox.sandbox import Sandbox

# Number of answers tested concurrently, and of runs cached in memory.
AT_ONCE = max(2, usable_cores() // 2)
REMEMBERED = 1000


@dataclass
class TestRun:
    """The tests of one answer. results grows as tests finish; each is the dict of a `TestResult`."""

    __test__ = False  # not a pytest class

    total: int
    results: list[dict] = field(default_factory=list)
    over: bool = False

    @property
    def passed(self) -> int:
        """Number of tests passed so far."""
        return sum(result["status"] == "passed" for result in self.results)


class TestRunner:
    """Runs the tests of answers in the background, those that someone looks at first, and saves the results in the store."""

    __test__ = False

    def __init__(self, sandbox: Sandbox, store: Store, run_unisolated: bool):
        """run_unisolated: run tests even if this machine cannot isolate them."""
        self.sandbox = sandbox
        self.enabled = sandbox.isolation.enough or run_unisolated
        self._store = store
        self._runs: dict[str, TestRun] = {}
        # What waits, by the answer's id: what someone looks at, and what comes later.
        self._now: dict[str, tuple[TestRun, Answer, Task]] = {}
        self._later: dict[str, tuple[TestRun, Answer, Task]] = {}
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="tests")

    def start_tests(self, answer: Answer, task: Task, later: bool = False) -> TestRun | None:
        """The tests of an answer, started if they have not run yet; None if there are none, or if tests are disabled.

        later: nobody looks at the answer yet, and other tests go first.
        """
        if not answer.code or not task.tests:
            return None
        with self._lock:
            if answer.id in self._runs:
                if not later and answer.id in self._later:
                    self._now[answer.id] = self._later.pop(answer.id)
                return self._runs[answer.id]
            kept = self._store.test_run(answer.id)
            if kept is None and not self.enabled:
                return None
            run = self._runs[answer.id] = TestRun(len(task.tests), kept or [], kept is not None)
            while len(self._runs) > REMEMBERED:
                del self._runs[next(iter(self._runs))]
            if kept is None:
                (self._later if later else self._now)[answer.id] = (run, answer, task)
                self._threads.submit(self._work)
        return run

    def _work(self) -> None:
        """Run the tests that are next: one call for each that waits."""
        with self._lock:
            waiting = self._now or self._later
            run, answer, task = waiting.pop(next(iter(waiting)))
        try:
            # The code may give its function another name than the task does.
            name = answer.parameters.get("function_name") or task.function_name
            for result in self.sandbox.run(answer.code, name, task.tests):
                run.results.append(result.as_dict())
            if not self._store.read_only:
                self._store.add_test_run(answer.id, run.results)
        finally:
            run.over = True

    def close(self) -> None:
        """Start no more tests, and wait for those that run."""
        self._threads.shutdown(cancel_futures=True)
