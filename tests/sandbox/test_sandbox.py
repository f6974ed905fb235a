"""Hostile code does no harm; its result says what happened."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preference_training.sandbox.sandbox import Isolation, Limits, Sandbox, open_sandbox, same, shorten

# Time matters only in the tests of time limits.
LIMITS = Limits(cpu_seconds=60, wall_seconds=60, memory_mb=256, files_mb=4, output_kb=16)
SHORT = replace(LIMITS, cpu_seconds=1)
BRIEF = replace(LIMITS, wall_seconds=1)
ADD = ({"args": [1, 2], "expected": 3},)


class Together(Sandbox):
    """A sandbox that runs all tests of a program in one process, as the judge of many programs does."""

    def run(self, code, function_name, tests):
        yield from self.run_together(code, function_name, tests)


@pytest.fixture(scope="module", params=[Sandbox, pytest.param(Together, marks=pytest.mark.long)], ids=["alone", "together"])
def sandbox(request) -> Sandbox:
    """The strongest sandbox on this machine. Without namespaces there is none, and nothing here may run."""
    opened = open_sandbox(LIMITS)
    return request.param(opened.limits, opened.wrap, opened.isolation)


def run(sandbox: Sandbox, code: str, name: str = "add", tests: tuple = ADD):
    assert sandbox.isolation.enough, sandbox.isolation.line()
    return list(sandbox.run(code, name, tests))


def one(sandbox: Sandbox, body: str):
    """The result of a function with this body, which may use os, socket and sys."""
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    [result] = run(sandbox, f"import os, socket, subprocess, sys, time\ndef add(a, b):\n{lines}    return a + b\n")
    return result


# ---- results -------------------------------------------------------------------------------------------------------------


def test_the_isolation_is_verified_and_reported(sandbox):
    assert sandbox.isolation.line() == (
        f"Tests run with {sandbox.isolation.how}, without access to network, files, other processes, new processes."
    )


def test_each_test_has_a_result_with_values(sandbox):
    code = "def half(n):\n    return n // 2 if n else 1 / n"
    tests = tuple({"args": [n], "expected": 2} for n in (4, 6, 0))
    passed, failed, error = run(sandbox, code, "half", tests)
    assert (passed.status, passed.call, passed.expected, passed.got) == ("passed", "half(4)", "2", "2")
    assert (failed.status, failed.got) == ("failed", "3")
    assert (error.status, error.message) == ("error", "ZeroDivisionError: division by zero (line 2)")


@pytest.mark.parametrize(
    "code",
    ["def add(a, b): return a + b", "class Solution:\n    def add(self, a, b): return a + b",
     "class Solution:\n    @staticmethod\n    def Add(a, b): return a + b", "from typing import *\nadd = lambda a, b: a + b"],
)  # fmt: skip
def test_functions_and_methods_are_found_by_their_name(sandbox, code):
    assert [result.status for result in run(sandbox, code)] == ["passed"]


@pytest.mark.parametrize(
    ("code", "message"),
    [("def sub(a, b): return 3", "NameError: no function named add"), ("def add(a, b: pass", "SyntaxError"),
     ("def add(a, b): return object()", "TypeError: it returned a object, which cannot be compared"),
     ("raise SystemExit('no')", "SystemExit: no (line 1)"), ("def add(a):\n    return a", "TypeError"),
     ("def add(a, b):\n    x = []\n    x.append(x)\n    return x", "RecursionError"),
     ("class E(Exception):\n    def __str__(self): raise E\ndef add(a, b): raise E", "E (line 3)"),
     ("import os\nos._exit(0)", "exited without an answer (status 0)")],
)  # fmt: skip
def test_failing_code_reports_its_error(sandbox, code, message):
    [result] = run(sandbox, code)
    assert result.status == "error" and message in result.message


def test_printed_output_is_not_an_answer(sandbox):
    body = "print('{\"value\": 3}', flush=True)\nos.write(1, b'{\"value\": 3}')\na = 5"
    assert one(sandbox, body).got == "7"


def test_code_cannot_fake_an_answer_without_knowing_it(sandbox):
    body = """
for fd in range(3, 64):
    try:
        os.write(fd, b'{"value": 4}')
    except OSError:
        pass
