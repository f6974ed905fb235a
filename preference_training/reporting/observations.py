"""What else the metrics of a run suggest, in plain words; what its reader must know first is in `findings`."""

from collections.abc import Iterator, Sequence

import numpy

from preference_training.core import metric_names
from preference_training.core.metric_names import EVAL_ACCURACY, GRAD_NORM
from preference_training.evaluation.phrasing import with_interval
from preference_training.reporting.charts import metric_values
from preference_training.reporting.run_record import RunRecord
from preference_training.tracking.run_files import BAD_STEPS

# The fall of log-probs that is worth mentioning. Unit: nats per response.
NOTABLE_FALL = 10.0
GUIDE = "docs/reading-the-curves.md"


def observations(run: RunRecord) -> list[str]:
    """Everything that the numbers of a run suggest."""
    checks = _falling_logps, _accuracy_at_chance, _clipping
    return [*(f"{text} See {GUIDE}." for check in checks for text in check(run)), *_skipped_steps(run)]


def finite_values(rows: Sequence[dict], metric: str) -> list[float]:
    """The finite values of a metric, in the order of the rows."""
    values = metric_values(rows, metric)
    return values[~numpy.isnan(values)].tolist()


def _change(values: list[float]) -> float:
    """The mean of the last tenth minus that of the first tenth."""
    part = max(1, len(values) // 10)
    return (sum(values[-part:]) - sum(values[:part])) / part


def _falling_logps(run: RunRecord) -> Iterator[str]:
    split, rows = ("eval", run.evaluations) if len(run.evaluations) > 1 else ("train", run.steps)
    chosen, margins = (
        finite_values(rows, metric_names.logps(split, "chosen")),
        finite_values(rows, metric_names.reward(split, "margins")),
    )
    if len(margins) > 1 and _change(chosen) < -NOTABLE_FALL and _change(margins) > 0:
        beta = run.settings.get("loss.beta")
        usual = f" This is usual with beta {beta}." if isinstance(beta, float) and beta <= 0.1 else ""
        yield (
            f"The log-prob of preferred responses fell by {-_change(chosen):.0f} nats while the margin grew by "
            f"{_change(margins):.3g}: the loss only asks that it falls less than that of rejected ones.{usual} Check the "
            "samples: if they still read well, the run is fine."
        )


def _accuracy_at_chance(run: RunRecord) -> Iterator[str]:
    accuracy, last = EVAL_ACCURACY, run.last_evaluation
    low, high = last.get(f"{accuracy}/low"), last.get(f"{accuracy}/high")
    if low is None or high is None or not run.steps:
        return
    if low <= 0.5 <= high:
        yield (
            f"Held-out reward accuracy is {with_interval(last[accuracy], low, high)}, not distinguishable from chance: the run "
            "is too short, lr too low, or the held-out set too small."
        )


def _clipping(run: RunRecord) -> Iterator[str]:
    norms, limit = finite_values(run.steps, GRAD_NORM), run.settings.get("max_grad_norm")
    if not norms or not isinstance(limit, int | float):
        return
    share = sum(norm > limit for norm in norms) / len(norms)
    # The others divide by the size of recent gradients: a limit that all exceed changes none of their steps.
    if share > 0.5 and run.settings.get("optimizer") == "SGD":
        yield f"The gradient was clipped to max_grad_norm={limit} in {share:.0%} of the steps, which makes these steps smaller."


def _skipped_steps(run: RunRecord) -> Iterator[str]:
    if run.bad_steps:
        count = "1 step was" if len(run.bad_steps) == 1 else f"{len(run.bad_steps)} steps were"
        yield f"{count} skipped because a loss or gradient was not finite. {BAD_STEPS} names the examples."
