"""What a loss trains on of a record: single targets, pairs, rankings, or labeled responses.

PreferenceRecord, kind -> Selected, of indices or texts of its responses
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from math import isfinite
from typing import NamedTuple

from preference_training.data.records.record import PreferenceRecord, Response
from preference_training.data.records.report import DataReport
from preference_training.losses.base import MISSING_NUMBERS, ExampleKind, MarginUse

NO_PAIR_TO_COMPARE = "a prompt without a pair of responses (loss=sft learns single responses)"
NO_MARGIN = "a pair without a margin (margins, a field margin, or scores of both responses give one)"
MARGIN_NOT_POSITIVE = "a pair with a margin of 0 or less, which has no logarithm (loss.scale=log; linear learns from it)"
UNDESIRABLE = "a response that is labeled undesirable, which SFT does not learn"
OUTVOTED = "a target that no majority of rows prefers to the same other response, which SFT does not learn"
LOWER = "a response with a lower score than the best of its prompt, which SFT does not learn"
ALL_TIED = "a prompt whose responses all have the same score"
NO_RANKING = "a prompt without a ranking (scores of two responses or more, or pairs of every two of them, give one)"
TIED = "a response with the score of another one in its ranking"
UNSCORED = "a response without a score"
UNLABELED = "a response without a label"
NO_LABELS = "a prompt without labeled responses (labels, or pairs, give them)"
PREFERRED_AND_NOT = "a response that is preferred in one pair and dispreferred in another"
WEIGHTS_OF_PAIRS = "weights have no effect: they are of pairs, which this loss does not compare"


class Selected(NamedTuple):
    """The responses that examples use, and the examples between them; see `TokenizedPrompt`."""

    responses: list
    examples: list[tuple[int, ...]]
    weights: list[float] | None = None
    margins: list[float] | None = None
    labels: list[float] | None = None

    @property
    def numbers(self) -> dict[str, list[float] | None]:
        """The numbers of its examples."""
        return {name: getattr(self, name) for name in MISSING_NUMBERS}


def select(record: PreferenceRecord, kind: ExampleKind, margins: MarginUse, report: DataReport) -> Iterator[Selected]:
    """What is trained on of a record, in one part or, for targets, in one for each; the report counts what is skipped."""
    if kind == "targets":
        yield from (Selected([target], []) for target in _targets(record, report))
        return
    if kind != "pairs" and record.weights:
        report.note(WEIGHTS_OF_PAIRS)
    if kind == "pairs":
        yield from _pairs(record, margins, report)
    elif kind == "rankings":
        yield from _ranking(record, report)
    else:
        yield from _labeled(record, report)


def _targets(record: PreferenceRecord, report: DataReport) -> Sequence[Response]:
    if record.scores:
        scores = [score for score in record.scores if score is not None]
        report.skip(LOWER, sum(score < max(scores) for score in scores))
    targets = list(record.targets)
    for reason, left_out in ((UNDESIRABLE, _undesirable(record)), (OUTVOTED, _outvoted(record))):
        before, targets = len(targets), [text for text in targets if text not in left_out]
        report.skip(reason, before - len(targets))
    return targets


def _undesirable(record: PreferenceRecord) -> list[Response]:
    labels = record.labels or [None] * len(record.responses)
    return [text for text, label in zip(record.responses, labels, strict=True) if label is False]


def _outvoted(record: PreferenceRecord) -> list[Response]:
    """The responses that are preferred to another one no more often than it is preferred to them."""
    if len(record.pairs) < 2:
        return []
    votes = Counter(record.pairs)
    return [record.responses[i] for (i, j), count in votes.items() if votes[j, i] >= count]


def used_responses(examples: Iterable[tuple[int, ...]]) -> list[int]:
    """The responses that examples use, as ascending indices."""
    return sorted({index for members in examples for index in members})


def renumbered(examples: Iterable[tuple[int, ...]], responses: Sequence[int]) -> list[tuple[int, ...]]:
    """The examples with the place in `responses` instead of each index."""
    place = {index: k for k, index in enumerate(responses)}
    return [tuple(place[index] for index in members) for members in examples]


def _compact(record: PreferenceRecord, examples: list[tuple[int, ...]], **numbers: list[float] | None) -> Selected:
    """The examples, with only the responses that they use."""
    used = (0, 1) if len(examples) == 1 and sorted(examples[0]) == [0, 1] else used_responses(examples)
    if len(used) == len(record.responses):
        return Selected(record.responses, examples, **numbers)
    return Selected([record.responses[index] for index in used], renumbered(examples, used), **numbers)


def _pairs(record: PreferenceRecord, use: MarginUse, report: DataReport) -> Iterator[Selected]:
    if not record.pairs:
        report.skip(ALL_TIED if _all_tied(record) else NO_PAIR_TO_COMPARE)
    elif use in ("unread", "optional"):
        yield _compact(
            record, record.pairs, weights=record.weights, margins=_given_margins(record) if use == "optional" else None
        )
    else:
        margins = _margins(record)
        kept = [k for k, margin in enumerate(margins) if margin is not None]
        report.skip(NO_MARGIN, len(margins) - len(kept))
        if use == "positive":
            positive = [k for k in kept if margins[k] > 0]
            report.skip(MARGIN_NOT_POSITIVE, len(kept) - len(positive))
            kept = positive
        if kept:
            weights = None if record.weights is None else [record.weights[k] for k in kept]
            pairs = [record.pairs[k] for k in kept]
            yield _compact(record, pairs, weights=weights, margins=[margins[k] for k in kept])


def _given_margins(record: PreferenceRecord) -> list[float] | None:
    """The record's own margins, 0 for a pair without; None where no pair has one."""
    if not record.margins or all(margin is None for margin in record.margins):
        return None
    return [float(margin or 0) for margin in record.margins]