os._exit(0)"""
    result = one(sandbox, body)
    assert (result.status, result.got) == ("failed", "4")


def test_lone_surrogates_and_large_values_are_shown_readably(sandbox):
    assert one(sandbox, "return '\\ud800'").got == '"?"'
    assert len(one(sandbox, "return 'x' * 5000").got) == 200


VALUES = (
    [1, -2.5, True, None, "ä\n\"", "\ud800", [], {}], {"a": {"b": [0.1, 1e300]}}, 10**40, [float("inf"), -float("inf")],
)  # fmt: skip


def test_every_plain_value_arrives_as_it_was(sandbox):
    for value in VALUES:
        code = f"from math import inf\ndef add(a, b):\n    return {value!r}"
        [result] = run(sandbox, code, tests=({"args": [1, 2], "expected": value},))
        assert result.status == "passed", result
    [nan] = run(sandbox, "def add(a, b):\n    return float('nan')")
    assert nan.got == "NaN"


# ---- hostile code --------------------------------------------------------------------------------------------------------


def test_an_endless_loop_exceeds_its_cpu_time(sandbox):
    result = one(replace(sandbox, limits=SHORT), "while True:\n    pass")
    assert (result.status, result.message) == ("timed out", "more than 1 s of CPU time")


def test_sleeping_exceeds_the_wall_clock_limit_even_if_signals_are_blocked(sandbox):
    body = """
import signal
for number in range(1, 64):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    time.sleep(60)"""
    result = one(replace(sandbox, limits=BRIEF), body)
    assert (result.status, result.message) == ("timed out", "no answer in 1 s")


@pytest.mark.parametrize(
    "start", ["while True:\n    os.fork()", "subprocess.run(['/bin/true'])", "os.posix_spawn('/bin/true', ['true'], {})"]
)
def test_a_fork_bomb_cannot_start_a_second_process(sandbox, start):
    result = one(sandbox, start)
    assert result.status == "error" and "Resource temporarily unavailable" in result.message


def test_threads_count_as_processes(sandbox):
    result = one(sandbox, "import threading\nthreading.Thread(target=print).start()")
    assert result.status == "error" and "can't start new thread" in result.message


@pytest.mark.parametrize("take", ["b = bytearray(10 * 2**30)", "x = []\nwhile True:\n    x.append(bytearray(2**20))"])
def test_ten_gigabytes_cannot_be_allocated(sandbox, take):
    result = one(sandbox, take)
    assert (result.status, result.message[:11]) == ("error", "MemoryError")


def test_no_file_of_the_machine_can_be_read(sandbox, tmp_path):
    (tmp_path / "secret").write_text("x")
    for path in (
        str(tmp_path / "secret"),
        str(Path(__file__)),
        "/etc/passwd",
        "/proc/self/environ",
        str(Path.home() / ".bashrc"),
    ):
        result = one(sandbox, f"return open({path!r}).read()")
        assert result.status == "error" and result.message.startswith(("FileNotFoundError", "PermissionError")), path


def test_there_is_no_network(sandbox):
    with __import__("socket").create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = one(sandbox, f"socket.create_connection(('127.0.0.1', {port}), 1)")
        assert result.status == "error" and result.message.startswith(("OSError: [Errno 101]", "ConnectionRefusedError"))
    result = one(sandbox, "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))")
    assert result.status == "error" and "Network is unreachable" in result.message


def test_nothing_can_be_written_outside_and_little_inside(sandbox, tmp_path):
    for path in (tmp_path / "x", Path("/x"), Path("/usr/x"), Path("/usr/bin/python3"), Path("/dev/shm/x")):
        result = one(sandbox, f"open({str(path)!r}, 'w').write('x')")
        assert result.status == "error" and "Error: [Errno" in result.message, path
    assert list(tmp_path.iterdir()) == []
    assert one(sandbox, "open('x', 'w').write('x')\nos.mkdir('d')\na += len(os.listdir('.'))").got == "5"
    assert one(sandbox, "a += len(os.listdir('.'))").status == "passed", "and it is gone at the end"
    result = one(sandbox, "for n in range(100):\n    open(str(n), 'w').write('x' * 2**20)")
    assert result.status == "error" and "No space left" in result.message


def test_the_parent_process_cannot_be_reached(sandbox):
    body = f"""
