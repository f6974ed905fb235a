"""The last lines of a run: what was trained, what it did to held-out examples, what to know first, and what to do next."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from preference_training.core.metric_names import EVAL_ACCURACY, EVAL_LOSS, EVAL_MARGIN, HELD_OUT_PROMPTS, HIGH, LOW, TIME
from preference_training.core.values import UNREADABLE
from preference_training.data.registry import dataset_entries
from preference_training.losses.registry import example_kind, find_loss, model_head
from preference_training.reporting.findings import Finding, findings
from preference_training.reporting.observations import finite_values
from preference_training.reporting.run_record import RunRecord
from preference_training.tracking.run_files import LATEST, REPORT

# What examples are called.
EXAMPLES = {"targets": "examples", "pairs": "pairs", "rankings": "rankings", "labels": "labeled responses"}
# Held-out metrics, and their titles.
SHOWN = {EVAL_LOSS: "held-out loss", EVAL_ACCURACY: "held-out reward accuracy", EVAL_MARGIN: "held-out reward margin"}


@dataclass(frozen=True)
class Conclusion:
    """What a finished run says of itself: its findings, and the lines in which it ends, these among them."""

    findings: Sequence[Finding]
    lines: Sequence[str]


def conclude(run_dir: Path, with_next_steps: bool = True) -> Conclusion:
    """The conclusion of a run. with_next_steps: with the commands that one would run next."""
    run = RunRecord.read(run_dir)
    found = findings(run)
    lines = ["", what_was_trained(run), *held_out_lines(run), *(finding.line for finding in found)]
    return Conclusion(found, [*lines, *(next_steps(run) if with_next_steps else ())])


def what_was_trained(run: RunRecord) -> str:
    """The loss, the data and the length of a run, in one line."""
    try:
        return f"{_loss(run)} on {_data(run)}: {run.progress}{_duration(run)}"
    except UNREADABLE:
        return run.progress


def _loss(run: RunRecord) -> str:
    keys = run.config["loss"]
    found = find_loss(keys["name"], keys.get("mode_loss"))
    beta = f" (beta {keys['beta']:g})" if "beta" in keys else ""
    return f"{found.name if found else keys['name']}{beta}"


def _data(run: RunRecord) -> str:
    entries = [str(entry.get("name") or entry.get("path")) for entry in dataset_entries(run.config)]
    names = ", ".join(Path(name).name for name in entries)
    number = run.about.get("train", {}).get("examples")
    return f"{number:,} {EXAMPLES[example_kind(run.config['loss']['name'])]} of {names}" if number else names


def _duration(run: RunRecord) -> str:
    seconds = finite_values(run.steps[-1:], TIME)
    # An earlier version logged the seconds since 1970.
    if not seconds or seconds[0] > 1e9:
        return ""
    minutes, hours = seconds[0] / 60, seconds[0] / 3600
    shown = f"{seconds[0]:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"
    return f" in {shown}"


def held_out_lines(run: RunRecord) -> list[str]:
    """Each held-out metric before training and now, with its interval."""
    first, last, lines = run.evaluations[0] if run.evaluations else {}, run.last_evaluation, []
    for metric, title in SHOWN.items():
        value = last.get(metric)
        if not isinstance(value, int | float):
            continue
        before = f"{first[metric]:.4g} -> " if first is not last and isinstance(first.get(metric), int | float) else ""
        low, high = last.get(f"{metric}{LOW}"), last.get(f"{metric}{HIGH}")
        interval = "" if low is None or high is None else f" [{low:.4g}, {high:.4g}]"
        lines.append(f"  {title}: {before}{value:.4g}{interval}")
    prompts = last.get(HELD_OUT_PROMPTS)
    if lines and isinstance(prompts, int | float):
        lines[0] += f" ({prompts:,.0f} prompt{'s' * (prompts != 1)}; 95% intervals)"
    return lines


def next_steps(run: RunRecord) -> list[str]:
    """The commands that one would run next, on what the run has left."""
    directory, lines = run.directory, []
    if directory.is_relative_to(Path.cwd()):
        directory = directory.relative_to(Path.cwd())
    name = shlex.quote(str(directory))
    loss = run.config.get("loss")
    if (run.directory / LATEST).exists() and isinstance(loss, dict) and model_head(loss.get("name")) == "lm":
        lines.append(f"talk to it: python scripts/chat.py {name}")
    if (run.directory / REPORT).exists():
        lines.append(f"report: {directory / REPORT}")
    return lines
