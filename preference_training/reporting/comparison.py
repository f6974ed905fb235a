"""comparison.html and comparison.csv: the results of several runs side by side, and the settings in which they differ.

Runs that differ only in their seed form a group, shown with its mean and spread. Runs may still be in progress.

    run directories -> groups -> table, curves, frontier -> comparison.html; one row per run -> comparison.csv
"""

import csv
import io
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import numpy
from markupsafe import Markup

from preference_training.configuration.composition import default_values
from preference_training.core import metric_names
from preference_training.core.errors import UserError
from preference_training.core.files import write_atomically
from preference_training.core.metric_names import (
    EVAL_ACCURACY,
    EVAL_CHOSEN_LOGPS,
    EVAL_LOSS,
    EVAL_MARGIN,
    GRAD_NORM,
    HELD_OUT_PROMPTS,
    HELD_OUT_REWARD,
    HELD_OUT_WIN_RATE,
    TRAIN_LOSS,
)
from preference_training.core.secrets import without_secrets
from preference_training.evaluation.phrasing import metric_text, too_few
from preference_training.losses.registry import evaluation_depends_on_run, example_kind, find_loss, parts_of, training_keys
from preference_training.reporting.charts import Line, chart, legend
from preference_training.reporting.examples import (
    MAX_CHARACTERS,
    last_question,
    response_before,
    rows_by_prompt,
    truncate,
)
from preference_training.reporting.model_card import is_shown
from preference_training.reporting.pages.rendering import render
from preference_training.reporting.run_charts import ACCURACY_AXES, axes_of
from preference_training.reporting.run_record import RunRecord
from preference_training.reporting.summary import other_model
from preference_training.tracking.run_files import ASIDE, METRICS, REPORT, ROUNDS_FILE

PAGE, TABLE = "comparison.html", "comparison.csv"
ACCURACY = EVAL_ACCURACY
# The metrics of the table and of the curves: name in metrics.jsonl → title on the page.
COLUMNS = {
    EVAL_LOSS: "held-out loss", ACCURACY: "reward accuracy", EVAL_MARGIN: "reward margin",
    HELD_OUT_REWARD: "held-out score", HELD_OUT_WIN_RATE: "win rate against the first model",
}  # fmt: skip
CURVES = {
    **COLUMNS,
    EVAL_CHOSEN_LOGPS: "log-prob of preferred responses",
    TRAIN_LOSS: "training loss",
    GRAD_NORM: "gradient norm",
}  # fmt: skip
# More settings than these do not fit beside the numbers; of more runs, intervals and legends would hide the lines.
MAX_KEY_COLUMNS, MAX_INTERVALS = 4, 8
# Of a group's name. Unit: characters.
MAX_NAME = 48
MAX_PROMPTS = 8
# The only setting in which the runs of a group differ.
SEED = "seed"


# ---- runs -------------------------------------------------------------------------------------------------------------------

KL, FALL = "KL to the reference", "fall of held-out responses' log-prob below the reference's"


def distance(run: RunRecord) -> tuple[str, float] | None:
    """How far the policy has moved from the reference, as (measure, nats); None where it is not known.

    The KL divergence that scripts/evaluate.py estimates; without it, the mean fall of the log-prob of held-out responses, which
    would be the KL divergence from reference to policy if the reference had written them.
    """
    try:
        kl = run.results["kl"]["per_answer"]["mean"]
    except (KeyError, TypeError):
        kl = None
    if isinstance(kl, int | float):
        return KL, kl
    name, beta = _rewarding(run)
    rewards = [run.last_evaluation.get(metric_names.reward("eval", side)) for side in ("chosen", "rejected")]
    is_known = all(isinstance(value, int | float) for value in (beta, *rewards)) and beta
    loss = find_loss(name)
    if not is_known or loss is None or loss.objective.reward != "log-ratio":
        return None
    return FALL, -sum(rewards) / 2 / beta