for pid in (os.getppid(), {os.getpid()}, -1, 0, *range(2, 500)):
    try:
        os.kill(pid, 9)
    except OSError:
        pass"""
    result = one(sandbox, body)
    assert result.status in ("passed", "error"), "it may have killed itself"


def test_a_gigabyte_of_output_is_cut_off(sandbox):
    for stream in ("sys.stdout", "sys.stderr"):
        result = one(sandbox, f"while True:\n    {stream}.write('x' * 2**20)")
        assert (result.status, result.message) == ("error", "more than 16 kB of output")
    assert one(sandbox, "return 'x' * 2**20").message == "more than 16 kB of output"


def test_privileges_cannot_be_regained(sandbox):
    for body in ("import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (9, 9))", "os.setuid(0) or os.chroot('/')",
                 "os.mount if hasattr(os, 'mount') else os.chroot('/tmp')"):  # fmt: skip
        assert one(sandbox, body).status == "error"


def test_no_process_is_left_behind(sandbox):
    def children() -> set[str]:
        task = Path(f"/proc/{os.getpid()}/task")
        return {pid for thread in task.iterdir() for pid in (thread / "children").read_text().split()}

    before = children()
    one(replace(sandbox, limits=BRIEF), "os.close(1)\nos.close(2)\nwhile True:\n    time.sleep(1)")
    assert children() <= before


def test_tests_end_with_the_app_that_runs_them(sandbox, tmp_path):
    """A separate process runs an endless test; when it is killed, the test dies too."""
    script = (
        "from preference_training.sandbox.sandbox import *\n"
        "sandbox = open_sandbox(Limits(60, 60, 256, 4, 16))\n"
        "print('ready', flush=True)\n"
        "list(sandbox.run('import time\\ndef add(a, b):\\n    time.sleep(50)', 'add', ({'args': [1, 2], 'expected': 3},)))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not (started := children.read_text().split()):
            pass
        process.kill()
        process.wait()
        # The pipe for the test's errors closes when the last process that holds it ends.
        process.stderr.read()
    outer = Path(f"/proc/{started[0]}")
    ended = threading.Event()
    for _ in range(200):
        if not outer.exists() or "State:\tZ" in (outer / "status").read_text():
            break
        ended.wait(0.02)
    else:
        pytest.fail("the test has outlived the app")


# ---- without isolation ---------------------------------------------------------------------------------------------------


def test_a_way_without_isolation_is_recognized(sandbox):
    from preference_training.sandbox.sandbox import _prove

    found = _prove("limits alone", lambda command, _: command, LIMITS)
    assert not found.enough and not (found.network or found.files or found.processes)
    assert "NOT isolated from network, files, other processes" in found.line()


def test_a_way_that_does_not_start_is_rejected():
    from preference_training.sandbox.sandbox import _prove

    found = _prove("a broken tool", lambda command, _: ["sh", "-c", "echo no rights >&2; exit 1"], LIMITS)
    assert not found.enough and "no rights" in found.how


def test_isolation_is_sufficient_only_if_complete():
    parts = ("network", "files", "processes", "forks")
    assert Isolation("x", True, True, True, True).enough
    for index in range(4):
        assert not Isolation("x", *(other != index for other in range(4))).enough, parts[index]


# ---- comparing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("got", "expected", "compare", "equal"),
    [
        (3, 3.0, "equal", True),
        (True, 1, "equal", False),
        (1, True, "equal", False),
        ("3", 3, "equal", False),
        (None, None, "equal", True),
        ([1, 2], [2, 1], "equal", False),
        ([[[1]]], [[[1]]], "equal", True),
        ({"1": [2]}, {"1": [2]}, "equal", True),
        ({"1": 2}, {"1": 3}, "equal", False),
        ([1, 2], [2, 1], "unordered", True),
        ([1, 1, 2], [1, 2, 2], "unordered", False),
        ([["b", "a"], []], [[], ["a", "b"]], "unordered", True),
        (0.1 + 0.2, 0.3, "equal", False),
        (0.1 + 0.2, 0.3, "close", True),
        ([0.30000001], [0.3], "close", True),
        (0.31, 0.3, "close", False),
        (float("nan"), 0.0, "close", False),
        ([1], 1, "close", False),
    ],
)
def test_values_are_compared_as_the_test_specifies(got, expected, compare, equal):
    assert same(got, expected, compare) is equal


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8,
)  # fmt: skip


@given(JSON, st.sampled_from(["equal", "unordered", "close"]))
def test_every_value_equals_itself_and_can_be_shown(value, compare):
    assert same(value, json.loads(json.dumps(value)), compare)
    assert len(shorten(value)) <= 200


@given(st.lists(JSON, max_size=5).flatmap(lambda items: st.tuples(st.just(items), st.permutations(items))))
def test_unordered_comparison_ignores_order(lists):
    assert same(*lists, "unordered")


def test_a_value_nested_too_deeply_to_compare_is_unequal():
    deep = value = []
    for _ in range(5000):
        value.append([])
        value = value[0]
    assert not same(deep, [[1]], "unordered") and shorten(deep) == "a value nested too deeply to show"
