"""Rules of length and form: what they count, how far a response keeps them, and which texts are no rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preference_training.core.errors import UserError
from preference_training.rounds.judges.base import JudgedInput, Score
from preference_training.rounds.judges.rules import UNITS, RulesJudge, count_sentences, read_rule


def score(response: str, *rules: str) -> Score:
    judge = RulesJudge("rules", [read_rule(text, "rounds.judging.rules") for text in rules])
    [found] = judge.judge([JudgedInput("Why?", response, {})])
    return found


@pytest.mark.parametrize(("rule", "response", "value", "reason"), [
    ("words<=3", "one two three", 1.0, None),
    ("words<=3", "one two three four", 3 / 4, "4 words, expected <=3"),
    ("words >= 4", "one two", 2 / 4, "2 words, expected >=4"),
    ("characters<=5", " abcde\n", 1.0, None),
    ("lines<=1", "one\n\ntwo", 1 / 2, "2 lines, expected <=1"),
    ("words<=0", "", 1.0, None),
    ("words>=1", "", 0.0, "0 words, expected >=1"),
    ("matches ^Yes", "Yes.", 1.0, None),
    ("matches ^Yes", "No. Yes.", 0.0, "nothing matches ^Yes"),
    ("not matches (?i)as an ai", "As an AI, I", 0.0, "'As an AI' matches (?i)as an ai"),
    ("not matches , then", "first", 1.0, None),
])  # fmt: skip
def test_a_response_keeps_a_rule_or_misses_it_by_so_much(rule, response, value, reason):
    assert score(response, rule) == Score(value, reason)


def test_rules_together_are_their_mean_and_the_first_that_is_missed_is_the_reason():
    # 1, 3 / 4 and 0.
    assert score("No, it is not", "matches No", "words<=3", "matches Paris") == Score(1.75 / 3, "4 words, expected <=3")


@pytest.mark.parametrize(("text", "count"), [
    ("", 0), ("One", 1), ("One.", 1), ("One. Two", 2), ("Is it? Yes! \u201cIt is.\u201d", 3), ("It costs 3.50 a piece.", 1),
    ("Wait... What?!", 2), ("\u4f60\u597d\u3002\u518d\u89c1\uff01", 2),
])  # fmt: skip
def test_sentences_are_counted_by_their_ends(text, count):
    assert count_sentences(text) == count


@given(st.text(), st.sampled_from(sorted(UNITS)), st.integers(0, 40))
def test_a_score_is_between_0_and_1_and_1_exactly_where_the_rule_is_kept(text, unit, limit):
    count = UNITS[unit](text)
    for sign, kept in (("<=", count <= limit), (">=", count >= limit)):
        found = score(text, f"{unit}{sign}{limit}")
        assert 0 <= found.value <= 1 and (found.value == 1) == kept == (found.reason is None)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 10))
def test_what_misses_a_length_by_less_is_better(one, other, limit):
    values = [score("x " * count, f"words<={limit}").value for count in (one, other)]
    assert values[0] >= values[1] if one <= other else values[0] <= values[1]


@pytest.mark.parametrize(("text", "words"), [
    ("word<=3", "no unit 'word'; did you mean words"), ("words<3", "expected UNIT<=N"), ("words<=", "expected UNIT<=N"),
    ("short", "found 'short', expected UNIT<=N or UNIT>=N with one of characters"), ("matches (", "is no regular expression"),
])  # fmt: skip
def test_what_is_no_rule_is_refused_with_what_one_is(text, words):
    with pytest.raises(UserError, match=words):
        read_rule(text, "rounds.judging.rules")


def test_another_rule_is_another_judge():
    one, other, again = (RulesJudge("rules", [read_rule(text, "")]) for text in ("words<=3", "words<=4", "words<=3"))
    assert one.identity == again.identity != other.identity
