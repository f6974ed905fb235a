"""The statistics of benchmarks: closed forms, numbers derived in view, and what must hold of any judge."""

import math

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit, logit
from scipy.stats import beta

from preference_training.core.files import run_file
from preference_training.evaluation.benchmarks import arena, length_control, sections
from preference_training.evaluation.benchmarks.arena import Battle, arena_scores, bradley_terry
from preference_training.evaluation.benchmarks.length_control import length_controlled
from preference_training.evaluation.benchmarks.logistic import fit_logistic
from tests.support.files import ROOT


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    for module in (arena, length_control, sections):
        monkeypatch.setattr(module, "ROUNDS", 100)


# ---- logistic regression ----------------------------------------------------------------------------------------------------


def test_with_a_constant_alone_the_prediction_is_the_mean():
    targets = numpy.array([1, 0, 1, 1, 0.5])
    [found] = fit_logistic(numpy.ones((5, 1)), targets, 1e-9)
    assert found == pytest.approx(logit(3.5 / 5), abs=1e-7)


def test_with_a_group_indicator_the_predictions_are_the_means_of_the_groups():
    features = numpy.array([[1, 0], [1, 0], [1, 0], [1, 0], [1, 1], [1, 1], [1, 1]])
    found = fit_logistic(features, numpy.array([1, 0, 0, 0, 1, 1, 0]), 1e-9)
    assert expit(found[0]) == pytest.approx(1 / 4) and expit(found.sum()) == pytest.approx(2 / 3)


@given(st.integers(0, 10_000))
def test_the_minimum_is_that_of_another_optimizer(seed):
    generator = numpy.random.default_rng(seed)
    features, targets, weights = generator.normal(size=(30, 3)), generator.random(30).round(1), generator.integers(1, 4, 30)
    ridge = numpy.array([0.5, 1, 2])

    def objective(b):
        scores = features @ b
        return (weights * (numpy.logaddexp(0, scores) - targets * scores)).sum() + (ridge * b**2).sum() / 2

    found = fit_logistic(features, targets, ridge, weights)
    assert objective(found) <= minimize(objective, numpy.zeros(3)).fun + 1e-9


def test_targets_that_a_feature_separates_have_a_finite_fit():
    found = fit_logistic(numpy.array([[-1.0], [-0.5], [0.5], [1.0]]), numpy.array([0, 0, 1, 1]), 0.01)
    assert numpy.isfinite(found).all() and found[0] > 3


@given(st.integers(0, 10_000), st.sampled_from([0.1, 1.0, 100.0]))
def test_the_l1_fit_that_the_ridge_is_compared_with_is_that_of_another_optimizer(seed, strength):
    generator = numpy.random.default_rng(seed)
    features, targets, weights = generator.normal(size=(30, 3)), generator.random(30).round(1), generator.integers(1, 4, 30)

    def objective(b):
        scores = features @ b
        return abs(b).sum() + strength * (weights * (numpy.logaddexp(0, scores) - targets * scores)).sum()

    script = run_file(ROOT / "benchmarks" / "length_control.py", "script")
    found = script.fit_l1(features, targets, weights, strength)
    # Not differentiable where a coefficient is 0.
    others = [
        minimize(objective, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-9})
        for start in (found, numpy.zeros(3))
    ]
    assert objective(found) <= min(other.fun for other in others) + 1e-6


def test_the_ridge_is_near_the_published_fit_where_outputs_are_about_as_long():
    script = run_file(ROOT / "benchmarks" / "length_control.py", "script")
    raw, true, ridge, l1, with_baseline = script.win_rates(0, 0.5, 1.0, 0.0)
    assert abs(ridge - l1) < 0.5 and abs(ridge - with_baseline) < 0.5 and abs(ridge - true) < 5 < raw


# ---- length control ---------------------------------------------------------------------------------------------------------


