"""comparison.html and comparison.csv: what runs have come to, side by side, and which keys set them apart.

Runs that differ in nothing but their seed are one group, with their mean and spread. Runs may be going on.

    run directories -> groups -> table, curves, frontier -> comparison.html; one row a run -> comparison.csv
"""

import csv
import io
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from preference_training.core import metric_names
from preference_training.core.errors import UserError
from preference_training.core.metric_names import HELD_OUT_PROMPTS
from preference_training.core.secrets import without_secrets
from preference_training.core.values import dotted
from preference_training.evaluation.phrasing import too_few, with_interval
from preference_training.reporting.charts import Line, chart, line_of, shown
from preference_training.reporting.model_card import NOT_SHOWN
from preference_training.reporting.pages import page, write_page
from preference_training.tracking.run_files import (
    ABOUT,
    ASIDE,
    JOB,
    METRICS,
    OF_THEIR_RUN,
    PRUNED,
    RESULTS_FILE,
    config_in,
    json_object,
    metric_rows,
    progress,
    results_of,
    split_rows,
)

PAGE, TABLE = "comparison.html", "comparison.csv"
# What the table has of each run, and what the curves show: name in metrics.jsonl → name on the page.
COLUMNS = {
    metric_names.EVAL_LOSS: "held-out loss",
    metric_names.EVAL_ACCURACY: "reward accuracy",
    metric_names.EVAL_MARGIN: "reward margin",
}
CURVES = {
    **COLUMNS,
    metric_names.EVAL_CHOSEN_LOGPS: "log-prob of preferred responses",
    metric_names.TRAIN_LOSS: "training loss",
    metric_names.GRAD_NORM: "gradient norm",
}  # fmt: skip
# Losses whose reward is beta times the log-ratio of policy and reference.
LOG_RATIO_LOSSES = ("dpo", "ipo", "hinge", "robust", "rpo", "dpop", "bco", "tr_dpo")
# Keys of a loss that change what is trained, and not what a held-out loss is of.
OF_TRAINING = ("loss.mode_loss", "loss.mode_weight", "loss.a", "loss.reference_update_every", "loss.reference_update_share")
# In which the runs of a group may differ.
SEED = "seed"


# ---- runs -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run as its directory has it; config by dotted keys, name as the comparison calls it."""

    name: str
    config: dict
    steps: list[dict]
    evaluations: list[dict]
    progress: str
    results: dict

    @classmethod
    def read(cls, run_dir: Path, name: str) -> "Run":
        """What lies in a run directory."""
        rows = metric_rows(run_dir / METRICS)
        said = progress(rows, json_object(run_dir / ABOUT))
        state = "pruned" if (run_dir / PRUNED).exists() else json_object(run_dir / JOB).get("state")
        said += f", {state}" if state in ("pruned", "failed", "stopped") else ""
        return cls(name, dotted(config_in(run_dir)), *split_rows(rows), said, results_of(run_dir / RESULTS_FILE))

    @property
    def newest(self) -> dict:
        """The newest evaluation's metrics; empty before the first."""
        return self.evaluations[-1] if self.evaluations else {}

    @property
    def distance(self) -> tuple[str, float] | None:
        """How far the policy has gone from the reference, and what measures it; None where nothing does. Unit: nats.

        The KL that scripts/evaluate.py estimates, else by how much held-out responses have become less likely than under the
        reference, which would be the KL from reference to policy if the reference had written them.
        """
        try:
            kl = self.results["kl"]["per_answer"]["mean"]
        except (KeyError, TypeError):
            kl = None
        if isinstance(kl, int | float):
            return KL, kl
        beta, rewards = (
            self.config.get("loss.beta"),
            [self.newest.get(metric_names.reward("eval", side)) for side in ("chosen", "rejected")],
        )
        known = all(isinstance(value, int | float) for value in (beta, *rewards)) and beta
        if not known or self.config.get("loss.name") not in LOG_RATIO_LOSSES:
            return None
        return FALL, -sum(rewards) / 2 / beta


