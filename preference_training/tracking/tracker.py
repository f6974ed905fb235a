"""Where a run's numbers go: metrics.jsonl always, the console as a progress bar or as lines, and dashboards if asked for.

A step hands over tensors; reading them synchronizes with the device, and is done only when a line is due. No step is lost:
pending ones are written with the next line, and at the end. What happens between steps (an evaluation, a checkpoint, a
warning) is a line on the console and in events.jsonl.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor

from preference_training.core.errors import first_line
from preference_training.core.metric_names import (
    BETA_USED,
    EVAL_LOSS,
    EXAMPLES,
    EXAMPLES_PER_SECOND,
    TRAIN_ACCURACY,
    TRAIN_LOSS,
    TRAIN_MARGIN,
)
from preference_training.tracking.dashboards.base import Dashboard, RunEnd
from preference_training.tracking.run_files import BAD_STEPS, EVENTS, METRICS, SAMPLES, json_lines

Metrics = dict[str, float | Tensor]

# Name in metrics.jsonl → name on the console
SHORT_NAMES = {
    TRAIN_LOSS: "loss",
    TRAIN_ACCURACY: "accuracy",
    TRAIN_MARGIN: "margin",
    BETA_USED: "beta",
    EXAMPLES_PER_SECOND: "examples/s",
}


def held_out_line(metrics: Metrics) -> str:
    """The metrics of an evaluation that a terminal shows."""
    shown = (EVAL_LOSS, "accuracies", "margins")
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name.endswith(shown))


class Tracker:
    """The sinks of one run. Use as a context manager; `total` is the number of training examples, for the time left.

    dashboards: where metrics go besides the run directory; they raise nothing. write_report makes a page of what the run
    directory holds, and returns its path; None for none. examples: how many the run has seen before.
    """

    def __init__(
        self,
        run_dir: Path,
        total: int | None,
        min_interval: float = 1.0,
        dashboards: Sequence[Dashboard] = (),
        write_report: Callable[[], Path] | None = None,
        examples: int = 0,
    ):
        self.run_dir = run_dir
        self.dashboards, self.write_report, self.examples = dashboards, write_report, examples
        self.page: Path | None = None
        # Raises where nothing can be written at the start.
        (run_dir / METRICS).touch()
        # Rows that could not be written yet, by file name. A checkpoint's line comes from another thread.
        self.unwritten: dict[str, bytes] = {}
        self.writing = threading.RLock()
        self.min_interval = min_interval
        self.pending: list[Metrics] = []
        # Kinds of findings that this process has recorded, and those that events.jsonl has had before, with their texts.
        self.recorded: set[str] = set()
        rows = json_lines(run_dir / EVENTS) if examples else ()
        self.recorded_before = {(str(row.get("finding")), str(row.get("text"))) for row in rows}
        self.last_line = float("-inf")
        self.console = _ProgressBar(total) if sys.stdout.isatty() else _Lines(total)

    def __enter__(self) -> "Tracker":
        self._record_event("goes on" if self.examples else "begins")
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.flush()
        self._record_event("ends" if error is None else f"ends: {first_line(error)}")
        self.report()
        self.console.close()
        for dashboard in self.dashboards:
            if self.page:
                dashboard.log_page(self.page)
            dashboard.finish(RunEnd.of(error))

    def log_step(self, metrics: Metrics) -> None:
        """Take a training step's metrics; they are written when `min_interval` seconds have passed since the last line."""
        self.pending.append(metrics)
        self.examples = metrics[EXAMPLES]
        if time.monotonic() - self.last_line >= self.min_interval:
            self.flush()

    def flush(self) -> None:
        """Write every pending step; the console and dashboards get the last one."""
        if not self.pending:
            return
        rows = [as_numbers(metrics) for metrics in self.pending]
        self.pending = []
        self._write(METRICS, rows)
        self.last_line = time.monotonic()
        self.console.step(rows[-1])
        for dashboard in self.dashboards:
            dashboard.log(rows[-1])

    def log_evaluation(self, metrics: Metrics) -> None:
        """Write an evaluation's metrics to all sinks, at once."""
        self.flush()
        row = as_numbers(metrics)
        self._write(METRICS, [row])
        self.examples = row[EXAMPLES]
        self.log_message(f"held out, after {row[EXAMPLES]:.0f} examples: {held_out_line(row)}")
        for dashboard in self.dashboards:
            dashboard.log(row)

    def log_samples(self, samples: list[dict], examples: int) -> None:
        """Add sampled answers to `samples.jsonl`, and show them to dashboards as a table."""
        self._write(SAMPLES, samples)
        for dashboard in self.dashboards:
            dashboard.log_table("samples", samples, examples)

    def log_bad_step(self, row: dict) -> None:
        """Add a skipped step to `bad_batches.jsonl`, and log it."""
        self._write(BAD_STEPS, [row])
        shown = ", ".join(row["pairs"][:3]) + (", ..." if len(row["pairs"]) > 3 else "")
        self.log_message(
            f"warning: the step after {row[EXAMPLES]} examples was skipped: its {row['not_finite']} is not "
            f"finite. {BAD_STEPS} names the examples: {shown}"
        )

    def report(self) -> None:
        """Bring the run's report up to date, if it has one."""
        if self.write_report is None:
            return
        self.flush()
        try:
            self.page = self.write_report()
        except Exception as error:  # whatever is wrong with the page, the run continues
            self.write_report = None
            again = f"python scripts/report.py {self.run_dir} tries it again"
            self.log_message(
                f"warning: report.html could not be written and keeps its old contents: {first_line(error)}. {again}"
            )

    def log_message(self, text: str) -> None:
        """One line on the console, above the progress bar, and in events.jsonl."""
        self.console.log_message(text)
        self._record_event(text)

    def log_finding(self, kind: str, text: str) -> None:
        """As `log_message`, of what the run's reader must know: in events.jsonl it has its kind, as `finding`."""
        self.console.log_message(text)
        self.record_finding(kind, text)

    def record_finding(self, kind: str, text: str) -> None:
        """A finding in events.jsonl alone, which the end of the run prints; each kind once.

        A run that was resumed records again only what has changed, such as its best checkpoint.
        """
        if kind in self.recorded:
            return
        self.recorded.add(kind)
        if (kind, text) not in self.recorded_before:
            self._record_event(text, finding=kind)

    def _record_event(self, text: str, **more: str) -> None:
        moment = datetime.now().astimezone().isoformat(timespec="seconds")
        self._write(EVENTS, [{"time": moment, "examples": self.examples, "text": text} | more])

    def _write(self, name: str, rows: list[dict]) -> None:
        """Append rows to a file. Those that a full disk does not take are written with the next ones: the run continues."""
        with self.writing:
            late = self.unwritten.pop(name, b"")
            left = late + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
            try:
                with (self.run_dir / name).open("ab", buffering=0) as file:
                    while left:
                        left = left[file.write(left) :]
            except OSError as error:
                self.unwritten[name] = left
                if not late:
                    self.log_message(f"warning: {name} cannot be written to, its rows are kept for later: {error.strerror}")


