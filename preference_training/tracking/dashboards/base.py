"""The interface of dashboards: what they are told of a run, under the names of metrics.jsonl."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from preference_training.core.signals import StoppedError


class RunEnd(Enum):
    """How a run has ended: it finished, it was stopped by a signal or a time limit, or it failed."""

    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"

    @classmethod
    def of(cls, error: BaseException | None) -> "RunEnd":
        """Of the error that a run has ended with, None for none."""
        if error is None:
            return cls.FINISHED
        return cls.STOPPED if isinstance(error, StoppedError | KeyboardInterrupt) else cls.FAILED


@dataclass(frozen=True)
class RunStart:
    """What a dashboard needs to know of a run that starts.

    config: the whole configuration, plain. run_id: the dashboards' id of the run, which is continued if there is one. examples:
    where the run resumes, 0 at its beginning.
    """

    config: dict
    run_dir: Path
    run_id: str
    examples: int = 0


class Dashboard:
    """A place for a run's numbers. Making one starts it; whatever it raises, then or later, is printed and ends no run."""

    def __init__(self, start: RunStart):
        pass

    def log(self, row: dict[str, float]) -> None:
        """Take one row of metrics, counters/examples among them."""
        raise NotImplementedError

    def log_table(self, name: str, rows: list[dict], examples: int) -> None:
        """Take rows of text, all with the same keys, as a table after so many examples."""

    def log_page(self, path: Path) -> None:
        """Take the run's report, a page in one file."""

    def finish(self, end: RunEnd) -> None:
        """Everything has been logged, and the run has ended like this."""
