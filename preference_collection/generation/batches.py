"""Many requests to models: a few at a time, repeated after temporary errors, with one line of progress.

All of it stops when no further request would succeed, and when it is told to.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from typing import TextIO

import tenacity

from preference_collection.generation.asking import Request, SourceError
from preference_collection.generation.sources import Model
from preference_collection.generation.stopping import Stop
from preference_collection.generation.writing import as_text
from preference_training.core.errors import UserError

# After so many requests in a row without a reply, further ones are not sent.
FAILURES_IN_A_ROW = 10
# The longest pause before a repetition, whatever a server asks for. Unit: seconds.
LONGEST_PAUSE = 120.0
# Where progress is not a terminal's line, it is a line as often. Unit: seconds.
LINE_EVERY = 30.0


class StoppedError(Exception):
    """A request ended because it was told to stop."""


@dataclass(frozen=True)
class Patience:
    """How often a request is sent until it has a reply, and the first pause between, in seconds; each is twice the last."""

    attempts: int = 6
    pause: float = 1.0


PATIENCE = Patience()


def reply_to(model: Model, request: Request, stop: Stop, patience: Patience) -> tuple[str, str | None]:
    """The whole reply to a request, and why the model ended it. Temporary errors are followed by another attempt.

    Raises UserError if there is none, StoppedError if stopped.
    """
    backoff = tenacity.wait_exponential_jitter(patience.pause, LONGEST_PAUSE, jitter=patience.pause)
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, SourceError) and error.is_retryable),
        wait=lambda state: max(backoff(state), min(state.outcome.exception().pause or 0.0, LONGEST_PAUSE)),
        stop=lambda state: stop.asked or state.attempt_number >= patience.attempts,
        sleep=stop.wait,
        reraise=True,
    )
    return retrying(_reply_once, model, request, stop)


def _reply_once(model: Model, request: Request, stop: Stop) -> tuple[str, str | None]:
    text, finish = [], None
    if not stop.asked:
        for part in model.source.stream(request, stop):
            text.append(as_text(part.text))
            finish = part.ended or finish
    if stop.asked:
        raise StoppedError
    return "".join(text), finish


# ---- progress ---------------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """One line: how much of a total is done, at which rate, and the time left. unit: the plural of what is counted."""

    total: int
    unit: str
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    done: int = 0
    _started: float = field(default_factory=time.monotonic)
    _drawn: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def step(self) -> None:
        """Count one, and draw the line: again in its place on a terminal, now and then elsewhere."""
        with self._lock:
            self.done += 1
            is_terminal, now = self.stream.isatty(), time.monotonic()
            if is_terminal or now - self._drawn >= LINE_EVERY:
                self._drawn = now
                print(f"\r{self.line()}\x1b[K" if is_terminal else self.line(), end="" if is_terminal else "\n",
                      file=self.stream, flush=True)  # fmt: skip

    def skip(self, count: int = 1) -> None:
        """Some of the total need not be done."""
        with self._lock:
            self.total -= count

    def end(self) -> None:
        """End the line on a terminal."""
        if self.done and self.stream.isatty():
            print(file=self.stream, flush=True)

    def line(self) -> str:
        """The line."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = self.done / seconds
        pace = f"{rate:.1f} a second" if rate >= 1 else f"{60 * rate:.1f} a minute"
        left = duration_text((self.total - self.done) / rate) if rate else "unknown time"
        return f"{self.done} of {self.total} {self.unit}, {pace}, {left} left"


def duration_text(seconds: float) -> str:
    """A duration with its two largest units: 2 h 5 min, 3 min 20 s, 12 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def number_of(count: int, one: str, many: str = "") -> str:
    """A number with the noun that it counts: 1 answer, 2 answers."""
    return f"{count} {one if count == 1 else many or f'{one}s'}"


# ---- batches ----------------------------------------------------------------------------------------------------------------


class Batch:
    """Runs jobs in several threads. A job that raises UserError has failed; what ends all of them is raised by `run`."""

    def __init__(self, workers: int, stop: Stop, progress: Progress | None = None):
        """stop: ends the requests in progress."""
        self.failures: list[UserError] = []
        self._workers, self._stop, self._progress = workers, stop, progress
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._fatal: BaseException | None = None

    def run(self, jobs: Iterable[Callable[[], object]]) -> None:
        """Run all jobs. Raises UserError if no further one would succeed, and KeyboardInterrupt as it comes.

        Then requests in progress are stopped; what jobs have saved stays.
        """
        jobs = iter(jobs)
        with ThreadPoolExecutor(self._workers, thread_name_prefix="requests") as pool:
            try:
                waiting = {pool.submit(self._run, job) for job in islice(jobs, self._workers)}
                while waiting:
                    done, waiting = wait(waiting, return_when="FIRST_COMPLETED")
                    if not self._stop.asked:
                        waiting |= {pool.submit(self._run, job) for job in islice(jobs, len(done))}
            except BaseException:
                # Otherwise the pool would wait for the replies.
                self._stop.ask()
                raise
            finally:
                if self._progress:
                    self._progress.end()
        if self._fatal:
            raise self._fatal

    def _run(self, job: Callable[[], object]) -> None:
        try:
            if self._stop.asked:
                return
            job()
        except StoppedError:
            return
        except UserError as error:
            self._failed(error)
        except BaseException as error:
            self._end(error)
        else:
            self._in_a_row = 0
        if self._progress and not self._fatal:
            self._progress.step()

    def _failed(self, error: UserError) -> None:
        with self._lock:
            self.failures.append(error)
            self._in_a_row += 1
            is_final = getattr(error, "is_final", True)
        if is_final:
            self._end(error)
        elif self._in_a_row >= FAILURES_IN_A_ROW:
            self._end(UserError(f"{self._in_a_row} requests in a row had no reply. {error}"))

    def _end(self, error: BaseException) -> None:
        with self._lock:
            self._fatal = self._fatal or error
        self._stop.ask()