def _margins(record: PreferenceRecord) -> list[float | None]:
    """The margin of each pair: the record's own, or the difference of the scores; None without either."""
    if record.margins is not None:
        return [None if margin is None else float(margin) for margin in record.margins]
    scores = record.scores or [None] * len(record.responses)
    differences = [
        None if scores[i] is None or scores[j] is None else float(scores[i]) - float(scores[j]) for i, j in record.pairs
    ]
    return [margin if margin is not None and isfinite(margin) else None for margin in differences]


def _ranking(record: PreferenceRecord, report: DataReport) -> Iterator[Selected]:
    if _all_tied(record):
        return report.skip(ALL_TIED)
    scored = sum(score is not None for score in record.scores or ())
    # A single score ranks nothing, and pairs may.
    order = _by_score(record.scores, report) if record.scores and scored > 1 else _by_pairs(record.pairs)
    if len(order) < 2:
        report.skip(NO_RANKING)
    else:
        yield _compact(record, [tuple(order)])


def _all_tied(record: PreferenceRecord) -> bool:
    scores = [score for score in record.scores or () if score is not None]
    return len(scores) > 1 and len(set(scores)) == 1 and not record.pairs


def _by_score(scores: Sequence[float | None], report: DataReport) -> list[int]:
    """The scored responses from best to worst; of those with equal scores the first."""
    first_with: dict[float, int] = {}
    for index, score in enumerate(scores):
        if score is not None:
            first_with.setdefault(score, index)
    unscored = sum(score is None for score in scores)
    report.skip(UNSCORED, unscored)
    report.skip(TIED, len(scores) - unscored - len(first_with))
    return [first_with[score] for score in sorted(first_with, reverse=True)]


def _by_pairs(pairs: Sequence[tuple[int, int]]) -> list[int]:
    """The responses from best to worst, if the pairs relate every two of them without a contradiction; else none."""
    known = set(pairs)
    wins = Counter(preferred for preferred, _ in known)
    order = sorted({index for pair in known for index in pair}, key=wins.__getitem__, reverse=True)
    return order if known == set(combinations(order, 2)) else []


def _labeled(record: PreferenceRecord, report: DataReport) -> Iterator[Selected]:
    if record.labels is not None:
        labels = dict(enumerate(record.labels))
        report.skip(UNLABELED, sum(label is None for label in record.labels))
    else:
        preferred, others = ({pair[side] for pair in record.pairs} for side in (0, 1))
        labels = {index: None if index in preferred & others else index in preferred for index in preferred | others}
        report.skip(PREFERRED_AND_NOT, len(preferred & others))
    known = {index: float(label) for index, label in sorted(labels.items()) if label is not None}
    if known:
        yield _compact(record, [(index,) for index in known], labels=list(known.values()))
    else:
        report.skip(NO_LABELS)
