"""What is made of the scored responses to a prompt, by hand and for any scores."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preference_training.rounds.pairing import (
    ALL_TIED,
    CLOSE,
    DUPLICATE,
    EMPTY,
    LENGTHS,
    LOW,
    MIDDLE,
    NO_PAIR,
    NONE,
    NOT_ENDED,
    ONE,
    TIE,
    TRUNCATED,
    UNJUDGED,
    WORSE,
    Candidate,
    Rule,
    pair,
)


def scored(*scores, lengths=None) -> list[Candidate]:
    """Responses A, B, C, ... with these scores."""
    lengths = lengths or [10] * len(scores)
    return [Candidate(chr(65 + k), score, length) for k, (score, length) in enumerate(zip(scores, lengths, strict=True))]


def texts_of_pairs(record: dict) -> list[str]:
    """Pairs as "better > worse", in their order."""
    return [f"{record['responses'][one]}>{record['responses'][other]}" for one, other in record["pairs"]]


# ---- pairs ----------------------------------------------------------------------------------------------------------------


def test_best_and_worst_are_one_pair_and_two_responses():
    found = pair(scored(2, 5, 1, 3), Rule("best_worst"))
    assert found.record == {"responses": ["B", "C"], "pairs": [[0, 1]], "sft_target": "B", "scores": [5, 1]}
    assert not found.excluded


def test_of_several_widest_pairs_the_first_is_taken():
    assert texts_of_pairs(pair(scored(1, 1, 0, 0), Rule("best_worst")).record) == ["A>C"]


def test_all_pairs_of_eight_responses_hold_each_response_once():
    record = pair(scored(*range(8)), Rule("all")).record
    assert len(record["pairs"]) == 8 * 7 // 2
    assert sorted(record["responses"]) == list("ABCDEFGH")


@pytest.mark.parametrize("pairs", ["all", "top_k"])
def test_the_chosen_response_of_a_pair_has_to_reach_the_threshold(pairs):
    # Of the pairs with different scores, B and D (0.5 and 0) have no response that reaches 1.
    found = pair(scored(1, 0.5, 1, 0), Rule(pairs, threshold=1, top_k=4))
    assert sorted(texts_of_pairs(found.record)) == ["A>B", "A>D", "C>B", "C>D"]
    assert found.excluded == {TIE: 1, WORSE: 1}


def test_without_a_response_that_reaches_the_threshold_there_is_no_pair():
    found = pair(scored(0.5, 0), Rule("best_worst", threshold=1))
    assert (found.record, found.excluded) == (None, {WORSE: 1, NO_PAIR: 1})


def test_equal_scores_are_no_pair_and_are_counted():
    found = pair(scored(1, 1, 0), Rule("all"))
    assert (texts_of_pairs(found.record), found.excluded) == (["A>C", "B>C"], {TIE: 1})


def test_a_pair_needs_the_margin_and_has_it_where_the_scores_differ_by_just_that():
    found = pair(scored(0, 1, 3), Rule("all", margin=2))
    assert (texts_of_pairs(found.record), found.excluded) == (["C>A", "C>B"], {CLOSE: 1})


def test_the_two_best_are_each_paired_with_the_two_worst():
    # From best to worst: A 5, B 4, C 3, D 2, E 1.
    assert texts_of_pairs(pair(scored(5, 4, 3, 2, 1), Rule("top_k", top_k=2)).record) == ["A>E", "A>D", "B>E", "B>D"]


def test_of_three_responses_the_two_best_and_worst_overlap_and_no_pair_comes_twice():
    # The best are A and B, the worst are C and B.
    assert texts_of_pairs(pair(scored(3, 2, 1), Rule("top_k", top_k=2)).record) == ["A>C", "A>B", "B>C"]


def test_responses_of_other_lengths_are_not_paired_and_the_widest_pair_of_what_is_left_is():
    # A is 10 tokens and B 30: 20 of 30 is more than a half. C is 12: 2 of 12 is not.
    candidates = scored(0, 9, 1, lengths=[10, 30, 12])
    found = pair(candidates, Rule("best_worst", length_matched=0.5))
    assert (texts_of_pairs(found.record), found.excluded) == (["C>A"], {LENGTHS: 2})
    assert texts_of_pairs(pair(candidates, Rule("best_worst")).record) == ["B>A"]


def test_a_prompt_of_which_the_margin_leaves_nothing_is_counted():
    found = pair(scored(0, 1), Rule("best_worst", margin=5))
    assert (found.record, found.excluded) == (None, {CLOSE: 1, NO_PAIR: 1})


@pytest.mark.parametrize("rule", ["best_worst", "all", "top_k", "ranking"])
def test_a_prompt_whose_scores_are_all_equal_gives_nothing(rule):
    found = pair(scored(1, 1, 1), Rule(rule))
    assert (found.record, found.excluded) == (None, {TIE: 3, ALL_TIED: 1})


def test_repeated_empty_and_unjudged_responses_are_excluded_and_counted():
    candidates = [*scored(1, None, 0), Candidate("A", 1, 10), Candidate(" \n", 7, 1)]
    found = pair(candidates, Rule("all"))
    assert texts_of_pairs(found.record) == ["A>C"]
    assert found.excluded == {UNJUDGED: 1, DUPLICATE: 1, EMPTY: 1}


def test_a_prompt_with_one_judged_response_is_counted():
    assert pair(scored(1, None), Rule("best_worst")).excluded == {UNJUDGED: 1, ONE: 1}


# ---- truncated responses ---------------------------------------------------------------------------------------------------


def cut(candidates: list[Candidate], *places: int) -> list[Candidate]:
    """The same, with those at these places truncated."""
    return [each._replace(ended=place not in places) for place, each in enumerate(candidates)]


def test_truncated_responses_count_as_whole_ones_are_excluded_or_are_the_worst():
    given = cut(scored(3, 9, 1), 1)
    assert texts_of_pairs(pair(given, Rule("all")).record) == ["B>A", "A>C", "B>C"]
    skipped = pair(given, Rule("all", truncated="skip"))
    assert texts_of_pairs(skipped.record) == ["A>C"] and skipped.excluded == {TRUNCATED: 1}
    worst = pair(given, Rule("all", truncated="worst"))
    # Below 1 by as much as 3 is above it.
    assert texts_of_pairs(worst.record) == ["A>B", "A>C", "C>B"] and worst.record["scores"] == [3, -1, 1]
    assert not worst.excluded


def test_the_worst_are_worse_by_the_margin_at_least_and_equal_among_themselves():
    given = cut(scored(2, 2, 5, None), 2, 3)
    found = pair(given, Rule("all", margin=4, truncated="worst"))
    assert texts_of_pairs(found.record) == ["A>C", "A>D", "B>C", "B>D"] and found.record["scores"] == [2, 2, -2, -2]
    assert found.excluded == {TIE: 2}
    # Where all that have ended are equal, and no margin is asked for.
    assert pair(given, Rule("best_worst", truncated="worst")).record["scores"] == [2, 1]


@pytest.mark.parametrize("way", ["all", "ranking", "unpaired", "best_of_n"])
def test_where_no_response_has_ended_none_is_the_worst(way):
    found = pair(cut(scored(1, 2), 0, 1), Rule(way, truncated="worst"))
    assert found.record is None and found.excluded[NOT_ENDED] == 2


def test_a_truncated_response_is_no_target_and_never_desirable():
    given = cut(scored(5, 9), 1)
    assert pair(given, Rule("best_of_n", truncated="worst")).record["responses"] == ["A"]
    assert pair(given, Rule("unpaired", threshold=0, truncated="worst")).record["labels"] == [True, False]
    assert pair(given, Rule("unpaired", threshold=0)).record["labels"] == [True, True]


# ---- rankings, labels, the best ----------------------------------------------------------------------------------------------


def test_a_ranking_goes_from_best_to_worst_without_ties_and_without_what_is_closer_than_the_margin():
    found = pair(scored(1, 3, 3, 2.5, 0), Rule("ranking", margin=1))
    # 3, then not the second 3, not 2.5 (0.5 below), 1 (2 below), 0 (1 below).
    assert found.record == {"responses": ["B", "A", "E"], "pairs": [], "sft_target": "B", "scores": [3, 1, 0]}
    assert found.excluded == {TIE: 1, CLOSE: 1}


def test_labels_are_above_or_below_the_median_which_itself_has_none():
    found = pair(scored(1, 2, 3), Rule("unpaired"))
    assert (found.record["responses"], found.record["labels"], found.excluded) == (["A", "C"], [False, True], {MIDDLE: 1})
    assert pair(scored(1, 2, 3, 4), Rule("unpaired")).record["labels"] == [False, False, True, True]
    assert pair(scored(2, 2), Rule("unpaired")).excluded == {ALL_TIED: 1}


def test_labels_by_a_threshold_include_it_and_without_a_desirable_one_sft_learns_nothing():
    assert pair(scored(1, 2, 3), Rule("unpaired", threshold=2)).record["labels"] == [False, True, True]
    record = pair(scored(1), Rule("unpaired", threshold=2)).record
    assert (record["labels"], record["sft_target"]) == ([False], None)


def test_the_best_of_n_is_the_first_of_the_best_and_has_to_reach_the_threshold():
    assert pair(scored(1, 3, 3), Rule("best_of_n")).record == {
        "responses": ["B"], "pairs": [], "sft_target": "B", "scores": [3],
    }  # fmt: skip
    assert pair(scored(1, 3), Rule("best_of_n", threshold=3)).record["sft_target"] == "B"
    assert pair(scored(1, 3), Rule("best_of_n", threshold=3.1)).excluded == {LOW: 1}
    assert pair(scored(None), Rule("best_of_n")).excluded == {UNJUDGED: 1, NONE: 1}


# ---- for any scores ---------------------------------------------------------------------------------------------------------

CANDIDATES = st.lists(
    st.builds(
        Candidate,
        st.text("abc", max_size=2),
        st.none() | st.integers(-3, 3).map(float),
        st.integers(1, 40),
    ),
    max_size=8,
)
RULES = st.builds(
    Rule,
    st.sampled_from(("best_worst", "all", "top_k")),
    st.sampled_from((0.0, 1.0, 2.5)),
    st.integers(1, 4),
    st.none(),
    st.none() | st.floats(0, 0.9),
)


@given(CANDIDATES, RULES)
def test_every_pair_prefers_the_higher_score_within_margin_and_length_and_none_comes_twice(candidates, rule):
    found = pair(candidates, rule)
    if found.record is None:
        assert any(reason.startswith("prompts") for reason in found.excluded)
        return
    # The first judged one of several with one text is the one that counts.
    by_text = {each.text: each for each in reversed(candidates) if each.score is not None}
    responses = found.record["responses"]
    assert len(set(responses)) == len(responses) and all(text.strip() for text in responses)
    assert found.record["scores"] == [by_text[text].score for text in responses]
    assert len({frozenset(members) for members in found.record["pairs"]}) == len(found.record["pairs"])
    for one, other in found.record["pairs"]:
        better, worse = by_text[responses[one]], by_text[responses[other]]
        assert better.score > worse.score and better.score - worse.score >= rule.margin
        if rule.length_matched is not None:
            longer = max(better.n_tokens, worse.n_tokens)
            assert abs(better.n_tokens - worse.n_tokens) <= rule.length_matched * longer
    assert {place for members in found.record["pairs"] for place in members} == set(range(len(responses)))


@given(CANDIDATES, RULES)
def test_pairs_do_not_depend_on_a_shift_or_on_unjudged_responses(candidates, rule):
    shifted = [each if each.score is None else each._replace(score=each.score + 16) for each in candidates]
    judged = [each for each in candidates if each.score is not None]
    found, other = pair(candidates, rule), pair(shifted, rule)
    assert (found.record or {}).get("pairs") == (other.record or {}).get("pairs")
    if len({each.text for each in judged}) == len(judged):
        assert pair(judged, rule).record == found.record


@given(CANDIDATES)
def test_all_pairs_and_those_excluded_are_all_that_there_are(candidates):
    found = pair(candidates, Rule("all", margin=1.5))
    usable = len(candidates) - sum(found.excluded[reason] for reason in (UNJUDGED, DUPLICATE, EMPTY))
    pairs = len(found.record["pairs"]) if found.record else 0
    excluded = Counter(found.excluded)
    assert pairs + excluded[TIE] + excluded[CLOSE] == (usable * (usable - 1) // 2 if usable > 1 else 0)
