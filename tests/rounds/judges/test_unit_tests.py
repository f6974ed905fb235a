"""Unit tests of the row as a judge: pass rates in the sandbox, rows without usable tests, and hostile responses."""

import json
import time

import pytest

from preference_training.core.errors import UserError
from preference_training.data.records.record import Turn
from preference_training.rounds.judges.base import JudgedInput, Score
from preference_training.rounds.judges.choice import build_judge, check_rows
from preference_training.rounds.judges.unit_tests import TestsJudge
from preference_training.rounds.prompts import LoopPrompt
from tests.support.files import ROOT

TESTS = ["assert half(4) == 2", "assert half(7) == 3", "assert half(0) == 0"]
RIGHT = "```python\ndef half(n):\n    return n // 2\n```"
WRONG = "def half(n):\n    return n / 2"


@pytest.fixture
def judge(compose, tmp_path):
    """The judge with these overrides."""

    def judge(*more: str, tests: str = "tests"):
        given = ("+rounds=default", "rounds.prompts=x.jsonl", "rounds.judging.tests_workers=2", f"local_run_dir={tmp_path}")
        return build_judge(compose(*given, f"rounds.judge={tests}", *more))

    return judge


def inputs(*responses: str, **row) -> list[JudgedInput]:
    return [JudgedInput("Halve n.", response, {"tests": TESTS} | row) for response in responses]


def test_the_score_is_the_share_of_passed_tests_and_the_reason_the_first_that_fails(judge):
    assert judge().judge(inputs(RIGHT, WRONG, "I cannot.")) == [
        Score(1.0), Score(2 / 3, "half(7): 3.5, expected 3"), Score(0.0, "contains no code"),
    ]  # fmt: skip


@pytest.mark.parametrize("tests", [json.dumps(TESTS), "\n".join(TESTS), [{"args": [7], "expected": 3}]])
def test_tests_may_be_a_list_its_json_or_a_line_each_and_the_row_may_name_the_function(tests, judge):
    assert judge().judge(inputs(RIGHT, tests=tests, function_name="half")) == [Score(1.0)]


def test_the_column_has_a_name_of_its_own_for_this_judge_alone(judge):
    own = judge(tests="{judge:tests,tests_column:checks}")
    assert own.judge(inputs(RIGHT, tests=None, checks=TESTS)) == [Score(1.0)]


def test_time_decides_among_equals_only_where_that_is_asked(judge):
    slow = "import time\ndef half(n):\n    time.sleep(0.3)\n    return n // 2"
    assert {score.value for score in judge().judge(inputs(RIGHT, slow))} == {1.0}
    fast, slower, wrong = (score.value for score in judge("rounds.judging.prefer_fast=true").judge(inputs(RIGHT, slow, WRONG)))
    assert 1 > fast > slower > 1 - 1 / 3 / 2 > 2 / 3 > wrong > 2 / 3 - 1 / 3 / 2


def test_an_endless_loop_costs_its_time_and_no_more(judge):
    endless = "def half(n):\n    while True:\n        pass"
    timed_out, right = judge("rounds.judging.tests_seconds=1").judge(inputs(endless, RIGHT))
    # Where much runs beside it, the wall-clock limit comes first.
    assert timed_out.reason in ("half(4): more than 1 s of CPU time", "half(4): no answer in 5 s")
    assert (timed_out.value, right) == (0.0, Score(1.0))


@pytest.mark.parametrize(("row", "words"), [
    ({"tests": None}, r"no tests in 'tests' of the row of the prompt 'Halve n\.'; its other columns are: tests, answer\. Exp"),
    ({"tests": []}, "no tests in 'tests'"),
    ({"tests": ["assert half(x) == 1"]}, r"of the prompt 'Halve n\.': test 1 is 'assert half\(x\) == 1', expected"),
    ({"tests": [{"args": [1]}]}, "test 1 is not an object with args"),
])  # fmt: skip
def test_a_row_without_usable_tests_is_told_before_the_loop_begins(row, words, compose):
    config = compose("+rounds=default", "rounds.prompts=x.jsonl", "rounds.judge=[tests,'length:words<=9']")
    good = LoopPrompt(0, "Halve n.", {"tests": TESTS}, False)
    check_rows(config, [good])
    with pytest.raises(UserError, match=words):
        check_rows(config, [good, good._replace(row={**row, "answer": 1})])
    with pytest.raises(UserError, match="Halve it"):
        check_rows(config, [LoopPrompt(1, (Turn("user", "Halve it."),), row, True)])


