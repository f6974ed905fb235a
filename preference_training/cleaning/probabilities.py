"""The probability that a label is flipped, from the margin of its pair under a model that was not trained on it.

Shapes: N pairs. h [N] is the reward margin of each pair in the direction of its label, in nats. The model: people prefer the
labeled response with probability sigmoid(tau * h), and a share e of labels is flipped afterwards. The label that is seen has

    L = (1 - e) * sigmoid(tau * h) + e * sigmoid(-tau * h)
    P(flipped | label) = e * sigmoid(-tau * h) / L

sigmoid(tau * h) is honest disagreement: of a pair with a small margin nothing follows, and its probability stays near e.

What can be known. tau and e compete for the labels that the model disagrees with: a small tau calls all of them honest, a large
one with e > 0 calls them wrong. Only confident disagreement tells them apart: where |tau * h| is large, honest disagreement
dies out, and flips do not. Where margins are small, or where labels are wrong in a way that the model has learned from them, e
is not identifiable, and the prior decides.

The prior on e is Beta(2, 10), as much as having seen one flipped label and nine right ones. Its mode, a tenth, is about what
people find when they check labels, and hundreds of pairs outweigh it. Where margins tell little, e stays near a tenth, all
probabilities are near e, and all weights nearly equal. A flat prior would take an overconfident model at its word there, and
discard each pair that it disagrees with; a prior whose mode is 0 would call no label flipped until thousands of pairs say so.
tau has no prior.
"""

from dataclasses import dataclass

import numpy
from scipy import optimize
from scipy.special import expit

# The labels, flipped and right, that the prior on e is worth.
PRIOR_FLIPPED, PRIOR_RIGHT = 1.0, 9.0
# tau times the median absolute margin, from and to: beyond it margins are signs.
SCALES = (1e-3, 30.0)
# Of its logarithm, the points at which the likelihood is computed before the best is refined.
GRID = 33
LEAST = 1e-300


@dataclass(frozen=True)
class LabelNoise:
    """What was fitted: tau, and the share e of labels that are flipped, with their standard errors.

    Both are 0 where the margins tell nothing. The error of a tau at its bound is NaN. agreement: the share of pairs
    whose margin agrees with the label, ties half.
    """

    tau: float
    flipped_share: float
    tau_error: float
    flipped_share_error: float
    agreement: float
    pairs: int

    @property
    def tells(self) -> bool:
        """Whether it distinguishes pairs: at tau = 0 all are equally likely to be flipped."""
        return self.tau > 0 and self.flipped_share > 0

    def probabilities(self, margins: numpy.ndarray) -> numpy.ndarray:
        """The probability that each label is flipped: [N]."""
        agree = expit(self.tau * margins)
        return self.flipped_share * (1 - agree) / _likelihood(agree, self.flipped_share)


def _likelihood(agree: numpy.ndarray, flipped: float) -> numpy.ndarray:
    """The probability of each label, where `agree` is that of the preference before flips: [N]."""
    return numpy.maximum(agree + flipped * (1 - 2 * agree), LEAST)


def fit_label_noise(margins: numpy.ndarray) -> LabelNoise:
    """Fit tau >= 0 and e in [0, 0.5) to margins [N] by the largest posterior density."""
    h = numpy.asarray(margins, numpy.float64)
    agreement = float(((h > 0) + 0.5 * (h == 0)).mean()) if len(h) else float("nan")
    scale = float(numpy.median(numpy.abs(h[h != 0]))) if h.any() else 0.0
    nothing = LabelNoise(0.0, 0.0, float("nan"), float("nan"), agreement, len(h))
    if scale == 0:
        return nothing

    def cost(log_tau: float) -> float:
        agree = expit(numpy.exp(log_tau) * h)
        return -_log_density(agree, _best_share(agree))

    grid = numpy.linspace(*numpy.log(numpy.array(SCALES) / scale), GRID)
    costs = [cost(point) for point in grid]
    best = int(numpy.argmin(costs))
    around = grid[max(best - 1, 0)], grid[min(best + 1, GRID - 1)]
    refined = optimize.minimize_scalar(cost, bounds=around, method="bounded", options={"xatol": 1e-4})
    log_tau, least = min(((refined.x, refined.fun), (grid[best], costs[best])), key=lambda found: found[1])
    # At tau = 0 each label has probability 1/2, whatever e is.
    mode = PRIOR_FLIPPED / (PRIOR_FLIPPED + PRIOR_RIGHT)
    if best == 0 or least >= -_log_density(numpy.full(len(h), 0.5), mode):
        return nothing
    tau = float(numpy.exp(log_tau))
    share = _best_share(expit(tau * h))
    tau_error, share_error = _errors(h, tau, share)
    at_bound = tau * scale > 0.99 * SCALES[1]
    return LabelNoise(tau, share, float("nan") if at_bound else tau_error, share_error, agreement, len(h))


