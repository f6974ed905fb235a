"""A user's callbacks: objects with any of the methods of `Callback`, which a run calls on rank 0."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preference_training.core.errors import UserError

METHODS = ("on_step", "on_evaluation", "on_checkpoint", "on_end")


class Callback:
    """What a run calls, in the process that trains; a callback needs only the methods that it is interested in.

    A text or True from the first three ends the run after the step, with an evaluation and a checkpoint; the text is the reason
    that is logged. Exceptions are not caught.
    """

    def on_step(self, metrics: dict[str, float]) -> bool | str | None:
        """A step was taken: its row of metrics.jsonl. To read it waits for the device."""

    def on_evaluation(self, metrics: dict[str, float]) -> bool | str | None:
        """The held-out examples were scored: the row of metrics.jsonl."""

    def on_checkpoint(self, path: Path) -> bool | str | None:
        """A checkpoint is complete. Called after the next step where it was written in the background."""

    def on_end(self, run_dir: Path) -> None:
        """The run has ended, or was stopped; everything is written."""


class Callbacks:
    """The callbacks of a run. reason: why one of them wants it to end; None while none does.

    calls: whether they are called in this process; the others keep step with it.
    """

    def __init__(self, callbacks: Sequence[object] = (), calls: bool = True):
        for callback in callbacks:
            if not any(callable(getattr(callback, name, None)) for name in METHODS) or isinstance(callback, type):
                raise UserError(
                    f"callbacks: found {callback!r}, expected an object with at least one of the methods {', '.join(METHODS)}."
                )
        self.callbacks, self.calls = callbacks, calls
        self.reason: str | None = None

    def __bool__(self) -> bool:
        return bool(self.callbacks)

    def read(self, method: str) -> bool:
        """Whether any callback has a method."""
        return self.calls and any(callable(getattr(callback, method, None)) for callback in self.callbacks)

    def call(self, method: str, argument: Any) -> None:
        """Call a method of all callbacks that have it."""
        for callback in self.callbacks if self.calls else ():
            function = getattr(callback, method, None)
            if callable(function) and (answer := function(argument)):
                self.reason = answer if isinstance(answer, str) else f"{method} of a callback has asked for it"
