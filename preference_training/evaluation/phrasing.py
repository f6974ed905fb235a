"""How results are put into words."""

# Below so many prompts an interval is too uncertain itself to decide anything by.
FEWEST_PROMPTS = 10


def too_few(prompts: int, what: str) -> str | None:
    """What is to be said where `what` is of too few prompts to decide anything by; None where there are enough."""
    if prompts >= FEWEST_PROMPTS:
        return None
    number = "1 prompt" if prompts == 1 else f"{prompts:,.0f} prompts"
    return f"{what}: {number}, too few to decide anything by; expected at least {FEWEST_PROMPTS}"


def with_interval(mean: float, low: float | None, high: float | None) -> str:
    """A mean and its interval, if there is one, three significant digits each."""
    return f"{mean:.3g}" if low is None else f"{mean:.3g} [{low:.3g}, {high:.3g}]"
