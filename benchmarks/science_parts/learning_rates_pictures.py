"""The picture of the numbers of benchmarks/learning_rates.py."""

from __future__ import annotations

from science_parts.drawing import Panel, Series, picture

# What docs/defaults.md has for models below 1B parameters.
USUAL = {"DPO, LoRA": 5e-5, "DPO, all weights": 5e-6, "SFT, LoRA": 5e-4, "SFT, all weights": 1e-4}
NAMES = ("LoRA", "all weights")


def lines(found: dict, loss: str, metric: str) -> list[Series]:
    """A line with a band for LoRA and one for all weights, and the usual rates as points."""
    drawn = []
    for color, name in enumerate(NAMES):
        sweep = f"{loss}, {name}"
        if sweep not in found["sweeps"]:
            continue
        runs = sorted(found["sweeps"][sweep]["runs"], key=lambda run: run["lr"])
        rates = [run["lr"] for run in runs]
        middle, low, high = ([run[metric][end] for run in runs] for end in range(3))
        drawn.append(Series(name, rates, middle, color, low=low, high=high))
        usual = middle[rates.index(USUAL[sweep])]
        drawn.append(Series("", [USUAL[sweep]], [usual], color, is_points=True))
    return drawn


def pictures(found: dict) -> dict[str, str]:
    """The picture by the name of its file."""
    axis = "learning rate (dot: docs/defaults.md)"
    panels = [
        Panel("DPO, beta 0.1", axis, "held-out loss", lines(found, "DPO", "loss"), is_log_x=True),
        Panel("DPO, beta 0.1", axis, "held-out accuracy", lines(found, "DPO", "accuracy"), is_log_x=True),
        Panel("SFT", axis, "held-out loss", lines(found, "SFT", "loss"), is_log_x=True),
    ]
    text = "Over learning rates, of LoRA and of all weights, with 95% intervals: held-out loss and accuracy of DPO, loss of SFT"
    return {"learning-rates.svg": picture([panel for panel in panels if panel.series], text)}
