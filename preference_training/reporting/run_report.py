"""report.html: what happened in a run, in one page that needs neither a network nor a server.

It is made from the run directory alone, so that it can be rebuilt at any time, also during the run.

    run directory -> RunRecord -> summary, findings, charts, samples, tables -> report.html
"""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from preference_training.core.errors import UserError
from preference_training.core.files import write_atomically
from preference_training.core.metric_names import (
    CHANGE,
    EPOCH,
    EVAL_ACCURACY,
    EVAL_LOSS,
    EVAL_MARGIN,
    EXAMPLES_PER_SECOND,
    HELD_OUT_PROMPTS,
    HIGH,
    LOW,
    MEMORY,
    MFU,
    TOKENS_PER_SECOND,
    UPDATES,
    change,
)
from preference_training.core.values import UNREADABLE, format_number
from preference_training.data.records.report import DataReport
from preference_training.evaluation.phrasing import metric_text
from preference_training.reporting.examples import BEFORE_TRAINING, Samples, flagged_by_kind
from preference_training.reporting.experts.balance import expert_section
from preference_training.reporting.findings import Finding, findings
from preference_training.reporting.flagged_pairs import KINDS, PairFinder
from preference_training.reporting.model_card import changed_settings
from preference_training.reporting.observations import finite_values, observations
from preference_training.reporting.pages.rendering import render
from preference_training.reporting.run_charts import CHARTS, run_charts
from preference_training.reporting.run_record import RunRecord
from preference_training.reporting.summary import (
    command,
    data_names,
    last_moment,
    name_of,
    noun,
    num_examples,
    other_model,
    reference,
    summary,
)
from preference_training.tracking.run_files import EVENTS, FLAGGED, METRICS, REPORT, SAMPLES

MAX_EVENTS = 200
# The shape of a row of events.jsonl.
EVENT = {"time": str, "examples": int, "text": str}
# The held-out metrics at the top of the page: their titles, and what they mean.
HEADLINE = {
    EVAL_ACCURACY: ("reward accuracy", "share of held-out pairs whose preferred response has the higher reward; chance is 0.5"),
    EVAL_MARGIN: ("reward margin", "reward of the preferred response minus that of the rejected one, held out"),
    EVAL_LOSS: ("held-out loss", "mean over the held-out examples; lower is better"),
}
# The medians of a run's steps at the top of the page.
SPEEDS = {TOKENS_PER_SECOND: "tokens per second", EXAMPLES_PER_SECOND: "examples per second"}
# What each metric is called in words: as its chart and its line there.
WORDS = {
    metric: f"{spec.title}: {label}".removesuffix(", held out").removesuffix(": held out")
    for spec in CHARTS
    for metric, label in spec.metrics.items()
}
# Files of a run directory that a report has a link to.
LINKED = ("config.yaml", METRICS, EVENTS, SAMPLES, FLAGGED)


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
    return render(
        "report.html",
        name=name_of(run),
        summary=summary(run),
        findings=[*findings(run), *(Finding("observation", "note", text) for text in observations(run))],
        numbers=[*headline(run), *speeds(run)],
        facts=run_facts(run),
        command=command(run),
        links=[name for name in LINKED if (run.directory / name).is_file()],
        charts=run_charts(run),
        experts=expert_section(run),
        held_out=held_out_table(run),
        results=evaluation_lines(run),
        samples=Samples.select(run.samples, f"reference, {other_model(run)}" if other_model(run) else BEFORE_TRAINING),
        pairs=flagged_by_kind(run.flagged_pairs),
        kinds=KINDS,
        events=Events.select(run),
        data=data_table(run),
        data_sets=data_names(run),
        changed=settings_table(run),
        machine=start_facts(run),
    )


# ---- numbers ----------------------------------------------------------------------------------------------------------------


