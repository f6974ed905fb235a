"""95% intervals of shares, means and correlations over held-out prompts; docs/intervals.md shows their coverage.

Shapes: E examples, G groups. Examples of one group, such as the pairs of a prompt, are not independent: the precision of a mean
depends on the number of groups, not of examples.
"""

import math
from collections.abc import Sequence

import numpy
from scipy import optimize, stats

Bounds = tuple[float, float]
LEVEL = 0.95
# The probability beyond each bound.
TAIL = (1 - LEVEL) / 2


def estimate(mean: float | None, bounds: Bounds | None) -> dict:
    """A mean and its interval as a plain dict; None for what is unknown or not finite."""
    is_known = mean is not None and numpy.isfinite(mean)
    low, high = bounds if is_known and bounds is not None else (None, None)
    return {"mean": float(mean) if is_known else None, "low": low, "high": high}


# ---- shares -----------------------------------------------------------------------------------------------------------------


def share_interval(values: Sequence[float], groups: Sequence | None = None) -> Bounds:
    """The interval of the mean of values [E] between 0 and 1, such as outcomes (1 won, 0 lost, 0.5 tied). Its width is never 0.

    groups [E]: examples with equal values belong together; None: all are independent. Independent outcomes get the
    Clopper-Pearson interval, extended to ties; other values the Korn-Graubard interval.
    """
    numbers = numpy.asarray(values, float)
    totals, sizes = _by_group(groups, numbers, numpy.ones(len(numbers)))
    if len(totals) == len(numbers) and numpy.isin(numbers, (0, 0.5, 1)).all():
        return _clopper_pearson(*(int((numbers == outcome).sum()) for outcome in (1, 0.5, 0)))
    return _korn_graubard(totals, sizes)


def _clopper_pearson(wins: int, ties: int, losses: int) -> Bounds:
    if not ties:
        bounds = stats.binomtest(wins, wins + losses).proportion_ci(LEVEL, method="exact")
        return float(bounds.low), float(bounds.high)
    return _lower_bound(wins, ties, losses), 1 - _lower_bound(losses, ties, wins)


def _lower_bound(wins: int, ties: int, losses: int) -> float:
    """The lowest mean under which at least this lead of wins over losses has probability TAIL.

    Of all distributions of outcomes with the same mean, it takes the one under which the counts are most likely.
    """
    lead = (wins - losses) / (wins + ties + losses)
    found = optimize.brentq(lambda difference: _tail(wins, ties, losses, difference) - TAIL, -1 + 1e-12, min(lead, 1 - 1e-12))
    return (1 + found) / 2


def _tail(wins: int, ties: int, losses: int, difference: float) -> float:
    """The probability of at least this lead, where wins and losses differ by `difference` in probability."""
    number = wins + ties + losses
    win, lose = _most_likely(wins, ties, losses, difference)
    tie = max(0.0, 1 - win - lose)
    # Sum over the number of ties; the mass outside of these bounds is below rounding.
    fewest, most = stats.binom.ppf([1e-13, 1 - 1e-13], number, tie)
    tied = numpy.arange(fewest, most + 1)
    least_wins = numpy.ceil((wins - losses + number - tied) / 2)
    among_others = stats.binom.sf(least_wins - 1, number - tied, win / (win + lose) if win + lose else 0.5)
    return float(stats.binom.pmf(tied, number, tie) @ among_others)


def _most_likely(wins: int, ties: int, losses: int, difference: float) -> tuple[float, float]:
    """Maximum-likelihood probabilities of a win and a loss that differ by `difference` (Tango 1998)."""
    number = wins + ties + losses
    b = -wins - losses + (2 * number - wins + losses) * difference
    c = -losses * difference * (1 - difference)
    lose = (math.sqrt(max(0.0, b * b - 8 * number * c)) - b) / (4 * number)
    lose = min(max(lose, 0.0, -difference), (1 - difference) / 2)
    return lose + difference, lose


def _korn_graubard(totals: numpy.ndarray, sizes: numpy.ndarray) -> Bounds:
    """Korn-Graubard interval (1998): Clopper-Pearson for the effective number of independent examples.

    Where all groups have the same share, their variance is unknown, and each counts as one example.
    """
    number, groups = sizes.sum(), len(totals)
    share = totals.sum() / number
    variance = _squared_error(totals - share * sizes, sizes)
    if groups < 2 or variance < 1e-18:
        effective = float(groups)
    else:
        wider = stats.t.ppf(TAIL, number - 1) / stats.t.ppf(TAIL, groups - 1)
        effective = min(number, share * (1 - share) / variance) * wider**2
    hits, misses = share * effective, (1 - share) * effective
    low = stats.beta.ppf(TAIL, hits, misses + 1) if hits > 0 else 0.0
    high = stats.beta.ppf(1 - TAIL, hits + 1, misses) if misses > 0 else 1.0
    return float(low), float(high)


