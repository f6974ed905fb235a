"""Pictures of results: charts side by side, as one SVG that needs nothing else and follows the reader's light or dark mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from preference_training.reporting.charts import tick_labels, ticks

# Of one chart. Unit: pixels.
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 400, 330, 64, 44, 52, 14
LEGEND_ROW = 18

STYLE = """
.ground{fill:#fbfbf8} .frame{fill:none;stroke:#9aa1ad} .grid{stroke:#e3e4df} text{fill:#22262e;font:13px system-ui,sans-serif}
.title{font-weight:600;font-size:14px} .small{font-size:11.5px;fill:#5b6270} .l{fill:none;stroke-width:1.8}
.dash{stroke-dasharray:5 3} .band{stroke:none;opacity:.16}
.c0{stroke:#1f77b4;fill:#1f77b4} .c1{stroke:#b5520f;fill:#b5520f} .c2{stroke:#2f7d3e;fill:#2f7d3e}
.c3{stroke:#7d4fa3;fill:#7d4fa3}
.c4{stroke:#a13d63;fill:#a13d63} .c5{stroke:#6d6a1c;fill:#6d6a1c} .c6{stroke:#5b6270;fill:#5b6270} .l.l{fill:none}
@media (prefers-color-scheme:dark){.ground{fill:#1c1f26} .frame{stroke:#6b7280} .grid{stroke:#31363f} text{fill:#e8eaee}
.small{fill:#a9b0bd} .c0{stroke:#5aa2dc;fill:#5aa2dc} .c1{stroke:#e08a4b;fill:#e08a4b} .c2{stroke:#63b876;fill:#63b876}
.c3{stroke:#b38ad6;fill:#b38ad6} .c4{stroke:#dd7ba0;fill:#dd7ba0} .c5{stroke:#c4bf5a;fill:#c4bf5a}
.c6{stroke:#a9b0bd;fill:#a9b0bd}}
"""


@dataclass(frozen=True)
class Series:
    """A line, or with is_points points; without a name not in the legend. color: its number.

    low, high: of a band around the line, or of each point's interval; x_low, x_high: of each point's interval across.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int
    is_dashed: bool = False
    is_points: bool = False
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    x_low: Sequence[float] = ()
    x_high: Sequence[float] = ()


@dataclass(frozen=True)
class Panel:
    """One chart. y_range: what of y is shown, by default all. is_log_x, is_log_y: logarithmic axes, in powers of ten."""

    title: str
    x_name: str
    y_name: str
    series: Sequence[Series]
    is_log_x: bool = False
    is_log_y: bool = False
    y_range: tuple[float, float] | None = None


def _axis(
    values: list[float], is_log: bool, bounds: tuple[float, float] | None
) -> tuple[float, float, list[tuple[float, str]]]:
    """Low and high end of an axis, and its ticks with their labels; for a logarithmic one in powers of ten."""
    low, high = bounds or (min(values), max(values))
    if is_log:
        low, high = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
        step = max(1, math.ceil((high - low) / 6))
        return low, high, [(at, f"{10.0**at:g}") for at in range(low, high + 1, step)]
    room = 0 if bounds else 0.04 * (high - low or 1.0)
    marks = ticks(low - room, high + room, about=5)
    return low - room, high + room, list(zip(marks, tick_labels(marks), strict=True))


def _panel(panel: Panel, left: float, legend_rows: int) -> list[str]:
    top = TOP + LEGEND_ROW * legend_rows
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    all_x = [x for line in panel.series for x in (*line.x, *line.x_low, *line.x_high)]
    all_y = [y for line in panel.series for y in (*line.y, *line.low, *line.high)]
    x_low, x_high, x_ticks = _axis(all_x, panel.is_log_x, None)
    y_low, y_high, y_ticks = _axis(all_y, panel.is_log_y, panel.y_range)
    to_x = lambda x: left + LEFT + across * ((math.log10(x) if panel.is_log_x else x) - x_low) / (x_high - x_low)  # noqa: E731

    def to_y(y: float) -> float:
        at = (math.log10(max(y, 10.0**y_low)) if panel.is_log_y else y) - y_low
        return top + down * (1 - min(max(at / (y_high - y_low), -0.02), 1.02))

    parts = [f'<text class="title" x="{left + LEFT}" y="26">{escape(panel.title)}</text>']
    for number, line in enumerate(line for line in panel.series if line.name):
        parts += _legend(line, left + LEFT, 46 + LEGEND_ROW * number)
    for at, text in y_ticks:
        y = top + down * (1 - (at - y_low) / (y_high - y_low))
        parts.append(f'<path class="grid" d="M{left + LEFT} {y:.1f}h{across}"/>')
        parts.append(f'<text class="small" x="{left + LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for at, text in x_ticks:
        x = left + LEFT + across * (at - x_low) / (x_high - x_low)
        parts.append(f'<text class="small" x="{x:.1f}" y="{top + down + 16}" text-anchor="middle">{text}</text>')
    parts.append(f'<rect class="frame" x="{left + LEFT}" y="{top}" width="{across}" height="{down}"/>')
    x, y = left + LEFT + across / 2, top + down / 2
    parts.append(f'<text class="small" x="{x}" y="{top + down + 36}" text-anchor="middle">{escape(panel.x_name)}</text>')
    turned = f'transform="rotate(-90 {left + 14} {y})"'
    parts.append(f'<text class="small" x="{left + 14}" y="{y}" text-anchor="middle" {turned}>{escape(panel.y_name)}</text>')
    for line in panel.series:
        places = [f"{to_x(a):.1f} {to_y(b):.1f}" for a, b in zip(line.x, line.y, strict=True)]
        edges = [[f"{to_x(a):.1f} {to_y(b):.1f}" for a, b in zip(line.x, edge, strict=True)] for edge in _edges(line)]
        sides = [[f"{to_x(a):.1f}" for a in edge] for edge in (line.x_low, line.x_high)]
        parts += _intervals(line.color, places, edges, sides) if line.is_points else []
        parts += _drawn(line, places, edges)
    return parts


def _edges(line: Series) -> list[Sequence[float]]:
    return [line.low, line.high] if line.low else []


def _intervals(color: int, places: list[str], edges: list[list[str]], sides: list[list[str]]) -> list[str]:
    """The intervals of points, upright and across."""
    drawn = [f"M{low}L{high}" for low, high in zip(*edges, strict=True)] if edges else []
    drawn += [f"M{a} {at.split()[1]}H{b}" for at, a, b in zip(places, *sides, strict=True)] if sides[0] else []
    return [f'<path class="l c{color}" d="{"".join(drawn)}"/>'] if drawn else []


def _drawn(line: Series, places: list[str], edges: list[list[str]]) -> list[str]:
    if line.is_points:
        return [f'<circle class="c{line.color}" cx="{at.split()[0]}" cy="{at.split()[1]}" r="2.6"/>' for at in places]
    band = [f'<path class="c{line.color} band" d="M{"L".join(edges[0] + edges[1][::-1])}Z"/>'] if edges else []
    return [*band, f'<path class="l c{line.color}{" dash" * line.is_dashed}" d="M{"L".join(places)}"/>']


def _legend(line: Series, x: float, y: float) -> list[str]:
    name = f'<text class="small" x="{x + 32}" y="{y + 4}">{escape(line.name)}</text>'
    if line.is_points:
        return [f'<circle class="c{line.color}" cx="{x + 13}" cy="{y}" r="2.6"/>', name]
    return [f'<path class="l c{line.color}{" dash" * line.is_dashed}" d="M{x} {y}h26"/>', name]


def picture(panels: Sequence[Panel], description: str) -> str:
    """The whole SVG."""
    rows = max(sum(bool(line.name) for line in panel.series) for panel in panels)
    width, height = WIDTH * len(panels), HEIGHT + LEGEND_ROW * rows
    parts = [part for number, panel in enumerate(panels) for part in _panel(panel, WIDTH * number, rows)]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(description)}">'
    )
    ground = f'<rect class="ground" width="{width}" height="{height}"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", ground, *parts, "</svg>", ""])