def headline(run: RunRecord) -> Iterator[dict]:
    """The held-out numbers at the top of the page: name, value, qualifications, and what they mean."""
    first, last = run.evaluations[0] if len(run.evaluations) > 1 else {}, run.last_evaluation
    for metric, (title, meaning) in HEADLINE.items():
        if isinstance(last.get(metric), int | float):
            value, _, interval = metric_text(last, metric).partition(" ")
            before, changed = first.get(metric), metric_text(last, change(metric)[0])
            size = ("95%, " * bool(interval) + held_out_size(run)).removesuffix(", ")
            more = [interval, size, f"{format_number(before)} at first" if _are_numbers(before) else ""]
            more.append(f"change {changed}" if changed != "-" and _are_numbers(before) else "")
            yield {"name": title, "value": value, "more": [text for text in more if text], "meaning": meaning}


def held_out_size(run: RunRecord) -> str:
    """On how many examples the held-out numbers are, in words; empty where it is not known."""
    number, limit = num_examples(run, "held out"), run.settings.get("n_eval_examples")
    if number:
        number = min(number, limit) if isinstance(limit, int) else number
        return f"{number:,} {noun(run, number)}"
    prompts = run.last_evaluation.get(HELD_OUT_PROMPTS)
    return f"{prompts:,.0f} prompts" if isinstance(prompts, int | float) else ""


def speeds(run: RunRecord) -> Iterator[dict]:
    """How fast the run was, and the memory it took: name, value and a qualification."""
    for metric, title in SPEEDS.items():
        if values := finite_values(run.steps, metric):
            value = format_number(float(f"{statistics.median(values):.3g}"))
            yield {"name": title, "value": value, "more": ["median"], "meaning": ""}
    if shares := finite_values(run.steps, MFU):
        meaning = "model FLOPs utilization: the share of the GPU's peak arithmetic that the model's needs take"
        yield {"name": "MFU", "value": f"{statistics.median(shares):.0%}", "more": ["of the GPU's peak"], "meaning": meaning}
    if memory := finite_values(run.steps, MEMORY):
        yield {"name": "memory", "value": f"{max(memory):.3g} GiB", "more": ["peak"], "meaning": ""}


def run_facts(run: RunRecord) -> dict[str, str]:
    """What the run did, in words: name → value."""
    settings, updates = run.settings, run.rows[-1].get(UPDATES) if run.rows else None
    rate, warm_up = settings.get("lr"), settings.get("warmup_steps")
    shapes = {"linear": "linear to", "cosine": "cosine to", "wsd": "at the end linear to"}
    schedule = shapes.get(settings.get("lr_schedule"), "")
    last = settings.get("final_lr_share")
    end = f", {schedule} {format_number(rate * last)}" if schedule and _are_numbers(rate, last) else ""
    share = settings.get("warmup_share")
    warmed = f", after {warm_up:,} step{'s' * (warm_up != 1)} of warm-up" if isinstance(warm_up, int) and warm_up else ""
    warmed = f", after a warm-up of {share:.0%} of the run" if warm_up is None and _are_numbers(share) and share else warmed
    size, epoch = settings.get("batch_size"), finite_values(run.steps, EPOCH)
    return {
        name: text
        for name, text in {
            "progress": run.progress + (f", {epoch[-1]:.3g} epochs" if epoch else ""),
            "batch": f"{size:,} {noun(run, size)}" if isinstance(size, int) and updates else "",
            "learning rate": f"{format_number(rate)}{end}{warmed}" if _are_numbers(rate) else "",
            "reference": reference(run),
            "last event": last_moment(run),
        }.items()
        if text
    }


def _are_numbers(*values: object) -> bool:
    return all(isinstance(value, int | float) for value in values)


def held_out_table(run: RunRecord) -> list[dict]:
    """Each held-out metric at the first and at the last evaluation, with its interval if it has one."""
    if not run.evaluations:
        return []
    first, last = run.evaluations[0], run.last_evaluation
    metrics = [name for name in last if "eval" in name and not name.endswith((LOW, HIGH, CHANGE))]
    return [
        {
            "words": WORDS.get(name, ""),
            "name": name,
            "values": [metric_text(first, name), metric_text(last, name), metric_text(last, change(name)[0])],
        }
        for name in metrics
    ]


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
