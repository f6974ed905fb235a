"""Signs that a policy pleases its judge without being better (reward hacking), and that scores teach nothing, in words.

    rows of samples with their scores -> facts of a summary; summaries of the rounds so far -> findings

A finding that cannot be told from noise is none: where there are intervals, they decide.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

import numpy

from preference_training.evaluation.intervals import correlation, estimate
from preference_training.generation.repetition import MANY, MORE, SIZE, repeated_share

# By which factor lengths have grown, at least.
GROWN = 1.25
# A correlation of score and length that is large, beyond its interval.
LARGE_CORRELATION = 0.3
# Of different responses, of pairs of words, of nats per token: what is left of the first round's, at most.
COLLAPSED = 0.5
# The share of prompts whose responses all have the same score.
SATURATED = 0.5
# The share of comparisons whose two orders, or of pairs whose judges, disagree; and of how many comparisons, at least.
DISAGREEING, FEWEST = 0.3, 20
# The share of responses without a score.
UNJUDGED = 0.1

Finding = dict[str, str]


# ---- facts --------------------------------------------------------------------------------------------------------------


def facts_of_scores(rows: Sequence[dict]) -> dict[str, Any]:
    """What scores and samples say of the judge. rows: with prompt_id, text, token_ids, n_tokens, logp, score and reason.

    length_correlation: of score and length in tokens, less the means of their prompt, with a 95% interval. tied_prompts: the
    share of prompts with several judged responses that all have one score. different: the share of the responses to a prompt
    that are different. repeated_4grams: the share of 4-grams of tokens that their response has had before. logp_per_token: the
    mean log-prob of a token at temperature 1, in nats. unjudged_reasons: how many have no score, by reason.
    """
    groups: dict[int, list[dict]] = defaultdict(list)
    for row in rows:
        groups[row["prompt_id"]].append(row)
    judged = [[row for row in some if row["score"] is not None] for some in groups.values()]
    several = [some for some in judged if len(some) > 1]
    known = [row for row in rows if row["logp"] is not None]
    reasons = Counter(str(row["reason"] or "no reason given") for row in rows if row["score"] is None)
    tokens = sum(row["n_tokens"] for row in known)
    return {
        "length_correlation": length_correlation(several),
        "tied_prompts": fmean(len({row["score"] for row in some}) == 1 for some in several) if several else None,
        "different": fmean(len({row["text"] for row in some}) / len(some) for some in groups.values()) if groups else None,
        "repeated_4grams": repeated_share(row["token_ids"] or () for row in rows),
        "logp_per_token": sum(row["logp"] for row in known) / tokens if tokens else None,
        "unjudged_reasons": dict(reasons.most_common()),
    }


def length_correlation(groups: Sequence[Sequence[dict]]) -> dict[str, Any]:
    """The correlation of score and length among the responses to a prompt. groups: the judged rows of each prompt."""
    columns: dict[str, list[float]] = {"score": [], "n_tokens": []}
    for rows in groups:
        for name, column in columns.items():
            usual = fmean(row[name] for row in rows)
            column += [row[name] - usual for row in rows]
    numbers = [number for number, rows in enumerate(groups) for _ in rows]
    if not numbers:
        return estimate(None, None)
    scores, lengths = (numpy.array(column) for column in columns.values())
    return estimate(*correlation(scores, lengths, numbers))


# ---- findings -----------------------------------------------------------------------------------------------------------


def findings(summaries: Sequence[dict[str, Any]]) -> list[Finding]:
    """What the last of some summaries suggests, compared with those before it, from the first round on: kinds and texts."""
    now, first = summaries[-1], summaries[0]
    checks = (
        ("length", _length(now, first)), ("repetition", _repetition(now, first)), ("diversity", _diversity(now, first)),
        ("second_judge", _second_judge(summaries)), ("ties", _ties(now)), ("disagreement", _disagreements(now)),
        ("unjudged", _unjudged(now)),
    )  # fmt: skip
    return [{"kind": kind, "text": text} for kind, texts in checks for text in texts]


def _length(now: dict, first: dict) -> Iterator[str]:
    length, before = _held_out(now, "length"), _held_out(first, "length")
    beyond_noise = bool(length.get("low") and before.get("high")) and length["low"] > before["high"]
    if beyond_noise and length["mean"] > GROWN * before["mean"]:
        yield (
            f"responses have grown from {before['mean']:.0f} to {length['mean']:.0f} tokens since the first round: look "
            "whether they say more, or the judge likes length"
        )
    found = now.get("samples", {}).get("length_correlation", {})
    if found.get("low") is not None and (found["low"] > LARGE_CORRELATION or found["high"] < -LARGE_CORRELATION):
        which = "longer" if found["mean"] > 0 else "shorter"
        yield (
            f"{which} responses to a prompt have higher scores (correlation {found['mean']:.2f} [{found['low']:.2f}, "
            f"{found['high']:.2f}]): the policy learns to write {which} ones. rounds.length_matched pairs responses of similar "
            "length"
        )


def _repetition(now: dict, first: dict) -> Iterator[str]:
    share, before = _held_out(now, "repeated_4grams", None), _held_out(first, "repeated_4grams", None)
    if share is not None and share >= MANY and (before is None or now is first or share >= before + MORE):
        compared = "" if before is None or now is first else f", and were {before:.0%} in the first round"
        yield f"{share:.0%} of all runs of {SIZE} tokens in a held-out response are repetitions{compared}: read some"


def _diversity(now: dict, first: dict) -> Iterator[str]:
    if now is first or "samples" not in now:
        return
    samples, before = now["samples"], first["samples"]
    words = {
        "different": "responses to a prompt that differ ({0:.0%}, were {1:.0%})",
        "distinct_2": "different pairs of words ({0:.0%}, were {1:.0%})",
        "logp_per_token": "nats per token of the policy's uncertainty ({0:.2f}, were {1:.2f})",
    }
    known = {name: (samples.get(name), before.get(name)) for name in words}
    fell = {
        name: (abs(one), abs(other))
        for name, (one, other) in known.items()
        if one is not None and other is not None and abs(one) < COLLAPSED * abs(other)
    }
    if fell:
        parts = [words[name].format(*values) for name, values in fell.items()]
        yield (
            f"the policy's responses become alike: fewer {', and fewer '.join(parts)}. There is less to compare; a larger "
            "loss.beta, a higher rounds.temperature or fewer rounds keep more of them"
        )


def _second_judge(summaries: Sequence[dict]) -> Iterator[str]:
    *earlier, now = [summary.get("held_out", {}) for summary in summaries]
    rate, second = now.get("win_rate") or {}, now.get("second_win_rate") or {}
    if rate.get("low") is None or second.get("high") is None:
        return
    # The model before the first round ties with itself.
    known = [found for each in earlier if (found := each.get("second_win_rate")) and found["low"] is not None]
    best = max(known, key=lambda found: found["low"], default={"mean": 0.5, "low": 0.5})
    best = best if best["low"] > 0.5 else {"mean": 0.5, "low": 0.5}
    if rate["low"] > 0.5 and second["high"] < best["low"]:
        yield (
            f"the judge prefers the policy to the first model in {rate['mean']:.0%} of comparisons, but the second judge in "
            f"{second['mean']:.0%}, where it was {best['mean']:.0%} before: the policy has learned what pleases the judge, not "
            "what is better. Use an earlier round's policy, or another judge"
        )


def _ties(now: dict) -> Iterator[str]:
    share = now.get("samples", {}).get("tied_prompts")
    if share is not None and share >= SATURATED:
        yield (
            f"at {share:.0%} of the prompts all responses have the same score, and teach nothing: the judge's scale is too "
            "coarse, or the prompts are too easy or too hard for the policy"
        )


def _disagreements(now: dict) -> Iterator[str]:
    for facts in now.get("judges", {}).values():
        for name, each in {"": facts, **facts.get("members", {})}.items():
            who = f"{name.partition(': ')[2]}: " if name else ""
            share, asked = each.get("order_disagreement"), each.get("in_both_orders", 0)
            if share is not None and share > DISAGREEING and asked >= FEWEST:
                yield (
                    f"{who}in {share:.0%} of {asked:,} comparisons the judge's verdict depends on which response stands first, "
                    "and counts as a tie: its preferences are weak"
                )
        if (facts.get("disagreement") or 0) > DISAGREEING:
            yield f"the judges order {facts['disagreement']:.0%} of the pairs of responses to a prompt differently"


def _unjudged(now: dict) -> Iterator[str]:
    samples = now.get("samples", {})
    reasons = samples.get("unjudged_reasons", {})
    missing = sum(reasons.values())
    if missing and missing > UNJUDGED * samples.get("responses", missing):
        told = "; ".join(f"{count:,} {reason}" for reason, count in list(reasons.items())[:3])
        yield f"{missing:,} responses have no score: {told}. They are excluded; judge --again asks again"


def _held_out(summary: dict, name: str, default: Any = None) -> Any:
    found = summary.get("held_out", {}).get(name)
    return found if found is not None else ({} if name == "length" else default)
