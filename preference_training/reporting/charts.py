"""Curves as pictures for a page in one file: SVG, with labels in HTML around it, to be read without a script too.

However long a run was, a line has at most BUCKETS places: the mean of each, and from where to where its values went. Shapes: N
points of a line.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy
from markupsafe import Markup, escape

from preference_training.core.metric_names import EXAMPLES

BUCKETS = 120
# Beyond this the distance of two numbers may be none.
LARGEST = 1e150
# Rows of the table under a chart.
TABLE_ROWS = 12
# Points up to which each shows its own interval as a bar, and its mark.
BARS = 30
# Colours, dashes and marks of the lines, which page.css has; more lines than these begin again.
STYLES = 24
# The narrowest plot there is, on a phone, and what a letter of a point's name takes of it. Unit: pixels.
PLOT, LETTER = (280, 170), (6.8, 14)


@dataclass(frozen=True)
class Line:
    """A named line of N points, x rising unless they are few; all are [N] float64 and finite, low and high may be missing.

    low, high: between which values a point stands for, such as an interval. labels: [N], if points have names of their own
    ("" for none), which are then not joined. style: which colour, dashes and mark; is_sparse: each point is marked.
    """

    name: str
    x: numpy.ndarray
    y: numpy.ndarray
    low: numpy.ndarray | None = None
    high: numpy.ndarray | None = None
    labels: tuple[str, ...] = ()
    style: int = 0
    is_sparse: bool = False


def line_of(rows: Sequence[dict], name: str, label: str, style: int = 0, is_sparse: bool = False) -> Line | None:
    """The line of a metric over examples, from rows of metrics.jsonl; None where none of them has a finite value of it.

    Intervals are those that the rows have under NAME/low and NAME/high, where all have one.
    """
    x, y = column(rows, EXAMPLES), column(rows, name)
    there = ~numpy.isnan(x + y)
    if not there.any():
        return None
    bounds = [None, None]
    # Most metrics have no intervals, and looking for them in every row takes as long as the rest.
    if f"{name}/low" in rows[int(there.argmax())]:
        found = [column(rows, f"{name}/{bound}")[there] for bound in ("low", "high")]
        bounds = bounds if numpy.isnan(found).any() else found
    return Line(label, x[there], y[there], *bounds, style=style, is_sparse=is_sparse)


def column(rows: Sequence[dict], name: str) -> numpy.ndarray:
    """What N rows of metrics.jsonl have under a name: [N] float64, NaN for what is no number that can be drawn."""
    values = [row.get(name) for row in rows]
    if set(map(type, values)) != {float}:
        values = list(map(_number, values))
    found = numpy.array(values, float)
    return numpy.where(numpy.abs(found) < LARGEST, found, math.nan)


def _number(value) -> float:
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan


def bucketed(line: Line, buckets: int = BUCKETS) -> Line:
    """A line of at most so many places, each as wide as the others: means of x, y, low and high.

    Without low and high these are the least and the largest value of each place. A line with fewer points stays as it is.
    """
    if len(line.x) <= buckets:
        return line
    first, last = line.x[0], line.x[-1]
    place = numpy.minimum((line.x - first) / max(last - first, 1e-300) * buckets, buckets - 1).astype(int)
    numbers, starts, counts = numpy.unique(place, return_index=True, return_counts=True)
    mean = lambda values: numpy.add.reduceat(values, starts) / counts  # noqa: E731
    if line.low is None:
        low, high = (extreme.reduceat(line.y, starts) for extreme in (numpy.minimum, numpy.maximum))
    else:
        low, high = mean(line.low), mean(line.high)
    assert len(numbers) <= buckets
    return replace(line, x=mean(line.x), y=mean(line.y), low=low, high=high)


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from low to high, about so many."""
    step = 10 ** math.floor(math.log10(max(high - low, 1e-300) / about))
    step = next((step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= about), step * 10)
    number = math.ceil(low / step - 1e-9)
    found = []
    while number * step <= high + 1e-9 * step and len(found) < 4 * about:
        found.append(number * step)
        number += 1
    return found


