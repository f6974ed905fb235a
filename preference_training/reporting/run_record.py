"""A run as its directory records it: read once, then handed to charts, tables and observations.

The run may still be in progress. Missing and damaged files count as empty.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy

from preference_training.configuration.saved import read_config
from preference_training.core.metric_names import EPOCH, EXAMPLES, LEARNING_RATE, MEMORY, ROUNDS, TIME
from preference_training.core.values import dotted
from preference_training.reporting.charts import Line, metric_line, metric_values
from preference_training.reporting.flagged_pairs import flagged_rows
from preference_training.tracking.run_files import (
    ABOUT,
    BAD_STEPS,
    EVENTS,
    JOB,
    METRICS,
    PRUNED,
    RESULTS_FILE,
    SAMPLES,
    json_lines,
    json_object,
    metric_rows,
    progress,
    read_results,
    split_rows,
)

# Metrics of a step without noise.
EXACT = (LEARNING_RATE, EPOCH, MEMORY, TIME)


@dataclass(frozen=True)
class RunRecord:
    """A run's configuration, the facts of its start, its metrics, and the results of its evaluation.

    label: what tables call the run. rows: of metrics.jsonl. Files that only the report needs are read on first use.
    """

    directory: Path
    label: str
    config: dict
    about: dict
    rows: list[dict]
    results: dict

    @classmethod
    def read(cls, run_dir: Path, label: str | None = None) -> "RunRecord":
        """Read a run directory."""
        about, rows = json_object(run_dir / ABOUT), metric_rows(run_dir / METRICS)
        return cls(run_dir, label or run_dir.name, read_config(run_dir), about, rows, read_results(run_dir / RESULTS_FILE))

    @cached_property
    def settings(self) -> dict:
        """The configuration by dotted keys, such as loss.beta."""
        return dotted(self.config)

    @property
    def loss(self) -> tuple[object, object]:
        """The loss's name, and the parts of a mix."""
        return self.settings.get("loss.name"), self.settings.get("loss.parts")

    @cached_property
    def _split_rows(self) -> tuple[list[dict], list[dict]]:
        return split_rows(self.rows)

    @property
    def steps(self) -> list[dict]:
        """The metrics of the training steps."""
        return self._split_rows[0]

    @property
    def evaluations(self) -> list[dict]:
        """The metrics of the evaluations."""
        return self._split_rows[1]

    @property
    def last_evaluation(self) -> dict:
        """The metrics of the last evaluation; empty before the first."""
        return self.evaluations[-1] if self.evaluations else {}

    @property
    def progress(self) -> str:
        """The progress of the run, in words."""
        return progress(self.rows, self.about)

    @property
    def status(self) -> str:
        """The progress, and the state of a job of a sweep that did not complete."""
        state = "pruned" if (self.directory / PRUNED).exists() else json_object(self.directory / JOB).get("state")
        return self.progress + (f", {state}" if state in ("pruned", "failed", "stopped") else "")

    def line(self, metric: str, label: str, style: int = 0) -> Line | None:
        """The line of a metric: over evaluations, each marked, if it is a held-out one, or else over steps."""
        is_held_out = "eval" in metric or metric.startswith(ROUNDS)
        look = {"style": style, "is_sparse": is_held_out, "is_noisy": not is_held_out and metric not in EXACT}
        rows, x = (self.evaluations, self._examples[1]) if is_held_out else (self.steps, self._examples[0])
        return metric_line(rows, x, metric, label, **look)

    @cached_property
    def _examples(self) -> list[numpy.ndarray]:
        """After how many examples each step and each evaluation was, which all lines share."""
        return [metric_values(rows, EXAMPLES) for rows in self._split_rows]

    @cached_property
    def samples(self) -> list[dict]:
        """The rows of samples.jsonl."""
        return list(json_lines(self.directory / SAMPLES))

    @cached_property
    def events(self) -> list[dict]:
        """The rows of events.jsonl."""
        return list(json_lines(self.directory / EVENTS))

    @cached_property
    def bad_steps(self) -> list[dict]:
        """The steps that were skipped because a loss or gradient was not finite."""
        return list(json_lines(self.directory / BAD_STEPS))

    @cached_property
    def flagged_pairs(self) -> list[dict]:
        """The valid rows of flagged_pairs.jsonl."""
        return flagged_rows(self.directory)