def _log_density(agree: numpy.ndarray, flipped: float) -> float:
    prior = PRIOR_FLIPPED * numpy.log(flipped) + PRIOR_RIGHT * numpy.log1p(-flipped)
    return float(numpy.log(_likelihood(agree, flipped)).sum() + prior)


def _best_share(agree: numpy.ndarray) -> float:
    """The e with the largest density at a tau. Its logarithm is concave in e: its slope has one root, or none below 1/2."""
    change = 1 - 2 * agree

    def slope(flipped: float) -> float:
        prior = PRIOR_FLIPPED / flipped - PRIOR_RIGHT / (1 - flipped)
        return float((change / _likelihood(agree, flipped)).sum() + prior)

    least, most = 1e-12, 0.5 - 1e-9
    return most if slope(most) >= 0 else float(optimize.brentq(slope, least, most, xtol=1e-7))


def _errors(h: numpy.ndarray, tau: float, share: float) -> tuple[float, float]:
    """The standard errors of tau and e, by the information in the scores of the pairs and in the prior."""
    agree = expit(tau * h)
    by_tau, by_share = (1 - 2 * share) * h * agree * (1 - agree), 1 - 2 * agree
    scores = numpy.stack([by_tau, by_share]) / _likelihood(agree, share)
    information = scores @ scores.T
    information[1, 1] += PRIOR_FLIPPED / share**2 + PRIOR_RIGHT / (1 - share) ** 2
    if numpy.linalg.det(information) <= 0:
        return float("nan"), float("nan")
    tau_error, share_error = numpy.sqrt(numpy.diag(numpy.linalg.inv(information)))
    return float(tau_error), float(share_error)


# ---- what follows from probabilities --------------------------------------------------------------------------------------


def label_weights(probabilities: numpy.ndarray) -> numpy.ndarray:
    """The weight of each pair in training: max(0, 1 - 2 p), [N].

    The expected sign of the label. A loss is l(m) of the margin m if the label is right, and l(-m) if it is flipped; at m = 0
    the gradient of the expectation is (1 - p) l'(0) - p l'(0) = (1 - 2 p) l'(0), which is that of the weighted loss. Where a
    label is more likely wrong than right, the pair is left out rather than turned around.
    """
    return numpy.maximum(0.0, 1 - 2 * numpy.asarray(probabilities, numpy.float64))


def normalized(weights: numpy.ndarray) -> numpy.ndarray:
    """The weights divided by their mean, [N]; all 1 where none is above 0.

    A common factor says nothing of the pairs, only of the step: with mean 1, lr, max_grad_norm and the loss mean what they do
    without weights. Weights that are all equal are exactly 1.
    """
    if len(weights) == 0 or weights.max() <= 0 or weights.min() == weights.max():
        return numpy.ones(len(weights))
    return weights / weights.mean()


def gains(probabilities: numpy.ndarray) -> numpy.ndarray:
    """What checking each label is worth while the pairs are weighted: 1 - max(0, 1 - 2 p)**2, [N], from 0 to 1.

    The gradient of a pair points along s = +1 where its label is right, with probability 1 - p, and along s = -1 where it is
    flipped; training takes w along the label. The expected squared error is

        E (s - w)**2 = 1 - 2 w (1 - 2 p) + w**2

    which w = max(0, 1 - 2 p) makes as small as a weight from 0 can: 1 - w**2. After a check s is known, and the error is 0.
    """
    return 1 - label_weights(probabilities) ** 2


def order_of_checks(margins: numpy.ndarray) -> numpy.ndarray:
    """The pairs in the order in which checking pays: the smallest margin first.

    Probability and gain fall with the margin; among pairs of gain 1, the likeliest to be flipped come first.
    """
    return numpy.argsort(margins, kind="stable")
