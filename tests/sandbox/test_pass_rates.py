"""Pass rates of many programs: each in an isolated process of its own, equal ones once, in bounded time."""

from dataclasses import replace

import pytest

from preference_training.core.errors import UserError
from preference_training.sandbox import pass_rates
from preference_training.sandbox.pass_rates import Outcome, run_tests
from preference_training.sandbox.sandbox import Isolation, Limits, Sandbox, open_sandbox

LIMITS = Limits(cpu_seconds=60, wall_seconds=60, memory_mb=256, files_mb=4, output_kb=16)
TESTS = ["assert half(4) == 2", "assert half(7) == 3", "assert half(0) == 0"]
RIGHT = "def half(n):\n    return n // 2"


def outcomes(*programs: str, limits: Limits = LIMITS, tests=TESTS) -> list[tuple]:
    return [(each.passed, each.total, each.reason) for each in run_tests(programs, [tests] * len(programs), 2, limits)]


def test_programs_have_their_pass_rate_time_and_reason():
    found = run_tests([RIGHT, "def half(n):\n    return n / 2 if n else None"], [TESTS, TESTS], 2, LIMITS)
    assert [(each.passed, each.total, each.reason) for each in found] == [(3, 3, ""), (1, 3, "half(7): 3.5, expected 3")]
    assert [each.rate for each in found] == [1.0, 1 / 3] and all(each.seconds > 0 for each in found)


def test_code_is_taken_out_of_replies():
    block = f"Sure:\n\n```python\n{RIGHT}\n```\nIt halves `n`."
    assert outcomes(block, "I cannot.", "```\ndef half(n) return\n```", "def third(n):\n    return n // 3") == [
        (3, 3, ""), (0, 3, "contains no code"), (0, 3, "does not parse: expected ':', line 1"),
        (0, 3, "does not define the function half"),
    ]  # fmt: skip


def test_a_program_that_ends_its_process_fails_that_test_and_the_rest():
    program = "import os\ndef half(n):\n    return n // 2 if n != 7 else os._exit(0)"
    assert outcomes(program) == [(1, 3, "half(7): exited without an answer (status 0)")]


def test_an_endless_loop_ends_with_the_limit_of_the_program_not_of_each_test():
    program = "import time\ndef half(n):\n    while n:\n        time.sleep(9)"
    assert outcomes(program, limits=replace(LIMITS, wall_seconds=1)) == [(0, 3, "half(4): no answer in 1 s")]


def test_each_test_executes_the_program_anew():
    program = "seen = []\ndef half(n):\n    seen.append(n)\n    return n // 2 if len(seen) == 1 else 'again'"
    assert outcomes(program) == [(3, 3, "")]


@pytest.fixture
def counted(monkeypatch):
    """The programs that were run."""
    ran = []

    class Counting(Sandbox):
        def run_together(self, code, function_name, tests):
            ran.append(code)
            return super().run_together(code, function_name, tests)

    def opened(limits):
        sandbox = open_sandbox(limits)
        return Counting(sandbox.limits, sandbox.wrap, sandbox.isolation)

    monkeypatch.setattr(pass_rates, "open_sandbox", opened)
    return ran


def test_equal_programs_with_equal_tests_run_once(counted):
    other = [{"args": [4], "expected": 2}]
    found = run_tests([RIGHT, f"```\n{RIGHT}\n```", RIGHT], [TESTS, TESTS, other], 2, LIMITS, ["half"] * 3)
    assert counted == [RIGHT, RIGHT] and found[0] == found[1] and found[2].total == 1


def test_hostile_programs_neither_escape_nor_touch_the_results_of_others(tmp_path):
    """A short form: tests/sandbox/test_sandbox.py runs all of its hostile set this way too, marked long."""
    target = tmp_path / "secret"
    target.write_text("x")
    bodies = [
        f"open({str(target)!r}).read()", f"open({str(tmp_path / 'new')!r}, 'w')", "os.fork()",
        "__import__('socket').create_connection(('127.0.0.1', 80), 1)", "bytearray(10 * 2**30)",
        "[os.kill(pid, 9) for pid in range(2, 500)]",
    ]  # fmt: skip
    hostile = [f"import os\ndef half(n):\n    {body}\n    return n // 2" for body in bodies]
    found = outcomes(*[each for body in hostile for each in (body, RIGHT + f"  # {len(body)}")])
    assert [passed for passed, _, _ in found[1::2]] == [3] * len(hostile)
    assert [passed for passed, _, _ in found[::2]] == [0] * len(hostile)
    assert list(tmp_path.iterdir()) == [target] and target.read_text() == "x"


def test_answers_that_a_program_writes_itself_pass_no_test():
    forged = "import os\ndef half(n):\n    for fd in range(3, 64):\n        try:\n            os.write(fd, LINE * 3)\n"
    forged += "        except OSError:\n            pass\n    os._exit(0)\n"
    for line in (b'{"value": true}\n', b'{"passed": 3}\n', b'{"value": 9}\n', b"\n", b"[]\n"):
        [(passed, total, _)] = outcomes(forged.replace("LINE", repr(line)))
        assert (passed, total) == (0, 3)
    liar = "class All:\n    def __eq__(self, other):\n        return True\ndef half(n):\n    return All()"
    assert outcomes(liar)[0][0] == 0


def test_expected_values_are_not_in_the_sandbox():
    """Everything that a program finds in its process: neither the expected values nor the assertions."""
    program = "import gc\ndef half(n):\n    return [x for x in map(str, gc.get_objects()) if str(int('493827') * 2) in x][:1]"
    [(passed, _, reason)] = outcomes(program, tests=["assert half(1) == 987654"])
    assert passed == 0 and reason == "half(1): [], expected 987654"


@pytest.mark.parametrize(
    ("tests", "told"),
    [([[], TESTS], "program 1 has no tests"), ([TESTS, ["assert half(x) == 1"]], "test 1 is 'assert half")],
)
def test_faulty_tests_are_refused_before_any_program_runs(tests, told, counted):
    with pytest.raises(ValueError, match=told):
        run_tests([RIGHT, RIGHT], tests, 2, LIMITS)
    assert counted == []


def test_a_machine_that_cannot_isolate_programs_runs_none(monkeypatch):
    def opened(limits):
        return Sandbox(limits, None, Isolation("resource limits only", False, False, False, True))

    monkeypatch.setattr(pass_rates, "open_sandbox", opened)
    with pytest.raises(UserError, match="NOT isolated from network, .* run only where it can be isolated"):
        run_tests([RIGHT], [TESTS], 2, LIMITS)


def test_no_programs_have_no_outcomes():
    assert run_tests([], [], 2, LIMITS) == []
    assert Outcome(1, 4, 0.1).rate == 0.25
