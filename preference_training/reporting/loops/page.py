"""report.html of a loop of rounds: what each policy does on held-out prompts, what each round was trained on, and responses.

It is made from the loop's directory alone, so that it can be rebuilt at any time.

    directory of a loop -> LoopRecord -> findings, charts, tables, responses -> report.html
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup
from omegaconf import OmegaConf

from preference_training.configuration.composition import CONFIG_DIR
from preference_training.core import metric_names
from preference_training.core.errors import UserError
from preference_training.core.files import write_atomically
from preference_training.core.values import UNREADABLE, dotted, format_number
from preference_training.data.records.record import Prompt
from preference_training.losses.registry import find_loss
from preference_training.reporting.charts import Axes, chart
from preference_training.reporting.examples import highlight_changes, last_question, truncate
from preference_training.reporting.loops.findings import loop_findings
from preference_training.reporting.loops.record import LoopRecord, Response
from preference_training.reporting.model_card import changed_settings
from preference_training.reporting.pages.rendering import render
from preference_training.reporting.summary import short_path
from preference_training.rounds.loop import ROUNDS
from preference_training.rounds.summary import loop_metric_text, policy_name
from preference_training.tracking.run_files import METRICS, REPORT

# Limits of a page: prompts, and policies whose responses stand side by side.
MAX_PROMPTS, MAX_POLICIES = 16, 6
# Of a judge's reason. Unit: characters.
MAX_REASON = 400
LINKED = (METRICS, ROUNDS, "config.yaml", "verdicts.jsonl")
X = "rounds of training"
# The charts: title, note, metrics with their labels, axes.
CHARTS = (
    ("Score", "of the judge, on held-out prompts", {metric_names.HELD_OUT_REWARD: "held out"}, Axes(X, is_count=True)),
    (
        "Win rate", "against the first model on held-out prompts, by score; ties count half",
        {metric_names.HELD_OUT_WIN_RATE: "by the judge", metric_names.HELD_OUT_SECOND_WIN_RATE: "by the second judge"},
        Axes(X, low=0, high=1, shown=(0.5,), guide=(0.5, "as the first model"), is_count=True),
    ),
    (
        "Length of responses", "in tokens",
        {metric_names.HELD_OUT_LENGTH: "held out", metric_names.SAMPLES_LENGTH: "sampled to train on"},
        Axes(X, low=0, is_count=True),
    ),
    (
        "KL to the first model", "nats per response, over the policy's own held-out responses",
        {metric_names.HELD_OUT_KL: "held out"}, Axes(X, shown=(0,), is_count=True),
    ),
    (
        "Diversity", "of the responses to a prompt; where distinct-2 falls and similarity rises, they become alike",
        {metric_names.DISTINCT: "distinct-2", metric_names.SIMILARITY: "similarity"},
        Axes(X, low=0, high=1, is_count=True),
    ),
    (
        "Score of samples", "mean over what is sampled to train on",
        {metric_names.SAMPLES_REWARD: "sampled to train on"}, Axes(X, is_count=True),
    ),
)  # fmt: skip
# The columns of the table of policies: title and metric.
COLUMNS = {
    "score": metric_names.HELD_OUT_REWARD, "win rate": metric_names.HELD_OUT_WIN_RATE,
    "second judge's": metric_names.HELD_OUT_SECOND_WIN_RATE, "tokens": metric_names.HELD_OUT_LENGTH,
    "KL": metric_names.HELD_OUT_KL,
}  # fmt: skip
# The columns of the table of rounds that are of its samples.
OF_SAMPLES = ("mean_score", "mean_length", "truncated", "distinct_2", "similarity")
# The numbers at the top: metric, title, meaning.
HEADLINE = (
    (metric_names.HELD_OUT_REWARD, "held-out score", "mean score of the last policy's responses to held-out prompts"),
    (metric_names.HELD_OUT_WIN_RATE, "win rate", "how often its score is higher than the first model's, ties half"),
    (metric_names.HELD_OUT_LENGTH, "tokens per response", "mean length of its responses to held-out prompts"),
    (metric_names.HELD_OUT_KL, "KL", "to the first model, in nats per response"),
)


def write_loop_report(directory: Path) -> Path:
    """Write a loop's report.html; returns its path. Raises OSError."""
    write_atomically(directory / REPORT, loop_page(LoopRecord.read(directory)))
    return directory / REPORT


