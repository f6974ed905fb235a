"""Results in words."""

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


def with_interval(mean: float, low: float | None, high: float | None) -> str:
    """A mean and its interval, if there is one, three significant digits each."""
    return f"{mean:.3g}" if low is None else f"{mean:.3g} [{low:.3g}, {high:.3g}]"
