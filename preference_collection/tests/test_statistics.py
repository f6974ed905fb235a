"""Agreement is what its definition says, progress is counted per labeler, and disagreements wait until they are settled."""

from datetime import UTC, timedelta
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preference_collection.store.model import Verdict
from preference_collection.store.schema import now
from preference_collection.store.statistics import LabelerProgress, agreement_of, midnight, opinions_of
from preference_collection.tests.conftest import a_comparison, a_judgment, a_task


def with_judgments(store, *judgments: dict, texts: str = "ab") -> list[str]:
    """A comparison for each dict of what labelers say about it; their ids."""
    store.add_tasks([a_task()])
    comparisons = [a_comparison(texts=texts, id=f"c{index}") for index in range(len(judgments))]
    told = [
        a_judgment(comparison, said, labeler, id=f"{comparison.id} {labeler}")
        for comparison, by_labeler in zip(comparisons, judgments, strict=True)
        for labeler, said in by_labeler.items()
    ]
    store.add_comparisons(comparisons, told)
    return [comparison.id for comparison in comparisons]


def two_answers(units: list[str]) -> list[list[tuple[str]]]:
    """Comparisons of two answers: each letter is the opinion of one rater."""
    return [[(opinion,) for opinion in unit] for unit in units]


# ---- agreement --------------------------------------------------------------------------------------------------------------


def test_agreement_is_krippendorffs_alpha():
    # Two labelers, four units, (a a) (a a) (b b) (a b): 8 values, 5 a and 3 b. D_o = 2/8: the one unit that disagrees has
    # (4 - 1 - 1) / 1 = 2. D_e = (64 - 25 - 9) / (8 * 7) = 30/56. alpha = 1 - (1/4) / (30/56) = 1 - 7/15.
    found = agreement_of(two_answers(["aa", "aa", "bb", "ab"]))
    assert (found.judged, found.compared, found.agreed, found.share) == (4, 4, 3, 0.75)
    assert found.alpha == pytest.approx(8 / 15)
    # Three labelers of one pair, two of a kind: one of three comparisons agrees.
    assert agreement_of(two_answers(["aab"])).agreed == 1
    assert agreement_of(two_answers(["aaa", "a"])).alpha is None
    assert agreement_of([]).compared == 0 and agreement_of([]).share is None


