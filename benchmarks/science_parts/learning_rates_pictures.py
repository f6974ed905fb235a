"""docs/learning-rates.svg, of the raw numbers of benchmarks/learning_rates.py."""

from __future__ import annotations

from collections.abc import Callable

from science_parts.drawing import Panel, Series, picture

# What docs/defaults.md has for models below 1B parameters.
USUAL = {"DPO, LoRA": 5e-5, "DPO, all weights": 5e-6, "SFT, LoRA": 5e-4, "SFT, all weights": 1e-4}
DPO = (
    ("DPO, LoRA", 0.05, "LoRA, beta 0.05"),
    ("DPO, LoRA", 0.5, "LoRA, beta 0.5"),
    ("DPO, all weights", 0.05, "all weights, beta 0.05"),
    ("DPO, LoRA, people's labels", 0.05, "LoRA, beta 0.05, people's labels"),
)
SFT = (("SFT, LoRA", None, "LoRA"), ("SFT, all weights", None, "all weights"))


def runs_at(found: dict, sweep: str, beta: float | None) -> list[dict]:
    """The runs of a sweep at a beta, in the order of their learning rates."""
    runs = found["sweeps"].get(sweep, {"runs": []})["runs"]
    return sorted((run for run in runs if beta is None or run["beta"] == beta), key=lambda run: run["lr"])


def lines(found: dict, wanted: tuple, metric: str, per: Callable[[dict], float] = lambda run: 1.0) -> list[Series]:
    """A line with a band for each of the wanted sweeps, its metric divided by `per` of the run; the usual rates as points."""
    drawn = []
    for color, (sweep, beta, name) in enumerate(wanted):
        runs = runs_at(found, sweep, beta)
        if not runs:
            continue
        rates = [run["lr"] for run in runs]
        middle, low, high = ([run[metric][end] / per(run) for run in runs] for end in range(3))
        drawn.append(Series(name, rates, middle, color, low=low, high=high))
        usual = USUAL.get(sweep)
        if usual in rates:
            drawn.append(Series("", [usual], [middle[rates.index(usual)]], color, is_points=True))
    return drawn


def pictures(found: dict) -> dict[str, str]:
    """The picture by its name in docs/."""
    axis = "learning rate (dot: docs/defaults.md)"
    panels = [
        Panel("DPO", axis, "held-out accuracy", lines(found, DPO, "accuracy"), is_log_x=True),
        Panel("DPO", axis, "held-out margin / beta, nats", lines(found, DPO, "margin", lambda run: run["beta"]), is_log_x=True),
        Panel("SFT", axis, "held-out loss", lines(found, SFT, "loss"), is_log_x=True),
    ]
    text = (
        "Over learning rates, with 95% intervals: held-out accuracy and margin of DPO with LoRA at two betas, of all weights, and "
        "with people's labels; held-out loss of SFT"
    )
    return {"learning-rates.svg": picture(panels, text)}
