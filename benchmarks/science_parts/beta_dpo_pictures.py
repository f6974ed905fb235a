"""docs/science-beta-dpo.svg, of the raw numbers of beta_dpo.py."""

from __future__ import annotations

from science_parts.beta_dpo import BETAS, FOLLOWED, PAIRS, advantage
from science_parts.drawing import Panel, Series, picture

COLORS = {"DPO": 0, "conservative": 1, "robust": 2, "IPO": 3, "filtering": 5, "scaling": 6, "beta-DPO": 4, "beta-DPO, trend": 4}
SHOWN = ("robust", "filtering", "scaling", "beta-DPO")
LEVEL, SHARE = 1.0, 0.2


def conditions(found: dict, is_mixed: bool = False, pairs: int = PAIRS) -> list[dict]:
    """The conditions of one kind of pairs, by their share of flipped labels."""
    return [each for each in found["conditions"] if (each["mixed"], each["pairs"]) == (is_mixed, pairs)]


def _mean(rows: list[list[float]]) -> list[float]:
    return [sum(row) / len(row) for row in rows]


def _frontiers(found: dict) -> Panel:
    """Win rate against divergence, a point for each beta, averaged over seeds."""
    [share] = [each for each in conditions(found) if each["flipped"] == SHARE]
    lines = []
    for name in ("DPO", "conservative", "robust", "IPO", "filtering", "beta-DPO"):
        at = found["methods"].index(name)
        kl, wins = _mean(share["kl"][at]), _mean(share["win_rate"][at])
        lines.append(Series(name, kl, wins, COLORS[name], is_dashed=name in ("IPO", "conservative")))
    return Panel("20% flipped: a point for each beta", "KL from the reference, nats", "win rate against it", lines)


def _advantages(found: dict) -> Panel:
    """Win rate minus DPO's at the same divergence, over the share of flipped labels."""
    shares, lines = conditions(found), []
    for name in SHOWN:
        rows = [(share["flipped"], *advantage(found, share, name, LEVEL)) for share in shares]
        x, mean, low, high = (list(column) for column in zip(*[row for row in rows if row[1] == row[1]], strict=True))
        lines.append(Series(name, x, mean, COLORS[name], low=low, high=high))
    lines.append(Series("", [0.0, 0.4], [0.0, 0.0], COLORS["DPO"]))
    title = f"Win rate minus DPO's at {LEVEL:g} nat"
    return Panel(title, "share of flipped labels", "difference, 95% interval by seed", lines, y_range=(-0.016, 0.016))


def _betas(found: dict) -> Panel:
    """The beta in force over the one that was asked for, and what it is without lag."""
    [share] = [each for each in conditions(found) if each["flipped"] == SHARE]
    lines = []
    for name in ("beta-DPO", "beta-DPO, trend"):
        means = share["course"][name]
        title = {"beta-DPO": "threshold=running_mean, the paper's", "beta-DPO, trend": "threshold=trend"}[name]
        places = [10 * at + 5 for at in range(len(means))]
        lines.append(Series(title, places, means, COLORS[name], is_dashed=name != "beta-DPO"))
    return Panel(f"beta-DPO, loss.beta={FOLLOWED:g}, 20% flipped", "steps", "beta in force over loss.beta", lines)


def pictures(found: dict) -> dict[str, str]:
    """The picture by its name in docs/."""
    assert found["betas"] == list(BETAS)
    text = "Win rate against KL divergence, its difference from DPO's at the same divergence, and beta in force over steps"
    return {"science-beta-dpo.svg": picture([_frontiers(found), _advantages(found), _betas(found)], text)}
