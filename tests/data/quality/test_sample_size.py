"""How many held-out pairs a difference of accuracies needs."""

import numpy
import pytest
from scipy import stats

from preference_training.data.quality.sample_size import pairs_needed, smallest_difference


def test_a_point_at_a_tenth_disagreement_is_the_formula_worked_out():
    # (1.959964 sqrt(0.1) + 0.841621 sqrt(0.1 - 0.0001))^2 / 0.0001 = (0.619795 + 0.266011)^2 / 0.0001 = 7846.5
    assert pairs_needed(0.01, 0.1) == 7847


@pytest.mark.parametrize(("difference", "disagreement"), [(0.02, 0.1), (0.05, 0.3), (0.03, 0.2)])
def test_mcnemars_test_finds_the_difference_in_four_of_five_draws(difference, disagreement):
    draw, number = numpy.random.default_rng(0), pairs_needed(difference, disagreement)
    wins = (disagreement + difference) / 2
    drawn = draw.multinomial(number, [wins, disagreement - wins, 1 - disagreement], size=20_000)
    statistic = (drawn[:, 0] - drawn[:, 1]) ** 2 / drawn[:, :2].sum(1)
    # The simulated power's own error is 0.3 points; the approximation's is a little more.
    assert (statistic > stats.chi2.ppf(0.95, 1)).mean() == pytest.approx(0.8, abs=0.015)


def test_the_smallest_difference_of_a_number_of_pairs_is_the_inverse():
    assert smallest_difference(7847) == pytest.approx(0.01, abs=1e-5)
    assert smallest_difference(5) is None and smallest_difference(0) is None
