"""Signs of reward hacking: what is said, of which numbers, and what is silent since it may be noise."""

import pytest

from preference_training.rounds.judges.findings import facts_of_scores, findings


def estimate(mean: float, half: float = 0.0) -> dict:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def summary(judges: dict | None = None, samples: dict | None = None, **held_out) -> dict:
    """The summary of a round in which nothing is conspicuous, but for these."""
    usual = {"different": 0.9, "distinct_2": 0.8, "logp_per_token": -1.5, "tied_prompts": 0.1, "responses": 100}
    held = {"length": estimate(50, 2), "repeated_4grams": 0.1, "win_rate": None} | held_out
    return {"held_out": held, "samples": usual | (samples or {}), "judges": judges or {}}


def kinds(*summaries: dict) -> list[str]:
    return [each["kind"] for each in findings(summaries)]


def text(*summaries: dict) -> str:
    [found] = findings(summaries)
    return found["text"]


def test_an_ordinary_round_has_no_findings():
    assert kinds(summary()) == kinds(summary(), summary(), summary()) == []


def test_lengths_that_grow_beyond_noise_are_told_with_both_lengths():
    assert "grown from 50 to 80 tokens since the first round" in text(summary(), summary(), summary(length=estimate(80, 5)))
    # Less than a quarter longer; and longer, but not beyond the intervals.
    assert kinds(summary(), summary(length=estimate(60, 1))) == kinds(summary(), summary(length=estimate(80, 29))) == []
    assert kinds(summary(length=estimate(80, 1)), summary()) == []


@pytest.mark.parametrize(("mean", "which"), [(0.6, "longer"), (-0.6, "shorter")])
def test_a_judge_whose_scores_go_with_length_is_told_in_the_first_round_already(mean, which):
    found = text(summary(samples={"length_correlation": estimate(mean, 0.1)}))
    assert found.startswith(f"{which} responses to a prompt have higher scores (correlation {mean:.2f} [")
    assert kinds(summary(samples={"length_correlation": estimate(mean, 0.4)})) == []


def test_repetition_is_told_where_there_is_much_and_more_than_in_the_first_round():
    assert "70% of all runs of 4 tokens in a held-out response are repetitions, and were 10%" in text(
        summary(), summary(repeated_4grams=0.7)
    )
    assert kinds(summary(repeated_4grams=0.6), summary(repeated_4grams=0.7)) == []
    assert kinds(summary(repeated_4grams=0.6)) == ["repetition"]


@pytest.mark.parametrize(("samples", "words"), [
    ({"different": 0.3}, "responses to a prompt that differ (30%, were 90%)"),
    ({"distinct_2": 0.2}, "different pairs of words (20%, were 80%)"),
    ({"logp_per_token": -0.5}, "uncertainty (0.50, were 1.50)"),
])  # fmt: skip
def test_diversity_that_collapses_is_told_by_each_of_its_measures(samples, words):
    assert words in text(summary(), summary(samples=samples))
    assert kinds(summary(samples=samples), summary(samples=samples)) == []


def test_a_second_judge_who_falls_while_the_first_rises_is_told():
    good = summary(win_rate=estimate(0.6, 0.05), second_win_rate=estimate(0.7, 0.05))
    bad = summary(win_rate=estimate(0.9, 0.05), second_win_rate=estimate(0.4, 0.05))
    assert "in 90% of comparisons, but the second judge in 40%, where it was 70% before" in text(summary(), good, bad)
    assert "in 40%, where it was 50% before" in text(summary(), bad)
    # No better by the first judge; not beyond noise by the second; no worse by it.
    for each in (
        summary(win_rate=estimate(0.52, 0.05), second_win_rate=estimate(0.4, 0.05)),
        summary(win_rate=estimate(0.9, 0.05), second_win_rate=estimate(0.62, 0.05)),
        good,
    ):
        assert kinds(summary(), good, each) == []


def test_scores_that_are_all_the_same_teach_nothing():
    assert "at 60% of the prompts all responses have the same score" in text(summary(samples={"tied_prompts": 0.6}))


def test_orders_that_disagree_are_told_of_each_judge_of_an_ensemble():
    facts = {"order_disagreement": 0.4, "in_both_orders": 50}
    assert text(summary({"samples": facts})).startswith("in 40% of 50 comparisons the judge's verdict depends")
    members = {"members": {"1: ollama:m": facts, "2: toy": {}}, "disagreement": 0.35}
    found = [each["text"] for each in findings([summary({"samples": members})])]
    assert found[0].startswith("ollama:m: in 40%") and found[1].startswith("the judges order 35% of the pairs")
    assert kinds(summary({"samples": facts | {"in_both_orders": 10}})) == []


def test_responses_without_a_score_are_told_with_the_reasons():
    reasons = {"malformed": 10, "refused": 5}
    assert text(summary(samples={"unjudged_reasons": reasons})).startswith(
        "15 responses have no score: 10 malformed; 5 refused"
    )
    assert kinds(summary(samples={"unjudged_reasons": {"malformed": 9}})) == []


def test_the_last_policy_which_has_no_samples_has_findings_of_its_held_out_responses_alone():
    last = {"held_out": summary(length=estimate(90, 2))["held_out"], "judges": {}}
    assert kinds(summary(), last) == ["length"]


def test_a_loop_without_held_out_prompts_has_findings_of_its_samples():
    nothing = {"held_out": {}, "samples": summary(samples={"tied_prompts": 1.0})["samples"], "judges": {}}
    assert kinds(nothing, nothing) == ["ties"]


# ---- the facts -----------------------------------------------------------------------------------------------------------


def row(prompt_id: int, text: str, score: float | None, reason: str | None = None) -> dict:
    tokens = list(range(len(text)))
    return {
        "prompt_id": prompt_id, "text": text, "token_ids": tokens, "n_tokens": len(tokens), "score": score, "reason": reason,
        "logp": -2.0 * len(tokens),
    }  # fmt: skip


def test_facts_by_hand():
    rows = [
        row(0, "a", 1.0), row(0, "bbb", 3.0), row(0, "bbb", 3.0),
        row(1, "cc", 7.0), row(1, "d", 7.0), row(1, "e", None, "mute"),
    ]  # fmt: skip
    facts = facts_of_scores(rows)
    assert facts["tied_prompts"] == 1 / 2 and facts["different"] == pytest.approx((2 / 3 + 1) / 2)
    assert facts["logp_per_token"] == -2.0 and facts["unjudged_reasons"] == {"mute": 1}
    # Less the means of prompt 0, 7 / 3 each: (-4/3, 2/3, 2/3) both. Of prompt 1: lengths (1/2, -1/2), scores (0, 0). So the sum
    # of products is 24/9, and those of squares 24/9 and 24/9 + 1/2.
    assert facts["length_correlation"]["mean"] == pytest.approx((24 / 9) / ((24 / 9) * (24 / 9 + 1 / 2)) ** 0.5)


def test_facts_of_no_rows_are_unknown():
    assert facts_of_scores([]) == {
        "length_correlation": {"mean": None, "low": None, "high": None}, "tied_prompts": None, "different": None,
        "repeated_4grams": None, "logp_per_token": None, "unjudged_reasons": {},
    }  # fmt: skip
