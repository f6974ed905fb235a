"""What the metrics of a run suggest, in plain words."""

from collections.abc import Iterator, Sequence

import numpy

from preference_training.core import metric_names
from preference_training.core.metric_names import EVAL_ACCURACY, EVAL_LOSS, EXAMPLES, GRAD_NORM, HELD_OUT_PROMPTS
from preference_training.evaluation.phrasing import too_few, with_interval
from preference_training.losses.registry import evaluation_depends_on_run
from preference_training.reporting.charts import metric_values
from preference_training.reporting.run_record import RunRecord
from preference_training.tracking.run_files import BAD_STEPS

# The fall of log-probs that is worth mentioning. Unit: nats per response.
NOTABLE_FALL = 10.0
GUIDE = "docs/reading-the-curves.md"


def observations(run: RunRecord) -> list[str]:
    """Everything that the numbers of a run suggest."""
    checks = _too_few_prompts, _falling_logps, _accuracy_at_chance, _overfitting, _clipping
    return [*(f"{text} See {GUIDE}." for check in checks for text in check(run)), *_skipped_steps(run)]


def finite_values(rows: Sequence[dict], metric: str) -> list[float]:
    """The finite values of a metric, in the order of the rows."""
    values = metric_values(rows, metric)
    return values[~numpy.isnan(values)].tolist()


def _change(values: list[float]) -> float:
    """The mean of the last tenth minus that of the first tenth."""
    part = max(1, len(values) // 10)
    return (sum(values[-part:]) - sum(values[:part])) / part


def _too_few_prompts(run: RunRecord) -> Iterator[str]:
    prompts = run.last_evaluation.get(HELD_OUT_PROMPTS)
    if isinstance(prompts, int | float) and (warning := too_few(prompts, "Held-out metrics")):
        yield f"{warning}."


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
    found = f"Held-out reward accuracy is {with_interval(last[accuracy], low, high)}"
    if high < 0.5:
        yield f"{found}, below chance. Are chosen and rejected swapped in the data?"
    elif low <= 0.5:
        yield f"{found}, not distinguishable from chance: the run is too short, lr too low, or the held-out set too small."


def _overfitting(run: RunRecord) -> Iterator[str]:
    if evaluation_depends_on_run(*run.loss):
        return
    # An earlier version logged beta-DPO's loss at a beta that changes between evaluations.
    comparable = [row for row in run.evaluations if not metric_names.loss_is_at_beta_used(row)]
    evaluations = comparable or run.evaluations
    losses = finite_values(evaluations, EVAL_LOSS)
    if len(losses) != len(evaluations) or len(losses) < 3:
        return
    best = min(range(len(losses)), key=losses.__getitem__)
    low = evaluations[-1].get(f"{EVAL_LOSS}/low")
    if low is not None and losses[best] < low:
        examples = evaluations[best][EXAMPLES]
        yield (
            f"Held-out loss was lowest after {examples:,.0f} examples ({losses[best]:.4g}) and is {losses[-1]:.4g} at the end: "
            "the run has overfitted since. Use an earlier checkpoint, or train for fewer epochs."
        )


def _clipping(run: RunRecord) -> Iterator[str]:
    norms, limit = finite_values(run.steps, GRAD_NORM), run.settings.get("max_grad_norm")
    if not norms or not isinstance(limit, int | float):
        return
    share = sum(norm > limit for norm in norms) / len(norms)
    if share > 0.5:
        yield f"The gradient was clipped to max_grad_norm={limit} in {share:.0%} of the steps, which makes these steps smaller."


def _skipped_steps(run: RunRecord) -> Iterator[str]:
    if run.bad_steps:
        count = "1 step was" if len(run.bad_steps) == 1 else f"{len(run.bad_steps)} steps were"
        yield f"{count} skipped because a loss or gradient was not finite. {BAD_STEPS} names the examples."
