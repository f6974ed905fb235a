"""Probabilities of flipped labels, their weights and gains: closed cases, and what is recovered from labels that were drawn."""

import math

import numpy
import pytest
from scipy.special import expit

from preference_training.cleaning.probabilities import (
    LabelNoise,
    fit_label_noise,
    gains,
    label_weights,
    normalized,
    order_of_checks,
)


def noise(tau: float, share: float) -> LabelNoise:
    return LabelNoise(tau, share, 0.0, 0.0, 0.5, 1)


def drawn(count: int, tau: float, share: float, seed: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Margins in the direction of labels, by the model itself; and which labels are flipped."""
    draw = numpy.random.default_rng(seed)
    of_first = draw.normal(0, 2, count)
    first_preferred, flipped = draw.random(count) < expit(tau * of_first), draw.random(count) < share
    return numpy.where(first_preferred ^ flipped, of_first, -of_first), flipped


def test_of_a_pair_without_a_margin_nothing_is_known_but_the_share():
    assert noise(2.0, 0.2).probabilities(numpy.zeros(1)) == pytest.approx([0.2])


def test_a_probability_is_bayes_rule():
    # sigmoid(ln 4) = 4/5. A label against it: right 4/5 * 1/5, flipped 1/5 * 4/5; one with it: 4/5 * 4/5 and 1/5 * 1/5.
    against, with_it = noise(1.0, 0.2).probabilities(numpy.array([-math.log(4), math.log(4)]))
    assert against == pytest.approx(1 / 2)
    assert with_it == pytest.approx((1 / 25) / (17 / 25))


def test_probabilities_fall_with_the_margin_from_one_to_zero():
    found = noise(1.0, 0.2).probabilities(numpy.linspace(-800, 800, 201))
    assert (numpy.diff(found) <= 0).all() and found[0] == pytest.approx(1) and found[-1] == pytest.approx(0)


def test_turning_all_labels_around_turns_right_into_flipped():
    """With e for 1 - e, a label with margin -h is as likely flipped as one with h is right."""
    margins = numpy.linspace(-3, 3, 7)
    turned = noise(1.3, 0.8).probabilities(-margins)
    assert turned == pytest.approx(1 - noise(1.3, 0.2).probabilities(margins))


@pytest.mark.parametrize("seed", range(3))
def test_tau_and_the_share_are_recovered_within_their_standard_errors(seed):
    margins, flipped = drawn(20_000, 1.0, 0.2, seed)
    found = fit_label_noise(margins)
    assert abs(found.tau - 1.0) < 3.5 * found.tau_error < 0.5
    assert abs(found.flipped_share - flipped.mean()) < 3.5 * found.flipped_share_error < 0.1
    # Calibrated: of labels with a probability around p, a share p is flipped.
    probabilities = found.probabilities(margins)
    for low in (0.0, 0.25, 0.5, 0.75):
        some = (low <= probabilities) & (probabilities < low + 0.25)
        error = math.sqrt(0.25 / some.sum()) + 0.03
        assert abs(flipped[some].mean() - probabilities[some].mean()) < 3 * error


def test_margins_in_other_units_change_tau_and_nothing_else():
    margins, _ = drawn(500, 1.0, 0.2, 0)
    one, other = fit_label_noise(margins), fit_label_noise(1000 * margins)
    assert other.tau == pytest.approx(one.tau / 1000, rel=1e-3)
    assert other.flipped_share == pytest.approx(one.flipped_share, abs=1e-3)


def test_where_all_disagreement_is_confident_the_share_is_the_mode_of_its_posterior():
    """If k of n confident labels disagree, it is e**(k + 1) (1 - e)**(n - k + 9), with its mode at (k + 1) / (n + 10)."""
    # A tenfold margin is wrong as often, so that disagreement is not of small margins: tau is large.
    margins = numpy.array([1.0] * 80 + [-1.0] * 20 + [10.0] * 80 + [-10.0] * 20)
    found = fit_label_noise(margins)
    assert found.agreement == 0.8
    assert found.flipped_share == pytest.approx(41 / 210, abs=0.005)


@pytest.mark.parametrize("margins", [[], [0.0, 0.0], [-1.0, -2.0, -1.5], [1.0, -1.0] * 50])
def test_margins_that_say_nothing_of_labels_leave_all_pairs_equal(margins):
    found = fit_label_noise(numpy.array(margins))
    assert not found.tells and (found.tau, found.flipped_share) == (0, 0)
    assert normalized(label_weights(found.probabilities(numpy.array(margins)))).tolist() == [1.0] * len(margins)


def test_a_weight_gives_the_expected_gradient_at_zero_margin():
    """Of the loss -ln sigmoid(m) for a right label and -ln sigmoid(-m) for a flipped one, by finite differences."""

    def expected(m: float, p: float) -> float:
        return -(1 - p) * math.log(expit(m)) - p * math.log(expit(-m))

    for p in (0.0, 0.1, 0.3, 0.5):
        step = 1e-5
        gradient = (expected(step, p) - expected(-step, p)) / (2 * step)
        assert gradient == pytest.approx(-0.5 * label_weights(numpy.array([p]))[0], abs=1e-9)


def test_a_label_that_is_rather_wrong_is_left_out_and_not_turned_around():
    assert label_weights(numpy.array([0.0, 0.25, 0.5, 0.9])).tolist() == [1.0, 0.5, 0.0, 0.0]


def test_weights_have_mean_one():
    assert normalized(numpy.array([1.0, 0.5, 0.0])).tolist() == [2.0, 1.0, 0.0]
    assert normalized(numpy.array([0.8, 0.8])).tolist() == [1.0, 1.0]
    assert normalized(numpy.zeros(2)).tolist() == [1.0, 1.0]


def test_the_gain_of_a_check_is_the_expected_error_of_the_gradient():
    """The sign is 1 with probability 1 - p, else -1; the weight stands in for it. After a check there is no error."""
    for p in (0.0, 0.1, 0.5, 0.8):
        [weight] = label_weights(numpy.array([p]))
        error = (1 - p) * (1 - weight) ** 2 + p * (-1 - weight) ** 2
        assert gains(numpy.array([p]))[0] == pytest.approx(error)


def test_checks_begin_where_the_gain_is_largest():
    margins = numpy.array([2.0, -5.0, 0.1, -1.0])
    order = order_of_checks(margins)
    assert order.tolist() == [1, 3, 2, 0]
    assert (numpy.diff(gains(noise(1.0, 0.2).probabilities(margins))[order]) <= 0).all()
