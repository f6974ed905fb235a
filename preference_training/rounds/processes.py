"""The processes of a loop: one step each, so that its memory is free afterwards. At most one works in a loop's directory.

The lock is on an open file that every step inherits: it is held as long as one of them lives, whatever became of the others.
"""

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO

from preference_training.configuration.run_dirs import writable
from preference_training.core.errors import UserError
from preference_training.core.processes import STEP_LOCK, is_step
from preference_training.core.signals import ENDED_AT_ONCE, SAME_SIGNAL, SIGNALS, STOPPED, StoppedError

LOCK = ".loop.lock"
# How long a directory in which another process works is waited for: for a step to stop whose loop was killed. Unit: seconds.
PATIENCE = 120.0
# How often processes that work together are looked at. Unit: seconds.
POLL = 0.1
# Linux: which signal a process gets when its parent dies.
PR_SET_PDEATHSIG = 1


class StepFailedError(Exception):
    """A step has ended with an exit status of its own, and has said why. status: that of the process."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status

    def told(self, key: str = "rounds") -> int:
        """Print what has failed, under the key that has asked for it; the exit status for it."""
        print(self.as_mistake(key), file=sys.stderr, flush=True)
        return self.status if self.status > 0 else 1

    def as_mistake(self, key: str = "rounds") -> UserError:
        """This end, where a mistake of the user's is behind it."""
        return UserError(f"{key}: {self}; what it said is above")


@contextmanager
def locked_loop(directory: Path) -> Iterator[None]:
    """Inside, no other loop works in a directory. A step of this loop is inside already.

    A step whose loop was killed is waited for until it has stopped; raises UserError where another loop goes on working.
    """
    if is_step():
        yield
        return
    with writable(directory):
        file = (directory / LOCK).open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that works in {directory}", flush=True)
            _wait_for(file, directory)
        os.set_inheritable(file.fileno(), True)
        os.environ[STEP_LOCK] = str(file.fileno())
        try:
            yield
        finally:
            del os.environ[STEP_LOCK]


def _wait_for(file: IO, directory: Path) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        with suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if time.monotonic() > until:
            raise UserError(
                f"local_run_dir: another command has worked in {directory} for {PATIENCE:g} s now. Wait for it, stop it, or "
                "name another directory."
            )
        time.sleep(POLL)


def run_step(command: Sequence[str], name: str) -> None:
    """Run a step in a process of its own; see `run_together`."""
    run_together([(command, {})], name)


def run_together(commands: Sequence[tuple[Sequence[str], dict[str, str]]], name: str) -> None:
    """Run a step in processes of its own: each a command and changes of the environment. Signals that stop it are forwarded.

    When one fails, the others are asked to stop. Raises StoppedError where they were stopped, and StepFailedError for any
    other end but a good one.
    """
    received: list[tuple[int, float]] = []
    children: list[subprocess.Popen] = []

    def forward(number: int, _frame) -> None:
        again = bool(received) and number == signal.SIGINT and time.monotonic() - received[0][1] > SAME_SIGNAL
        received.append((number, time.monotonic()))
        for child in children:
            with suppress(ProcessLookupError):
                child.kill() if again else child.send_signal(number)
        if again:
            os._exit(ENDED_AT_ONCE)

    with handling(forward):
        for command, environment in commands:
            children.append(_started(command, environment))
        if received:
            forward(received.pop()[0], None)
        status = _first_failure(children)
    if received or status == STOPPED:
        said = signal.Signals(received[0][0]).name if received else "its process was stopped"
        raise StoppedError(f"stopped during {name}: {said}")
    if status:
        end = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        raise StepFailedError(f"{name} has ended with {end}", status)


def _first_failure(children: Sequence[subprocess.Popen]) -> int:
    """Wait for processes; the exit status of the first that fails, which ends the others, or 0."""
    while len(children) > 1 and None in (statuses := [child.poll() for child in children]) and not any(statuses):
        time.sleep(POLL)
    failed = next((child for child in children if child.poll()), children[0])
    for child in children if failed.poll() else ():
        with suppress(ProcessLookupError):
            child.terminate()
    ends = [child.wait() for child in children]
    return failed.returncode or max(ends, key=abs)


def _started(command: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.Popen:
    files = [int(os.environ[STEP_LOCK])] if is_step() else []
    # A step whose loop was killed stops, as if it were asked to.
    first = partial(_end_with_parent, os.getpid()) if sys.platform == "linux" else None
    return subprocess.Popen(
        list(command), pass_fds=files, preexec_fn=first, env=os.environ | (environment or {}), stdout=_stdout()
    )


def _stdout() -> int | None:
    """Where steps print: where this process prints to, which may be redirected."""
    try:
        return sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):
        return None


def _end_with_parent(parent: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def handling(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Inside, signals that stop a run go to a handler, where this is the thread that may handle them."""
    handles = threading.current_thread() is threading.main_thread()
    usual = {number: signal.signal(number, handler) for number in SIGNALS} if handles else {}
    try:
        yield
    finally:
        for number, before in usual.items():
            signal.signal(number, before)


def stop_at_signal(number: int, _frame) -> None:
    """For `handling`: stop a step at once. What it has written stays, and it goes on behind that."""
    raise StoppedError(f"stopped: {signal.Signals(number).name}")