def test_other_limits_are_another_judge(judge):
    identities = [
        judge(*more).identity for more in ([], ["rounds.judging.tests_seconds=2"], ["rounds.judging.prefer_fast=true"])
    ]
    assert len(set(identities)) == 3


HOSTILE = (
    "open(SECRET).read()", "open(NEW, 'w').write('x')", "os.fork()", "os.system('touch ' + NEW)", "os.kill(os.getppid(), 9)",
    "[os.kill(pid, 9) for pid in range(2, 500)]", "__import__('socket').create_connection(('127.0.0.1', 80), 1)",
    "bytearray(10 * 2**30)", "open('/proc/1/environ').read()",
    "__import__('ctypes').CDLL(None).system(b'touch ' + NEW.encode())",
    "[os.write(fd, b'{\"value\": 2}\\n' * 3) for fd in (1, 2)]; os._exit(0)", "print('x' * 10**7)",
    "__import__('threading').Thread(target=print).start()", "os.symlink(SECRET, '/tmp/s'); open('/tmp/s').read()",
)  # fmt: skip


def test_hostile_responses_neither_escape_nor_score_nor_touch_others(judge, tmp_path):
    secret, new = tmp_path / "outside" / "secret", tmp_path / "outside" / "new"
    secret.parent.mkdir()
    secret.write_text("x")
    head = f"import os, sys\nSECRET, NEW = {str(secret)!r}, {str(new)!r}\ndef half(n):\n    "
    bodies = [f"{head}{body}\n    return -1" for body in HOSTILE]
    found = judge().judge(inputs(*[each for number, body in enumerate(bodies) for each in (body, f"{WRONG}  # {number}")]))
    assert [score.value for score in found[::2]] == [0.0] * len(HOSTILE)
    assert [score.value for score in found[1::2]] == [2 / 3] * len(HOSTILE)
    assert list(secret.parent.iterdir()) == [secret] and secret.read_text() == "x"


@pytest.mark.long
def test_many_programs_are_judged_in_bounded_time_whatever_some_of_them_do(judge):
    """Of 60, every tenth loops forever, and every tenth sleeps: 5 s each at most, two at a time; the others take no second."""
    bodies = {0: "while True: pass", 1: "__import__('time').sleep(999)"}
    programs = [f"def half(n):\n    {bodies.get(k % 10, 'return n // 2')}  # {k}" for k in range(60)]
    started = time.monotonic()
    found = judge("rounds.judging.tests_seconds=1").judge(inputs(*programs))
    assert time.monotonic() - started < 12 * 5 / 2 + 60
    assert [score.value for score in found] == [0.0 if k % 10 in bodies else 1.0 for k in range(60)]


def test_a_response_that_equals_everything_or_reads_its_tests_scores_nothing(judge):
    liar = "class All:\n    def __eq__(self, other):\n        return True\ndef half(n):\n    return All()"
    reader = (
        "import gc\ndef half(n):\n    return [x for x in gc.get_objects() if isinstance(x, str) and 'assert half' in x][:1]"
    )
    assert [score.value for score in judge().judge(inputs(liar, reader))] == [0.0, 0.0]


def test_the_problems_of_the_examples_are_judged_by_their_solutions(judge):
    rows = [json.loads(line) for line in (ROOT / "examples" / "code_problems.jsonl").read_text().splitlines()[:12]]
    found = judge().judge([JudgedInput(row["prompt"], f"```python\n{row['solution']}\n```", row) for row in rows])
    assert found == [Score(1.0)] * 12


def test_the_judge_is_no_test_class_of_pytest():
    assert TestsJudge.__test__ is False
