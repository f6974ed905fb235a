"""Running unit tests of model-written code, which is untrusted.

Each test, or all tests of one program, runs in its own process, without network, seeing only an interpreter and an empty /tmp
of the machine's files and processes, unable to start other processes, with limits on CPU time, wall-clock time, memory, files
and output. Return values are compared outside the sandbox; the expected values never enter it. `open_sandbox` verifies that the
machine can isolate code like this. The labeling app otherwise runs nothing unless told to, and `run_tests` nothing at all.
"""

import json
import marshal
import math
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory

CHILD = (Path(__file__).parent / "child.py").read_text()
JAIL = (Path(__file__).parent / "jail.sh").read_text()

COMPARISONS = ("equal", "unordered", "close")

# Locations of an interpreter and its libraries, in addition to its own directory; missing ones are skipped.
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/ld.so.cache")
NOBODY = "65534"
NAMESPACES = ("--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child")


@dataclass(frozen=True)
class Limits:
    """The resource limits of one process: of one test, or of all tests of a program."""

    cpu_seconds: int
    wall_seconds: float
    memory_mb: int
    files_mb: int
    output_kb: int

    def of_process(self) -> dict[str, int]:
        """The limits by setrlimit's names. No further process or thread can be started."""
        return {
            "RLIMIT_CPU": self.cpu_seconds,
            "RLIMIT_AS": self.memory_mb * 2**20,
            "RLIMIT_FSIZE": self.files_mb * 2**20,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
            "RLIMIT_NPROC": 0,
        }


@dataclass(frozen=True)
class Isolation:
    """What the code was verified to be isolated from on this machine."""

    how: str
    network: bool
    files: bool
    processes: bool
    forks: bool

    @property
    def enough(self) -> bool:
        """Whether untrusted code may run."""
        return self.network and self.files and self.processes and self.forks

    def line(self) -> str:
        """A one-line description."""
        parts = {"network": self.network, "files": self.files, "other processes": self.processes, "new processes": self.forks}
        held, open_to = ([name for name, value in parts.items() if value is state] for state in (True, False))
        text = f"Tests run with {self.how}"
        if held:
            text += f", without access to {', '.join(held)}"
        return f"{text}; NOT isolated from {', '.join(open_to)}." if open_to else f"{text}."


@dataclass(frozen=True)
class TestResult:
    """The result of one test: status is passed, failed, error or timed out. Values are JSON, shortened for display."""

    __test__ = False  # not a pytest class

    status: str
    call: str
    expected: str
    got: str = ""
    message: str = ""

    def as_dict(self) -> dict:
        """The result as plain values, for the store."""
        return asdict(self)


@dataclass(frozen=True)
class Sandbox:
    """A way to run code. wrap turns a command line into an isolated one, with a limit on files in megabytes."""

    limits: Limits
    wrap: Callable[[list[str], int], list[str]]
    isolation: Isolation

    def run(self, code: str, function_name: str, tests: tuple[dict, ...]) -> Iterator[TestResult]:
        """Yield the results of tests one by one. Closing the generator kills the running test."""
        for test in tests:
            [ended] = _call(self.wrap, self.limits, lambda _, args=test["args"]: (code, function_name, [args]))
            yield _result(ended, test, function_name, self.limits)

    def run_together(self, code: str, function_name: str, tests: Sequence[dict]) -> list[TestResult]:
        """The results of tests that run in one process, under the limits of one: for many programs, several times as fast.

        The isolation is that of `run`. But a program may carry something from one call to the next through what it imports, and
        the tests after one that ends the process, or runs out of its time, have no answer: they are errors, or timed out.
        """
        ended = _call(self.wrap, self.limits, lambda _: (code, function_name, [test["args"] for test in tests]))
        return [_result(each, test, function_name, self.limits) for each, test in zip(ended, tests, strict=True)]


def open_sandbox(limits: Limits) -> Sandbox:
    """The strongest isolation that this machine offers. Each is verified, the best first."""
    tried = []
    for how, wrap in _ways().items():
        sandbox = Sandbox(limits, wrap, _prove(how, wrap, limits))
        if sandbox.isolation.enough:
            return sandbox
        tried.append(sandbox)
    return max(tried, key=lambda sandbox: sum(value is True for value in asdict(sandbox.isolation).values()))


# ---- ways to isolate code ------------------------------------------------------------------------------------------------


def _ways() -> dict[str, Callable[[list[str], int], list[str]]]:
    """The available ways by name, the best first."""
    ways = {}
    tools = {name: shutil.which(name, path=PATH) for name in ("bwrap", "unshare", "setpriv")}
    # As root, bubblewrap would leave the code as root, to whom process limits do not apply.
    if tools["bwrap"] and os.geteuid() != 0:
        ways["bubblewrap"] = _bubblewrap
    if tools["unshare"] and tools["setpriv"]:
        ways["Linux namespaces"] = _namespaces
    return {**ways, "resource limits only": lambda command, _: command}


PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


def _interpreter() -> Path:
    """The interpreter itself, not the link in a virtual environment."""
    return Path(getattr(sys, "_base_executable", sys.executable)).resolve()


def _visible() -> list[str]:
    """The directories visible to the code."""
    own = str(Path(sys.base_prefix).resolve())
    return [*[path for path in SYSTEM if os.path.lexists(path)], *[own] * (not own.startswith("/usr"))]


def _bubblewrap(command: list[str], files_mb: int) -> list[str]:
    line = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    for path in map(Path, _visible()):
        line += ["--symlink", str(path.readlink()), str(path)] if path.is_symlink() else ["--ro-bind", str(path), str(path)]
    return [*line, "--size", str(files_mb * 2**20), "--tmpfs", "/tmp", "--chdir", "/tmp", "--", *command]


def _namespaces(command: list[str], files_mb: int) -> list[str]:
    """Isolate with `unshare` and `jail.sh`. Root becomes nobody; other users are root only in their user namespace."""
    root = os.geteuid() == 0
    own = [] if root else ["--user", "--map-root-user"]
    jail = ["sh", "-c", JAIL, "sh", str(files_mb), NOBODY if root else "-", *_visible(), "--", *command]
    # Kill the tests when the app ends, for whatever reason.
    return ["setpriv", "--pdeathsig", "KILL", "unshare", *own, *NAMESPACES, *jail]


# The verification: attempt to reach resources that this process created. An attempt that raises OSError was refused.
ATTEMPTS = """
def attempts(secret, folder, port, process):
    import os, socket
    def refused(action):
        try:
            action()
        except OSError:
            return True
        return False
    return {
        "network": refused(lambda: socket.create_connection(("127.0.0.1", port), 2)),
        "files": refused(lambda: open(secret)) and refused(lambda: open(os.path.join(folder, "written"), "w")),
        "processes": refused(lambda: os.kill(process, 0)),
        "forks": refused(lambda: os.fork() or os._exit(0)),
    }
"""


def _prove(how: str, wrap: Callable, limits: Limits) -> Isolation:
    """Attempt what the code must not be able to do."""
    with TemporaryDirectory(dir=Path.home() if os.access(Path.home(), os.W_OK) else None) as folder, socket.socket() as server:
        secret = Path(folder) / "secret"
        secret.touch()
        server.bind(("127.0.0.1", 0))
        server.listen()
        arguments = [str(secret), folder, server.getsockname()[1]]
        [ended] = _call(wrap, limits, lambda process: (ATTEMPTS, "attempts", [[*arguments, process]]))
    value = (ended.answer or {}).get("value")
    names = ("network", "files", "processes", "forks")
    if not isinstance(value, dict):
        return Isolation(f"{how} (failed: {ended.reason})", False, False, False, False)
    return Isolation(how, *(value.get(name) is True for name in names))


# ---- one process ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a call ended: with an answer, or for a reason. late means that it ran out of time."""

    answer: dict | None
    reason: str = ""
    late: bool = False


def _call(wrap: Callable, limits: Limits, work_of: Callable[[int], tuple[str, str, list[list]]]) -> list[Ended]:
    """How each call of a process ended. work_of maps the id of the waiting process to (code, name, arguments of each call)."""
    command = wrap([str(_interpreter()), "-I", "-S", "-B", "-c", CHILD], limits.files_mb)
    with TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command, cwd=folder, env={"PATH": PATH, "LANG": "C.UTF-8"}, start_new_session=True, bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            code, name, calls = work_of(process.pid)
            work = {"code": code, "name": name, "calls": calls, "limits": limits.of_process()}
            started = time.monotonic()
            deadline = started + limits.wall_seconds
            output, exceeded = _exchange(process, _as_work(work), deadline, limits.output_kb * 1024)
        finally:
            _end(process)
        answers = _answers(output["stdout"], exceeded, len(calls))
        reason = _unanswered(output, exceeded, process.returncode, time.monotonic() - started, limits)
        return [*map(Ended, answers), *[reason] * (len(calls) - len(answers))]


def _as_work(work: dict) -> bytes:
    """What a process is told: plain JSON, in the interpreter's own format, which is read without importing anything."""
    return marshal.dumps(json.loads(json.dumps(work)))