def tick_label(value: float) -> str:
    """A round number beside an axis, as short as it can be: 0.5, 500, 20k, 6.4M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4) and abs(value) < 1e13:
            return f"{value / size:.6g}{letter}"
    return shown(value)


def shown(value: float) -> str:
    """A number as a label has it: 12,800, 0.693, 1.2e-07."""
    if value != 0 and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


# ---- the picture ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """What a chart shows: x from left to right, y from bottom to top. In the picture both go from 0 to 1000."""

    left: float
    right: float
    bottom: float
    top: float

    @classmethod
    def around(cls, lines: Sequence[Line]) -> "Frame":
        """All points of lines, with some room; of long ones all means and 9 of 10 values, so that one far away does not press
        the others flat, and what hardly moves is not drawn as if it did.
        """
        drawn = [bucketed(line) for line in lines]
        x = numpy.concatenate([line.x for line in drawn])
        bounds = [bound for line in lines if len(line.x) <= BARS for bound in (line.low, line.high) if bound is not None]
        usual = [numpy.quantile(line.y, [0.05, 0.95]) for line in lines]
        y = numpy.concatenate([*(line.y for line in drawn), *bounds, *usual])
        return cls(*_with_room(x.min(), x.max(), 0.02), *_with_room(y.min(), y.max(), 0.06))

    def places(self, x: numpy.ndarray, y: numpy.ndarray) -> list[str]:
        """Points in the picture, as "x,y"."""
        across = 1000 * (x - self.left) / (self.right - self.left)
        # What lies far outside is cut there, and its number must not be too large for a browser.
        down = (1000 * (self.top - y) / (self.top - self.bottom)).clip(-1e4, 1e4)
        return [f"{a:.1f},{b:.1f}" for a, b in zip(across.tolist(), down.tolist(), strict=True)]


def _with_room(low: float, high: float, share: float) -> tuple[float, float]:
    size = max(abs(low), abs(high))
    # A mean of equal values is not always equal to them.
    room = (high - low) * share if high - low > 1e-9 * size else max(size * 0.1, 1e-9)
    return float(low - room), float(high + room)


def chart(title: str, lines: Sequence[Line | None], note: str = "", x_name: str = "examples") -> Markup:
    """A figure with its legend, values under the pointer and a table; nothing where no line has a point."""
    whole = [line for line in lines if line is not None]
    if not whole:
        return Markup()
    drawn, frame = [bucketed(line) for line in whole], Frame.around(whole)
    parts = [
        Markup('<figure class="chart"><figcaption><strong>{}</strong>{}</figcaption>').format(title, _note(note)),
        Markup('<ul class="legend">{}</ul>').format(Markup().join(map(_legend, drawn))),
        _plot(title, drawn, frame, x_name),
        _table(title, whole, x_name),
        Markup('<script type="application/json">{}</script></figure>').format(Markup(_data(drawn, frame, x_name))),
    ]
    return Markup("\n").join(parts)


def _note(note: str) -> Markup:
    return Markup(" <span>{}</span>").format(note) if note else Markup()


def _legend(line: Line) -> Markup:
    stroke = Markup() if line.labels else Markup('<line x1="1" y1="5" x2="29" y2="5"/>')
    dot = _dots(["15,5"]) if _is_marked(line) else Markup()
    sample = Markup('<svg viewBox="0 0 30 10" aria-hidden="true">{}{}</svg>').format(stroke, dot)
    return Markup('<li class="s{}">{}{}</li>').format(line.style % STYLES, sample, line.name)


def _dots(places: Iterable[str]) -> Markup:
    """A mark at each place: what page.css makes a circle, a square, or one of these with a hole."""
    at = " ".join(f"M{place}h0" for place in places)
    return Markup('<path class="dots" d="{}"/><path class="holes" d="{}"/>').format(at, at)


def _plot(title: str, lines: Sequence[Line], frame: Frame, x_name: str) -> Markup:
    described = "; ".join(f"{line.name}: {shown(line.y[0])} to {shown(line.y[-1])}" for line in lines)
    across = [(_share(x, frame.left, frame.right), tick_label(x)) for x in ticks(frame.left, frame.right)]
    up = [(_share(y, frame.bottom, frame.top), tick_label(y)) for y in ticks(frame.bottom, frame.top, about=5)]
    labels = [Markup('<span class="x" style="left:{}%">{}</span>').format(*place) for place in across]
    labels += [Markup('<span class="y" style="bottom:{}%">{}</span>').format(*place) for place in up]
    grid = " ".join(f"M0 {1000 - 10 * float(share):.1f}H1000" for share, _ in up)
    svg = Markup(
        '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{}"><path class="grid" d="{}"/>{}</svg>'
    ).format(f"{title}. {described}", grid, Markup().join(_drawn(line, frame) for line in lines))
    return Markup(
        '<div class="plot" tabindex="0" role="group" aria-label="{}: arrow keys read its values">{}{}{}<i class="cursor"></i>'
        '<div class="readout" aria-live="polite"></div></div><p class="axis">{}</p>'
    ).format(title, svg, Markup().join(labels), _point_names(lines, frame), x_name)


def _share(value: float, low: float, high: float) -> str:
    return f"{100 * (value - low) / (high - low):.2f}"


def _drawn(line: Line, frame: Frame) -> Markup:
    """A line, the band or bars around it, and its points where they are marked."""
    places = frame.places(line.x, line.y)
    parts = []
    if line.low is not None:
        below, above = (frame.places(line.x, bound) for bound in (line.low, line.high))
        if len(places) <= BARS:
            bars = " ".join(f"M{one}L{other}" for one, other in zip(below, above, strict=True))
            parts.append(Markup('<path class="bar" d="{}"/>').format(bars))
        else:
            parts.append(Markup('<polygon class="band" points="{}"/>').format(" ".join(below + above[::-1])))
    if not line.labels:
        parts.append(Markup('<polyline points="{}"/>').format(" ".join(places)))
    if _is_marked(line):
        parts.append(_dots(places))
    return Markup('<g class="s{}">{}</g>').format(line.style % STYLES, Markup().join(parts))


def _is_marked(line: Line) -> bool:
    """Whether each point has a mark: where there are many, they would hide the line."""
    return bool(line.labels) or len(line.x) == 1 or (line.is_sparse and len(line.x) <= BARS)


def _point_names(lines: Sequence[Line], frame: Frame) -> Markup:
    """Names beside their points, of those that have room on the narrowest plot; the others are in the legend and the table."""
    width, height = PLOT
    points = [(line, k, *_pixels(line.x[k], line.y[k], frame)) for line in lines for k in range(len(line.labels))]
    taken = [(x - 5, x + 5, y - 5, y + 5) for _, _, x, y in points]
    found = []
    for line, k, x, y in points:
        half, high = len(line.labels[k]) * LETTER[0] / 2, LETTER[1]
        middle = min(max(x, half), width - half)
        for side, bottom in {"above": y + 6, "below": y - 6 - high}.items():
            box = middle - half, middle + half, bottom, bottom + high
            is_free = not any(box[0] < b and a < box[1] and box[2] < d and c < box[3] for a, b, c, d in taken)
            if line.labels[k] and is_free and 2 * half < width and bottom >= 0 and box[3] <= height:
                taken.append(box)
                place = Markup(
                    '<span class="name {}" style="left:clamp({:.0f}px,{:.2f}%,100% - {:.0f}px);bottom:{:.2f}%">{}</span>'
                )
                found.append(place.format(side, half, 100 * x / width, half, 100 * y / height, line.labels[k]))
                break
    return Markup().join(found)


def _pixels(x: float, y: float, frame: Frame) -> tuple[float, float]:
    """A point's place on the narrowest plot, from its lower left corner."""
    width, height = PLOT
    return (
        width * (x - frame.left) / (frame.right - frame.left),
        height * (y - frame.bottom) / (frame.top - frame.bottom),
    )


