"""Ensembles: weights, z-scores per prompt, what one of them cannot judge, and how much they disagree."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preference_training.rounds.judges.base import Judge, JudgedInput, Score
from preference_training.rounds.judges.ensemble import EnsembleJudge, Member, z_score
from preference_training.rounds.judges.verdicts import Verdicts


class Counting(Judge):
    """A judge that counts a letter; asked: every response that it was asked about."""

    def __init__(self, letter: str, mute: str = "\0"):
        self.name = self.identity = f"counts {letter}"
        self.letter, self.mute, self.asked = letter, mute, []

    def judge(self, samples):
        self.asked += [sample.response for sample in samples]
        return [Score(None if self.mute in each.response else float(each.response.count(self.letter))) for each in samples]

    def facts(self, samples):
        return {"letter": self.letter}


def inputs(*responses: str, against=()) -> list[JudgedInput]:
    return [JudgedInput("Why?", each, {}, () if against else responses, tuple(against)) for each in responses]


def ensemble(path, *members: Member) -> EnsembleJudge:
    return EnsembleJudge(members, Verdicts(path / "verdicts.jsonl", unjudged_again=True))


def test_without_normalization_a_score_is_the_weighted_mean(tmp_path):
    judge = ensemble(tmp_path, Member(Counting("a"), 1, False), Member(Counting("b"), 3, False))
    # (1 * 2 + 3 * 1) / 4
    assert judge.judge(inputs("aab")) == [Score(1.25, "counts a 2; counts b 1")]
    assert not judge.compares


def test_z_scores_are_of_the_responses_to_the_prompt(tmp_path):
    judge = ensemble(tmp_path, Member(Counting("a")), Member(Counting("b"), 2, False))
    # The numbers of a are 0, 2 and 4: mean 2, variance (4 + 0 + 4) / 3.
    z = 2 / (8 / 3) ** 0.5
    found = [score.value for score in judge.judge(inputs("b", "aa", "aaaabb"))]
    assert found == pytest.approx([(-z + 2 * 1) / 3, 0.0, (z + 2 * 2) / 3]) and judge.compares


def test_z_scores_of_held_out_responses_are_among_them_and_the_first_models(tmp_path):
    judge = ensemble(tmp_path, Member(Counting("a")))
    assert [score.value for score in judge.judge(inputs("aaa", "", against=["a"]))] == pytest.approx([1.0, -1.0])
    assert judge.judge([JudgedInput("Why?", "aaa", {})]) == [Score(0.0, "counts a 0")]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8), st.floats(0.5, 100), st.floats(-100, 100))
def test_z_scores_do_not_depend_on_the_unit_of_a_judge(values, factor, shift):
    scaled = [factor * value + shift for value in values]
    one, other = ([z_score(value, some) for value in some] for some in (values, scaled))
    if max(values) - min(values) > 1e-3:
        assert one == pytest.approx(other, abs=1e-3)
    assert sum(one) == pytest.approx(0, abs=1e-3)


def test_equal_scores_have_z_scores_of_0():
    assert z_score(0.1 + 0.2, [0.3, 0.1 + 0.2]) == z_score(5.0, [5.0]) == z_score(0.0, [0.0, 0.0]) == 0.0


def test_each_member_is_asked_once_of_a_response_though_it_is_in_many_groups(tmp_path):
    member = Counting("a")
    judge = ensemble(tmp_path, Member(member))
    judge.judge(inputs("a", "b", "c"))
    judge.judge(inputs("d", against=("a", "b")))
    ensemble(tmp_path, Member(member)).judge(inputs("a", "b", "c"))
    assert sorted(member.asked) == ["a", "b", "c", "d"]


def test_what_a_member_cannot_judge_is_not_judged(tmp_path):
    judge = ensemble(tmp_path, Member(Counting("a")), Member(Counting("b", mute="x")))
    assert judge.judge(inputs("a", "x"))[1] == Score(None, "counts b: cannot judge it")


def test_disagreement_is_the_share_of_pairs_that_two_judges_order_differently(tmp_path):
    judge = ensemble(tmp_path, Member(Counting("a"), 1, False), Member(Counting("b"), 1, False))
    samples = inputs("a", "b", "aab", "c")
    judge.judge(samples)
    # Numbers of (a, b): (1, 0), (0, 1), (2, 1), (0, 0). Of the six pairs both order 1-2 (opposed) and 3-4 and 1-3 (agreeing);
    # the others are ties of one of them.
    facts = judge.facts(samples)
    assert facts["disagreement"] == 1 / 3
    assert facts["members"] == {
        "1: counts a": {"mean_score": 0.75, "letter": "a"}, "2: counts b": {"mean_score": 0.5, "letter": "b"},
    }  # fmt: skip


def test_other_weights_are_another_judge(tmp_path):
    identities = {
        ensemble(tmp_path, Member(Counting("a"), weight, normal)).identity for weight in (1, 2) for normal in (True, False)
    }
    assert len(identities) == 4
