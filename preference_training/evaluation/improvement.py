"""How far the losses of a run have fallen since its beginning, and whether that can be told from noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from preference_training.core.errors import UserError
from preference_training.core.metric_names import EVAL_LOSS, EXAMPLES, HIGH, LOW, TRAIN_LOSS, change
from preference_training.losses.registry import build_loss
from preference_training.losses.zero_margin import loss_at_zero_margin

# Of the loss at the start: a smaller gain is none, however well it is measured. Of ln 2 it is a margin of 0.007.
NEGLIGIBLE = 0.005
# Where the interval of the gain reaches further than this, in either direction, the run may have learned, and nothing is said.
SMALL = 0.05
# Beginning and end of a run: its first and last quarter, of at least so many steps, from which a spread can be estimated.
LEAST_STEPS = 3
# How exactly the first step's loss must be the value that a loss starts at: float32, and means over ranks.
AS_DERIVED = 1e-3


@dataclass(frozen=True)
class Improvement:
    """How far a loss has fallen from its value `before` to that `after`, with the 95% interval of the difference."""

    name: str
    before: float
    after: float
    low: float
    high: float

    @property
    def is_learned(self) -> bool:
        """Whether it has fallen beyond doubt, by more than a negligible part."""
        return self.low > 0 and self.before - self.after > NEGLIGIBLE * abs(self.before)

    @property
    def is_nothing(self) -> bool:
        """Whether it has not fallen, and certainly not changed much."""
        small = SMALL * abs(self.before)
        return not self.is_learned and -small < self.low and self.high < small

    @property
    def words(self) -> str:
        """Both values."""
        return f"{self.name} was {self.before:.4g} at the start and is {self.after:.4g} at the end"


def held_out_improvement(evaluations: Sequence[dict]) -> Improvement | None:
    """That of the held-out loss since before training, from the metrics of all evaluations; None where that is not known."""
    if len(evaluations) < 2 or evaluations[0][EXAMPLES] > 0:
        return None
    first, last = evaluations[0], evaluations[-1]
    before, after = first[EVAL_LOSS], last[EVAL_LOSS]
    if not (math.isfinite(before) and math.isfinite(after)):
        return None
    changed = [last.get(name) for name in change(EVAL_LOSS)]
    if None not in changed:
        # Example by example: far more precise than the difference of two means.
        return Improvement("held-out loss", before, after, -changed[2], -changed[1])
    ends = [row.get(f"{EVAL_LOSS}{end}") for row in (first, last) for end in (LOW, HIGH)]
    return None if None in ends else Improvement("held-out loss", before, after, ends[0] - ends[3], ends[1] - ends[2])


def training_improvement(steps: Sequence[dict], loss_keys: Any) -> Improvement | None:
    """That of the training loss from the first to the last steps, from their metrics; None for too few of them.

    A loss that starts at the same value for every example, as DPO's ln 2, is compared with that value, which has no noise.
    loss_keys: the section `loss` of the run's configuration.
    """
    losses = [row[TRAIN_LOSS] for row in steps if math.isfinite(row.get(TRAIN_LOSS, math.nan))]
    size = max(LEAST_STEPS, len(losses) // 4)
    if len(losses) < 2 * LEAST_STEPS:
        return None
    after, error_after = _mean_and_error(losses[-size:])
    before, error_before = _mean_and_error(losses[:size])
    exact = starting_value(loss_keys)
    if exact is not None and abs(losses[0] - exact) <= AS_DERIVED * abs(exact):
        before, error_before = exact, 0.0
    error = math.hypot(error_after, error_before)
    return Improvement("training loss", before, after, before - after - error, before - after + error)


def starting_value(keys: Any) -> float | None:
    """What the loss with these keys is while policy and reference are the same; None if that depends on the example."""
    # Reading a run's directory must not execute code that it names.
    if not isinstance(keys, dict) or keys.get("name") == "own":
        return None
    try:
        return loss_at_zero_margin(build_loss(**keys))
    except (UserError, TypeError, ValueError):
        return None


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean of some steps, and half the width of its 95% interval (Student's): steps are of different examples."""
    mean, number = sum(values) / len(values), len(values)
    variance = sum((value - mean) ** 2 for value in values) / (number - 1)
    return mean, float(stats.t.ppf(0.975, number - 1)) * math.sqrt(variance / number)
