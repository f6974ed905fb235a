"""What a loss trains on of a record: targets, pairs with margins, rankings, labeled responses; and what is skipped."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preference_training.data.records.record import PreferenceRecord
from preference_training.data.records.report import DataReport
from preference_training.data.rows.examples import (
    ALL_TIED,
    MARGIN_NOT_POSITIVE,
    NO_LABELS,
    NO_MARGIN,
    NO_PAIR_TO_COMPARE,
    NO_RANKING,
    OUTVOTED,
    PREFERRED_AND_NOT,
    TIED,
    UNDESIRABLE,
    UNLABELED,
    UNSCORED,
    WEIGHTS_OF_PAIRS,
    Selected,
    select,
)


def record(pairs=(), responses="abcd", **more) -> PreferenceRecord:
    return PreferenceRecord("p", list(responses), list(pairs), "a", 1, "mine, train prompt 1", **more)


def selected(given: PreferenceRecord, kind: str, margins: str = "unread") -> tuple[list[Selected], DataReport]:
    report = DataReport()
    return list(select(given, kind, margins, report)), report


def only(given: PreferenceRecord, kind: str, margins: str = "unread") -> Selected:
    [found], report = selected(given, kind, margins)
    assert report == DataReport()
    return found


# ---- targets and pairs ----------------------------------------------------------------------------------------------------


def test_each_target_is_an_example_of_its_own_but_not_one_that_is_labeled_undesirable():
    given = record(sft_targets=("a", "b", "x"), labels=[True, False, False, None])
    found, report = selected(given, "targets")
    assert found == [Selected(["a"], []), Selected(["x"], [])]
    assert report.left_out == {UNDESIRABLE: 1}


@pytest.mark.parametrize(
    ("pairs", "learned"),
    [
        ([(0, 1), (1, 0)], []),
        ([(0, 1), (1, 0), (0, 1)], ["a", "a"]),
        ([(0, 1), (1, 0), (1, 0)], ["b", "b"]),
        # b is worse than a and better than c, on which all agree.
        ([(0, 1), (1, 2)], ["a", "b"]),
    ],
)
def test_of_two_responses_that_are_preferred_to_each_other_sft_learns_the_majoritys(pairs, learned):
    targets = tuple("abc"[preferred] for preferred, _ in pairs)
    found, report = selected(record(pairs, responses="abc", sft_targets=targets), "targets")
    assert found == [Selected([text], []) for text in learned]
    assert report.left_out.get(OUTVOTED, 0) == len(pairs) - len(learned)


def test_pairs_keep_their_weights_and_only_the_responses_that_they_use():
    found = only(record([(3, 1), (3, 0)], weights=[0.5, 2.0]), "pairs")
    assert found == Selected(["a", "b", "d"], [(2, 1), (2, 0)], weights=[0.5, 2.0])
    # A loss that reads no margins gets none, so that its data is the same with and without them.
    assert only(record([(0, 1)], margins=[3.0], scores=[1, 2, 3, 4]), "pairs") == Selected(["a", "b"], [(0, 1)])


def test_a_prompt_without_a_pair_is_counted():
    found, report = selected(record(), "pairs")
    assert (found, report.left_out) == ([], {NO_PAIR_TO_COMPARE: 1})


def test_the_margin_of_a_pair_is_the_given_one_else_the_difference_of_the_scores():
    pairs, scores = [(0, 1), (2, 1)], [5, 1.5, 2, None]
    # 5 - 1.5 and 2 - 1.5.
    assert only(record(pairs, scores=scores), "pairs", margins="required").margins == [3.5, 0.5]
    assert only(record(pairs, scores=scores, margins=[1, 7.0]), "pairs", margins="required").margins == [1.0, 7.0]


def test_a_loss_that_reads_margins_gets_those_of_the_data_and_0_for_a_pair_without():
    pairs = [(0, 1), (2, 1)]
    assert only(record(pairs, margins=[1.5, None], weights=[1, 2]), "pairs", "optional") == Selected(
        ["a", "b", "c"], pairs, weights=[1, 2], margins=[1.5, 0.0]
    )
    # Scores are no margin that anybody gave.
    for without in (record(pairs, scores=[5, 1, 2, 0]), record(pairs, margins=[None, None]), record(pairs)):
        assert only(without, "pairs", "optional") == Selected(["a", "b", "c"], pairs)


@pytest.mark.parametrize("scores", [[5, None, 4, 1], [5, float("inf"), 4, 1]])
def test_a_pair_without_a_finite_margin_is_skipped_with_its_weight_and_counted(scores):
    found, report = selected(record([(1, 0), (2, 3), (0, 2)], scores=scores, weights=[1, 2, 3]), "pairs", margins="required")
    assert found == [Selected(["a", "c", "d"], [(1, 2), (0, 1)], weights=[2, 3], margins=[3.0, 1.0])]
    assert report.left_out == {NO_MARGIN: 1}
    found, report = selected(record([(0, 1)]), "pairs", margins="required")
    assert (found, report.left_out) == ([], {NO_MARGIN: 1})


def test_a_pair_whose_margin_has_no_logarithm_is_skipped_and_counted_where_the_loss_takes_one():
    given = record([(0, 1), (1, 2), (0, 2)], margins=[0, 2.0, -1.0])
    found, report = selected(given, "pairs", margins="positive")
    assert found == [Selected(["b", "c"], [(0, 1)], margins=[2.0])]
    assert report.left_out == {MARGIN_NOT_POSITIVE: 2}
    assert only(given, "pairs", margins="required").margins == [0, 2.0, -1.0]


@pytest.mark.parametrize("kind", ["pairs", "rankings"])
def test_a_prompt_whose_responses_all_have_one_score_is_skipped_with_that_reason(kind):
    found, report = selected(record([], scores=[1, 1, None, 1]), kind)
    assert (found, report.left_out) == ([], {ALL_TIED: 1})


# ---- rankings -------------------------------------------------------------------------------------------------------------


def test_scores_give_a_ranking_from_best_to_worst():
    assert only(record(scores=[2, 7, -1, 3.5]), "rankings") == Selected(["a", "b", "c", "d"], [(1, 3, 0, 2)])


@pytest.mark.parametrize("scores", [[None] * 4, [None, 3, None, None]])
def test_pairs_rank_responses_of_which_fewer_than_two_have_scores(scores):
    assert only(record([(1, 0), (0, 2), (1, 2)], scores=scores), "rankings") == Selected(["a", "b", "c"], [(1, 0, 2)])


def test_tied_and_unscored_responses_leave_the_ranking_and_are_counted():
    found, report = selected(record(scores=[2, None, 2, 3]), "rankings")
    assert found == [Selected(["a", "d"], [(1, 0)])]
    assert report.left_out == {TIED: 1, UNSCORED: 1}


@given(order=st.permutations(range(4)), data=st.data())
def test_pairs_of_every_two_responses_give_their_ranking_in_any_order(order, data):
    pairs = data.draw(st.permutations(list(combinations(order, 2))))
    assert only(record(pairs), "rankings").examples == [tuple(order)]


@pytest.mark.parametrize(
    "given",
    [
        record(),
        # c and a are not compared; three in a circle; both directions of one pair.
        record([(0, 1), (1, 2)]),
        record([(0, 1), (1, 2), (2, 0)]),
        record([(0, 1), (1, 0)]),
        record(scores=[1, None, None, None]),
    ],
)
def test_a_prompt_without_a_ranking_of_its_responses_is_skipped_and_counted(given):
    found, report = selected(given, "rankings")
    assert found == [] and report.left_out[NO_RANKING] == 1


def test_one_pair_is_a_ranking_of_two():
    assert only(record([(2, 0)]), "rankings") == Selected(["a", "c"], [(1, 0)])


# ---- labels ---------------------------------------------------------------------------------------------------------------


def test_each_labeled_response_is_an_example_and_the_others_are_counted():
    found, report = selected(record(labels=[False, None, True, True]), "labels")
    assert found == [Selected(["a", "c", "d"], [(0,), (1,), (2,)], labels=[0.0, 1.0, 1.0])]
    assert report.left_out == {UNLABELED: 1}


def test_of_pairs_the_preferred_responses_are_desirable_and_the_others_not():
    found, report = selected(record([(1, 0), (1, 2), (2, 3)]), "labels")
    # c is better than d and worse than b.
    assert found == [Selected(["a", "b", "d"], [(0,), (1,), (2,)], labels=[0.0, 1.0, 0.0])]
    assert report.left_out == {PREFERRED_AND_NOT: 1}


@pytest.mark.parametrize("given", [record(), record(labels=[None] * 4), record([(0, 1), (1, 0)])])
def test_a_prompt_without_labels_is_skipped_and_counted(given):
    found, report = selected(given, "labels")
    assert found == [] and report.left_out[NO_LABELS] == 1


@pytest.mark.parametrize("kind", ["rankings", "labels"])
def test_weights_of_pairs_are_said_to_have_no_effect_where_no_pairs_are_compared(kind):
    [found], report = selected(record([(0, 1)], weights=[2.0]), kind)
    assert found.weights is None and report.notes == [WEIGHTS_OF_PAIRS]