def _exchange(process: subprocess.Popen, work: bytes, deadline: float, max_bytes: int) -> tuple[dict[str, bytes], str]:
    """Write the work and read the output; returns it by stream, and which limit ended it: "time", "output" or ""."""
    output = {"stdout": b"", "stderr": b""}
    with selectors.DefaultSelector() as selector:
        for name, stream in (("stdin", process.stdin), ("stdout", process.stdout), ("stderr", process.stderr)):
            os.set_blocking(stream.fileno(), False)
            selector.register(stream, selectors.EVENT_WRITE if name == "stdin" else selectors.EVENT_READ, name)
        while selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if time.monotonic() >= deadline:
                return output, "time"
            for key, _ in ready:
                if key.data == "stdin":
                    work = _write_some(key.fileobj, work)
                    open_still = bool(work)
                else:
                    data = os.read(key.fd, 65536)
                    output[key.data] += data
                    open_still = bool(data)
                    if len(output[key.data]) > max_bytes:
                        return output, "output"
                if not open_still:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
    return output, ""


def _write_some(stream, work: bytes) -> bytes:
    """Write as much as the pipe takes; returns the rest, nothing if the reader has gone."""
    try:
        return work[os.write(stream.fileno(), work[:65536]) :]
    except BrokenPipeError:
        return b""


def _end(process: subprocess.Popen) -> None:
    """Kill the process group, and reap the process."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        stream.close()


def _answers(stdout: bytes, exceeded: str, num_calls: int) -> list[dict]:
    """The answers up to the first call that has none. What a process is ended for is the fault of its last call."""
    lines = [] if exceeded == "output" else stdout.split(b"\n")[: num_calls - bool(exceeded)]
    return list(takewhile(bool, map(_answer, lines)))


def _answer(line: bytes) -> dict:
    """The answer in a line of output; empty if it is none."""
    with suppress(ValueError, RecursionError):
        answer = json.loads(line)
        if isinstance(answer, dict) and ("value" in answer or isinstance(answer.get("error"), str)):
            return answer
    return {}


def _unanswered(output: dict[str, bytes], exceeded: str, status: int, seconds: float, limits: Limits) -> Ended:
    """Why a process has ended without an answer."""
    if exceeded == "time":
        return Ended(None, f"no answer in {limits.wall_seconds:g} s", late=True)
    if exceeded == "output":
        return Ended(None, f"more than {limits.output_kb} kB of output")
    # The kernel kills a process that exceeds its CPU time; the exit status depends on the wrapping tools.
    if status != 0 and seconds >= limits.cpu_seconds:
        return Ended(None, f"more than {limits.cpu_seconds} s of CPU time", late=True)
    last = output["stderr"].decode(errors="replace").strip().splitlines()[-1:]
    return Ended(None, f"exited without an answer (status {status}){': ' if last else ''}{''.join(last)[:200]}")


# ---- results -------------------------------------------------------------------------------------------------------------


def _result(ended: Ended, test: dict, function_name: str, limits: Limits) -> TestResult:
    call, expected = f"{function_name}({', '.join(shorten(arg) for arg in test['args'])})", shorten(test["expected"])
    if ended.late:
        return TestResult("timed out", call, expected, message=ended.reason)
    if ended.answer is None:
        return TestResult("error", call, expected, message=ended.reason)
    if "error" in ended.answer:
        line = ended.answer.get("line")
        place = f" (line {line})" if isinstance(line, int) else ""
        return TestResult("error", call, expected, message=printable(ended.answer["error"][:300]) + place)
    value = ended.answer["value"]
    status = "passed" if same(value, test["expected"], test.get("compare", "equal")) else "failed"
    return TestResult(status, call, expected, shorten(value))


def same(got, expected, compare: str = "equal") -> bool:
    """Whether two JSON values are equal. "unordered" ignores the order of lists, "close" rounding errors."""
    if compare == "unordered" and isinstance(got, list) and isinstance(expected, list):
        got, expected = (sorted(value, key=_as_json) for value in (got, expected))
    if isinstance(expected, bool) or isinstance(got, bool):
        return got is expected
    if isinstance(expected, list):
        return isinstance(got, list) and len(got) == len(expected) and all(map(same, got, expected, [compare] * len(got)))
    if isinstance(expected, dict):
        return isinstance(got, dict) and got.keys() == expected.keys() and all(
            same(got[key], expected[key], compare) for key in expected
        )  # fmt: skip
    if compare == "close" and isinstance(got, int | float) and isinstance(expected, int | float):
        return math.isclose(got, expected, rel_tol=1e-6, abs_tol=1e-9)
    return got == expected


def _as_json(value) -> str:
    """A value as JSON, as a sort key. Values nested too deeply all have the same key."""
    try:
        return json.dumps(value, sort_keys=True)
    except RecursionError:
        return ""


def shorten(value, length: int = 200) -> str:
    """A value as JSON, shortened for display."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        text = "a value nested too deeply to show"
    return printable(text if len(text) <= length else text[: length - 3] + "...")


def printable(text: str) -> str:
    """A text with lone surrogates replaced, which neither the store nor the page accepts."""
    return text.encode("utf-8", "replace").decode()
