"""Results in words."""

from collections.abc import Mapping

from preference_training.core.metric_names import HIGH, LOW
from preference_training.core.values import format_number

# With fewer prompts, even an interval is too uncertain to support a decision.
MIN_PROMPTS = 10
# What is to be done then.
MORE_HELD_OUT = "Raise held_out_share, or n_eval_examples if it leaves some out."
# And in the training of a loop's round.
OF_LOOPS = "Rounds are compared on the prompts of rounds.held_out, not on these."


def too_few(prompts: int, what: str) -> str | None:
    """A warning if `what` has too few prompts to support a decision; None if it has enough."""
    if prompts >= MIN_PROMPTS:
        return None
    number = "1 prompt" if prompts == 1 else f"{prompts:,.0f} prompts"
    return f"{what}: {number}, too few to decide anything by; expected at least {MIN_PROMPTS}"


def with_interval(mean: float, low: float | None, high: float | None, digits: int = 3) -> str:
    """A mean and its interval, if there is one, with so many significant digits each."""
    texts = [f"{value:.{digits}g}" for value in (mean, low, high) if value is not None]
    return texts[0] if low is None else f"{texts[0]} [{texts[1]}, {texts[2]}]"


def metric_text(row: Mapping[str, object], metric: str, digits: int = 3) -> str:
    """A metric of a row of metrics.jsonl, with its interval if it has one; a dash where the row has no number.

    digits: significant ones of a metric with an interval.
    """
    value, low, high = (row.get(f"{metric}{end}") for end in ("", LOW, HIGH))
    if not isinstance(value, int | float):
        return "-"
    if isinstance(low, int | float) and isinstance(high, int | float):
        return with_interval(value, low, high, digits)
    return format_number(value)