@given(st.lists(st.text("abc", max_size=4), max_size=8))
def test_alpha_is_what_its_definition_says_for_any_opinions(units):
    """Observed over expected disagreement, as the mean over pairs of values (Krippendorff 2011, section C)."""
    found = agreement_of(two_answers(units))
    units = [unit for unit in units if len(unit) > 1]
    values = "".join(units)
    observed = sum(2 * sum(a != b for a, b in combinations(unit, 2)) / (len(unit) - 1) for unit in units)
    expected = 2 * sum(a != b for a, b in combinations(values, 2))
    if expected == 0:
        assert found.alpha is None
    else:
        assert found.alpha == pytest.approx(1 - (len(values) - 1) * observed / expected)
    assert found.compared == sum(len(unit) * (len(unit) - 1) // 2 for unit in units) and found.judged == len(units)


def test_a_ranking_is_an_opinion_about_each_two_answers():
    assert opinions_of("ranked", (2, 1, 2), 3) == ("second", "tie", "first")
    assert opinions_of("ranked", (1, 2), 2) == ("first",) and opinions_of("bad", (), 3) == ("bad", "bad", "bad")
    # Of the three pairs of a, b and c in the orders abc and acb only the last differs.
    found = agreement_of([[opinions_of("ranked", ranks, 3) for ranks in ((1, 2, 3), (1, 3, 2))]])
    assert (found.judged, found.compared, found.agreed) == (1, 3, 2)


def test_agreement_ignores_skips_single_judgments_and_what_settles(store):
    with_judgments(store, {"ada": 0, "bob": 0, "eve": "skip"}, {"ada": "tie", "bob": 1}, {"ada": 0})
    store.judge(a_judgment(store.comparison("c1"), 1, "ada", settles=True))
    store.judge(a_judgment(store.comparison("c2"), 1, "bob", settles=True))
    found = store.agreement()
    assert (found.judged, found.compared, found.agreed) == (2, 2, 1)


def test_agreement_is_told_of_each_two_labelers_and_of_each_judge_with_people(store):
    with_judgments(store, {"ada": 0, "bob": 0}, {"bob": 1, "ada": 0, "eve": 1}, {"ada": "bad"}, {"eve": "skip"})
    both = {(each.one, each.other): (each.agreement.agreed, each.agreement.compared) for each in store.agreement_by_pair()}
    assert list(both.items()) == [(("ada", "bob"), (1, 2)), (("ada", "eve"), (0, 1)), (("bob", "eve"), (1, 1))]
    assert store.agreement_with_judges() == []
    # The judge agrees with both on c0, with bob and eve but not with ada on c1, and with ada on c2, where both are bad to her.
    told = {"c0": (1, 2), "c1": (2, 1), "c2": (1, 1), "c3": (1, 2)}
    store.add_verdicts([Verdict(id, "judge", ranks, "", {}) for id, ranks in told.items()])
    [found] = store.agreement_with_judges()
    assert (found.one, found.other, found.agreement.agreed, found.agreement.compared) == ("judge", "", 5, 6)
    assert store.agreement().compared == 4, "a judge is none of the people"


# ---- disagreements ----------------------------------------------------------------------------------------------------------


def test_disagreements_are_listed_until_they_are_settled_the_most_disputed_first(store):
    with_judgments(store, {"ada": 0, "bob": 0}, {"ada": 0, "bob": "tie"}, {"ada": 0, "bob": 1}, {"ada": 1, "bob": "skip"})
    assert store.disagreements() == ["c2", "c1"]
    store.judge(a_judgment(store.comparison("c2"), 0, "eve", settles=True))
    assert store.disagreements() == ["c1"]
    store.undo("eve")
    assert store.disagreements() == ["c2", "c1"]


# ---- progress ---------------------------------------------------------------------------------------------------------------


def test_progress_is_told_of_each_labeler(store):
    with_judgments(store, {}, {}, {}, {})
    comparisons = list(store.comparisons())
    for comparison, seconds in zip(comparisons, (2.0, 30.0, 4.0), strict=False):
        store.judge(a_judgment(comparison, 0, "ada", seconds=seconds))
    store.judge(a_judgment(comparisons[3], "skip", "ada"))
    store.judge(a_judgment(comparisons[0], 1, "bob"))
    store.judge(a_judgment(comparisons[0], 1, "bob", settles=True, seconds=50.0))
    assert store.progress_by_labeler() == [
        LabelerProgress("ada", judgments=4, skips=1, settled=0, today=4, median_seconds=4.0),
        LabelerProgress("bob", judgments=1, skips=0, settled=1, today=2, median_seconds=None),
    ]
    tomorrow = now() + timedelta(days=1)
    assert [each.today for each in store.progress_by_labeler(tomorrow)] == [0, 0]
    store.undo("bob")
    assert store.progress_by_labeler()[1].settled == 0


def test_today_begins_at_this_machines_midnight():
    assert timedelta(0) <= now() - midnight() < timedelta(hours=25)
    local = midnight().replace(tzinfo=UTC).astimezone()
    assert (local.hour, local.minute, local.second) == (0, 0, 0)


def test_a_comparison_is_finished_with_enough_judgments_or_when_it_is_settled(store):
    with_judgments(store, {"ada": 0, "bob": 1}, {"ada": 0, "bob": "skip"}, {"ada": 0}, {})
    assert [store.finished(overlap) for overlap in (1, 2, 3)] == [3, 1, 0]
    store.judge(a_judgment(store.comparison("c3"), 0, "eve", settles=True))
    assert [store.finished(overlap) for overlap in (1, 2, 3)] == [4, 2, 1]
