"""docs/science-rates.svg, of the raw numbers of rates.py."""

from __future__ import annotations

from science_parts.drawing import Panel, Series, picture
from science_parts.rates import run_of


def _divergence(found: dict, optimizer: str) -> Panel:
    """KL over learning rates, a line for each beta."""
    run = run_of(found, optimizer, "pretrained")
    lines = [
        Series(f"beta {beta:g}", run["rates"], [row[at] for row in run["kl"]], color)
        for color, (at, beta) in enumerate(enumerate(found["betas"]))
    ]
    title = f"{optimizer}, 36 steps"
    return Panel(title, "learning rate", "KL from the reference, nats", lines, is_log_x=True, is_log_y=True)


def _schedules(found: dict) -> Panel:
    """Win rates of AdamW over learning rates, a line for each schedule."""
    at, lines = found["betas"].index(found["kept"]), []
    for color, name in enumerate(("pretrained", "a tenth", "original")):
        run = run_of(found, "AdamW", name)
        lines.append(Series(run["schedule"], run["rates"], [row[at] for row in run["win_rate"]], color))
    return Panel(
        "AdamW, beta 0.1: warm-up and schedule", "learning rate", "win rate against the reference", lines, is_log_x=True
    )


def pictures(found: dict) -> dict[str, str]:
    """The picture by its name in docs/."""
    text = (
        "KL divergence over learning rates for each beta, of AdamW and of SGD; win rates over learning rates for each schedule"
    )
    panels = [_divergence(found, "AdamW"), _divergence(found, "SGD"), _schedules(found)]
    return {"science-rates.svg": picture(panels, text)}
