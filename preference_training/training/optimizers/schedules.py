"""The learning rate over a run's steps: warm-up, then the shape that `lr_schedule` names."""

import math
from collections.abc import Callable


def warmup_steps(config, total_steps: int) -> int:
    """Over how many of a run's optimizer steps the learning rate rises: `warmup_share` of them, else `warmup_steps`."""
    return (config.warmup_steps or 0) if config.warmup_share is None else round(config.warmup_share * total_steps)


def schedule(config, total_steps: int) -> Callable[[int], float]:
    """The learning rate of each optimizer step (from 0) over `lr`: a linear rise, then the shape that `lr_schedule` names.

    linear and cosine reach `final_lr_share` at the run's last step; inverse_sqrt falls as 1 / sqrt(step). A share of 0 would
    be reached one step later: a step with learning rate 0 is computed for nothing.
    """
    warmup, final = warmup_steps(config, total_steps), config.final_lr_share
    last = total_steps - 1 if final else total_steps
    shapes = {
        "constant": lambda _: 1.0,
        "linear": lambda step: 1 - (1 - final) * progress(step),
        "cosine": lambda step: final + (1 - final) * (1 + math.cos(math.pi * progress(step))) / 2,
        "inverse_sqrt": lambda step: math.sqrt((warmup + 1) / (step + 1)),
    }

    def progress(step: int) -> float:
        return min(1.0, (step - warmup) / max(1, last - warmup))

    shape = shapes[config.lr_schedule]
    return lambda step: (step + 1) / (warmup + 1) if step < warmup else shape(step)
