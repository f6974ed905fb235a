"""Coverage of intervals: by exact sums over all outcomes where there are few, or else by simulation."""

import math

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from preference_training.evaluation.intervals import correlation, mean_interval, share_interval

# Of these sizes every outcome is looked at. 14 and 8 are where other intervals hold the truth least often.
SIZES = (8, 9, 14, 20, 33, 64, 100, 256)


def bounds_of(number: int) -> numpy.ndarray:
    """The intervals of 0 to `number` wins of `number` comparisons without ties: [number + 1, 2]."""
    return numpy.array([share_interval([1.0] * wins + [0.0] * (number - wins)) for wins in range(number + 1)])


@pytest.mark.parametrize("number", SIZES)
def test_the_interval_of_a_share_has_the_nominal_coverage(number):
    low, high = bounds_of(number).T
    # Between two ends the coverage is smooth; it is least beside one of them.
    near = numpy.concatenate([low - 1e-9, low + 1e-9, high - 1e-9, high + 1e-9])
    shares = numpy.concatenate([numpy.linspace(0.01, 0.99, 491), near[(near > 0.01) & (near < 0.99)]])
    chances = stats.binom.pmf(numpy.arange(number + 1), number, shares[:, None])
    held = (low <= shares[:, None]) & (shares[:, None] <= high)
    assert (chances * held).sum(1).min() >= 0.95 - 1e-6


@pytest.mark.parametrize("number", SIZES)
def test_the_interval_of_a_share_is_no_wider_than_clopper_and_pearsons(number):
    wins = numpy.arange(number + 1)
    exact = numpy.column_stack([stats.beta.ppf(0.025, wins, number - wins + 1), stats.beta.ppf(0.975, wins + 1, number - wins)])
    exact[0, 0], exact[-1, 1] = 0, 1
    assert (numpy.diff(bounds_of(number)) <= numpy.diff(exact) + 1e-9).all()


@pytest.mark.parametrize(("number", "low"), [(1, 0.025), (8, 0.6306), (128, 0.9716)])
def test_a_share_of_1_is_not_certain(number, low):
    # All of n happens with probability p^n, which is 0.025 at its 1/n-th power.
    assert share_interval([1.0] * number) == (pytest.approx(0.025 ** (1 / number)), 1.0)
    assert share_interval([0.0] * number) == (0.0, pytest.approx(1 - 0.025 ** (1 / number)))
    assert share_interval([1.0] * number)[0] == pytest.approx(low, abs=1e-4)


def test_8_of_10_has_the_textbooks_interval():
    assert share_interval([1.0] * 8 + [0.0] * 2) == (pytest.approx(0.444, abs=1e-3), pytest.approx(0.975, abs=1e-3))


# ---- ties -------------------------------------------------------------------------------------------------------------------


def with_ties(wins: int, ties: int, losses: int) -> tuple[float, float]:
    return share_interval([1.0] * wins + [0.5] * ties + [0.0] * losses)


@pytest.mark.parametrize("number", [8, 14])
def test_the_interval_of_a_win_rate_with_ties_has_the_nominal_coverage(number):
    outcomes = [(wins, number - wins - losses, losses) for wins in range(number + 1) for losses in range(number + 1 - wins)]
    low, high = numpy.array([with_ties(*outcome) for outcome in outcomes]).T
    for tie in (0.02, 0.1, 0.3, 0.6, 0.9):
        for win in numpy.linspace(0, 1 - tie, 26):
            rate = win + tie / 2
            if not 0.01 <= rate <= 0.99:
                continue
            lose = max(0.0, 1 - win - tie)
            chances = stats.multinomial.pmf(outcomes, number, [1 - tie - lose, tie, lose])
            assert chances[(low <= rate) & (rate <= high)].sum() >= 0.94, (tie, win)


def test_ties_are_more_informative_than_as_many_wins_and_losses():
    narrow, wide = numpy.diff(with_ties(10, 80, 10)).item(), numpy.diff(with_ties(50, 0, 50)).item()
    # The standard deviation of an outcome is sqrt(0.2) / 2 against 1 / 2.
    assert narrow / wide == pytest.approx(math.sqrt(0.2), rel=0.1)


def test_only_ties_are_not_certain():
    # With a chance of 1 - 0.025^(1/20) of a win, and none of a loss, 20 ties still happen once in 40 times.
    assert with_ties(0, 20, 0)[1] == pytest.approx(0.5 + (1 - 0.025 ** (1 / 20)) / 2)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60))
def test_the_interval_of_a_win_rate_contains_it_and_mirrors_that_of_the_opponent(wins, ties, losses):
    if wins + ties + losses == 0:
        return
    low, high = with_ties(wins, ties, losses)
    assert 0 <= low <= (wins + ties / 2) / (wins + ties + losses) <= high <= 1 and low < high
    assert with_ties(losses, ties, wins) == (pytest.approx(1 - high, abs=1e-9), pytest.approx(1 - low, abs=1e-9))


