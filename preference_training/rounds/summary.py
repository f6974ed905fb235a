"""A round in numbers: what its policy does on held-out prompts, compared with the model before the first round."""

import json
import math
import uuid
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations, pairwise
from statistics import mean
from typing import Any

from preference_training.core.metric_names import (
    DISTINCT,
    EXAMPLES,
    HELD_OUT_KL,
    HELD_OUT_LENGTH,
    HELD_OUT_PROMPTS,
    HELD_OUT_REWARD,
    HELD_OUT_SECOND_WIN_RATE,
    HELD_OUT_WIN_RATE,
    HIGH,
    LOW,
    PAIRS,
    RECORDS,
    ROUND,
    ROUNDS,
    SAMPLES_LENGTH,
    SAMPLES_REWARD,
    SIMILARITY,
    UPDATES,
)
from preference_training.core.values import aligned, counted
from preference_training.evaluation.intervals import estimate, mean_interval, share_interval
from preference_training.evaluation.phrasing import metric_text, with_interval
from preference_training.generation.repetition import repeated_share
from preference_training.rounds.judges.findings import facts_of_scores, findings
from preference_training.rounds.loop import JUDGED, Loop, RoundFiles
from preference_training.rounds.tables import read_table, save_text
from preference_training.tracking.dashboards.base import RunEnd, RunStart
from preference_training.tracking.dashboards.starting import start_dashboards
from preference_training.tracking.run_files import METRICS, REPORT, json_object, metric_rows, split_rows

# What dashboards have got of a loop: its id there, and the rows.
TRACKED = "tracked.json"
# A loop's metrics: of the held-out part of a summary, with intervals; of its samples; of what was made of them.
HELD_OUT_METRICS = {
    HELD_OUT_REWARD: "score", HELD_OUT_WIN_RATE: "win_rate", HELD_OUT_SECOND_WIN_RATE: "second_win_rate",
    HELD_OUT_LENGTH: "length", HELD_OUT_KL: "kl",
}  # fmt: skip
SAMPLE_METRICS = {
    SAMPLES_REWARD: "mean_score", SAMPLES_LENGTH: "mean_length", DISTINCT: "distinct_2", SIMILARITY: "similarity",
}  # fmt: skip
COUNT_METRICS = {PAIRS: "pairs", RECORDS: "records"}
# The columns of the table: title and metric.
COLUMNS = {
    "score": HELD_OUT_REWARD, "win rate": HELD_OUT_WIN_RATE, "second judge's": HELD_OUT_SECOND_WIN_RATE,
    "tokens": HELD_OUT_LENGTH, "KL": HELD_OUT_KL, "distinct-2": DISTINCT, "pairs": PAIRS,
}  # fmt: skip


def summarize(loop: Loop, number: int) -> dict[str, Any]:
    """Compute, print and write summary.json: of the policy that a round begins with, and of the round's own samples."""
    files = loop.round(number)
    summary: dict[str, Any] = {"round": files.number, "held_out": held_out(loop, number)}
    if files.number is not None:
        rows = read_rows(files.samples, files.scores)
        summary["samples"] = facts_of_samples(rows) | facts_of_scores(rows)
        summary |= json_object(files.excluded)
    summary["judges"] = json_object(files.directory / JUDGED)
    earlier = [read_summary(loop.round(each)) for each in range(1, number)]
    summary["findings"] = findings([*filter(None, earlier), summary])
    save_text(files.summary, json.dumps(summary, indent=1) + "\n")
    found = [f"  {each['text']}" for each in summary["findings"]]
    print(f"{files.name}: {held_out_line(summary['held_out'], number)}", *found, sep="\n", flush=True)
    return summary


def read_rows(samples, scores) -> list[dict[str, Any]]:
    """The rows of samples with their scores."""
    columns = ("prompt_id", "number", "text", "token_ids", "n_tokens", "ended", "logp", "logp_first")
    found = {(row["prompt_id"], row["number"]): row for row in read_table(scores)}
    rows = []
    for row in read_table(samples, columns):
        score = found[row["prompt_id"], row["number"]]
        rows.append(row | {name: score.get(name) for name in ("score", "reason", "second_score")})
    return rows