def lengths(count: int, seed: int = 0) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Lengths of a model's outputs, nearly all longer than the baseline's, and of those."""
    generator = numpy.random.default_rng(seed)
    baseline = generator.integers(300, 1500, count)
    return (baseline * generator.lognormal(0.55, 0.33, count)).astype(int), baseline


def test_a_judge_that_prefers_length_alone_gives_about_a_half_at_equal_length():
    mine, baseline = lengths(2000)
    chances = expit(6 * (mine - baseline) / (mine - baseline).std())
    preferred = (numpy.random.default_rng(1).random(2000) < chances).astype(float)
    found = length_controlled(preferred, mine, baseline)
    assert preferred.mean() > 0.9
    assert found.mean == pytest.approx(0.5, abs=0.1) and found.bounds[0] < 0.5 < found.bounds[1]
    assert found.coefficients["length"] > 3


def test_a_judge_that_ignores_length_gives_the_raw_win_rate():
    generator = numpy.random.default_rng(2)
    baseline = generator.integers(300, 1500, 3000)
    mine = (baseline * generator.lognormal(0, 0.5, 3000)).astype(int)
    preferred = generator.choice([0, 0.5, 1], 3000, p=[0.2, 0.1, 0.7])
    found = length_controlled(preferred, mine, baseline)
    assert found.mean == pytest.approx(preferred.mean(), abs=0.01) and abs(found.coefficients["length"]) < 0.2
    low, high = found.bounds
    assert low < preferred.mean() < high and found.note is None


def test_a_model_with_the_baselines_own_lengths_has_its_raw_win_rate():
    # No length differs, so that the fit is the mean, but for the prior: 40 (p - 0.75) = -logit(p) / 25.
    found = length_controlled([1, 1, 1, 0] * 10, [7] * 40, [7] * 40)
    chance = found.mean
    assert 40 * (chance - 0.75) == pytest.approx(-math.log(chance / (1 - chance)) / 25, abs=1e-6)


def test_the_two_sides_of_a_comparison_sum_to_one():
    mine, baseline = lengths(200)
    preferred = (numpy.random.default_rng(3).random(200) < 0.6).astype(float)
    found, other = length_controlled(preferred, mine, baseline), length_controlled(1 - preferred, baseline, mine)
    assert found.mean + other.mean == pytest.approx(1, abs=1e-8)


def test_difficulty_has_a_coefficient_of_its_own_where_it_is_known():
    generator = numpy.random.default_rng(4)
    difficulty, baseline = generator.normal(size=4000), generator.integers(300, 1500, 4000)
    mine = baseline + generator.integers(-200, 200, 4000)
    preferred = (generator.random(4000) < expit(0.5 - 1.5 * difficulty)).astype(float)
    found = length_controlled(preferred, mine, baseline, difficulty)
    # Standard errors are some 0.04.
    assert found.coefficients["difficulty"] == pytest.approx(-1.5, abs=0.15)
    assert found.coefficients["model"] == pytest.approx(0.5, abs=0.15)
    assert found.mean == pytest.approx(preferred.mean(), abs=0.01)
    assert "difficulty" not in length_controlled(preferred, mine, baseline).coefficients


def test_outputs_that_are_all_longer_are_said_to_be_extrapolated():
    found = length_controlled([1, 0] * 20, [9 + k for k in range(40)], [5] * 40)
    assert "100% of the outputs are longer than the baseline's, and 0% are shorter" in found.note


# ---- Arena-Hard -------------------------------------------------------------------------------------------------------------


def test_against_the_baseline_alone_a_score_is_the_weighted_share_of_wins():
    # 3 + 1 of 3 + 1 + 1 + 1 + 3, and half a tie.
    outcomes = [(1.0, 3), (1.0, 1), (0.5, 1), (0.0, 1), (0.0, 3)]
    battles = [Battle(k, 1, 0, outcome, weight) for k, (outcome, weight) in enumerate(outcomes)]
    assert expit(bradley_terry(battles, 2)[1]) == pytest.approx(4.5 / 9, abs=1e-3)
    [score] = arena_scores(battles, 2)
    assert score["mean"] == pytest.approx(0.5, abs=1e-3) and score["low"] < 0.5 < score["high"]
    battles += [Battle(9, 1, 0, 1.0, 3)] * 3
    assert expit(bradley_terry(battles, 2)[1]) == pytest.approx(13.5 / 18, abs=1e-3)


def test_models_that_meet_in_a_cycle_are_equally_strong():
    battles = [Battle(0, 0, 1, 1.0), Battle(1, 1, 2, 1.0), Battle(2, 2, 0, 1.0)]
    assert bradley_terry(battles, 3) == pytest.approx([0, 0, 0], abs=1e-6)


def test_a_model_that_wins_everything_has_a_finite_score_near_one():
    battles = [Battle(k, 1, 0, 1.0) for k in range(50)]
    [score] = arena_scores(battles, 2)
    assert 0.98 < score["mean"] < 1 and 0.98 < score["low"] <= score["high"] < 1


def test_battles_of_one_prompt_are_drawn_together():
    # Ten prompts with two battles each say no more than ten with one.
    single = [Battle(k, 1, 0, float(k % 2)) for k in range(10)]
    [one], [two] = arena_scores(single, 2), arena_scores([*single, *single], 2)
    assert two["low"] == pytest.approx(one["low"], abs=0.01) and two["high"] == pytest.approx(one["high"], abs=0.01)


# ---- RewardBench ------------------------------------------------------------------------------------------------------------


def outcomes_of(shares: dict[str, tuple[int, int]]) -> tuple[numpy.ndarray, list[str]]:
    """Outcomes and categories of subsets with so many right ones of so many pairs."""
    rows = [(float(k < right), name) for name, (right, count) in shares.items() for k in range(count)]
    return numpy.array([outcome for outcome, _ in rows]), [name for _, name in rows]


def test_sections_weigh_subsets_by_pairs_and_math_as_all_code():
    outcomes, categories = outcomes_of({
        "alpacaeval-easy": (9, 10), "mt-bench-med": (1, 30), "mt-bench-hard": (1, 4), "donotanswer": (3, 4),
        "math-prm": (1, 2), "hep-cpp": (6, 6), "hep-go": (0, 2), "shp": (1, 4), "summarize": (40, 40),
    })  # fmt: skip
    found = {name: each["mean"] for name, each in sections.sections(outcomes, categories).items()}
    # 10 of 40; 6 of 8 code and 1 of 2 math, with equal weights; 1/4 and 1 with equal weights.
    expected = {"Chat": 0.25, "Chat Hard": 0.25, "Safety": 0.75, "Reasoning": 0.625, "Prior Sets": 0.625}
    score = (0.25 + 0.25 + 0.75 + 0.625 + 0.5 * 0.625) / 4.5
    assert found == pytest.approx(expected | {"score": score})


def test_a_section_whose_pairs_are_all_right_has_an_interval_all_the_same(monkeypatch):
    monkeypatch.setattr(sections, "ROUNDS", 20_000)
    found = sections.sections(*outcomes_of({"donotanswer": (10, 10)}))["Safety"]
    # Jeffreys: Beta(10.5, 0.5).
    assert found["mean"] == 1 and found["low"] == pytest.approx(beta.ppf(0.025, 10.5, 0.5), abs=0.01)


def test_without_all_four_sections_there_is_no_score():
    assert [*sections.sections(*outcomes_of({"donotanswer": (1, 2), "mine": (1, 2)}))] == ["Safety"]
    assert sections.sections(*outcomes_of({"mine": (1, 2)})) == {}


def test_accuracies_by_category_have_intervals_over_prompts():
    outcomes, categories = outcomes_of({"a": (15, 20), "": (5, 20)})
    found = sections.by_category(outcomes, categories, [f"prompt {k}" for k in range(40)])
    assert [*found] == ["all", "a"] and found["all"]["mean"] == 0.5 and found["a"]["pairs"] == 20
    together = sections.by_category(outcomes, categories, [f"prompt {k // 5}" for k in range(40)])
    assert together["all"]["high"] - together["all"]["low"] > found["all"]["high"] - found["all"]["low"]