KL, FALL = "KL to the reference", "fall of held-out responses' log-prob below the reference's"


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Run directories among some paths and below them, in the order of their names. Raises UserError where there is none."""
    found: dict[Path, None] = {}
    for path in paths:
        found_here = [file.parent for file in path.rglob(METRICS)] if path.is_dir() else []
        # What a run has set aside of one before it is looked at only where it is named itself.
        kept = [each for each in found_here if not any(part.startswith(ASIDE) for part in each.relative_to(path).parts)]
        below = sorted(kept, key=_by_number)
        if not below:
            raise UserError(f"{path}: no {METRICS} in it or below it. Expected run directories, or a folder of them.")
        found |= dict.fromkeys(each.resolve() for each in below)
    return list(found)


def _by_number(path: Path) -> list:
    """Orders 2 before 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in path.parts]


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """The runs in some directories, named by what their paths do not share."""
    parts = [path.parts for path in directories]
    shared = next((k for k, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1), min(map(len, parts)) - 1)
    return [Run.read(path, "/".join(path.parts[shared:])) for path in directories]


# ---- groups -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed; `settings` are what sets them apart from other groups."""

    settings: dict
    runs: list[Run]

    @property
    def name(self) -> str:
        """What the group is called: its settings, or its runs' names where nothing sets it apart."""
        said = ", ".join(f"{key.removeprefix('loss.')}={value}" for key, value in self.settings.items())
        return said or ", ".join(run.name for run in self.runs)

    def line(self, metric: str, label: str, style: int) -> Line | None:
        """A metric's line: of one run with its interval; of several the mean at the points that all have, and their range."""
        sparse = "eval" in metric
        lines = [line_of(run.evaluations if sparse else run.steps, metric, label, style, sparse) for run in self.runs]
        lines = [line for line in lines if line is not None]
        if len(lines) < 2:
            return lines[0] if lines else None
        x = sorted(set.intersection(*(set(line.x.tolist()) for line in lines)))
        if not x:
            return None
        columns = numpy.array([[dict(zip(line.x.tolist(), line.y.tolist(), strict=True))[at] for at in x] for line in lines])
        bounds = columns.min(0), columns.max(0)
        return Line(label, numpy.array(x), columns.mean(0), *bounds, style=style, is_sparse=sparse)


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """The keys in which runs differ, the seed and what no model depends on left aside."""
    # What says which data and which weights it was is left out of cards, but not here.
    told = ("datasets", "model.archive", "model.name_or_path")
    keys = {key for run in runs for key in run.config if key.startswith(told) or not key.startswith(NOT_SHOWN)} - {SEED}
    return sorted(key for key in keys if len({str(run.config.get(key)) for run in runs}) > 1)


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The runs by what sets them apart, in the order of these values."""
    keys = differing_keys(runs)
    by_settings: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: [_in_order(run.config.get(key)) for key in keys]):
        by_settings.setdefault(str([run.config.get(key) for key in keys]), []).append(run)
    return [Group({key: members[0].config.get(key) for key in keys}, members) for members in by_settings.values()]


def _in_order(value) -> tuple:
    """Numbers by their size, before everything else by its text."""
    is_number = isinstance(value, int | float)
    return not is_number, value if is_number else 0, str(value)


# ---- the page ---------------------------------------------------------------------------------------------------------------


def comparison_page(runs: Sequence[Run]) -> str:
    """The HTML of a comparison."""
    groups = grouped(runs)
    return page(
        "comparison.html",
        number=len(runs),
        keys=differing_keys(runs),
        warnings=doubts(runs),
        columns=[title for name, title in COLUMNS.items() if any(name in run.newest for run in runs)],
        rows=[row_of(group) for group in groups],
        frontiers=[picture for picture in frontiers(groups) if picture],
        charts=[picture for name, title in CURVES.items() if (picture := curves(groups, name, title))],
    )


def doubts(runs: Sequence[Run]) -> list[str]:
    """Which columns do not compare between the runs, and why."""
    if len(runs) < 2:
        return []
    found = []
    keys = [key for key in differing_keys(runs) if key.startswith("loss.") and key not in OF_TRAINING]
    if keys:
        found.append(
            f"Held-out losses do not compare: they are of other formulas where {', '.join(keys)} differ. Accuracies do."
        )
    if "loss.beta" in keys:
        found.append("Reward margins have beta in them: margin / beta compares.")
    own = sorted({run.config.get("loss.name") for run in runs} & {*OF_THEIR_RUN})
    if own:
        found.append(f"Held-out losses of {', '.join(own)} depend on what their run has seen, and do not compare.")
    old = [run.name for run in runs if metric_names.loss_is_at_beta_used(run.newest)]
    if old:
        found.append(f"Of an earlier version, with the held-out loss at beta-DPO's beta in force: {', '.join(old)}.")
    return found


def row_of(group: Group) -> dict:
    """A group's row of the table."""
    cells = [cell(group.runs, name) for name in COLUMNS if any(name in run.newest for run in group.runs)]
    return {
        "settings": list(group.settings.values()),
        "cells": cells,
        "runs": [{"name": run.name, "seed": run.config.get(SEED), "progress": run.progress} for run in group.runs],
    }