# ---- means ------------------------------------------------------------------------------------------------------------------


def mean_interval(
    values: Sequence[float], groups: Sequence | None = None, sizes: Sequence[float] | None = None, least: float = -math.inf
) -> Bounds | None:
    """The interval of the mean of values [E]: Student's, corrected for skewness; None for fewer than two groups.

    groups: as in `share_interval`. sizes [E]: the weights of the examples; the mean is the sum of values over the sum of sizes.
    With skewed values, Student's interval lies too low; Hall's transformation (1992) extends it toward the long tail. least:
    the least value that there is, where the bounds end: the true mean is not below, so that they contain it as often.
    """
    values = numpy.asarray(values, float)
    sizes = numpy.ones(len(values)) if sizes is None else numpy.asarray(sizes, float)
    totals, sizes = _by_group(groups, values, sizes)
    if len(totals) < 2 or not numpy.isfinite(totals).all():
        return None
    mean = float(totals.sum() / sizes.sum())
    deviations = totals - mean * sizes
    error = math.sqrt(_squared_error(deviations, sizes))
    if error <= 1e-12 * abs(mean):
        return mean, mean
    # Scaled, so that powers do not underflow.
    scaled = deviations / abs(deviations).max()
    skewness = (scaled**3).mean() / (scaled**2).mean() ** 1.5
    high, low = (_hall_quantile(sign * stats.t.ppf(TAIL, len(totals) - 1), skewness, len(totals)) for sign in (1, -1))
    return max(mean - error * low, least), max(mean - error * high, least)


def _hall_quantile(quantile: float, skewness: float, number: int) -> float:
    """The studentized mean of `number` skewed values that Hall's transformation maps to a quantile of Student's t."""
    skew = float(skewness) / math.sqrt(number)
    return quantile if abs(skew) < 1e-6 else 3 / skew * (math.cbrt(1 + skew * (quantile - skew / 6)) - 1)


def _by_group(groups: Sequence | None, *columns: numpy.ndarray) -> list[numpy.ndarray]:
    """The sums [G] of each column [E] over the groups."""
    if groups is None:
        return list(columns)
    numbers = numpy.unique(numpy.asarray(groups), return_inverse=True)[1]
    return [numpy.bincount(numbers, column) for column in columns]


def _squared_error(deviations: numpy.ndarray, sizes: numpy.ndarray) -> float:
    """The squared standard error of a ratio of sums, from the deviations [G] and sizes [G] of the groups."""
    number = len(deviations)
    return float((deviations**2).sum() / sizes.sum() ** 2 * number / max(1, number - 1))


# ---- correlations -----------------------------------------------------------------------------------------------------------


def correlation(x: numpy.ndarray, y: numpy.ndarray, groups: Sequence) -> tuple[float | None, Bounds | None]:
    """Pearson's correlation of x and y [E] (None where either is constant), and its interval (None for fewer than 3 groups).

    The interval is Student's for Fisher's z, with a jackknife estimate of the error over groups.
    """
    x, y = x - x.mean(), y - y.mean()
    moments = numpy.column_stack(_by_group(groups, numpy.ones(len(x)), x, y, x * y, x * x, y * y))
    whole = moments.sum(0)
    found = float(_correlations(whole[None])[0])
    number = len(moments)
    if math.isnan(found):
        return None, None
    without = _correlations(whole - moments) if number > 2 else numpy.array([math.nan])
    if numpy.isnan(without).any():
        return found, None
    # Fisher's z of a correlation of 1 is infinite.
    z, left = (numpy.arctanh(numpy.clip(each, -1 + 1e-15, 1 - 1e-15)) for each in (found, without))
    half = -stats.t.ppf(TAIL, number - 1) * math.sqrt((number - 1) / number * ((left - left.mean()) ** 2).sum())
    return found, (math.tanh(z - half), math.tanh(z + half))


def _correlations(moments: numpy.ndarray) -> numpy.ndarray:
    """Pearson's correlation [N] of x and y from sums [N, 6] of 1, x, y, xy, x^2 and y^2; NaN where one is constant."""
    n, x, y, xy, xx, yy = moments.T
    with numpy.errstate(divide="ignore", invalid="ignore"):
        mx, my = x / n, y / n
        spread = (xx / n - mx * mx).clip(0) * (yy / n - my * my).clip(0)
        found = (xy / n - mx * my) / numpy.sqrt(spread)
    return numpy.where(numpy.isfinite(found), found.clip(-1, 1), numpy.nan)
