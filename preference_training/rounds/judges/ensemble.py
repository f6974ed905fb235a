"""Several judges as one: the weighted mean of their scores, each as it is or as z-scores of the responses to a prompt."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, pstdev
from typing import Any

from preference_training.core.values import hash_values
from preference_training.rounds.judges.base import Judge, JudgedInput, Score
from preference_training.rounds.judges.verdicts import Verdicts
from preference_training.rounds.prompts import as_json


@dataclass(frozen=True)
class Member:
    """A judge of an ensemble. is_normalized: whether its scores become z-scores per prompt."""

    judge: Judge
    weight: float = 1.0
    is_normalized: bool = True


def z_score(value: float, values: Sequence[float]) -> float:
    """How many standard deviations a value lies above the mean of all; 0 where they are equal."""
    deviation = pstdev(values) if len(values) > 1 else 0.0
    # Equal scores may differ by rounding.
    scale = max(map(abs, values), default=0.0)
    return (value - fmean(values)) / deviation if deviation > 1e-12 * scale else 0.0


class EnsembleJudge(Judge):
    """The weighted mean of the members' scores. What one of them cannot judge is not judged.

    verdicts: where the members' own scores are kept. Z-scores are among the responses to a prompt; those of a held-out
    response are among it and those of the model before the first round.
    """

    def __init__(self, members: Sequence[Member], verdicts: Verdicts):
        self.members, self.verdicts = members, verdicts
        self.name = " + ".join(member.judge.name for member in members)
        self.identity = f"ensemble {hash_values([[each.judge.identity, each.weight, each.is_normalized] for each in members])}"
        self.compares = any(member.is_normalized or member.judge.compares for member in members)

    def judge(self, samples: Sequence[JudgedInput]) -> list[Score]:
        """The score of each response. Raises what the members raise."""
        for member in self.members:
            self.verdicts.ask(member.judge, self._asked(member, samples))
        return [self._score(sample) for sample in samples]

    def _asked(self, member: Member, samples: Sequence[JudgedInput]) -> list[JudgedInput]:
        return [each for sample in samples for each in (_group(sample) if member.is_normalized else [sample])]

    def _score(self, sample: JudgedInput) -> Score:
        total, reasons = 0.0, []
        for member in self.members:
            [score] = self.verdicts.scores(member.judge, [sample])
            if score.value is None:
                return Score(None, f"{member.judge.name}: {score.reason or 'cannot judge it'}")
            value = self._normalized(member, sample, score.value)
            total += member.weight * value
            reasons.append(f"{member.judge.name} {value:.3g}" + f" ({score.reason})" * bool(score.reason))
        return Score(total / sum(member.weight for member in self.members), "; ".join(reasons))

    def _normalized(self, member: Member, sample: JudgedInput, value: float) -> float:
        if not member.is_normalized:
            return value
        scores = self.verdicts.scores(member.judge, _group(sample))
        return z_score(value, [score.value for score in scores if score.value is not None])

    def facts(self, samples: Sequence[JudgedInput]) -> dict[str, Any]:
        """members: the facts and the mean score of each.

        disagreement: of the pairs of responses to a prompt that two members both order, the share that they order differently;
        None without such pairs.
        """
        members = {}
        for number, member in enumerate(self.members, start=1):
            values = [score.value for score in self.verdicts.scores(member.judge, samples) if score.value is not None]
            facts = {"mean_score": fmean(values) if values else None, **member.judge.facts(samples)}
            members[f"{number}: {member.judge.name}"] = facts
        return {"members": members, "disagreement": self._disagreement(samples)}

    def _disagreement(self, samples: Sequence[JudgedInput]) -> float | None:
        groups: dict[str, list[list[float | None]]] = defaultdict(list)
        columns = [[score.value for score in self.verdicts.scores(each.judge, samples)] for each in self.members]
        for sample, *values in zip(samples, *columns, strict=True):
            groups[as_json(sample.prompt)].append(list(values))
        ordered = opposed = 0
        for rows in groups.values():
            for one, other in combinations(rows, 2):
                signs = [_sign(a, b) for a, b in zip(one, other, strict=True)]
                for x, y in combinations(signs, 2):
                    ordered += bool(x * y)
                    opposed += x * y < 0
        return opposed / ordered if ordered else None

    def close(self) -> None:
        """Close the members."""
        for member in self.members:
            member.judge.close()


def _group(sample: JudgedInput) -> list[JudgedInput]:
    """A response and those that its z-scores are among, as inputs of a judge: the first is the response itself."""
    texts = dict.fromkeys((sample.response, *(sample.against or sample.among)))
    return [sample if text == sample.response else sample._replace(response=text) for text in texts]


def _sign(one: float | None, other: float | None) -> int:
    return 0 if one is None or other is None else (one > other) - (one < other)
