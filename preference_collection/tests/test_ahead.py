"""While people judge, tests of what comes next run, and answers to further tasks are made."""

import threading
import time

import pytest

from preference_collection import running
from preference_collection.generation import ahead as ahead_module
from preference_collection.generation.ahead import Ahead
from preference_collection.generation.asking import Sampling
from preference_collection.generation.sources import model_named
from preference_collection.generation.writing import answer_of, write_answers
from preference_collection.running import TestRunner
from preference_collection.settings import limits_of, load_settings
from preference_collection.store.queue import Queue
from preference_collection.tests.conftest import a_comparison, a_judgment, a_task
from preference_collection.tests.models import QUICK, REPLIES, settings_for, with_tasks
from preference_collection.tests.ollama_stand_in import ollama_stand_in
from preference_training.core.errors import UserError
from preference_training.sandbox.sandbox import Isolation, TestResult, open_sandbox
from tests.sandbox.test_replies import STANDING_IN


@pytest.fixture
def server():
    with ollama_stand_in(dict(REPLIES)) as stand_in:
        yield stand_in


@pytest.fixture
def runner(store):
    made = TestRunner(open_sandbox(limits_of(load_settings())), store, False)
    yield made
    made.close()


def until(condition, seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return bool(condition())


@pytest.fixture
def working(store, server, runner):
    """A function that starts working ahead with some settings; it ends with the test."""
    started = []

    def start(queue: Queue, *overrides: str) -> Ahead:
        started.append(Ahead(store, queue, runner, settings_for(server, *overrides)).start())
        return started[-1]

    yield start
    for each in started:
        each.stop()


def is_tested(store, comparison) -> bool:
    return all(store.test_run(answer.id) for answer in comparison.answers)


def test_tests_of_what_comes_next_run_before_it_is_shown(store, working):
    with_tasks(store, *"abcd")
    comparisons = [a_comparison(id, ("def add(a, b): return a + b", "def add(a, b): return 0")) for id in "abcd"]
    store.add_comparisons(comparisons)
    queue = Queue(store)
    ahead = working(queue, "ahead=2")
    assert queue.next("ada") == comparisons[0].id and not is_tested(store, comparisons[1]), "nobody is known to be there"
    ahead.seen("ada")
    for comparison in comparisons[1:3]:
        assert until(lambda: is_tested(store, comparison))  # noqa: B023
        assert [store.test_run(answer.id)[0]["status"] for answer in comparison.answers] == ["passed", "failed"]
    assert not is_tested(store, comparisons[3]), "it is not among the next two"
    store.judge(a_judgment(comparisons[0]))
    queue.judged("ada", comparisons[0].id)
    assert queue.next("ada") == comparisons[1].id
    ahead.seen("ada")
    assert until(lambda: is_tested(store, comparisons[3]))


class SlowSandbox:
    """A sandbox whose tests wait until they may go on; order says whose were run."""

    isolation = Isolation("a stand-in", True, True, True, True)

    def __init__(self):
        self.go_on, self.order = threading.Event(), []

    def run(self, code: str, name: str, tests: tuple):
        self.order.append(code)
        assert self.go_on.wait(30)
        yield TestResult("passed", name, "3")


def test_tests_of_what_someone_looks_at_go_before_those_of_what_comes_later(store):
    sandbox = SlowSandbox()
    runner = TestRunner(sandbox, store, False)
    task = a_task()
    store.add_tasks([task])
    codes = [str(number) for number in range(running.AT_ONCE + 4)]
    answers = [answer for code in codes for answer in a_comparison(texts=(code, code)).answers[:1]]
    *running_now, late, later, promoted, shown = answers
    for answer in running_now:
        runner.start_tests(answer, task, later=True)
    assert until(lambda: len(sandbox.order) == running.AT_ONCE)
    runs = [runner.start_tests(answer, task, later=True) for answer in (late, later, promoted)]
    runs.append(runner.start_tests(shown, task))
    assert runner.start_tests(promoted, task) is runs[2]
    sandbox.go_on.set()
    assert until(lambda: all(run.over for run in runs))
    place = {code: number for number, code in enumerate(sandbox.order)}
    assert max(place[shown.code], place[promoted.code]) < min(place[late.code], place[later.code])
    runner.close()


def test_tests_call_the_function_that_the_code_defines(store, server, runner):
    with_tasks(store, "a")
    for number, solution in enumerate(STANDING_IN.values()):
        server.replies[str(number)] = lambda _, solution=solution: [f"```python\n{solution}\n```"]
        source = model_named(f"ollama:{number}", settings_for(server)).source
        [writing] = write_answers(source, str(number), store.task("a"), Sampling(0, 9, ""), count=1)
        answer = answer_of(store.task("a"), writing.wait(30).request, "", writing.text, None)
        run = runner.start_tests(answer, store.task("a"))
        assert until(lambda: run.over) and run.passed == 1  # noqa: B023
        assert run.results[0]["call"] == "plus(1, 2)"


def test_answers_are_made_until_enough_comparisons_are_ready(store, server, working):
    with_tasks(store, *"abcdefgh")
    queue = Queue(store)
    ahead = working(queue, "ahead=3", "generator=ollama:varied", "answers=3")
    assert not until(lambda: queue.remaining("ada"), 0.1), "nobody is there"
    ahead.seen("ada")
    assert until(lambda: queue.remaining("ada") == 3)
    assert not until(lambda: queue.remaining("ada") > 3, 0.1) and len(server.requests) == 9
    first = store.comparison(queue.next("ada"))
    assert until(lambda: is_tested(store, store.comparison(queue.peek("ada", 1)[0])))
    store.judge(a_judgment(first))
    queue.judged("ada", first.id)
    ahead.seen("ada")
    assert until(lambda: queue.remaining("ada") == 3)
    ahead.seen("bob")
    assert until(lambda: queue.remaining("bob") == 6), "two people share what is left"
    assert [comparison.task for comparison in store.comparisons()] == list("abcdefg")


def test_a_failing_source_is_said_once_and_asked_again_later(store, server, working, monkeypatch, capsys):
    monkeypatch.setattr(ahead_module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(ahead_module, "EVERY_SECONDS", 0.01)
    monkeypatch.setattr(ahead_module, "PATIENCE", QUICK)
    with_tasks(store, "a", "b")
    server.refuse = lambda _: (404, {})
    queue = Queue(store)
    ahead = working(queue, "ahead=2", "generator=ollama:varied")
    ahead.seen("ada")
    assert until(lambda: len(server.requests) >= 6), "it is asked again"
    message = "No answers are made ahead: Ollama has no model 'varied'. Download it with: ollama pull varied"
    assert ahead.status() == message and ahead.pause > 0.01
    server.refuse = lambda _: None
    assert until(lambda: queue.remaining("ada") == 2) and until(lambda: ahead.status() == "")
    assert capsys.readouterr().err.count(message) == 1


def test_it_stops_at_once_also_while_a_server_is_silent(store, server, working):
    with_tasks(store, "a")
    ahead = working(Queue(store), "generator=ollama:silent")
    ahead.seen("ada")
    assert until(lambda: server.requests)
    ahead.stop()
    assert not any(thread.is_alive() for thread in ahead._threads)


def test_a_generator_that_cannot_be_is_refused_before_it_starts(store, runner, server):
    with pytest.raises(UserError, match="olama:x: no such file; did you mean ollama"):
        Ahead(store, Queue(store), runner, settings_for(server, "generator=olama:x"))