def rebuild_loop_report(directory: Path) -> Path:
    """`write_loop_report` for a path that a user gave. Raises UserError for another directory, or an unwritable one."""
    if not (directory / ROUNDS).is_file():
        raise UserError(f"{directory}: contains no {ROUNDS}. Expected the directory of a loop of rounds.")
    try:
        return write_loop_report(directory)
    except OSError as error:
        raise UserError(
            f"cannot write {directory / REPORT}: {error.strerror}. Expected a writable folder with enough space."
        ) from error


def loop_page(loop: LoopRecord) -> str:
    """The HTML of a loop's report."""
    shown = list(loop.held_out_prompts)[:MAX_PROMPTS]
    answered = loop.responses(shown)
    return render(
        "rounds.html",
        name=loop.config.get("exp_name", loop.directory.name),
        summary=summary(loop),
        findings=loop_findings(loop),
        numbers=list(headline(loop)),
        facts=facts(loop),
        links=[name for name in LINKED if (loop.directory / name).is_file()],
        charts=charts(loop),
        columns=list(known_columns(loop)),
        policies=policies(loop),
        rounds=list(trained_on(loop)),
        prompts=[example(loop.held_out_prompts[prompt], found) for prompt, found in answered.items() if found],
        num_hidden=len(loop.held_out_prompts) - len(shown),
        changed=settings_table(loop),
    )


# ---- numbers ----------------------------------------------------------------------------------------------------------------


def summary(loop: LoopRecord) -> str:
    """The loop in one line."""
    settings = loop.settings
    loss = find_loss(settings.get("loss.name"), settings.get("loss.mode_loss"))
    model = settings.get("model.name_or_path") or settings.get("model.archive")
    judge = settings.get("rounds.judge")
    parts = [
        f"{loss.title if loss else settings.get('loss.name')} in rounds",
        short_path(str(model)) if model else "",
        f"judged by {_judge(judge)}" if judge else "",
        loop.progress,
    ]
    return " · ".join(part for part in parts if part)


def _judge(judge: object) -> str:
    text = str(judge)
    return text.rpartition("/")[2] if ".py:" in text else text


def headline(loop: LoopRecord) -> Iterator[dict]:
    """The numbers of the last policy at the top of the page: name, value, qualifications, and what they mean."""
    if not loop.rows:
        return
    first, last = loop.rows[0], loop.rows[-1]
    prompts = last.get(metric_names.HELD_OUT_PROMPTS)
    for metric, title, meaning in HEADLINE:
        if metric in last:
            value, _, interval = loop_metric_text(last, metric).partition(" ")
            size = f"95%, {prompts:,.0f} prompts" if interval and prompts else ""
            more = [interval, size]
            if metric in first and first is not last and metric != metric_names.HELD_OUT_KL:
                more.append(f"{format_number(float(f'{first[metric]:.3g}'))} before training")
            yield {"name": title, "value": value, "more": [text for text in more if text], "meaning": meaning}


def facts(loop: LoopRecord) -> dict[str, str]:
    """What the loop does, in words: name → value."""
    rounds = {key.removeprefix("rounds."): value for key, value in loop.settings.items() if key.startswith("rounds.")}
    reference = {
        "previous": "the policy that a round begins with",
        "first": "the model before the first round",
        "moving": "begins as the policy that a round begins with, and follows it",
    }
    cut = {"keep": "count as whole ones", "skip": "are excluded", "worst": "are the worst of their prompt"}
    counts = next((found["counts"] for found in loop.summaries if isinstance(found.get("counts"), dict)), {})
    samples = f"{rounds.get('n_samples')} responses to each of {counts['prompts']:,} prompts" if "prompts" in counts else ""
    held_out = loop.held_out(loop.measured[0]).get("prompts") if loop.measured else None
    found = {
        "judge": str(rounds.get("judge", "")),
        "a round": samples,
        "pairs": str(rounds.get("pairs") or ""),
        "cut responses": cut.get(str(rounds.get("truncated")), ""),
        "held out": f"{held_out:,} prompts" if held_out else "",
        "reference": reference.get(str(rounds.get("reference")), ""),
    }
    return {name: text for name, text in found.items() if text}