def _rewarding(run: RunRecord) -> tuple[object, object]:
    """Name and beta of the loss whose rewards a run logs: of a mix its first part of pairs."""
    name, parts = run.loss
    if name != "mix":
        return name, run.settings.get("loss.beta")
    of_pairs = [part for part in parts_of(name, parts) if example_kind(part.get("name")) == "pairs"]
    first = of_pairs[0] if of_pairs else {}
    return first.get("name"), first.get("beta", default_values(loss=str(first.get("name")))["loss"].get("beta"))


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run directories at and below some paths, sorted by name: a loop of rounds counts as one, its trainings do not.

    Raises UserError for a path without any.
    """
    found: dict[Path, None] = {}
    for path in paths:
        directories = [file.parent for file in path.rglob(METRICS)] if path.is_dir() else []
        loops = [each for each in directories if (each / ROUNDS_FILE).is_file()]
        # An earlier run that was set aside, or a loop's training, counts only where its own path is given.
        kept = [each for each in directories if not any(part.startswith(ASIDE) for part in each.relative_to(path).parts)]
        kept = [each for each in kept if not any(loop in each.parents for loop in loops)]
        if not kept:
            raise UserError(f"{path}: no {METRICS} at or below this path. Expected run directories, or a folder of them.")
        found |= dict.fromkeys(each.resolve() for each in sorted(kept, key=_natural_order))
    return list(found)


def _natural_order(path: Path) -> list:
    """A sort key that puts 2 before 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in path.parts]


def read_runs(directories: Sequence[Path]) -> list[RunRecord]:
    """The runs in some directories, labeled by the part of the path in which they differ."""
    parts = [path.parts for path in directories]
    shared = next((k for k, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1), min(map(len, parts)) - 1)
    return [RunRecord.read(path, "/".join(path.parts[shared:])) for path in directories]


# ---- groups -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed; `settings` are those that distinguish them from other groups."""

    settings: dict
    runs: list[RunRecord]

    @property
    def name(self) -> str:
        """The settings of the group; its runs' labels where these would be too long, or there is no other group."""
        settings = ", ".join(f"{key.removeprefix('loss.')}={setting_text(value)}" for key, value in self.settings.items())
        if settings and len(settings) <= MAX_NAME:
            return settings
        first, *others = [run.label for run in self.runs]
        return f"{first} and {len(others)} more" if len(others) > 2 else ", ".join([first, *others])

    def line(self, metric: str, label: str, style: int) -> Line | None:
        """A metric's line: of one run with its interval; of several the mean and the range at the points that all have."""
        lines = [line for run in self.runs if (line := run.line(metric, label, style)) is not None]
        if len(lines) < 2:
            return lines[0] if lines else None
        x = sorted(set.intersection(*(set(line.x.tolist()) for line in lines)))
        if not x:
            return None
        columns = numpy.array([[dict(zip(line.x.tolist(), line.y.tolist(), strict=True))[at] for at in x] for line in lines])
        bounds = columns.min(0), columns.max(0)
        return replace(lines[0], x=numpy.array(x), y=columns.mean(0), low=bounds[0], high=bounds[1])


def setting_text(value: object) -> str:
    """A value as the command line has it; nothing for a key that a run does not have."""
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def differing_keys(runs: Sequence[RunRecord]) -> list[str]:
    """The keys in which runs differ, except for the seed and for keys that no model depends on."""
    # Model cards do not show data and weights as settings; here they matter.
    shown = ("datasets", "model.archive", "model.name_or_path")
    keys = {key for run in runs for key in run.settings if key.startswith(shown) or is_shown(key)} - {SEED}
    return sorted(key for key in keys if len({str(run.settings.get(key)) for run in runs}) > 1)


def group_runs(runs: Sequence[RunRecord]) -> list[Group]:
    """The groups of some runs, sorted by the settings that distinguish them."""
    keys = differing_keys(runs)
    by_settings: dict[str, list[RunRecord]] = {}
    for run in sorted(runs, key=lambda run: [_sort_key(run.settings.get(key)) for key in keys]):
        by_settings.setdefault(str([run.settings.get(key) for key in keys]), []).append(run)
    return [Group({key: members[0].settings.get(key) for key in keys}, members) for members in by_settings.values()]


def _sort_key(value) -> tuple:
    """Numbers by size, then all other values by their text."""
    is_number = isinstance(value, int | float)
    return not is_number, value if is_number else 0, str(value)


# ---- the page ---------------------------------------------------------------------------------------------------------------


def comparison_page(runs: Sequence[RunRecord], folder: Path) -> str:
    """The HTML of a comparison that lies in a folder, from which its links begin."""
    groups = group_runs(runs)
    keys = differing_keys(runs)
    columns = {name: title for name, title in COLUMNS.items() if any(name in run.last_evaluation for run in runs)}
    has_prompts = any(HELD_OUT_PROMPTS in run.last_evaluation for run in runs)
    return render(
        "comparison.html",
        number=len(runs),
        keys=keys,
        in_columns=len(keys) <= MAX_KEY_COLUMNS,
        differences=[(key, [setting_text(group.settings.get(key)) for group in groups]) for key in keys],
        warnings=comparability_warnings(runs),
        columns=[*columns.values(), *(["held-out prompts"] if has_prompts else [])],
        rows=[table_row(group, list(columns), has_prompts, folder) for group in groups],
        frontiers=[figure for figure in frontier_charts(groups) if figure],
        legend=shared_legend(groups),
        charts=[figure for name, title in CURVES.items() if (figure := curve_chart(groups, name, title))],
        samples=sample_table(groups),
    )