def _table(title: str, lines: Sequence[Line], x_name: str) -> Markup:
    """The values in a few rows, for those who do not see the picture; of long lines the means of what is nearest to each."""
    cells: dict[float, list[str]] = {}
    for number, line in enumerate(_thinned(lines)):
        for k, (x, y) in enumerate(zip(line.x.tolist(), line.y.tolist(), strict=True)):
            interval = f" [{shown(line.low[k])}, {shown(line.high[k])}]" if line.low is not None else ""
            name = f"{line.labels[k]}: " if line.labels and line.labels[k] not in ("", line.name) else ""
            cells.setdefault(x, [""] * len(lines))[number] = f"{name}{shown(y)}{interval}"
    head = Markup().join(Markup("<th>{}</th>").format(line.name) for line in lines)
    rows = Markup().join(
        Markup("<tr><th>{}</th>{}</tr>").format(shown(x), Markup().join(Markup("<td>{}</td>").format(cell) for cell in row))
        for x, row in sorted(cells.items())
    )
    table = Markup("<table><thead><tr><th>{}</th>{}</tr></thead><tbody>{}</tbody></table>").format(x_name, head, rows)
    return Markup(
        '<details><summary>values</summary><div class="wide" tabindex="0" role="region" aria-label="values of {}">{}</div>'
        "</details>"
    ).format(title, table)