def charts(loop: LoopRecord) -> list[Markup]:
    """The charts for which there are values."""
    figures = []
    for title, note, metrics, axes in CHARTS:
        lines = [loop.line(metric, label, style) for style, (metric, label) in enumerate(metrics.items())]
        figures.append(chart(title, lines, note, axes))
    return [figure for figure in figures if figure]


def known_columns(loop: LoopRecord) -> dict[str, str]:
    """The columns of the table of policies for which there are values: title → metric."""
    return {title: metric for title, metric in COLUMNS.items() if any(metric in row for row in loop.rows)}


def policies(loop: LoopRecord) -> list[dict]:
    """The rows of the table of policies: what each does on held-out prompts."""
    found = []
    for row in loop.rows:
        place = int(row[metric_names.ROUND])
        held_out = loop.held_out(place)
        if held_out:
            cells = [loop_metric_text(row, metric) for metric in known_columns(loop).values()]
            counts = [f"{held_out.get(name, 0):,}" for name in ("truncated", "unjudged")]
            report = loop.rounds[place - 1].run / REPORT if place else None
            found.append({"name": policy_name(place), "cells": cells + counts, "report": _link(loop, report)})
    return found


def trained_on(loop: LoopRecord) -> Iterator[dict]:
    """The rows of the table of rounds: what was sampled, what was made of it, and what was excluded."""
    for files, found in zip(loop.rounds, loop.summaries, strict=True):
        counts, samples = found.get("counts"), found.get("samples")
        if files.number is None or not isinstance(counts, dict) or not isinstance(samples, dict):
            continue
        excluded = found.get("excluded")
        yield {
            "number": files.number,
            "report": _link(loop, files.run / REPORT),
            "counts": [f"{counts.get(name, 0):,}" for name in ("prompts", "responses", "records", "pairs")],
            "samples": [_number(samples.get(name)) for name in OF_SAMPLES],
            "excluded": _excluded(excluded if isinstance(excluded, dict) else {}),
        }


def _excluded(reasons: dict[str, Any]) -> list[str]:
    known = [(count, reason) for reason, count in reasons.items() if isinstance(count, int)]
    return [f"{count:,} {reason}" for count, reason in sorted(known, reverse=True)]


def _number(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else "-"


def _link(loop: LoopRecord, page: Path | None) -> str:
    """The address of a page from the loop's, so that both can be moved together; empty without one."""
    return quote(os.path.relpath(page, loop.directory)) if page is not None and page.is_file() else ""


def settings_table(loop: LoopRecord) -> dict:
    """The settings that differ from the defaults: key → (value, default)."""
    usual = {f"rounds.{key}": [value] for key, value in dotted(_rounds_defaults()).items()}
    try:
        return changed_settings(loop.config, usual)
    except UNREADABLE:
        return {}


def _rounds_defaults() -> dict[str, Any]:
    found = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "rounds" / "default.yaml"), throw_on_missing=False)
    return found if isinstance(found, dict) else {}


# ---- responses --------------------------------------------------------------------------------------------------------------


def example(prompt: Prompt, responses: list[Response]) -> dict:
    """A held-out prompt with the responses of some policies side by side: title, score and reason, text."""
    shown = evenly(responses, MAX_POLICIES)
    columns = []
    for before, response in zip([None, *shown], shown, strict=False):
        text = truncate(response.text.strip())
        changed = highlight_changes(text, truncate(before.text.strip())) if before else text
        score = "not judged" if response.score is None else f"score {format_number(float(f'{response.score:.4g}'))}"
        title = f"{response.policy}: {score}{', cut' * (not response.ended)}"
        columns.append((title, truncate(response.reason or "", MAX_REASON), changed))
    question = last_question(prompt) if isinstance(prompt, str) else prompt[-1].content
    return {"question": truncate(question), "columns": columns, "num_hidden": len(responses) - len(shown)}


def evenly(responses: list[Response], most: int) -> list[Response]:
    """At most so many of the responses, evenly spread, the first and the last among them."""
    if len(responses) <= most:
        return responses
    last = len(responses) - 1
    return [responses[round(last * number / (most - 1))] for number in range(most)]
