"""Logistic regression by Newton's method, for targets between 0 and 1.

Shapes: N observations, K features.
"""

from collections.abc import Sequence

import numpy
from scipy.special import expit

# Newton's method converges quadratically; with a penalty it always does.
MOST_STEPS = 100
CONVERGED = 1e-10


def fit_logistic(
    features: numpy.ndarray, targets: numpy.ndarray, ridge: float | Sequence[float], weights: numpy.ndarray | None = None
) -> numpy.ndarray:
    """The coefficients b [K] that minimize the penalized cross entropy

        sum_n w_n (log(1 + exp(x_n b)) - y_n x_n b) + sum_k r_k b_k^2 / 2

    features [N, K]; targets [N] between 0 and 1, such as 0.5 for a tie; weights [N], 1 by default. ridge [K] or one for all:
    positive, so that there is one minimum even where the features separate the targets. Each step is halved until it descends.
    """
    count = features.shape[1]
    weights = numpy.ones(len(targets)) if weights is None else weights
    penalty = numpy.broadcast_to(numpy.asarray(ridge, float), (count,))
    found = numpy.zeros(count)
    for _ in range(MOST_STEPS):
        chances = expit(features @ found)
        slope = features.T @ (weights * (chances - targets)) + penalty * found
        curvature = (features * (weights * chances * (1 - chances))[:, None]).T @ features + numpy.diag(penalty)
        step = numpy.linalg.solve(curvature, slope)
        size, before = 1.0, _objective(found, features, targets, penalty, weights)
        while size > 1e-8 and _objective(found - size * step, features, targets, penalty, weights) > before:
            size /= 2
        found = found - size * step
        if abs(size * step).max(initial=0.0) < CONVERGED:
            break
    return found


def _objective(
    found: numpy.ndarray, features: numpy.ndarray, targets: numpy.ndarray, penalty: numpy.ndarray, weights: numpy.ndarray
) -> float:
    scores = features @ found
    return float((weights * (numpy.logaddexp(0, scores) - targets * scores)).sum() + (penalty * found**2).sum() / 2)
