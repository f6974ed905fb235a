"""The part of the store that counts: progress, and agreement between labelers."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import krippendorff
import numpy

from preference_collection.store.judgments import Judgments

PROGRESS = """
    SELECT (SELECT count(*) FROM tasks), (SELECT count(*) FROM comparisons), (SELECT count(DISTINCT comparison) FROM standing),
        (SELECT count(*) FROM standing), (SELECT count(*) FROM standing WHERE labeler = $labeler),
        (SELECT count(DISTINCT labeler) FROM standing)"""

OPINIONS = """SELECT comparison, labeler, choice, ranks FROM standing WHERE choice <> 'skip' AND NOT settles
    QUALIFY count(*) OVER (PARTITION BY comparison) > 1 ORDER BY number"""


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
class Agreement:
    """Agreement between labelers on comparisons that several have judged, without skips.

    judged counts these comparisons; compared counts pairs of labelers on the same two answers, and agreed those of the same
    opinion. alpha is Krippendorff's for nominal data (1 agreement, 0 chance); None if all opinions are the same.
    """

    judged: int
    compared: int
    agreed: int
    alpha: float | None


def opinions_of(choice: str, ranks: tuple[int, ...] | None, n: int) -> list[str]:
    """What a judgment of n answers says about each two of them: "first", "second", "tie" or "bad".

    A ranking of n answers says as much as judgments of all n (n - 1) / 2 pairs; answers of equal rank are a tie.
    """
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    if choice != "ranked":
        return [choice for _ in pairs]
    return ["tie" if ranks[i] == ranks[j] else "first" if ranks[i] < ranks[j] else "second" for i, j in pairs]


def agreement_of(units: Iterable[Iterable[str]], judged: int | None = None) -> Agreement:
    """Agreement, from the opinions about each unit, one of each labeler. Units with a single opinion say nothing."""
    votes = [Counter(opinions) for opinions in units]
    votes = [counts for counts in votes if counts.total() > 1]
    kinds = sorted({kind for counts in votes for kind in counts})
    same = sum(n * (n - 1) // 2 for counts in votes for n in counts.values())
    compared = sum(counts.total() * (counts.total() - 1) // 2 for counts in votes)
    alpha = None
    if len(kinds) > 1:
        table = numpy.array([[counts[kind] for kind in kinds] for counts in votes])
        alpha = float(krippendorff.alpha(value_counts=table, level_of_measurement="nominal"))
    return Agreement(len(votes) if judged is None else judged, compared, same, alpha)


class Statistics(Judgments):
    """Counts of what was judged."""

    def progress(self, labeler: str = "") -> Progress:
        """The progress counts."""
        return Progress(*self._row(PROGRESS, {"labeler": labeler}))

    def agreement(self) -> Agreement:
        """The agreement between labelers."""
        units: dict[tuple[str, int], list[str]] = {}
        sizes = self._sizes()
        rows = self._rows(OPINIONS)
        for comparison, _, choice, ranks in rows:
            for place, opinion in enumerate(opinions_of(choice, ranks, sizes[comparison])):
                units.setdefault((comparison, place), []).append(opinion)
        return agreement_of(units.values(), len({row[0] for row in rows}))

    def _sizes(self) -> dict[str, int]:
        return dict(self._rows("SELECT id, len(answers) FROM comparisons"))
