"""Scores from comparisons of two responses: which pairs are compared, and what a response's score is, its win share."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from statistics import mean
from typing import Any, NamedTuple

import xxhash

from preference_training.data.records.record import Prompt
from preference_training.rounds.judges.base import Judge, JudgedInput, Score

# Two different responses, the first of which is the one whose hash is smaller.
Pair = tuple[str, str]


class Comparison(NamedTuple):
    """Two different responses to a prompt, in the order of their hashes, so that a comparison is one however it came about."""

    prompt: Prompt
    first: str
    second: str


class Outcome(NamedTuple):
    """What a comparison came to: 1 where the first response won, 0 where it lost, 0.5 for a tie; None without a verdict.

    reason: why there is none. orders_disagree: whether the two orders had different verdicts; None where one was asked.
    """

    value: float | None
    reason: str | None = None
    orders_disagree: bool | None = None


def ordered(one: str, other: str) -> Pair:
    """Two responses in the order of their hashes: it says nothing of them, and is the same each time."""
    return (one, other) if (_hash(one), one) < (_hash(other), other) else (other, one)


def _hash(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def chosen_pairs(responses: Iterable[str], limit: int | None) -> list[Pair]:
    """Which two of some responses are compared: every two, or `limit` pairs in which each response is about equally often.

    Responses are set on a circle in the order of their hashes. First each is compared with its neighbor, then with the one
    behind it, and so on: after the first round of the circle all are connected, and after k of them each has 2k comparisons.
    """
    circle = sorted(set(responses), key=lambda text: (_hash(text), text))
    every = [ordered(one, other) for one, other in combinations(circle, 2)]
    if limit is None or limit >= len(every):
        return every
    pairs: dict[Pair, None] = {}
    for distance in range(1, len(circle) // 2 + 1):
        for place, one in enumerate(circle):
            pairs.setdefault(ordered(one, circle[(place + distance) % len(circle)]))
    return list(pairs)[:limit]


def win_share(response: str, outcomes: Mapping[Pair, float], ties: int = 0) -> float | None:
    """The share of its comparisons that a response won, ties half; None where it has none.

    outcomes: 1 where the first of the pair won, 0 where it lost, 0.5 for a tie. ties: how many more ties it has.
    """
    values = [
        value if response == first else 1 - value for (first, second), value in outcomes.items() if response in (first, second)
    ]
    return mean([*values, *[0.5] * ties]) if values or ties else None


class ComparingJudge(Judge):
    """A judge that compares two responses. A score is the share of its comparisons that a response wins, ties half.

    The responses to a prompt are compared among each other, at most `limit` pairs; those to a held-out prompt with those of the
    model before the first round. Where there is none, and of equal responses, the share is 0.5.
    """

    compares = True

    def __init__(self, name: str, identity: str, limit: int | None):
        self.name, self.identity, self.limit = name, f"{identity} compares {limit}", limit

    @abstractmethod
    def ask(self, comparisons: Sequence[Comparison]) -> None:
        """Have the comparisons made that have no verdict yet. Raises UserError, PendingError."""

    @abstractmethod
    def recall(self, comparison: Comparison) -> Outcome:
        """The outcome of a comparison, as far as it is known; nobody is asked."""

    def comparisons(self, sample: JudgedInput) -> list[Comparison]:
        """What a response is compared in."""
        if sample.against:
            pairs = [ordered(sample.response, other) for other in sample.against if other != sample.response]
        else:
            pairs = [pair for pair in chosen_pairs(sample.among, self.limit) if sample.response in pair]
        return [Comparison(sample.prompt, *pair) for pair in pairs]

    def judge(self, samples: Sequence[JudgedInput]) -> list[Score]:
        """The win share of each response. Raises UserError, PendingError."""
        self.ask(self._all(samples))
        return [self._score(sample) for sample in samples]

    def _all(self, samples: Sequence[JudgedInput]) -> list[Comparison]:
        return list(dict.fromkeys(each for sample in samples for each in self.comparisons(sample)))

    def _score(self, sample: JudgedInput) -> Score:
        found = {each: self.recall(each) for each in self.comparisons(sample)}
        known = {(pair.first, pair.second): made.value for pair, made in found.items() if made.value is not None}
        if found and not known:
            return Score(None, "; ".join(sorted({outcome.reason or "no verdict" for outcome in found.values()})))
        # Comparisons with an equal response are ties that nobody is asked about.
        equal = sum(other == sample.response for other in sample.against)
        share = win_share(sample.response, known, equal)
        return Score(0.5 if share is None else share, _words(share, len(known) + equal, found.values()))

    def facts(self, samples: Sequence[JudgedInput]) -> dict[str, Any]:
        """comparisons and those unanswered; in_both_orders and of these those whose orders disagree, as count and as share."""
        found = [self.recall(each) for each in self._all(samples)]
        both = [each.orders_disagree for each in found if each.orders_disagree is not None]
        facts: dict[str, Any] = {"comparisons": len(found), "unanswered": sum(each.value is None for each in found)}
        if both:
            facts |= {"in_both_orders": len(both), "orders_disagree": sum(both), "order_disagreement": sum(both) / len(both)}
        return facts


def _words(share: float | None, count: int, outcomes: Iterable[Outcome]) -> str:
    if share is None:
        return "nothing to compare it with"
    disagree = sum(bool(each.orders_disagree) for each in outcomes)
    missing = sum(each.value is None for each in outcomes)
    parts = [f"wins {share * count:g} of {count} comparisons"]
    parts += [f"in {disagree} the orders disagree"] * bool(disagree) + [f"{missing} without a verdict"] * bool(missing)
    return ", ".join(parts)