def held_out(loop: Loop, number: int) -> dict[str, Any]:
    """What the policy that a round begins with does on held-out prompts; empty without any.

    score, length, kl: means with 95% intervals. kl: of log pi - log pi_first over its own responses, in nats per response; with
    a temperature other than 1 these are not samples of pi itself. win_rate: against the model before the first round, by score.
    second_score, second_win_rate: the same by rounds.second_judge, if there is one.
    """
    files, first = loop.round(number), loop.round(1)
    rows = read_rows(files.held_out_samples, files.held_out_scores)
    if not rows:
        return {}
    judged = [row for row in rows if row["score"] is not None]
    facts = {
        "prompts": len({row["prompt_id"] for row in rows}),
        "responses": len(rows),
        "unjudged": len(rows) - len(judged),
        "truncated": sum(not row["ended"] for row in rows),
        "score": _mean(judged, "score"),
        "length": _mean(rows, "n_tokens"),
    }
    scored = [row | {"kl": row["logp"] - row["logp_first"]} for row in rows if row["logp"] is not None]
    facts["kl"] = _mean(scored, "kl")
    facts["repeated_4grams"] = repeated_share(row["token_ids"] or () for row in rows)
    others = [] if number == 1 else read_rows(first.held_out_samples, first.held_out_scores)
    facts["win_rate"] = None if number == 1 else win_rate(judged, others)
    if second := [row | {"score": row["second_score"]} for row in rows if row["second_score"] is not None]:
        facts["second_score"] = _mean(second, "score")
        by_second = [row | {"score": row["second_score"]} for row in others]
        facts["second_win_rate"] = None if number == 1 else win_rate(second, by_second)
    return facts


def _mean(rows: Sequence[dict], column: str) -> dict:
    values, groups = [row[column] for row in rows], [row["prompt_id"] for row in rows]
    return estimate(mean(values), mean_interval(values, groups)) if rows else estimate(None, None)


def win_rate(rows: Sequence[dict], others: Sequence[dict]) -> dict:
    """How often a response has a higher score than another model's to the same prompt, ties half, with its interval.

    Each judged response is compared with each of the other's to its prompt; comparisons of a prompt belong together.
    """
    by_prompt: dict[int, list[float]] = defaultdict(list)
    for row in others:
        if row["score"] is not None:
            by_prompt[row["prompt_id"]].append(row["score"])
    pairs = [(row["prompt_id"], row["score"], score) for row in rows for score in by_prompt[row["prompt_id"]]]
    if not pairs:
        return estimate(None, None)
    outcomes = [1.0 if one > other else 0.5 if one == other else 0.0 for _, one, other in pairs]
    groups = [prompt_id for prompt_id, *_ in pairs]
    return estimate(mean(outcomes), share_interval(outcomes, groups))


def facts_of_samples(rows: Sequence[dict]) -> dict[str, Any]:
    """What a round's own samples are like: scores, lengths, and how much the responses to a prompt differ.

    distinct_2: different pairs of words over all of them, among the responses to a prompt. similarity: the share of their words
    that two responses have in common (Jaccard). repeated: responses that repeat another one word for word.
    """
    texts: dict[int, list[str]] = defaultdict(list)
    for row in rows:
        texts[row["prompt_id"]].append(row["text"])
    scores = [row["score"] for row in rows if row["score"] is not None]
    several = [some for some in texts.values() if len(some) > 1]
    return {
        "responses": len(rows),
        "mean_score": mean(scores) if scores else None,
        "unjudged": len(rows) - len(scores),
        "truncated": sum(not row["ended"] for row in rows),
        "mean_length": mean(row["n_tokens"] for row in rows),
        "repeated": sum(len(some) - len(set(some)) for some in texts.values()),
        "distinct_2": _mean_of(map(distinct_2, texts.values())),
        "similarity": _mean_of(map(similarity, several)),
    }


def distinct_2(texts: Sequence[str]) -> float | None:
    """Different pairs of neighboring words over all of them (Li et al. 2016); None where there is none."""
    pairs = [pair for words in map(str.split, texts) for pair in pairwise(words)]
    return len(set(pairs)) / len(pairs) if pairs else None


def similarity(texts: Sequence[str]) -> float:
    """The mean Jaccard similarity of the words of two of the texts; two texts without words are equal."""
    words = [frozenset(text.split()) for text in texts]
    return mean(len(one & other) / len(one | other) if one | other else 1.0 for one, other in combinations(words, 2))


def _mean_of(values) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def held_out_line(facts: dict[str, Any], number: int) -> str:
    """The held-out numbers of a policy in a line."""
    who = "the model before the first round" if number == 1 else f"the policy after round {number - 1}"
    if not facts:
        return f"{who}: nothing is held out, so nothing compares policies (rounds.held_out)"
    parts = [f"score {_text(facts['score'])}"]
    if facts["win_rate"]:
        parts.append(f"win rate against the first {_text(facts['win_rate'])}")
    if facts.get("second_score"):
        rate = facts["second_win_rate"]
        parts.append(f"second judge {_text(facts['second_score'])}" + (f" (win rate {_text(rate)})" if rate else ""))
    parts.append(f"{facts['length']['mean']:.1f} tokens")
    if facts["kl"]["mean"] is not None:
        parts.append(f"KL to the first {facts['kl']['mean']:.3g} nats")
    more = [f"{facts[name]:,} {name}" for name in ("unjudged", "truncated") if facts[name]]
    return f"{who}, on {counted(facts['prompts'], 'held-out prompt')}: " + ", ".join(parts + more)