def test_hundred_thousand_outcomes_have_the_normal_interval():
    low, high = with_ties(50_000, 30_000, 20_000)
    # Mean 0.65, variance 0.5 + 0.3 / 4 - 0.65^2.
    half = 1.96 * math.sqrt(0.1525 / 100_000)
    assert (low, high) == (pytest.approx(0.65 - half, abs=2e-5), pytest.approx(0.65 + half, abs=2e-5))


# ---- examples of one prompt -------------------------------------------------------------------------------------------------


def test_copies_of_an_example_do_not_narrow_the_interval_of_a_share():
    alone = share_interval([1.0, 1.0, 0.0, 1.0, 0.0] * 4)
    groups = numpy.repeat(numpy.arange(20), 2)
    copied = share_interval(numpy.repeat([1.0, 1.0, 0.0, 1.0, 0.0] * 4, 2), groups)
    assert numpy.diff(copied) >= numpy.diff(alone)
    assert share_interval([1.0] * 40, groups) == pytest.approx(share_interval([1.0] * 20))


@pytest.mark.parametrize(("groups", "share"), [(10, 0.05), (10, 0.5), (32, 0.9), (32, 0.3)])
def test_the_interval_of_a_share_covers_the_truth_for_correlated_examples(groups, share):
    draw, held = numpy.random.default_rng(0), 0
    for _ in range(400):
        prompts = numpy.repeat(numpy.arange(groups), draw.integers(1, 5, groups))
        values = draw.random(len(prompts)) < draw.beta(2 * share, 2 * (1 - share), groups)[prompts]
        low, high = share_interval(values, prompts)
        held += low <= share <= high
    assert held / 400 >= 0.92


# ---- means ------------------------------------------------------------------------------------------------------------------


def coverage_of_means(draw, mean: float, number: int, rounds: int = 800) -> float:
    """How often the interval of a mean of `number` drawn values holds the true mean."""
    bounds = [mean_interval(draw(number)) for _ in range(rounds)]
    return sum(low <= mean <= high for low, high in bounds) / rounds


@pytest.mark.parametrize(("number", "least"), [(4, 0.92), (8, 0.92), (32, 0.92)])
def test_the_interval_of_a_normal_mean_covers_it_for_any_sample_size(number, least):
    assert coverage_of_means(numpy.random.default_rng(1).standard_normal, 0.0, number) >= least


@pytest.mark.parametrize(("number", "least"), [(10, 0.88), (32, 0.90), (128, 0.91)])
def test_the_interval_of_a_heavy_tailed_mean_covers_it(number, least):
    # As skewed as the KL of a prompt; the percentile bootstrap holds it in 80% of cases at 10.
    draw = numpy.random.default_rng(2)
    assert coverage_of_means(lambda n: draw.lognormal(0, 1, n), math.exp(0.5), number) >= least


def test_an_interval_ends_at_the_least_value_there_is_and_contains_the_truth_as_often():
    def found(**least) -> list[tuple[float, float]]:
        draw = numpy.random.default_rng(2)
        return [mean_interval(draw.lognormal(0, 2, 6), **least) for _ in range(400)]

    open_ended, ended = found(), found(least=0.0)
    assert min(low for low, _ in open_ended) < 0 == min(low for low, _ in ended)
    truth = math.exp(2)
    assert [low <= truth <= high for low, high in ended] == [low <= truth <= high for low, high in open_ended]


def test_without_skewness_the_interval_of_a_mean_is_students():
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert mean_interval(values) == pytest.approx(stats.ttest_1samp(values, 0).confidence_interval(0.95))


def test_the_interval_of_a_mean_extends_toward_the_long_tail():
    low, high = mean_interval([1.0] * 15 + [10.0])
    assert high - 1.5625 > 2 * (1.5625 - low) > 0


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=20), st.integers(1, 4))
def test_copies_of_an_example_do_not_narrow_the_interval_of_a_mean(values, copies):
    alone = mean_interval(values)
    together = mean_interval(numpy.repeat(values, copies), numpy.repeat(numpy.arange(len(values)), copies))
    assert together == pytest.approx(alone, rel=1e-6, abs=1e-6)


def test_a_mean_per_token_weights_responses_by_their_tokens():
    # All have 2 a token: whatever their lengths, the mean is 2.
    assert mean_interval([2.0, 8.0, 20.0], sizes=[1, 4, 10]) == (2, 2)


def test_a_single_value_or_nan_has_no_interval():
    assert mean_interval([3.0]) is None and mean_interval([1.0, math.inf]) is None


# ---- correlations -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [6, 20])
def test_the_interval_of_a_correlation_covers_it(number):
    draw, held = numpy.random.default_rng(3), 0
    for _ in range(400):
        x = draw.standard_normal(number)
        _, (low, high) = correlation(x, 0.6 * x + 0.8 * draw.standard_normal(number), numpy.arange(number))
        held += low <= 0.6 <= high
    assert held / 400 >= 0.92


def test_a_correlation_of_two_prompts_has_no_interval():
    found, bounds = correlation(numpy.array([1.0, 2.0, 4.0, 3.0]), numpy.array([1.0, 2.0, 3.0, 5.0]), [0, 0, 1, 1])
    assert found is not None and bounds is None
