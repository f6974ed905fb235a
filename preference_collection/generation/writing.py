"""Replies on their way: each in its own thread, so that a page can show it as it streams in, and stop it.

The answers of a comparison come from the same prompt with different seeds, and the request is stored with each.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from preference_collection.generation.asking import Request, Sampling, filled, new_seeds, requests_for
from preference_collection.generation.sources import Source
from preference_collection.generation.stopping import Stop
from preference_collection.store.model import Answer, Comparison, Task, new_id
from preference_training.core.errors import UserError, first_line
from preference_training.sandbox.replies import Extracted, extract_code


@dataclass
class Writing:
    """A reply in progress. state is waiting, writing, done, failed or stopped; message says why it failed.

    finish: why the model ended (stop, length, ...), where the source says it. instruction: the one in the request's prompt.
    """

    source: Source
    request: Request
    instruction: str = ""
    text: str = ""
    state: str = "waiting"
    message: str = ""
    finish: str | None = None
    last_at: float = field(default_factory=time.monotonic)
    stop: Stop = field(default_factory=Stop)
    _thread: threading.Thread | None = None

    def start(self) -> "Writing":
        """Send the request."""
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()
        return self

    @property
    def over(self) -> bool:
        """Whether the reply is finished."""
        return self.state in ("done", "failed", "stopped")

    def quiet_seconds(self) -> float:
        """Seconds since the last output."""
        return 0.0 if self.over else time.monotonic() - self.last_at

    def cancel(self) -> None:
        """Stop, keeping the text so far. Closing the connection tells the server."""
        if not self.over:
            self.state = "stopped"
        self.stop.ask()

    def wait(self, seconds: float | None = None) -> "Writing":
        """Wait until the reply is finished."""
        self._thread.join(seconds)
        return self

    def fault(self, task: Task) -> str | None:
        """The fault of a finished reply, as the end of a sentence, or None."""
        if not self.over:
            return None
        if self.state != "done":
            return "was stopped" if self.state == "stopped" else "failed"
        return read_reply(task, self.text).fault

    def _write(self) -> None:
        try:
            for part in self.source.stream(self.request, self.stop):
                if self.stop.asked:
                    break
                self.text += as_text(part.text)
                self.finish = part.ended or self.finish
                self.state, self.last_at = "writing", time.monotonic()
            self._finish("done")
        except UserError as error:
            self._finish("failed", str(error))
        except Exception as error:  # show any error on the page, where a thread's traceback would be invisible
            self._finish("failed", f"{type(error).__name__}: {first_line(error)}")
            raise

    def _finish(self, state: str, message: str = "") -> None:
        if not self.stop.asked:
            self.state, self.message = state, message


def as_text(piece: str) -> str:
    """What a server sent as text that the store accepts: without lone surrogates."""
    return piece.encode("utf-8", "replace").decode()


def write_answers(source: Source, model: str, task: Task, sampling: Sampling, count: int = 2) -> list[Writing]:
    """Request several answers to a task: the same prompt with different seeds."""
    instruction = filled(sampling.instruction, task)
    requests = requests_for(task, model, sampling, new_seeds(count))
    return [Writing(source, request, instruction).start() for request in requests]


def write_again(writing: Writing) -> Writing:
    """Repeat a request with another seed."""
    [seed] = new_seeds(1)
    return Writing(writing.source, replace(writing.request, seed=seed), writing.instruction).start()


def read_reply(task: Task, text: str) -> Extracted:
    """The code in a reply to a task and its fault. Where the task is not one of code, only an empty reply is at fault."""
    if task.kind == "code":
        return extract_code(text, task.function_name, task.tests)
    return Extracted(None, None if text.strip() else "is empty")


def answer_of(task: Task, request: Request, instruction: str, text: str, finish: str | None) -> Answer:
    """A reply as an answer for the store.

    parameters: temperature, seed, max_tokens, instruction, and where there is one: finish (why the model ended), fault (the
    end of a sentence) and function_name (the function that its tests call, where that is not the task's).
    """
    found = read_reply(task, text)
    others = {"finish": finish, "fault": found.fault, "function_name": found.function_name}
    parameters = {
        "temperature": request.temperature,
        "seed": request.seed,
        "max_tokens": request.max_tokens,
        "instruction": instruction,
        **{key: value for key, value in others.items() if value},
    }
    return Answer(new_id(), request.model, request.prompt, parameters, text, found.code)


def as_comparison(task: Task, writings: Sequence[Writing]) -> Comparison:
    """Several replies as a comparison for the store."""
    answers = (answer_of(task, w.request, w.instruction, w.text, w.finish) for w in writings)
    return Comparison(new_id(), task.id, tuple(answers))