def _text(found: dict) -> str:
    if found["mean"] is None or not math.isfinite(found["mean"]):
        return "-"
    return f"{found['mean']:.4g}" if found["low"] is None else with_interval(found["mean"], found["low"], found["high"])


def read_summary(files: RoundFiles) -> dict[str, Any]:
    """The summary of a round; empty where there is none yet."""
    return json_object(files.summary)


# ---- all rounds -----------------------------------------------------------------------------------------------------------


def loop_metrics(rounds: Sequence[RoundFiles]) -> list[dict[str, float]]:
    """What is known of the policies of a loop as rows of metrics: of the first model, and of that after each round.

    Those of samples and pairs are of the round that samples from the policy.
    """
    rows, trained = [], Counter({EXAMPLES: 0, UPDATES: 0})
    for number, files in enumerate(rounds):
        summary = read_summary(files)
        if summary:
            rows.append({**trained, ROUND: number, **_metrics(summary)})
        last = next(reversed(metric_rows(files.run / METRICS)), {})
        trained.update({name: last.get(name, 0) for name in (EXAMPLES, UPDATES)})
    return rows


def _metrics(summary: dict[str, Any]) -> dict[str, float]:
    found, facts = {}, summary.get("held_out") or {}
    for metric, name in HELD_OUT_METRICS.items():
        known = facts.get(name) or {}
        found |= {metric: known.get("mean"), metric + LOW: known.get("low"), metric + HIGH: known.get("high")}
    found[HELD_OUT_PROMPTS] = facts.get("prompts")
    found |= {metric: (summary.get("samples") or {}).get(name) for metric, name in SAMPLE_METRICS.items()}
    found |= {metric: (summary.get("counts") or {}).get(name) for metric, name in COUNT_METRICS.items()}
    return {metric: value for metric, value in found.items() if value is not None}


def write_metrics(loop: Loop) -> list[str]:
    """Write metrics.jsonl of a loop; returns its table as lines."""
    rows = loop_metrics(list(loop.rounds()))
    save_text(loop.directory / METRICS, "".join(json.dumps(row) + "\n" for row in rows))
    return metrics_table(rows)


def track(loop: Loop) -> None:
    """Give new rows of metrics.jsonl to the dashboards of `tracking`, as a run of the loop's own beside those of its trainings.

    Where an earlier row has changed, it is given again, with those after it. The page goes with the last policy's row.
    """
    names, rows = loop.config.dashboard_names, loop_metrics(list(loop.rounds()))
    noted = json_object(loop.directory / TRACKED)
    before = noted.get("rows", [])
    known = next(
        (k for k, (row, given) in enumerate(zip(rows, before, strict=False)) if row != given), min(len(rows), len(before))
    )
    if not names or known == len(rows):
        return
    noted = {"id": noted.get("id") or uuid.uuid4().hex, "rows": rows}
    examples = rows[known - 1][EXAMPLES] if known else 0
    dashboards = start_dashboards(names, RunStart(loop.config.as_dict(), loop.directory, noted["id"], int(examples)))
    for dashboard in dashboards:
        for row in rows[known:]:
            dashboard.log(row)
        if len(rows) > loop.config.rounds.rounds and (loop.directory / REPORT).is_file():
            dashboard.log_page(loop.directory / REPORT)
        dashboard.finish(RunEnd.FINISHED)
    save_text(loop.directory / TRACKED, json.dumps(noted) + "\n")


def metrics_table(rows: Sequence[dict[str, float]]) -> list[str]:
    """The metrics of a loop's policies as lines: on held-out prompts with intervals; of the samples from each, and their pairs.

    Columns without any value are left out.
    """
    titles = {title: metric for title, metric in COLUMNS.items() if any(metric in row for row in rows)}
    cells = [["policy", *titles]]
    cells += [[policy_name(int(row[ROUND])), *(loop_metric_text(row, metric) for metric in titles.values())] for row in rows]
    return aligned(cells)


def policy_name(rounds: int) -> str:
    """What a policy is called that was trained in so many rounds."""
    return "first model" if rounds == 0 else f"after round {rounds}"


def loop_metric_text(row: dict[str, float], metric: str) -> str:
    """`metric_text`, with counts in full, and without an interval where that has no width."""
    value, low, high = (row.get(f"{metric}{end}") for end in ("", LOW, HIGH))
    if metric in COUNT_METRICS and value is not None:
        return f"{value:,.0f}"
    return metric_text(row if low != high else {metric: value}, metric)


def objective_of(loop: Loop) -> float | None:
    """What a loop returns to a sweeper: the metric `objective` of its last policy, or of the last training's evaluation."""
    objective = loop.config.objective
    if objective.startswith(ROUNDS):
        rows = loop_metrics(list(loop.rounds()))
    else:
        _, rows = split_rows(metric_rows(loop.round(loop.config.rounds.rounds).run / METRICS))
    return rows[-1].get(objective) if rows else None
