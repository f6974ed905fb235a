"""Scores from comparisons: which pairs are compared, and what win shares are, whatever the verdicts."""

from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preference_training.rounds.judges.base import JudgedInput, Score
from preference_training.rounds.judges.comparing import (
    ComparingJudge,
    Comparison,
    Outcome,
    chosen_pairs,
    ordered,
    win_share,
)

RESPONSES = st.lists(st.text(max_size=3), min_size=2, max_size=9, unique=True)


def inputs(responses, against=()) -> list[JudgedInput]:
    among = () if against else tuple(dict.fromkeys(responses))
    return [JudgedInput("Why?", response, {}, among, tuple(against)) for response in responses]


class ByKey(ComparingJudge):
    """The response with the higher key wins; asked: how often each pair was asked for."""

    def __init__(self, key, limit=None, missing=()):
        super().__init__("by key", "by key", limit)
        self.key, self.missing, self.asked = key, missing, Counter()

    def ask(self, comparisons):
        self.asked.update(comparisons)

    def recall(self, comparison):
        if comparison in self.missing:
            return Outcome(None, "malformed")
        one, other = self.key(comparison.first), self.key(comparison.second)
        return Outcome(0.5 if one == other else float(one > other), orders_disagree=one == other)


# ---- which pairs ------------------------------------------------------------------------------------------------------------


@given(RESPONSES, st.randoms())
def test_pairs_do_not_depend_on_the_order_of_the_responses(responses, random):
    shuffled = random.sample(responses, len(responses))
    for limit in (None, 1, 5):
        assert set(chosen_pairs(responses, limit)) == set(chosen_pairs(shuffled, limit))


@given(RESPONSES, st.integers(1, 40))
def test_a_limit_is_kept_and_every_two_are_compared_where_it_allows(responses, limit):
    every = {ordered(*pair) for pair in combinations(responses, 2)}
    found = chosen_pairs(responses, limit)
    assert len(found) == len(set(found)) == min(limit, len(every)) and set(found) <= every
    assert set(chosen_pairs(responses, None)) == every


@given(RESPONSES, st.integers(1, 4))
def test_after_whole_circles_each_response_has_as_many_comparisons_and_all_are_connected(responses, circles):
    number = len(responses)
    limit = circles * number
    if limit >= number * (number - 1) // 2:
        return
    pairs = chosen_pairs(responses, limit)
    assert set(Counter(text for pair in pairs for text in pair).values()) == {2 * circles}
    reached = {responses[0]}
    for _ in responses:
        reached |= {text for pair in pairs if reached & set(pair) for text in pair}
    assert reached == set(responses)


# ---- win shares ------------------------------------------------------------------------------------------------------------


@given(RESPONSES.flatmap(lambda some: st.tuples(st.just(some), st.permutations(some))), st.integers(1, 40))
def test_each_comparison_gives_one_win_in_all(orders, limit):
    """Wins are comparisons times shares; summed over the responses they are as many as there were comparisons."""
    responses, ranking = orders
    judge = ByKey(ranking.index, limit)
    scores = judge.judge(inputs(responses))
    counts = Counter(text for pair in chosen_pairs(responses, limit) for text in pair)
    wins = sum(score.value * counts[text] for text, score in zip(responses, scores, strict=True))
    assert wins == pytest.approx(min(limit, len(responses) * (len(responses) - 1) // 2))
    assert set(judge.asked.values()) <= {1}


@given(RESPONSES.flatmap(lambda some: st.tuples(st.just(some), st.permutations(some))))
def test_where_every_two_are_compared_an_order_comes_out_as_it_is(orders):
    """The response that beats k of n - 1 others has the share k / (n - 1)."""
    responses, ranking = orders
    scores = ByKey(ranking.index).judge(inputs(responses))
    assert [score.value for score in scores] == [ranking.index(text) / (len(responses) - 1) for text in responses]


@given(RESPONSES, st.integers(1, 40))
def test_opposite_verdicts_give_opposite_shares(responses, limit):
    def key(text):
        return len(text), text

    ranked = sorted(responses, key=key)
    one = ByKey(ranked.index, limit).judge(inputs(responses))
    other = ByKey(ranked[::-1].index, limit).judge(inputs(responses))
    assert [score.value for score in one] == pytest.approx(
        [1 - score.value if "nothing" not in score.reason else 0.5 for score in other]
    )


def test_a_win_share_by_hand():
    # a beats b, ties with c, loses to d.
    outcomes = {("a", "b"): 1.0, ("c", "a"): 0.5, ("d", "a"): 1.0}
    assert win_share("a", outcomes) == 1.5 / 3 and win_share("a", outcomes, ties=1) == 2 / 4
    assert win_share("b", outcomes) == 0 and win_share("e", outcomes) is None and win_share("e", {}, ties=2) == 0.5


def test_equal_responses_have_equal_scores_and_one_alone_has_nothing_to_be_compared_with():
    judge = ByKey(len)
    assert judge.judge(inputs(["a", "bb", "a"])) == [
        Score(0.0, "wins 0 of 1 comparisons"), Score(1.0, "wins 1 of 1 comparisons"), Score(0.0, "wins 0 of 1 comparisons"),
    ]  # fmt: skip
    assert judge.judge(inputs(["a", "a"])) == [Score(0.5, "nothing to compare it with")] * 2


def test_held_out_responses_are_compared_with_those_of_the_first_model_only():
    judge = ByKey(len)
    found = judge.judge(inputs(["bb", "c"], against=["a", "c", "ddd"]))
    # bb beats a and c, and loses to ddd; c ties with a, whose orders disagree then, and with itself unasked, and loses to ddd.
    assert found == [
        Score(2 / 3, "wins 2 of 3 comparisons"), Score(1 / 3, "wins 1 of 3 comparisons, in 1 the orders disagree"),
    ]  # fmt: skip
    asked = {frozenset({each.first, each.second}) for each in judge.asked}
    assert asked == set(map(frozenset, [("bb", "a"), ("bb", "c"), ("bb", "ddd"), ("c", "a"), ("c", "ddd")]))


def test_comparisons_without_a_verdict_do_not_count_and_are_said():
    missing = [Comparison("Why?", *ordered("a", "bb"))]
    judge = ByKey(len, missing=missing)
    assert judge.judge(inputs(["a", "bb", "ccc"]))[0] == Score(0.0, "wins 0 of 1 comparisons, 1 without a verdict")
    assert ByKey(len, missing=missing).judge(inputs(["a", "bb"]))[0] == Score(None, "malformed")
    assert judge.facts(inputs(["a", "bb", "ccc"])) == {
        "comparisons": 3, "unanswered": 1, "in_both_orders": 2, "orders_disagree": 0, "order_disagreement": 0.0,
    }  # fmt: skip
