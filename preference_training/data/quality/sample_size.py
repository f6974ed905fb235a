"""How many held-out pairs a difference of accuracies needs to be seen.

Two models are scored on the same pairs, so only pairs on which they disagree carry information. For McNemar's test at level
alpha with power 1 - beta, where they disagree on a share psi of pairs and differ by d (Connor, Biometrics 43, 1987):

    n = (z_{1 - alpha/2} sqrt(psi) + z_{1 - beta} sqrt(psi - d^2))^2 / d^2

Pairs of one prompt are not independent, and count as fewer.
"""

import math
from statistics import NormalDist

ALPHA, POWER = 0.05, 0.8
# Two checkpoints of one run disagree on about a tenth of the pairs, two different models on a third.
DISAGREEMENT = 0.1
DIFFERENCE = 0.01


def pairs_needed(difference: float = DIFFERENCE, disagreement: float = DISAGREEMENT) -> int:
    """The held-out pairs that show a difference of accuracies."""
    return math.ceil(_needed(difference, disagreement))


def _needed(difference: float, disagreement: float) -> float:
    level, power = NormalDist().inv_cdf(1 - ALPHA / 2), NormalDist().inv_cdf(POWER)
    root = level * math.sqrt(disagreement) + power * math.sqrt(max(0.0, disagreement - difference**2))
    return root**2 / difference**2


def smallest_difference(pairs: int, disagreement: float = DISAGREEMENT) -> float | None:
    """The smallest difference that so many pairs show; None where even models that differ wherever they disagree look alike."""
    low, high = 0.0, disagreement
    if pairs < 1 or _needed(high, disagreement) > pairs:
        return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _needed(middle, disagreement) <= pairs else (middle, high)
    return high
