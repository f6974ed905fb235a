"""The part of the store that counts: progress, agreement of people with each other and with judges, and disagreements."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from itertools import combinations

import krippendorff
import numpy

from preference_collection.store.judgments import Judgments
from preference_collection.store.priorities import DISAGREEMENTS, DISPUTED, NEWEST_VERDICTS

PROGRESS = """
    SELECT (SELECT count(*) FROM tasks), (SELECT count(*) FROM comparisons), count(DISTINCT comparison), count(*),
        count(*) FILTER (labeler = $labeler), count(DISTINCT labeler) FROM standing"""
PROGRESS_BY_LABELER = """
    SELECT labeler, count(*) FILTER (NOT settles), count(*) FILTER (choice = 'skip'), count(*) FILTER (settles),
        count(*) FILTER (moment >= $since), median(seconds) FILTER (NOT settles)
    FROM standing GROUP BY labeler ORDER BY 2 DESC, labeler"""
LABELERS = "SELECT DISTINCT labeler FROM judgments ORDER BY labeler"
FINISHED = """
    SELECT count(*) FROM (SELECT comparison FROM standing WHERE choice <> 'skip' GROUP BY comparison
        HAVING bool_or(settles) OR count(*) >= $overlap)"""

OPINIONS = """
    SELECT comparison, labeler, choice, ranks, len(answers) FROM standing JOIN comparisons ON comparisons.id = comparison
    WHERE choice <> 'skip' AND NOT settles ORDER BY standing.number"""
VERDICTS = f"SELECT comparison, judge, ranks FROM ({NEWEST_VERDICTS}) ORDER BY judge"
DISPUTES = f"""SELECT found.comparison FROM ({DISAGREEMENTS}) found JOIN comparisons ON comparisons.id = found.comparison
    LEFT JOIN ({DISPUTED}) disputed ON disputed.comparison = found.comparison ORDER BY priority NULLS LAST, number"""


@dataclass(frozen=True)
class Progress:
    """Progress counts. judgments counts the current ones, and mine those of one labeler."""

    tasks: int
    comparisons: int
    judged_comparisons: int
    judgments: int
    mine: int
    labelers: int


@dataclass(frozen=True)
class LabelerProgress:
    """What one labeler has done: judgments with the skips among them, disagreements settled, and of all these those of today.

    median_seconds is the time that a judgment took, None if it was never measured.
    """

    labeler: str
    judgments: int
    skips: int
    settled: int
    today: int
    median_seconds: float | None


@dataclass(frozen=True)
class Agreement:
    """Agreement on comparisons that several have judged, without skips and without what settles.

    judged counts these comparisons; compared counts each two opinions about the same two answers, and agreed those that are the
    same. alpha is Krippendorff's for nominal data (1 agreement, 0 chance); None if all opinions are the same.
    """

    judged: int
    compared: int
    agreed: int
    alpha: float | None

    @property
    def share(self) -> float | None:
        """The share of the same opinions, from 0 to 1; None if nothing was compared."""
        return self.agreed / self.compared if self.compared else None


@dataclass(frozen=True)
class AgreementOfTwo:
    """The agreement of two labelers, or of a judge (one) with all labelers (other is "")."""

    one: str
    other: str
    agreement: Agreement


# What one rater says of a comparison: an opinion about each two of its answers.
Opinions = tuple[str, ...]


@lru_cache(maxsize=1024)
def opinions_of(choice: str, ranks: tuple[int, ...], n: int) -> Opinions:
    """What a judgment of n answers says about each two of them: "first", "second", "tie" or "bad".

    A ranking says as much as judgments of all n (n - 1) / 2 pairs, and answers of equal rank are a tie. So rankings are
    compared by the preferences in them, which is also what training reads.
    """
    pairs = list(combinations(range(n), 2))
    if choice != "ranked":
        return (choice,) * len(pairs)
    return tuple("tie" if ranks[i] == ranks[j] else "first" if ranks[i] < ranks[j] else "second" for i, j in pairs)


def agreement_of(comparisons: Iterable[Sequence[Opinions]]) -> Agreement:
    """Agreement, from the opinions of all raters of each comparison. A comparison with a single rater says nothing."""
    comparisons = [raters for raters in comparisons if len(raters) > 1]
    # Among thousands of pairs of answers there are few different sets of opinions.
    units = Counter(tuple(sorted(opinions)) for raters in comparisons for opinions in zip(*raters, strict=True))
    kinds = sorted({kind for opinions in units for kind in opinions})
    votes = numpy.array([[opinions.count(kind) for kind in kinds] for opinions in units]).reshape(len(units), len(kinds))
    times = numpy.array(list(units.values()), dtype=int)
    same = int(times @ _pairs(votes).sum(1))
    compared = int(times @ _pairs(votes.sum(1)))
    alpha = None
    if len(kinds) > 1:
        alpha = float(krippendorff.alpha(value_counts=votes.repeat(times, 0), level_of_measurement="nominal"))
    return Agreement(len(comparisons), compared, same, alpha)


def _pairs(number: numpy.ndarray) -> numpy.ndarray:
    """How many pairs some things form."""
    return number * (number - 1) // 2


class Statistics(Judgments):
    """Counts of what was judged."""

    def progress(self, labeler: str = "") -> Progress:
        """The progress counts."""
        return Progress(*self._row(PROGRESS, {"labeler": labeler}))

    def progress_by_labeler(self, since: datetime | None = None) -> list[LabelerProgress]:
        """What each labeler has done, whoever judged most first. since: when today began, in UTC; else this machine's."""
        return [LabelerProgress(*row) for row in self._rows(PROGRESS_BY_LABELER, {"since": since or midnight()})]

    def labelers(self) -> list[str]:
        """The names of all who ever judged, in order."""
        return [name for (name,) in self._rows(LABELERS)]

    def finished(self, overlap: int) -> int:
        """How many comparisons have as many judgments as they need, without skips, or were settled."""
        return self._row(FINISHED, {"overlap": overlap})[0]

    # ---- agreement ----------------------------------------------------------------------------------------------------------

    def agreement(self) -> Agreement:
        """The agreement of all labelers with each other."""
        return agreement_of([list(raters.values()) for raters in self._opinions().values()])

    def agreement_by_pair(self) -> list[AgreementOfTwo]:
        """The agreement of each two labelers who judged the same comparisons, those with the most in common first."""
        common: dict[tuple[str, str], list] = defaultdict(list)
        for raters in self._opinions().values():
            for one, other in combinations(sorted(raters), 2):
                common[one, other].append((raters[one], raters[other]))
        found = [AgreementOfTwo(*two, agreement_of(comparisons)) for two, comparisons in common.items()]
        return sorted(found, key=lambda each: (-each.agreement.judged, each.one, each.other))

    def agreement_with_judges(self) -> list[AgreementOfTwo]:
        """The agreement of each model judge with people: each of them who judged the same is compared with it.

        A judge does not say that answers are bad: what people find equally bad is a tie here.
        """
        people = self._opinions()
        common: dict[str, list] = defaultdict(list)
        for comparison, judge, ranks in self._rows(VERDICTS):
            verdict = opinions_of("ranked", tuple(ranks), len(ranks))
            for opinions in people.get(comparison, {}).values():
                common[judge].append((verdict, tuple("tie" if opinion == "bad" else opinion for opinion in opinions)))
        return [AgreementOfTwo(judge, "", agreement_of(comparisons)) for judge, comparisons in common.items()]

    def disagreements(self) -> list[str]:
        """The ids of the comparisons on which labelers disagree and that nobody has settled, the most disputed first."""
        return [id for (id,) in self._rows(DISPUTES)]

    def _opinions(self) -> dict[str, dict[str, Opinions]]:
        """By comparison and labeler."""
        found: dict[str, dict[str, Opinions]] = {}
        for comparison, labeler, choice, ranks, n in self._rows(OPINIONS):
            found.setdefault(comparison, {})[labeler] = opinions_of(choice, tuple(ranks or ()), n)
        return found


def midnight() -> datetime:
    """When today began on this machine, in UTC, for DuckDB's TIMESTAMP."""
    begun = datetime.now().astimezone().replace(hour=0, minute=0, second=0, microsecond=0)
    return begun.astimezone(UTC).replace(tzinfo=None)
