"""The learning rate over a run's steps: warm-up, then the shape that `lr_schedule` names."""

import math
from bisect import bisect_right
from collections.abc import Callable


def warmup_steps(config, total_steps: int) -> int:
    """Over how many of a run's optimizer steps the learning rate rises: `warmup_share` of them, else `warmup_steps`."""
    return (config.warmup_steps or 0) if config.warmup_share is None else round(config.warmup_share * total_steps)


def schedule(config, total_steps: int) -> Callable[[int], float]:
    """The learning rate of each optimizer step (from 0) over `lr`: a linear rise, then the shape that `lr_schedule` names.

    linear, cosine and wsd reach `final_lr_share` at the run's last step, cosine also at the last step before each restart;
    inverse_sqrt falls as 1 / sqrt(step). wsd (warm-up, stable, decay: Hu et al. 2024, "MiniCPM") is constant until the last
    `decay_share` of all steps, over which it falls linearly. A share of 0 would be reached one step later: a step with learning
    rate 0 is computed for nothing.
    """
    warmup, final = warmup_steps(config, total_steps), config.final_lr_share
    decay = max(warmup, total_steps - round(config.decay_share * total_steps))
    # Where each fall begins, and where the last one ends.
    starts = restarts(warmup, total_steps, config.lr_restarts)

    def progress(step: int, first: int, end: int) -> float:
        last = end - 1 if final else end
        return min(1.0, max(0.0, (step - first) / max(1, last - first)))

    def cosine(step: int) -> float:
        number = max(0, min(bisect_right(starts, step), len(starts) - 1) - 1)
        return final + (1 - final) * (1 + math.cos(math.pi * progress(step, *starts[number : number + 2]))) / 2

    shapes = {
        "constant": lambda _: 1.0,
        "linear": lambda step: 1 - (1 - final) * progress(step, warmup, total_steps),
        "cosine": cosine,
        "inverse_sqrt": lambda step: math.sqrt((warmup + 1) / (step + 1)),
        "wsd": lambda step: 1 - (1 - final) * progress(step, decay, total_steps),
    }
    shape = shapes[config.lr_schedule]
    return lambda step: (step + 1) / (warmup + 1) if step < warmup else shape(step)


def restarts(warmup: int, total_steps: int, number: int) -> list[int]:
    """The steps, after warm-up, at which each of `number` + 1 parts of equal length begins, and the end of the last one."""
    length = max(0, total_steps - warmup)
    return [warmup + round(length * part / (number + 1)) for part in range(number + 2)]