def comparability_warnings(runs: Sequence[RunRecord]) -> list[str]:
    """Which columns are not comparable across the runs, and why."""
    if len(runs) < 2:
        return []
    found = []
    keys = [key for key in differing_keys(runs) if key.startswith("loss.") and key not in training_keys()]
    if keys:
        found.append(
            f"Held-out losses are not comparable: their formula depends on {', '.join(keys)}. Accuracies are comparable."
        )
    if "loss.beta" in keys:
        found.append("Reward margins scale with beta: compare margin / beta.")
    stateful = sorted({run.settings["loss.name"] for run in runs if evaluation_depends_on_run(*run.loss)})
    if stateful:
        found.append(f"Held-out losses of {', '.join(stateful)} depend on the data seen in training, and are not comparable.")
    old = [run.label for run in runs if metric_names.loss_is_at_beta_used(run.last_evaluation)]
    if old:
        found.append(f"An earlier version logged the held-out loss at the current beta of beta-DPO: {', '.join(old)}.")
    return found


def table_row(group: Group, metrics: Sequence[str], has_prompts: bool, folder: Path) -> dict:
    """A group's row of the table. has_prompts: whether it says how many held-out prompts there were."""
    return {
        "name": group.name,
        "settings": [setting_text(value) for value in group.settings.values()],
        "cells": [table_cell(group.runs, name) for name in metrics] + [prompts_cell(group.runs)] * has_prompts,
        "runs": [
            {"label": run.label, "seed": run.settings.get(SEED), "status": run.status, "report": report_link(run, folder)}
            for run in group.runs
        ],
    }


def report_link(run: RunRecord, folder: Path) -> str:
    """The address of a run's report for a page in a folder, relative so that both can be moved together; empty without one."""
    report = run.directory / REPORT
    return quote(os.path.relpath(report.resolve(), folder.resolve())) if report.is_file() else ""


def table_cell(runs: Sequence[RunRecord], name: str) -> str:
    """A metric at the last evaluation: of one run with its 95% interval, of several their mean and standard deviation."""
    rows = [run.last_evaluation for run in runs if isinstance(run.last_evaluation.get(name), int | float)]
    if not rows:
        return "-"
    if len(rows) == 1:
        found = metric_text(rows[0], name)
    else:
        values = [row[name] for row in rows]
        found = f"{statistics.fmean(values):.3g} ± {statistics.stdev(values):.2g}"
    return found


def prompts_cell(runs: Sequence[RunRecord]) -> str:
    """How many held-out prompts the numbers of some runs are of, at least."""
    found = [run.last_evaluation.get(HELD_OUT_PROMPTS) for run in runs]
    prompts = [number for number in found if isinstance(number, int | float)]
    return "" if not prompts else f"{min(prompts):,.0f}" + ": too few" * bool(too_few(min(prompts), ""))


def curve_chart(groups: Sequence[Group], name: str, title: str) -> Markup:
    """The chart of a metric with a line for each group."""
    lines = [group.line(name, group.name, style) for style, group in enumerate(groups)]
    if len(groups) > MAX_INTERVALS:
        lines = [line and replace(line, low=None, high=None) for line in lines]
    return chart(f"{title[0].upper()}{title[1:]}", lines, axes=axes_of(name), has_legend=not shared_legend(groups))


def shared_legend(groups: Sequence[Group]) -> Markup:
    """One legend for all charts, where each would be longer than the chart; empty otherwise."""
    if len(groups) <= MAX_INTERVALS:
        return Markup()
    return legend([Line(group.name, *numpy.zeros((2, 2)), style=style, is_sparse=True) for style, group in enumerate(groups)])


# ---- samples ----------------------------------------------------------------------------------------------------------------


def sample_table(groups: Sequence[Group]) -> list[dict]:
    """The latest responses of each group's first run to the same prompts, and those before training where all agree on them."""
    runs = {group.name: rows_by_prompt(_from_the_start(group.runs[0])) for group in groups}
    # A template of its own renders a question differently.
    asked = {name: {last_question(prompt): rows for prompt, rows in found.items()} for name, found in runs.items()}
    found = []
    for question in dict.fromkeys(question for rows in asked.values() for question in rows):
        answered = {name: rows[question] for name, rows in asked.items() if question in rows}
        if len(answered) > 1 or len(groups) == 1:
            found.append({"question": truncate(question), "columns": sample_columns(answered)})
    return found[:MAX_PROMPTS]


