"""report.html: what happened in a run, in one page that needs neither a network nor a server.

Everything in it is read from the run directory (`run_files.py`), so that it can be made again, also while the run goes on.

    metrics.jsonl, samples.jsonl, about.json, ... -> charts, tables, observations -> report.html
"""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from preference_training.core import metric_names
from preference_training.core.errors import UserError
from preference_training.core.values import UNREADABLE
from preference_training.data.rows.records import DataReport
from preference_training.evaluation.phrasing import too_few, with_interval
from preference_training.reporting.charts import Line, chart, column, line_of, shown, words_marked
from preference_training.reporting.flagged_pairs import KINDS, PairFinder, flagged_rows
from preference_training.reporting.model_card import entries_of, settings_changed
from preference_training.reporting.pages import page, write_page
from preference_training.tracking.run_files import (
    ABOUT,
    BAD_STEPS,
    EVENTS,
    METRICS,
    OF_THEIR_RUN,
    REPORT,
    RESULTS_FILE,
    SAMPLES,
    config_in,
    json_lines,
    json_object,
    metric_rows,
    progress,
    results_of,
    split_rows,
)

# What is shown of long things: prompts with samples and the moments of each, pairs of each kind, letters of a text.
PROMPTS_SHOWN, MOMENTS_SHOWN, PAIRS_SHOWN, LETTERS_SHOWN, EVENTS_SHOWN = 16, 4, 20, 1200, 200
# The shape of a row of events.jsonl.
EVENT = {"time": str, "examples": int, "text": str}

# Charts: title, what it says, and the metrics in it with their names there.
CHARTS = (
    (
        "Loss", "lower is better",
        {
            metric_names.TRAIN_LOSS: "training", metric_names.EVAL_LOSS: "held out",
            metric_names.LOSS_AT_BETA_USED: "held out, at the beta in force",
        },
    ),
    (
        "Reward accuracy", "share of pairs whose preferred response has the larger reward; 0.5 is chance",
        {metric_names.TRAIN_ACCURACY: "training", metric_names.EVAL_ACCURACY: "held out"},
    ),
    (
        "Reward margin", "reward of the preferred response minus that of the other",
        {metric_names.TRAIN_MARGIN: "training", metric_names.EVAL_MARGIN: "held out"},
    ),
    (
        "Log-prob of responses", "nats a response; both may fall while the margin grows",
        {
            metric_names.TRAIN_CHOSEN_LOGPS: "preferred, training", metric_names.TRAIN_REJECTED_LOGPS: "other, training",
            metric_names.EVAL_CHOSEN_LOGPS: "preferred, held out", metric_names.EVAL_REJECTED_LOGPS: "other, held out",
        },
    ),
    (
        "Rewards", "beta times the log-ratio of policy and reference, of each response",
        {
            metric_names.TRAIN_CHOSEN_REWARD: "preferred, training", metric_names.TRAIN_REJECTED_REWARD: "other, training",
            metric_names.EVAL_CHOSEN_REWARD: "preferred, held out", metric_names.EVAL_REJECTED_REWARD: "other, held out",
        },
    ),
    ("Gradient norm", "before it is scaled down to max_grad_norm", {metric_names.GRAD_NORM: "norm"}),
    ("Learning rate", "of each step", {metric_names.LEARNING_RATE: "lr"}),
    ("Beta in force", "of each micro-batch", {metric_names.BETA_USED: "beta"}),
    ("Share of pairs kept", "by the filter of beta-DPO", {metric_names.KEPT_FRACTION: "share"}),
    (
        "Gaps of pairs", "margins by which beta-DPO filters and moves beta, over the run so far",
        {metric_names.GAP_MEAN: "mean", metric_names.GAP_STD: "deviation"},
    ),
    ("Throughput", "examples a second", {metric_names.EXAMPLES_PER_SECOND: "examples/s"}),
    ("Memory", "GiB of the main process; on a GPU the most so far", {metric_names.MEMORY: "GiB"}),
)  # fmt: skip
# Without a chart of their own.
NOT_CHARTED = (metric_names.COUNTERS, metric_names.EPOCH, metric_names.TIME, metric_names.TOKENS_PER_SECOND)


