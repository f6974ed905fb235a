"""docs/science-closed-form.svg, of the raw numbers of closed_form.py."""

from __future__ import annotations

from science_parts.drawing import Panel, Series, picture

COLORS = {"DPO": 0, "conservative": 1, "robust": 2, "IPO": 3}


def _title(run: dict) -> str:
    if run["loss"] != "dpo":
        return {"ipo": "IPO", "robust": "robust"}[run["loss"]]
    return "conservative" if "label_smoothing" in run else "DPO"


def _convergence(found: dict, beta: float) -> Panel:
    """The divergence from the closed form over steps, at one beta."""
    lines = []
    for run in found["many"]:
        if run["beta"] != beta:
            continue
        title, values = _title(run), [max(value, 1e-16) for value in run["kl_from_optimum"]]
        labels = f"{100 * run['flipped']:g}% flipped" if run["flipped"] else "clean labels"
        goal = "IPO's optimum" if title == "IPO" else "exp(r / beta)"
        lines.append(
            Series(
                f"{title}, {labels}: to {goal}",
                range(len(values)),
                values,
                COLORS[title],
                is_dashed=title != "IPO" and bool(run["flipped"]),
            )
        )
    return Panel(f"32 responses, beta {beta:g}", "steps", "KL from the closed form, nats", lines, is_log_y=True)


def _margins(found: dict) -> Panel:
    """Learned margins as points, the algebra's as lines, over the true difference of rewards."""
    two, lines = found["two"], []
    order = sorted(range(len(two["reward_difference"])), key=lambda at: two["reward_difference"][at])
    x = [two["reward_difference"][at] for at in order]
    for title, color in COLORS.items():
        lines.append(Series(f"{title}, expected", x, [two[title]["expected"][at] for at in order], color))
    for title, color in COLORS.items():
        lines.append(Series("learned" * (color == 0), x, [two[title]["margin"][at] for at in order], color, is_points=True))
    return Panel("Two responses, 20% flipped, beta 0.5", "true difference of rewards", "margin, nats", lines)


def _certain(found: dict) -> Panel:
    """Margins of a pair whose label is always the same."""
    certain = found["certain"]
    x = certain["steps"][1:]
    names = {"robust": "robust (assumes 20% flips)", "conservative": "conservative (smoothing 0.2)"}
    lines = [Series(names.get(title, title), x, certain[title][1:], color) for title, color in COLORS.items()]
    return Panel("One pair, always the same label", "steps", "margin, nats", lines, is_log_x=True, is_log_y=True)


def pictures(found: dict) -> dict[str, str]:
    """The picture by its name in docs/."""
    panels = [_convergence(found, 0.5), _margins(found), _certain(found)]
    text = (
        "KL divergence from the closed form over steps; learned margins on the expected curves; margins of a pair that is sure"
    )
    return {"science-closed-form.svg": picture(panels, text)}