def _from_the_start(run: RunRecord) -> list[dict]:
    """The rows of samples of a run, without responses of a reference that training does not start from."""
    rows = list(run.samples)
    return [{name: row[name] for name in row if name != "reference"} for row in rows] if other_model(run) else rows


def sample_columns(answered: dict[str, list[dict]]) -> list[tuple[str, str]]:
    """What stands side by side of one prompt: title and text."""
    room = MAX_CHARACTERS if len(answered) <= MAX_INTERVALS else MAX_CHARACTERS // 3
    before = {found[1] for rows in answered.values() if (found := response_before(rows))}
    shown = [("before training", truncate(before.pop(), room))] if len(before) == 1 else []
    for name, rows in answered.items():
        shown.append((f"{name}, after {rows[-1]['examples']:,} examples", truncate(rows[-1]["policy"].strip(), room)))
    return shown


# ---- accuracy and distance --------------------------------------------------------------------------------------------------


def frontier_charts(groups: Sequence[Group]) -> Iterator[Markup]:
    """Reward accuracy against the distance from the reference, one point per run; a chart for each measure of distance."""
    for measure in (KL, FALL):
        found = [(group, line) for style, group in enumerate(groups) if (line := frontier_points(group, measure, style))]
        lines = [line for _, line in found]
        if sum(len(line.x) for line in lines) < 2:
            continue
        axes, title = replace(ACCURACY_AXES, x_name=f"{measure}, nats"), "Reward accuracy and distance"
        has_legend = not shared_legend(groups)
        yield chart(title, [frontier_line(found), *lines], "held out; upper left is better", axes, has_legend)


def frontier_line(points: Sequence[tuple[Group, Line]]) -> Line | None:
    """The line through the groups' means by the one number that distinguishes them, such as beta; None for other groups."""
    keys = {key for group, _ in points for key in group.settings}
    numbers = [value for group, _ in points for value in group.settings.values()]
    if len(numbers) < 2 or len(keys) != 1 or not all(isinstance(value, int | float) for value in numbers):
        return None
    [key] = keys
    means = numpy.array([(line.x.mean(), line.y.mean()) for _, line in points])
    return Line(f"means, by {key.removeprefix('loss.')}", *means.T, style=len(points))


def frontier_points(group: Group, measure: str, style: int) -> Line | None:
    """The distance and accuracy of a group's runs, the first labeled with the group's name; None without any run."""
    points = sorted(
        (moved[1], run.last_evaluation[ACCURACY])
        for run in group.runs
        if (moved := distance(run)) and moved[0] == measure and isinstance(run.last_evaluation.get(ACCURACY), int | float)
    )
    if not points:
        return None
    x, y = numpy.array(points, float).T
    return Line(group.name, x, y, labels=(group.name, *[""] * (len(points) - 1)), style=style)


# ---- the files --------------------------------------------------------------------------------------------------------------


def comparison_csv(runs: Sequence[RunRecord]) -> str:
    """One row per run: label, seed, the keys that differ, each metric of the last evaluation, and the distance."""
    keys = [SEED, *differing_keys(runs)]
    metrics = list(dict.fromkeys(name for run in runs for name in run.last_evaluation))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["run", *keys, *metrics, "distance", "distance_measure"])
    for run in runs:
        measure, nats = distance(run) or ("", "")
        values = [run.settings.get(key) for key in keys] + [run.last_evaluation.get(name) for name in metrics]
        writer.writerow([run.label, *values, nats, measure])
    return without_secrets(file.getvalue())


def write_comparison(paths: Sequence[Path], to: Path) -> list[Path]:
    """Compare the runs at and below some paths: write comparison.html and comparison.csv into a folder, return their paths.

    Raises UserError where there is no run, and where the files cannot be written.
    """
    runs = read_runs(find_runs(paths))
    try:
        to.mkdir(parents=True, exist_ok=True)
        write_atomically(to / PAGE, comparison_page(runs, to))
        write_atomically(to / TABLE, comparison_csv(runs))
    except OSError as error:
        raise UserError(f"--to: cannot write {to}: {error.strerror}. Expected a writable folder with enough space.") from error
    return [to / PAGE, to / TABLE]