def write_report(run_dir: Path) -> Path:
    """Write a run's report.html from what lies in its directory; returns the path. Raises OSError."""
    write_page(run_dir / REPORT, report_page(run_dir))
    return run_dir / REPORT


def rebuild_report(run_dir: Path) -> Path:
    """`write_report`, asked for by hand: raises UserError for a directory that is no run's, or cannot be written to."""
    if not (run_dir / METRICS).is_file():
        raise UserError(f"{run_dir}: no {METRICS} in it. Expected the directory of a run.")
    try:
        return write_report(run_dir)
    except OSError as error:
        fault = f"{run_dir / REPORT} cannot be written: {error.strerror}. Expected a folder of yours, with room."
        raise UserError(fault) from error


def report_page(run_dir: Path) -> str:
    """The HTML of a run's report."""
    rows = metric_rows(run_dir / METRICS)
    config, about = config_in(run_dir), json_object(run_dir / ABOUT)
    steps, evaluations = split_rows(rows)
    bad_steps = list(json_lines(run_dir / BAD_STEPS))
    return page(
        "report.html",
        name=config.get("exp_name", run_dir.name),
        directory=run_dir.name,
        progress=progress(rows, about),
        observations=[*observations(steps, evaluations, config), *observed_bad_steps(bad_steps)],
        numbers=headline(steps, evaluations),
        charts=charts_of(steps, evaluations),
        held_out=held_out_table(evaluations),
        results=lines_of_results(results_of(run_dir / RESULTS_FILE)),
        samples=samples_of(json_lines(run_dir / SAMPLES)),
        pairs=pairs_of(flagged_rows(run_dir)),
        kinds=KINDS,
        events=events_of(json_lines(run_dir / EVENTS), run_dir),
        data=data_of(about),
        data_sets=[str(entry.get("name") or entry.get("path")) for entry in entries_of(config)] if "datasets" in config else [],
        changed=changed_settings(config),
        facts=facts_of_start(about),
    )


# ---- at the head ------------------------------------------------------------------------------------------------------------

# Held-out metrics at the head of the page, and their names there.
HEADLINE = {
    metric_names.EVAL_LOSS: "held-out loss",
    metric_names.EVAL_ACCURACY: "reward accuracy",
    metric_names.EVAL_MARGIN: "reward margin",
}


def headline(steps: list[dict], evaluations: list[dict]) -> list[dict]:
    """What one wants to know first: name, value, and more where there is more to say of it."""
    newest, found = evaluations[-1] if evaluations else {}, []
    for name, title in HEADLINE.items():
        if isinstance(newest.get(name), int | float):
            value, _, interval = _estimate(newest, name).partition(" ")
            more = f"95%: {interval}" if interval else ""
            found.append({"name": title, "value": value, "more": more})
    speeds, memory = _values(steps, metric_names.EXAMPLES_PER_SECOND), _values(steps, metric_names.MEMORY)
    if speeds:
        found.append({"name": "examples a second", "value": shown(statistics.median(speeds)), "more": "median"})
    if memory:
        found.append({"name": "memory", "value": f"{max(memory):.3g} GiB", "more": "at most"})
    return found


# ---- curves -----------------------------------------------------------------------------------------------------------------


def charts_of(steps: list[dict], evaluations: list[dict]) -> list:
    """The charts that there are numbers for: those of CHARTS, and one for each metric that is in none of them."""
    found = []
    for title, note, names in CHARTS:
        lines = [metric_line(steps, evaluations, name, label, style) for style, (name, label) in enumerate(names.items())]
        found.append(chart(title, lines, note))
    charted = {name for _, _, names in CHARTS for name in names}
    others = dict.fromkeys(name for row in (*steps[:1], *steps[-1:], *evaluations[-1:]) for name in row)
    for name in others:
        if name not in charted and not name.startswith(NOT_CHARTED) and not name.endswith(("/low", "/high")):
            found.append(chart(name, [metric_line(steps, evaluations, name, name, 0)]))
    return [picture for picture in found if picture]


