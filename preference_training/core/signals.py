"""Stopping a run before its end, by a signal or a time limit.

The first signal has the run finish its step, or the batch of its evaluation, write a checkpoint and exit; before the first step
there is nothing to write. A second SIGINT ends it at once.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

# Exit status of a run that has stopped before its end, its checkpoint written: "try again later" (EX_TEMPFAIL).
STOPPED = 75
# Exit status after a second SIGINT.
ENDED_AT_ONCE = 128 + signal.SIGINT
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Ctrl-C reaches a worker twice, from the terminal and from its launcher: one request within this time. Unit: seconds.
SAME_SIGNAL = 1.0
# After this time a start that SIGTERM has not ended is ended again. Unit: seconds.
EXIT_AGAIN = 2.0


class StoppedError(Exception):
    """The run has stopped before its end; the message says why. resumable: whether with a checkpoint to resume from."""

    def __init__(self, message: str, resumable: bool = True):
        super().__init__(message)
        self.resumable = resumable

    def with_advice(self, resume: str | None) -> str:
        """The message, and how to go on. resume: what the stopped command has for the key of this name."""
        return f"{self}; the same command {'' if resume else 'with resume=auto '}continues from there"


class StopRequests:
    """Handles signals inside its `with` block. `reason` says why the run is to stop, None while it is not.

    max_minutes: how long the run may take; None for no limit. ends_process: whether this process has nothing to do after its
    run. Later signals are then ignored: its exit status is that of the run.
    """

    ends_process: ClassVar[bool] = False

    def __init__(self, max_minutes: float | None = None):
        self.ends_at = time.monotonic() + 60 * (float("inf") if max_minutes is None else max_minutes)
        self.received: tuple[str, float] | None = None
        self.handlers: dict = {}

    def __enter__(self) -> "StopRequests":
        # Only a process's main thread may handle signals.
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        restore_handlers(self.handlers)

    @property
    def signal(self) -> str | None:
        """The name of the signal that asks the run to stop; None while none has."""
        return self.received and self.received[0]

    @property
    def reason(self) -> str | None:
        """Why the run is to stop; None while it is not."""
        if self.signal is not None:
            return self.signal
        return "max_wall_time is over" if time.monotonic() >= self.ends_at else None

    def _receive(self, number: int, _frame) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received = signal.Signals(number).name, now
            _announce(self.received[0])
        elif number == signal.SIGINT and now - self.received[1] > SAME_SIGNAL:
            os._exit(ENDED_AT_ONCE)


def _announce(name: str) -> None:
    """Say, from within a signal handler, that the run will stop: its step and an evaluation may still take minutes."""
    if os.environ.get("RANK", "0") == "0":
        text = (
            f"{name}: the run stops after its step or the batch of its evaluation, with a checkpoint if it has taken a step; a "
            "second Ctrl-C ends it at once, without one\n"
        )
        # Unlike `print`, it may interrupt another write.
        os.write(2, text.encode())


def restore_handlers(usual: dict) -> None:
    """Restore the handlers of signals that were in force before a run, or ignore signals if the process ends with the run."""
    for number, handler in usual.items():
        signal.signal(number, signal.SIG_IGN if StopRequests.ends_process else handler)


@contextmanager
def stoppable_start() -> Iterator[None]:
    """Inside, SIGTERM and SIGINT end this process by SystemExit and one line, until a run has handlers of its own.

    A run that is still starting can so clear away what it has begun. Not in a thread, nor where something else handles SIGTERM.
    """
    handles = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if handles:
        signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    except KeyboardInterrupt:
        _say_stopped(signal.SIGINT)
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        if handles and signal.getsignal(signal.SIGALRM) is _exit:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _exit(number: int, _frame) -> None:
    if number == signal.SIGTERM:
        _say_stopped(number)
        # Python discards exceptions in some places, such as __del__: raise it again until it is not.
        signal.signal(signal.SIGALRM, _exit)
        signal.setitimer(signal.ITIMER_REAL, EXIT_AGAIN, EXIT_AGAIN)
    raise SystemExit(128 + signal.SIGTERM)


def _say_stopped(number: int) -> None:
    os.write(2, f"{signal.Signals(number).name}: stopped before its first step\n".encode())