def _thinned(lines: Sequence[Line]) -> list[Line]:
    """Lines at few places: of those whose points are marked some points as they are, of the others the means around these."""
    if any(line.labels for line in lines):
        return list(lines)
    marked = [_some_points(line) if line.is_sparse else None for line in lines]
    x = [line.x for line in marked if line is not None]
    first, last = min(line.x[0] for line in lines), max(line.x[-1] for line in lines)
    places = numpy.unique(numpy.concatenate(x)) if x else numpy.unique(numpy.linspace(first, last, TABLE_ROWS))
    return [_means_around(places, line) if few is None else few for few, line in zip(marked, lines, strict=True)]


def _some_points(line: Line) -> Line:
    kept = numpy.unique(numpy.linspace(0, len(line.x) - 1, TABLE_ROWS).round().astype(int))
    bounds = [None if bound is None else bound[kept] for bound in (line.low, line.high)]
    return replace(line, x=line.x[kept], y=line.y[kept], low=bounds[0], high=bounds[1])


def _means_around(places: numpy.ndarray, line: Line) -> Line:
    """A line at some places, rising: at each the mean of those points to which no other place is nearer."""
    numbers, starts, counts = numpy.unique(
        numpy.searchsorted((places[1:] + places[:-1]) / 2, line.x), return_index=True, return_counts=True
    )
    return replace(line, x=places[numbers], y=numpy.add.reduceat(line.y, starts) / counts, low=None, high=None)


def _data(lines: Sequence[Line], frame: Frame, x_name: str) -> str:
    """What the page's script reads, in JSON that cannot end the element that it stands in."""
    listed = [
        {"name": line.name, "labels": line.labels, "style": line.style % STYLES}
        | {name: _short(values) for name in ("x", "y", "low", "high") if (values := getattr(line, name)) is not None}
        for line in lines
    ]
    bounds = [frame.left, frame.right, frame.bottom, frame.top]
    return json_in_html({"x": x_name, "frame": bounds, "lines": listed})


def json_in_html(value) -> str:
    """A value as JSON that may stand in an element of a page."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _short(values: numpy.ndarray) -> list[float]:
    return [float(f"{value:.5g}") if abs(value) < 1e5 else round(value, 1) for value in values.tolist()]


def words_marked(text: str, other: str) -> Markup:
    """A text in which the words that another text does not have at that place are marked as inserted."""
    import re
    from difflib import SequenceMatcher

    if text == other:
        return escape(text)
    # A word with the blanks behind it: blanks of their own would match everywhere, which takes minutes to sort out.
    one, two = (re.findall(r"^\s+|\S+\s*", each) for each in (other, text))
    parts = []
    for change, _, _, start, end in SequenceMatcher(None, one, two).get_opcodes():
        words = escape("".join(two[start:end]))
        parts.append(Markup("<ins>{}</ins>").format(words) if change != "equal" and words.strip() else words)
    return Markup().join(parts)
