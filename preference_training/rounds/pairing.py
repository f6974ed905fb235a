"""What is made of the scored responses to one prompt: pairs, a ranking, labels, or the best one. Pure functions.

Shapes: N responses.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import median
from typing import NamedTuple

# Why a response or a pair is excluded.
UNJUDGED = "responses that the judge could not judge"
EMPTY = "responses without text"
TRUNCATED = "responses that were cut (truncated)"
NOT_ENDED = "responses that were cut, to prompts of which no response has ended"
DUPLICATE = "responses that repeat another one to their prompt"
TIE = "pairs of responses with equal scores"
CLOSE = "pairs whose scores differ by less than margin"
WORSE = "pairs whose better response is below threshold"
LENGTHS = "pairs whose lengths differ by more than length_matched"
MIDDLE = "responses with the median score of their prompt"
LOW = "prompts whose best response is below threshold"
# Why a prompt has no record.
NONE = "prompts without a judged response"
ONE = "prompts with fewer than two different judged responses"
ALL_TIED = "prompts whose responses all have the same score"
NO_PAIR = "prompts of which margin, threshold or length_matched leaves no pair"

Pair = tuple[int, int]


class Candidate(NamedTuple):
    """A response to a prompt, with its score (None: not judged) and its length in tokens. ended: it was not truncated."""

    text: str
    score: float | None
    n_tokens: int
    ended: bool = True


@dataclass(frozen=True)
class Rule:
    """How responses are paired; see config/rounds/default.yaml."""

    pairs: str
    margin: float = 0.0
    top_k: int = 2
    threshold: float | None = None
    length_matched: float | None = None
    truncated: str = "keep"


@dataclass
class Paired:
    """What was made of a prompt's responses, which are kept once each, in their order.

    record: in the schema of records (`data/records/record.py`), without its prompt; None where nothing is left. excluded: how
    many responses, pairs or prompts were, by reason.
    """

    record: dict | None = None
    excluded: Counter = field(default_factory=Counter)


def pair(candidates: Sequence[Candidate], rule: Rule) -> Paired:
    """Pair the scored responses to one prompt."""
    paired = Paired()
    kept = _usable(_ended(candidates, rule, paired.excluded), paired.excluded)
    if rule.pairs == "best_of_n":
        paired.record = _best(kept, rule, paired.excluded)
    elif rule.pairs == "unpaired":
        paired.record = _labeled(kept, rule, paired.excluded)
    elif len(kept) < 2:
        paired.excluded[ONE] += 1
    elif len({each.score for each in kept}) == 1:
        paired.excluded[TIE] += _count_pairs(len(kept))
        paired.excluded[ALL_TIED] += 1
    elif rule.pairs == "ranking":
        paired.record = _ranking(kept, rule, paired.excluded)
    else:
        pairs = _pairs(kept, rule, paired.excluded)
        paired.record = _record(kept, pairs)
    if paired.record is None and not any(reason.startswith("prompts") for reason in +paired.excluded):
        paired.excluded[NO_PAIR] += 1
    # Without the reasons that have excluded nothing.
    paired.excluded = +paired.excluded
    return paired


def _ended(candidates: Sequence[Candidate], rule: Rule, excluded: Counter) -> Sequence[Candidate]:
    """The responses, of which the truncated ones are what the rule makes of them."""
    if rule.truncated == "keep" or all(each.ended for each in candidates):
        return candidates
    whole = [each for each in candidates if each.ended]
    scores = [each.score for each in whole if each.score is not None]
    if rule.truncated == "skip" or not scores:
        excluded[TRUNCATED if rule.truncated == "skip" else NOT_ENDED] += len(candidates) - len(whole)
        return whole
    # By as much as the others differ, and at least by the margin.
    worst = min(scores) - (max(max(scores) - min(scores), rule.margin) or 1.0)
    return [each if each.ended else each._replace(score=worst) for each in candidates]


def _usable(candidates: Sequence[Candidate], excluded: Counter) -> list[Candidate]:
    """The judged responses with text, each once."""
    found: dict[str, Candidate] = {}
    for each in candidates:
        reason = None
        if not each.text.strip():
            reason = EMPTY
        elif each.text in found:
            reason = DUPLICATE
        elif each.score is None:
            reason = UNJUDGED
        if reason is None:
            found[each.text] = each
        else:
            excluded[reason] += 1
    return list(found.values())


def _count_pairs(number: int) -> int:
    return number * (number - 1) // 2


# ---- pairs ----------------------------------------------------------------------------------------------------------------


def _pairs(kept: Sequence[Candidate], rule: Rule, excluded: Counter) -> list[Pair]:
    """The pairs of places, the better response first."""
    if rule.pairs == "best_worst":
        allowed = [pair for pair in combinations(range(len(kept)), 2) if _matched(kept, pair, rule)]
        excluded[LENGTHS] += _count_pairs(len(kept)) - len(allowed)
        # The first of several with the largest difference.
        widest = max(allowed, key=lambda pair: abs(kept[pair[0]].score - kept[pair[1]].score), default=None)
        wanted = [widest] if widest else []
    elif rule.pairs == "all":
        wanted = list(combinations(range(len(kept)), 2))
    else:
        wanted = _extremes(kept, rule.top_k)
    return [_better_first(kept, pair) for pair in wanted if _is_pair(kept, pair, rule, excluded)]


def _extremes(kept: Sequence[Candidate], k: int) -> list[Pair]:
    """Each of the k best with each of the k worst; of a response that is both, no pair with itself, and none twice."""
    order = sorted(range(len(kept)), key=lambda place: -kept[place].score)
    found = [(best, worst) for best in order[:k] for worst in reversed(order[-k:]) if best != worst]
    return list({frozenset(pair): pair for pair in reversed(found)}.values())[::-1]


def _is_pair(kept: Sequence[Candidate], pair: Pair, rule: Rule, excluded: Counter) -> bool:
    one, other = (kept[place] for place in pair)
    difference = abs(one.score - other.score)
    reason = TIE if difference == 0 else CLOSE if difference < rule.margin else None
    if reason is None and rule.threshold is not None and max(one.score, other.score) < rule.threshold:
        reason = WORSE
    reason = reason or (None if _matched(kept, pair, rule) else LENGTHS)
    if reason:
        excluded[reason] += 1
    return reason is None


def _matched(kept: Sequence[Candidate], pair: Pair, rule: Rule) -> bool:
    """Whether the lengths of a pair differ by no more than is allowed."""
    if rule.length_matched is None:
        return True
    short, long = sorted(kept[place].n_tokens for place in pair)
    return long - short <= rule.length_matched * long


def _better_first(kept: Sequence[Candidate], pair: Pair) -> Pair:
    one, other = pair
    return (one, other) if kept[one].score > kept[other].score else (other, one)


def _record(kept: Sequence[Candidate], pairs: list[Pair]) -> dict | None:
    """A record of the responses that pairs use; SFT learns the best of them."""
    if not pairs:
        return None
    used = sorted({place for pair in pairs for place in pair})
    at = {place: number for number, place in enumerate(used)}
    best = max(used, key=lambda place: kept[place].score)
    return {
        "responses": [kept[place].text for place in used],
        "pairs": [[at[one], at[other]] for one, other in pairs],
        "sft_target": kept[best].text,
        "scores": [kept[place].score for place in used],
    }


# ---- other examples ----------------------------------------------------------------------------------------------------------


def _ranking(kept: Sequence[Candidate], rule: Rule, excluded: Counter) -> dict | None:
    """All responses from best to worst: of those with equal scores the first, and none closer than margin to a better one."""
    ranked: list[Candidate] = []
    for each in sorted(kept, key=lambda candidate: -candidate.score):
        difference = ranked[-1].score - each.score if ranked else None
        if difference is not None and (difference == 0 or difference < rule.margin):
            excluded[TIE if difference == 0 else CLOSE] += 1
        else:
            ranked.append(each)
    if len(ranked) < 2:
        return None
    texts, scores = [each.text for each in ranked], [each.score for each in ranked]
    return {"responses": texts, "pairs": [], "sft_target": texts[0], "scores": scores}


def _labeled(kept: Sequence[Candidate], rule: Rule, excluded: Counter) -> dict | None:
    """A label for each response: at or above the threshold, or above the median of them, which itself has no label."""
    if rule.threshold is not None:
        labels = [each.score >= rule.threshold and (each.ended or rule.truncated == "keep") for each in kept]
    elif len(kept) < 2:
        excluded[ONE] += 1
        return None
    elif len({each.score for each in kept}) == 1:
        excluded[ALL_TIED] += 1
        return None
    else:
        middle = median(each.score for each in kept)
        excluded[MIDDLE] += sum(each.score == middle for each in kept)
        kept = [each for each in kept if each.score != middle]
        labels = [each.score > middle for each in kept]
    if not kept:
        excluded[NONE] += 1
        return None
    best = max(kept, key=lambda candidate: candidate.score)
    texts, scores = [each.text for each in kept], [each.score for each in kept]
    target = best.text if any(labels) else None
    return {"responses": texts, "pairs": [], "sft_target": target, "scores": scores, "labels": labels}


def _best(kept: Sequence[Candidate], rule: Rule, excluded: Counter) -> dict | None:
    """The best response alone, the first of several."""
    best = max(kept, key=lambda candidate: candidate.score, default=None)
    if best is None:
        excluded[NONE] += 1
        return None
    if rule.threshold is not None and best.score < rule.threshold:
        excluded[LOW] += 1
        return None
    return {"responses": [best.text], "pairs": [], "sft_target": best.text, "scores": [best.score]}