def cell(runs: Sequence[Run], name: str) -> str:
    """A metric at the newest evaluation: of one run with its 95% interval, of several their mean and standard deviation."""
    rows = [run.newest for run in runs if isinstance(run.newest.get(name), int | float)]
    if not rows:
        return "-"
    if len(rows) == 1:
        [row] = rows
        bounds = row.get(f"{name}/low"), row.get(f"{name}/high")
        found = with_interval(row[name], *bounds) if None not in bounds else shown(row[name])
    else:
        values = [row[name] for row in rows]
        found = f"{statistics.fmean(values):.3g} ± {statistics.stdev(values):.2g}"
    prompts = [row[HELD_OUT_PROMPTS] for row in rows if isinstance(row.get(HELD_OUT_PROMPTS), int | float)]
    return f"{found} ({min(prompts):.0f} prompts: too few)" if prompts and too_few(min(prompts), name) else found


def curves(groups: Sequence[Group], name: str, title: str):
    """A metric's curves of all groups, overlaid."""
    lines = [group.line(name, group.name, style) for style, group in enumerate(groups)]
    return chart(f"{title[0].upper()}{title[1:]}", lines)


def frontiers(groups: Sequence[Group]) -> Iterator:
    """Reward accuracy against the distance from the reference, one point a run; a picture for each measure of distance."""
    for measure in (KL, FALL):
        found = [(group, line) for style, group in enumerate(groups) if (line := placed(group, measure, style))]
        lines = [line for _, line in found]
        note = "held out; to the upper left is better"
        yield chart("Reward accuracy and distance", [frontier(found), *lines], note, x_name=f"{measure}, nats")


def frontier(placed_groups: Sequence[tuple[Group, Line]]) -> Line | None:
    """The line through the groups' means in the order of the one number that sets them apart, such as beta; else None."""
    keys = {key for group, _ in placed_groups for key in group.settings}
    numbers = [value for group, _ in placed_groups for value in group.settings.values()]
    if len(numbers) < 2 or len(keys) != 1 or not all(isinstance(value, int | float) for value in numbers):
        return None
    [key] = keys
    means = numpy.array([(line.x.mean(), line.y.mean()) for _, line in placed_groups])
    return Line(f"means, by {key.removeprefix('loss.')}", *means.T, style=len(placed_groups))


def placed(group: Group, measure: str, style: int) -> Line | None:
    """Where a group's runs stand by one measure of distance, the first of them with the group's name; None for nowhere."""
    points = sorted(
        (run.distance[1], run.newest[metric_names.EVAL_ACCURACY])
        for run in group.runs
        if run.distance is not None
        and run.distance[0] == measure
        and isinstance(run.newest.get(metric_names.EVAL_ACCURACY), int | float)
    )
    if not points:
        return None
    x, y = numpy.array(points, float).T
    return Line(group.name, x, y, labels=(group.name, *[""] * (len(points) - 1)), style=style)


# ---- the files --------------------------------------------------------------------------------------------------------------


def csv_of(runs: Sequence[Run]) -> str:
    """One row a run: name, seed, the keys that differ, how far it is, and each metric of its newest evaluation."""
    keys = [SEED, *differing_keys(runs)]
    metrics = list(dict.fromkeys(name for run in runs for name in run.newest))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["run", *keys, *metrics, "distance", "distance_measure"])
    for run in runs:
        measure, distance = run.distance or ("", "")
        values = [run.config.get(key) for key in keys] + [run.newest.get(name) for name in metrics]
        writer.writerow([run.name, *values, distance, measure])
    return without_secrets(file.getvalue())


def write_comparison(paths: Sequence[Path], to: Path) -> list[Path]:
    """Compare the runs in and below some paths; writes comparison.html and .csv into a folder and returns their paths.

    Raises UserError where there is no run, and where the files cannot be written.
    """
    runs = read_runs(find_runs(paths))
    try:
        to.mkdir(parents=True, exist_ok=True)
        write_page(to / PAGE, comparison_page(runs))
        write_page(to / TABLE, csv_of(runs))
    except OSError as error:
        fault = f"--to: {to} cannot be written to: {error.strerror}. Expected a folder of yours, with room."
        raise UserError(fault) from error
    return [to / PAGE, to / TABLE]
