"""report.html: what happened in a run, in one page that needs neither a network nor a server.

It is made from the run directory alone, so that it can be rebuilt at any time, also during the run.

    run directory -> RunRecord -> charts, tables, samples, observations -> report.html
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

from preference_training.core.errors import UserError
from preference_training.core.files import write_atomically
from preference_training.core.metric_names import (
    CHANGE,
    EVAL_ACCURACY,
    EVAL_LOSS,
    EVAL_MARGIN,
    EXAMPLES_PER_SECOND,
    HIGH,
    LOW,
    MEMORY,
)
from preference_training.core.values import UNREADABLE
from preference_training.data.rows.records import DataReport
from preference_training.evaluation.phrasing import with_interval
from preference_training.reporting.charts import format_number
from preference_training.reporting.examples import Samples, flagged_by_kind
from preference_training.reporting.flagged_pairs import KINDS, PairFinder
from preference_training.reporting.model_card import changed_settings, dataset_entries
from preference_training.reporting.observations import finite_values, observations
from preference_training.reporting.pages.rendering import render
from preference_training.reporting.run_charts import run_charts
from preference_training.reporting.run_record import RunRecord
from preference_training.tracking.run_files import METRICS, REPORT

MAX_EVENTS = 200
# The shape of a row of events.jsonl.
EVENT = {"time": str, "examples": int, "text": str}
# The held-out metrics at the top of the page, and their titles.
HEADLINE = {EVAL_LOSS: "held-out loss", EVAL_ACCURACY: "reward accuracy", EVAL_MARGIN: "reward margin"}


def write_report(run_dir: Path) -> Path:
    """Write a run's report.html; returns its path. Raises OSError."""
    write_atomically(run_dir / REPORT, report_page(RunRecord.read(run_dir)))
    return run_dir / REPORT


def rebuild_report(run_dir: Path) -> Path:
    """`write_report` for a path that a user gave. Raises UserError for another directory, and where it cannot be written."""
    if not (run_dir / METRICS).is_file():
        raise UserError(f"{run_dir}: contains no {METRICS}. Expected a run directory.")
    try:
        return write_report(run_dir)
    except OSError as error:
        raise UserError(
            f"cannot write {run_dir / REPORT}: {error.strerror}. Expected a writable folder with enough space."
        ) from error


def report_writer(config, run_dir: Path, loss, tokenizer, data):
    """A function that writes a run's report, and its flagged pairs if it has a ledger, and returns the report's path."""
    finder = PairFinder(run_dir, data[0].table, tokenizer) if config.ledger and loss.examples == "pairs" else None

    def write() -> Path:
        if finder is not None:
            finder.write()
        return write_report(run_dir)

    return write


def report_page(run: RunRecord) -> str:
    """The HTML of a run's report."""
    datasets = dataset_entries(run.config) if "datasets" in run.config else []
    return render(
        "report.html",
        name=run.config.get("exp_name", run.directory.name),
        directory=run.directory.name,
        progress=run.progress,
        observations=observations(run),
        numbers=headline(run),
        charts=run_charts(run),
        held_out=held_out_table(run),
        results=evaluation_lines(run),
        samples=Samples.select(run.samples),
        pairs=flagged_by_kind(run.flagged_pairs),
        kinds=KINDS,
        events=Events.select(run),
        data=data_table(run),
        data_sets=[str(entry.get("name") or entry.get("path")) for entry in datasets],
        changed=settings_table(run),
        facts=start_facts(run),
    )


# ---- numbers ----------------------------------------------------------------------------------------------------------------


def headline(run: RunRecord) -> list[dict]:
    """The numbers at the top of the page: name, value and a qualification."""
    last, found = run.last_evaluation, []
    for metric, title in HEADLINE.items():
        if isinstance(last.get(metric), int | float):
            value, _, interval = _estimate(last, metric).partition(" ")
            found.append({"name": title, "value": value, "more": f"95%: {interval}" if interval else ""})
    speeds, memory = finite_values(run.steps, EXAMPLES_PER_SECOND), finite_values(run.steps, MEMORY)
    if speeds:
        found.append({"name": "examples per second", "value": format_number(statistics.median(speeds)), "more": "median"})
    if memory:
        found.append({"name": "memory", "value": f"{max(memory):.3g} GiB", "more": "peak"})
    return found


def held_out_table(run: RunRecord) -> list[dict]:
    """Each held-out metric at the first and at the last evaluation, with its interval if it has one."""
    if not run.evaluations:
        return []
    first, last = run.evaluations[0], run.last_evaluation
    metrics = [name for name in last if "eval" in name and not name.endswith((LOW, HIGH, CHANGE))]
    return [{"name": name, "first": _estimate(first, name), "last": _estimate(last, name)} for name in metrics]


def _estimate(row: dict, metric: str) -> str:
    value, bounds = row.get(metric), (row.get(f"{metric}/low"), row.get(f"{metric}/high"))
    if not isinstance(value, int | float):
        return "-"
    return with_interval(value, *bounds) if None not in bounds else format_number(value)


def evaluation_lines(run: RunRecord) -> list[str]:
    """The results of scripts/evaluate.py on the run, as it prints them; empty without any."""
    if not run.results:
        return []
    from preference_training.evaluation.results_text import format_results

    try:
        return [f"after {run.results['examples_trained']:,} examples", *format_results(run.results)]
    except UNREADABLE:
        return []


# ---- events, data and configuration -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Events:
    """What happened besides steps, the latest last; num_hidden counts older events that are not shown."""

    shown: list[dict]
    num_hidden: int

    @classmethod
    def select(cls, run: RunRecord) -> "Events":
        """The latest events of a run, with paths relative to its directory."""
        found = [row for row in run.events if all(isinstance(row.get(name), kind) for name, kind in EVENT.items())]
        shown = [
            {
                "time": row["time"][:19].replace("T", " "),
                "examples": row["examples"],
                "text": row["text"].replace(f"{run.directory}/", ""),
                "is_warning": row["text"].startswith("warning"),
            }
            for row in found[-MAX_EVENTS:]
        ]
        return cls(shown, len(found) - len(shown))


def data_table(run: RunRecord) -> list[dict]:
    """What was read of each split and data set, and what was skipped."""
    found, data = [], run.about.get("data")
    for split, reports in data.items() if isinstance(data, dict) else ():
        for report in reports if isinstance(reports, list) else ():
            try:
                values = DataReport(**{key: value for key, value in report.items() if key != "name"})
                counts = [f"{count:,} {what}" for count, what in values.counts()]
                row = {"split": split, "name": report["name"], "rows": values.rows_read, "prompts": values.num_prompts}
                found.append(row | {"counts": counts + values.remarks(), "bad_rows": values.bad_row_lines()})
            except UNREADABLE:
                continue
    return found


def settings_table(run: RunRecord) -> dict:
    """The settings that differ from the defaults: key → (value, default)."""
    try:
        return changed_settings(run.config, run.about.get("usual"))
    except UNREADABLE:
        return {}


def start_facts(run: RunRecord) -> dict[str, str]:
    """When and on what machine the run started, in words."""
    machine, versions, code = (
        part if isinstance(part, dict) else {} for part in map(run.about.get, ("machine", "versions", "code"))
    )
    facts = {"started": run.about.get("started"), **machine, **versions}
    if "commit" in code:
        changed = code.get("changed_files")
        facts["code"] = f"commit {code['commit']}" + (f", {changed} files changed" if changed else "")
    return {name: str(value) for name, value in facts.items() if value}
