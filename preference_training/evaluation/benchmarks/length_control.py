"""The length-controlled win rate of AlpacaEval 2 (Dubois et al. 2024, "Length-Controlled AlpacaEval", equation 2).

Of model m against baseline b on instruction x, with a judge's preference y between 0 and 1:

    P(y) = logistic(theta + phi tanh(d_x / std(d)) + psi gamma_x)

theta is the quality of the model, d_x the length of its output minus that of the baseline's, in characters, and gamma_x the
difficulty of the instruction. The length-controlled win rate is the mean over x of the prediction for d_x = 0.

What differs here from AlpacaEval's own fit, of a hundred models with one judge:
- gamma_x is fitted there once, over all models of its leaderboard. A file may give it (column instruction_difficulty); it then
  has a coefficient psi, as there. With one model and no such column all instructions count as equally difficult: no such term.
- There, L1 penalties chosen by cross-validation, and the baseline's verbose and concise outputs beside the model's, keep phi
  from explaining what quality does. Here a weak ridge does: a normal prior of standard deviation PRIOR on each coefficient.
  Those outputs have to be judged too, which few have. benchmarks/length_control.py measures the difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from scipy.special import expit

from preference_training.evaluation.benchmarks.logistic import fit_logistic
from preference_training.evaluation.intervals import TAIL, Bounds

# Standard deviation of a coefficient's prior, in units of log-odds. At 5, a win rate of 90% of 100 is moved by less than 0.1%.
PRIOR = 5.0
# Of the bootstrap over instructions.
ROUNDS = 1000
# Where so small a share of the outputs are shorter (or longer) than the baseline's, length and quality cannot be told apart.
ONE_SIDED = 0.05


@dataclass(frozen=True)
class LengthControlled:
    """A length-controlled win rate with its 95% bootstrap interval, and its coefficients by term; note: what to doubt."""

    mean: float
    bounds: Bounds
    coefficients: dict[str, float]
    note: str | None = None

    def as_dict(self) -> dict:
        """Plain values."""
        low, high = self.bounds
        return {"mean": self.mean, "low": low, "high": high, "coefficients": self.coefficients, "note": self.note}


def length_controlled(
    preferences: Sequence[float],
    lengths: Sequence[int],
    baseline_lengths: Sequence[int],
    difficulty: Sequence[float] | None = None,
    seed: int = 0,
) -> LengthControlled:
    """The length-controlled win rate; all in the order of the instructions.

    preferences: 1 where the model's output won, 0 where the baseline's did, 0.5 for a tie.
    """
    targets = numpy.asarray(preferences, float)
    delta = numpy.asarray(lengths, float) - numpy.asarray(baseline_lengths, float)
    spread = delta.std(ddof=1) if len(delta) > 1 else 0.0
    columns = {"model": numpy.ones(len(targets)), "length": numpy.tanh(delta / spread) if spread else numpy.zeros(len(targets))}
    if difficulty is not None:
        columns["difficulty"] = numpy.asarray(difficulty, float)
    features = numpy.column_stack(list(columns.values()))
    at_equal_length = features * [name != "length" for name in columns]
    coefficients = fit_logistic(features, targets, PRIOR**-2)
    drawn = numpy.random.default_rng(seed).integers(0, len(targets), (ROUNDS, len(targets)))
    means = [_predicted(features[rows], targets[rows], at_equal_length[rows]) for rows in drawn]
    low, high = numpy.quantile(means, [TAIL, 1 - TAIL])
    return LengthControlled(
        float(expit(at_equal_length @ coefficients).mean()),
        (float(low), float(high)),
        dict(zip(columns, coefficients.tolist(), strict=True)),
        _doubt(delta),
    )


def _predicted(features: numpy.ndarray, targets: numpy.ndarray, at_equal_length: numpy.ndarray) -> float:
    return float(expit(at_equal_length @ fit_logistic(features, targets, PRIOR**-2)).mean())


def _doubt(delta: numpy.ndarray) -> str | None:
    shorter, longer = (delta < 0).mean(), (delta > 0).mean()
    if min(shorter, longer) >= ONE_SIDED or not delta.any():
        return None
    words = ("longer", "shorter") if longer > shorter else ("shorter", "longer")
    share, other = max(longer, shorter), min(longer, shorter)
    return (
        f"{share:.0%} of the outputs are {words[0]} than the baseline's, and {other:.0%} are {words[1]}: how the judge would "
        "decide at equal length is extrapolated"
    )