def metric_line(steps: list[dict], evaluations: list[dict], name: str, label: str, style: int) -> Line | None:
    """The line of a metric, from evaluations where it is held out (marked at each), else from the steps."""
    held_out = "eval" in name
    return line_of(evaluations if held_out else steps, name, label, style, is_sparse=held_out)


# ---- what is worth saying ---------------------------------------------------------------------------------------------------

# How far log-probs fall before it is said. Unit: nats.
FALLEN = 10.0
# What says more of each.
GUIDE = "docs/reading-the-curves.md"


def observations(steps: list[dict], evaluations: list[dict], config: dict) -> list[str]:
    """What the numbers of a run give reason to say, in plain words."""
    looks = _too_few, _fallen, _held_out, _overfitted, _clipped
    return [f"{text} See {GUIDE}." for look in looks for text in look(steps, evaluations, config)]


def _values(rows: Sequence[dict], name: str) -> list[float]:
    values = column(rows, name)
    return values[~numpy.isnan(values)].tolist()


def _change(values: list[float]) -> float:
    """From the mean of the first tenth to that of the last."""
    part = max(1, len(values) // 10)
    return (sum(values[-part:]) - sum(values[:part])) / part


def _too_few(steps, evaluations, config) -> Iterator[str]:
    prompts = evaluations[-1].get(metric_names.HELD_OUT_PROMPTS) if evaluations else None
    if isinstance(prompts, int | float) and (few := too_few(prompts, "Held-out numbers")):
        yield f"{few}."


def _fallen(steps, evaluations, config) -> Iterator[str]:
    split, rows = ("eval", evaluations) if len(evaluations) > 1 else ("train", steps)
    chosen, margins = _values(rows, metric_names.logps(split, "chosen")), _values(rows, metric_names.reward(split, "margins"))
    if len(margins) > 1 and _change(chosen) < -FALLEN and _change(margins) > 0:
        beta = (config.get("loss") or {}).get("beta")
        yield (
            f"The log-prob of preferred responses fell by {-_change(chosen):.0f} nats while the margin grew by "
            f"{_change(margins):.3g}. The loss only asks that it falls less than the other's; "
            + (f"with beta {beta} that is usual. " if isinstance(beta, float) and beta <= 0.1 else "")
            + "Look at the samples: if they are still sound, so is the run."
        )


def _held_out(steps, evaluations, config) -> Iterator[str]:
    accuracy = metric_names.EVAL_ACCURACY
    last = evaluations[-1] if evaluations else {}
    low, high = last.get(f"{accuracy}/low"), last.get(f"{accuracy}/high")
    if low is None or high is None or not steps:
        return
    found = f"Held-out reward accuracy is {with_interval(last[accuracy], low, high)}"
    if high < 0.5:
        yield f"{found}, below chance. Are chosen and rejected the right way round in the data?"
    elif low <= 0.5:
        yield (
            f"{found}, which cannot be told from chance: the run is too short, lr too low, or too little is held out to say."
        )


def _overfitted(steps, evaluations, config) -> Iterator[str]:
    if (config.get("loss") or {}).get("name") in OF_THEIR_RUN:
        return
    # Of beta-DPO those of an earlier version are at another beta.
    comparable = [row for row in evaluations if not metric_names.loss_is_at_beta_used(row)]
    evaluations = comparable or evaluations
    losses = _values(evaluations, metric_names.EVAL_LOSS)
    if len(losses) != len(evaluations) or len(losses) < 3:
        return
    best = min(range(len(losses)), key=losses.__getitem__)
    low = evaluations[-1].get(f"{metric_names.EVAL_LOSS}/low")
    if low is not None and losses[best] < low:
        at = evaluations[best][metric_names.EXAMPLES]
        yield (
            f"Held-out loss was lowest after {at:,.0f} examples ({losses[best]:.4g}) and is {losses[-1]:.4g} at the end: from "
            "there on the run learnt its training data by heart. Take an earlier checkpoint, or fewer epochs."
        )


def _clipped(steps, evaluations, config) -> Iterator[str]:
    norms, limit = _values(steps, metric_names.GRAD_NORM), config.get("max_grad_norm")
    if not norms or not isinstance(limit, int | float):
        return
    share = sum(norm > limit for norm in norms) / len(norms)
    if share > 0.5:
        yield f"The gradient was scaled down to max_grad_norm={limit} in {share:.0%} of the steps, which are shorter for it."


def observed_bad_steps(bad_steps: list[dict]) -> list[str]:
    """What is to be said of steps that were not taken."""
    if not bad_steps:
        return []
    number = len(bad_steps)
    what = "1 step was" if number == 1 else f"{number} steps were"
    return [f"{what} not taken, since a loss or gradient was not finite. {BAD_STEPS} names the examples."]


# ---- tables -----------------------------------------------------------------------------------------------------------------


def held_out_table(evaluations: list[dict]) -> list[dict]:
    """Each held-out metric at the first and at the newest evaluation, with its interval where there is one."""
    if not evaluations:
        return []
    ends = evaluations[0], evaluations[-1]
    names = [name for name in ends[1] if "eval" in name and not name.endswith(("/low", "/high"))]
    return [{"name": name, "first": _estimate(ends[0], name), "newest": _estimate(ends[1], name)} for name in names]


def _estimate(row: dict, name: str) -> str:
    value, bounds = row.get(name), (row.get(f"{name}/low"), row.get(f"{name}/high"))
    if not isinstance(value, int | float):
        return "-"
    return with_interval(value, *bounds) if None not in bounds else shown(value)


def lines_of_results(results: dict) -> list[str]:
    """What scripts/evaluate.py has found of the run, as it prints it; nothing where it was not asked."""
    if not results:
        return []
    from preference_training.evaluation.held_out_report import lines_of

    try:
        return [f"after {results['examples_trained']:,} examples", *lines_of(results)]
    except UNREADABLE:
        return []


@dataclass(frozen=True)
class Events:
    """What happened beside steps, the newest last; left_out counts older ones that are not shown."""

    shown: list[dict]
    left_out: int


def events_of(rows: Iterable[dict], run_dir: Path) -> Events:
    """The newest of a run's events: moment, examples and text of each, paths in its directory made short; is it a warning?"""
    found = [row for row in rows if all(isinstance(row.get(name), kind) for name, kind in EVENT.items())]
    shown = [
        {
            "moment": row["time"][:19].replace("T", " "),
            "examples": row["examples"],
            "text": row["text"].replace(f"{run_dir}/", ""),
            "warns": row["text"].startswith("warning"),
        }
        for row in found[-EVENTS_SHOWN:]
    ]
    return Events(shown, len(found) - len(shown))


def data_of(about: dict) -> list[dict]:
    """Of each split and data set, what was read and what was left out."""
    found = []
    for split, reports in about.get("data", {}).items() if isinstance(about.get("data"), dict) else ():
        for report in reports if isinstance(reports, list) else ():
            try:
                values = DataReport(**{key: value for key, value in report.items() if key != "name"})
                counts = [f"{count:,} {what}" for count, what in values.counts()]
                row = {"split": split, "name": report["name"], "rows": values.rows_read, "prompts": values.num_prompts}
                found.append(row | {"counts": counts + values.remarks(), "bad_rows": values.bad_rows})
            except UNREADABLE:
                continue
    return found


def changed_settings(config: dict) -> dict:
    """What differs from the defaults: key → (value, default)."""
    try:
        return settings_changed(config)
    except UNREADABLE:
        return {}


def facts_of_start(about: dict) -> dict[str, str]:
    """When and on what the run was started, in words."""
    machine, versions, code = (
        part if isinstance(part, dict) else {} for part in map(about.get, ("machine", "versions", "code"))
    )
    facts = {"started": about.get("started"), **machine, **versions}
    if "commit" in code:
        changed = code.get("changed_files")
        facts["code"] = f"commit {code['commit']}" + (f", {changed} files changed" if changed else "")
    return {name: str(value) for name, value in facts.items() if value}


# ---- texts ------------------------------------------------------------------------------------------------------------------


def shortened(text: str) -> str:
    """As much of a text as the page has room for."""
    return text if len(text) <= LETTERS_SHOWN else f"{text[:LETTERS_SHOWN]} [... {len(text) - LETTERS_SHOWN:,} letters more]"


@dataclass(frozen=True)
class Samples:
    """The answers to some prompts over time; left_out counts prompts that are not shown."""

    prompts: list[dict]
    left_out: int


def samples_of(rows: Iterable[dict]) -> Samples:
    """The answers to each prompt at a few moments from first to last, and where policy and reference differ."""
    by_prompt: dict[str, list[dict]] = {}
    for row in rows:
        if all(isinstance(row.get(name), kind) for name, kind in {"prompt": str, "policy": str, "examples": int}.items()):
            by_prompt.setdefault(row["prompt"], []).append(row)
    prompts = [
        {"prompt": shortened(prompt.strip()), "moments": [_moment(row) for row in _some(found)]}
        for prompt, found in list(by_prompt.items())[:PROMPTS_SHOWN]
    ]
    return Samples(prompts, len(by_prompt) - len(prompts))


def _some(rows: list[dict]) -> list[dict]:
    """At most MOMENTS_SHOWN rows, as far apart as they can be, the first and the last among them; the newest in front."""
    last = len(rows) - 1
    kept = {round(last * number / (MOMENTS_SHOWN - 1)) for number in range(MOMENTS_SHOWN)}
    return [rows[place] for place in sorted(kept, reverse=True)]


def _moment(row: dict) -> dict:
    policy, reference = shortened(row["policy"].strip()), row.get("reference")
    if not isinstance(reference, str):
        return {"examples": row["examples"], "policy": policy, "reference": None}
    reference = shortened(reference.strip())
    marked = {"policy": words_marked(policy, reference), "reference": words_marked(reference, policy)}
    return {"examples": row["examples"], **marked}


def pairs_of(rows: Iterable[dict]) -> dict[str, dict]:
    """Of each kind of flagged pair how many there are, and the first of them."""
    found: dict[str, dict] = {kind: {"number": 0, "shown": []} for kind in KINDS}
    for row in rows:
        if row["kind"] not in found:
            continue
        kind = found[row["kind"]]
        kind["number"] += 1
        if len(kind["shown"]) < PAIRS_SHOWN:
            texts = {name: shortened(row[name]) for name in ("prompt", "preferred", "other")}
            margins = ", ".join(shown(margin) for margin in row.get("margins") or () if isinstance(margin, int | float))
            chance = row.get("wrong_label_probability")
            said = f"{chance:.0%}" if isinstance(chance, int | float) else None
            kind["shown"].append({"source": row["source"], "margins": margins, "wrong_label": said, **texts})
    return {kind: facts for kind, facts in found.items() if facts["number"]}


def report_writer(config, run_dir: Path, loss, tokenizer, data):
    """A function that writes a run's report.html and returns its path; before it, if there is a ledger, flagged_pairs.jsonl."""
    finder = PairFinder(run_dir, data[0].table, tokenizer) if config.ledger and loss.paired else None

    def write() -> Path:
        if finder is not None:
            finder.write()
        return write_report(run_dir)

    return write