class NoTracker:
    """A tracker that writes nothing, for ranks other than 0."""

    def __enter__(self) -> "NoTracker":
        return self

    def __exit__(self, *exception) -> None:
        """Nothing was opened."""

    def ignore(self, *_) -> None:
        """Do nothing."""

    def log_finding(self, _kind: str, text: str) -> None:
        """A message, where those are not ignored."""
        self.log_message(text)

    log_step = log_evaluation = log_samples = log_bad_step = report = flush = log_message = record_finding = ignore


def as_numbers(metrics: Metrics) -> dict[str, float]:
    """Metrics as floats. Tensors are stacked first: one synchronization with the device per step, not per metric."""
    tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
    values = torch.stack([value.double().cpu() for value in tensors.values()]).tolist() if tensors else []
    read = dict(zip(tensors, values, strict=True))
    return {name: read.get(name, value) for name, value in metrics.items()}


# ---- console --------------------------------------------------------------------------------------------------------------


def _short(row: dict[str, float]) -> dict[str, str]:
    return {short: f"{row[name]:.4g}" for name, short in SHORT_NAMES.items() if name in row}


class _ProgressBar:
    """One bar over the training examples, for a terminal."""

    def __init__(self, total: int | None):
        from tqdm import tqdm

        self.bar = tqdm(total=total, unit="ex", dynamic_ncols=True, file=sys.stdout)

    def step(self, row: dict[str, float]) -> None:
        self.bar.set_postfix(_short(row), refresh=False)
        self.bar.update(row[EXAMPLES] - self.bar.n)

    def log_message(self, text: str) -> None:
        self.bar.write(text, file=sys.stdout)

    def close(self) -> None:
        self.bar.close()


class _Lines:
    """Plain lines, for a file or a pipe."""

    def __init__(self, total: int | None):
        self.total = total

    def step(self, row: dict[str, float]) -> None:
        done = f"{row[EXAMPLES]:.0f}" + (f"/{self.total}" if self.total else "")
        left = (self.total - row[EXAMPLES]) / max(row[EXAMPLES_PER_SECOND], 1e-9) if self.total else None
        self.log_message(
            f"{done} " + " ".join(f"{k} {v}" for k, v in _short(row).items()) + (f" left {left:.0f} s" if left else "")
        )

    def log_message(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        pass
