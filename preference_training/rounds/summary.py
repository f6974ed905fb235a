"""A round in numbers: what its policy does on held-out prompts, compared with the model before the first round."""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations, pairwise
from statistics import mean
from typing import Any

from preference_training.core.files import write_atomically
from preference_training.evaluation.intervals import estimate, mean_interval, share_interval
from preference_training.evaluation.phrasing import with_interval
from preference_training.rounds.loop import Loop, RoundFiles, counted
from preference_training.rounds.tables import read_table
from preference_training.tracking.run_files import json_object


def summarize(loop: Loop, number: int) -> dict[str, Any]:
    """Compute, print and write summary.json: of the policy that a round begins with, and of the round's own samples."""
    files = loop.round(number)
    summary: dict[str, Any] = {"round": files.number, "held_out": held_out(loop, number)}
    if files.number is not None:
        summary["samples"] = facts_of_samples(read_rows(files.samples, files.scores))
        summary |= json_object(files.excluded)
    write_atomically(files.summary, json.dumps(summary, indent=1) + "\n")
    print(f"{files.name}: {held_out_line(summary['held_out'], number)}", flush=True)
    return summary


def read_rows(samples, scores) -> list[dict[str, Any]]:
    """The rows of samples with their scores."""
    found = {(row["prompt_id"], row["number"]): row["score"] for row in read_table(scores)}
    columns = ("prompt_id", "number", "text", "n_tokens", "ended", "logp", "logp_first")
    return [row | {"score": found[row["prompt_id"], row["number"]]} for row in read_table(samples, columns)]


def held_out(loop: Loop, number: int) -> dict[str, Any]:
    """What the policy that a round begins with does on held-out prompts; empty without any.

    score, length, kl: means with 95% intervals. kl: of log pi - log pi_first over its own responses, in nats per response; with
    a temperature other than 1 these are not samples of pi itself. win_rate: against the model before the first round, by score.
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
    facts["win_rate"] = None if number == 1 else win_rate(judged, read_rows(first.held_out_samples, first.held_out_scores))
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
