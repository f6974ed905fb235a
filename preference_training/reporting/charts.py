"""Line charts for self-contained pages: SVG with HTML labels, readable without a script.

However long a run, a line is drawn with at most BUCKETS points: the mean and the range of each bucket. Shapes: N points of a
line.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy
from markupsafe import Markup

from preference_training.core.values import format_number

BUCKETS = 120
# Differences of larger values may overflow.
MAX_MAGNITUDE = 1e150
# Rows of the table below a chart.
TABLE_ROWS = 12
# Up to this many points, each has a marker and an error bar.
MAX_MARKERS = 30
# Measurements are joined, by a faint line, from so many on.
FEWEST_JOINED = 4
# Combinations of color, dash pattern and marker in page.css; further lines reuse them.
NUM_STYLES = 24
# Width and height of the narrowest plot, on a phone, and of a character in a point's label. Unit: pixels.
PLOT, CHARACTER = (280, 170), (6.8, 14)
# Values that differ by less, relative to their size, are drawn as equal: what is left is noise.
FLAT = 1e-3
# Units of an axis, and their letters.
UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Line:
    """A named line of N points, [N] float64, all finite, by rising x.

    low, high: the interval or range of each point, if known. labels: [N] names of single points ("" for none), which are then
    drawn unconnected. style: number of its color, dash pattern and marker. is_sparse: its points are measurements, far apart:
    each is marked, and what joins them is faint. is_noisy: drawn as its running mean. raw: [N], what y is the running mean of.
    """

    name: str
    x: numpy.ndarray
    y: numpy.ndarray
    low: numpy.ndarray | None = None
    high: numpy.ndarray | None = None
    labels: tuple[str, ...] = ()
    style: int = 0
    is_sparse: bool = False
    is_noisy: bool = False
    raw: numpy.ndarray | None = None


@dataclass(frozen=True)
class Axes:
    """What the axes of a chart show.

    low, high: no value of y can lie beyond; ignored where one does. shown: values of y that are always visible. guide: a value
    of y with a line, and its name. marks: values of x with a line. is_count: x counts something, so that only whole numbers of
    it have labels.
    """

    x_name: str = "examples"
    low: float | None = None
    high: float | None = None
    shown: tuple[float, ...] = ()
    guide: tuple[float, str] | None = None
    marks: tuple[float, ...] = ()
    is_count: bool = False


DEFAULT_AXES = Axes()


def metric_line(rows: Sequence[dict], x: numpy.ndarray, name: str, label: str, **look) -> Line | None:
    """The line of a metric over examples, from rows of metrics.jsonl; None without any finite value.

    x: the examples of these rows, by `metric_values`. look: of `Line`. Intervals come from NAME/low and NAME/high, where all
    rows have them.
    """
    y = metric_values(rows, name)
    is_finite = ~numpy.isnan(x + y)
    if not is_finite.any():
        return None
    bounds = [None, None]
    # Most metrics have no intervals, and searching every row for them would double the time.
    if f"{name}/low" in rows[int(is_finite.argmax())]:
        found = [metric_values(rows, f"{name}/{bound}")[is_finite] for bound in ("low", "high")]
        bounds = bounds if numpy.isnan(found).any() else found
    return Line(label, x[is_finite], y[is_finite], *bounds, **look)


def metric_values(rows: Sequence[dict], name: str) -> numpy.ndarray:
    """A metric's values in N rows of metrics.jsonl: [N] float64, NaN for what cannot be drawn."""
    values = [row.get(name) for row in rows]
    kinds = set(map(type, values))
    if kinds == {type(None)}:
        return numpy.full(len(values), math.nan)
    # Numbers of both kinds in one list take much longer.
    if kinds != {float} and not (kinds == {int} and max(values) < MAX_MAGNITUDE and min(values) > -MAX_MAGNITUDE):
        values = list(map(_to_float, values))
    found = numpy.array(values, float)
    return numpy.where(numpy.abs(found) < MAX_MAGNITUDE, found, math.nan)


def _to_float(value) -> float:
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan


def downsample(line: Line, buckets: int = BUCKETS) -> Line:
    """Reduce a line to the means of equally wide buckets; a line with few points is returned as it is.

    low and high are averaged too; without them they become the minimum and maximum of each bucket.
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


def running_mean(values: numpy.ndarray) -> numpy.ndarray:
    """The mean of each value and its neighbors, a tenth of all, as far as there are as many on both sides: [N]."""
    places = numpy.arange(len(values))
    radius = numpy.minimum(len(values) // 20, numpy.minimum(places, places[::-1]))
    sums = numpy.concatenate([[0.0], numpy.cumsum(values)])
    return (sums[places + radius + 1] - sums[places - radius]) / (2 * radius + 1)


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """About so many round numbers between low and high."""
    step = 10 ** math.floor(math.log10(max(high - low, 1e-300) / about))
    step = next((step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= about), step * 10)
    number = math.ceil(low / step - 1e-9)
    found = []
    while number * step <= high + 1e-9 * step and len(found) < 4 * about:
        found.append(number * step)
        number += 1
    return found


def tick_labels(values: Sequence[float]) -> list[str]:
    """Round numbers as labels of an axis, as short as they can be told apart, in one unit: 0.00, 0.25, or 0, 5k, 10k."""
    size = max((abs(value) for value in values), default=0.0)
    if size and not 1e-3 <= size < 1e13:
        exponent = math.floor(math.log10(size))
        scaled = [value / 10.0**exponent for value in values]
        return [f"{text}e{exponent}" if float(text) else "0" for text in _alike(scaled)]
    unit, letter = next((unit for unit in UNITS if size >= max(unit[0], 1e4)), (1, ""))
    return [f"{text}{letter}" if float(text.replace(",", "")) else "0" for text in _alike([value / unit for value in values])]


def _alike(values: Sequence[float]) -> list[str]:
    """Numbers with the same number of decimals, as few as they need."""
    tolerance = 1e-6 * max((abs(value) for value in values), default=0.0)
    decimals = next((n for n in range(9) if all(abs(round(value, n) - value) <= tolerance for value in values)), 9)
    return [f"{value:,.{decimals}f}" for value in values]


# ---- drawing ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """The visible range of x and y. In the SVG both axes run from 0 to 1000."""

    left: float
    right: float
    bottom: float
    top: float

    @classmethod
    def around(cls, lines: Sequence[Line], axes: Axes = DEFAULT_AXES) -> "Frame":
        """The range of some lines, with padding; long lines count with their means and the central 90% of their values.

        So an outlier does not flatten the rest, and a nearly constant line is not drawn as a moving one.
        """
        drawn = [downsample(line) for line in lines]
        x = numpy.concatenate([line.x for line in drawn])
        bounds = [bound for line in lines if len(line.x) <= MAX_MARKERS for bound in (line.low, line.high) if bound is not None]
        usual = [numpy.quantile(line.y, [0.05, 0.95]) for line in lines]
        y = numpy.concatenate([*(line.y for line in drawn), *bounds, *usual])
        low, high = possible(lines, axes)
        y = numpy.concatenate([y.clip(low, high), axes.shown])
        return cls(*_padded(x.min(), x.max(), 0.02, 1e-9), *_padded(y.min(), y.max(), 0.06, FLAT))

    def project(self, x: numpy.ndarray, y: numpy.ndarray) -> list[str]:
        """Points in SVG coordinates, as "x,y"."""
        across = 1000 * (x - self.left) / (self.right - self.left)
        # Browsers cannot handle huge coordinates; far outside the frame they are clipped anyway.
        down = (1000 * (self.top - y) / (self.top - self.bottom)).clip(-1e4, 1e4)
        return [f"{a:.1f},{b:.1f}" for a, b in zip(across.tolist(), down.tolist(), strict=True)]


def possible(lines: Sequence[Line], axes: Axes) -> tuple[float, float]:
    """The bounds of what y can be, infinite where there are none."""
    low, high = -math.inf if axes.low is None else axes.low, math.inf if axes.high is None else axes.high
    least, most = min(line.y.min() for line in lines), max(line.y.max() for line in lines)
    return low if least >= low else -math.inf, high if most <= high else math.inf


def _padded(low: float, high: float, share: float, flat: float) -> tuple[float, float]:
    size = max(abs(low), abs(high))
    padding = (high - low) * share if high - low > flat * size else max(size * 0.1, 1e-9)
    return float(low - padding), float(high + padding)


def chart(
    title: str, lines: Sequence[Line | None], note: str = "", axes: Axes = DEFAULT_AXES, has_legend: bool = True
) -> Markup:
    """A figure with legend, plot, readout and table; empty without any line."""
    full = [line for line in lines if line is not None]
    if not full:
        return Markup()
    drawn, frame = [_as_drawn(line) for line in full], Frame.around(full, axes)
    parts = [
        Markup('<figure class="chart"><figcaption><strong>{}</strong>{}</figcaption>').format(title, _note(note)),
        legend(drawn if has_legend else ()),
        _plot(title, drawn, frame, axes),
        _table(title, full, axes.x_name),
        Markup('<script type="application/json">{}</script></figure>').format(Markup(_chart_data(drawn, frame, axes.x_name))),
    ]
    return Markup("\n").join(parts)


def _as_drawn(line: Line) -> Line:
    """A line with few points, of a noisy one the running mean."""
    short = downsample(line)
    if not line.is_noisy:
        return short
    # Where points were averaged, the range of each bucket shows the noise already.
    return replace(short, y=running_mean(short.y), raw=short.y if short is line else None)


def _note(note: str) -> Markup:
    return Markup(" <span>{}</span>").format(note) if note else Markup()


def legend(lines: Sequence[Line]) -> Markup:
    """The names of some lines, each with a piece of it."""
    return Markup('<ul class="legend">{}</ul>').format(Markup().join(map(_legend, lines)))


def _legend(line: Line) -> Markup:
    look = Markup(' class="faint"') if line.is_sparse and _has_markers(line) else Markup()
    stroke = Markup() if line.labels else Markup('<line{} x1="1" y1="5" x2="29" y2="5"/>').format(look)
    dot = _markers(["15,5"]) if _has_markers(line) else Markup()
    sample = Markup('<svg viewBox="0 0 30 10" aria-hidden="true">{}{}</svg>').format(stroke, dot)
    return Markup('<li class="s{}">{}{}</li>').format(line.style % NUM_STYLES, sample, line.name)


def _markers(places: Iterable[str]) -> Markup:
    """A marker at each place; page.css makes it a circle, a square, or a hollow one of these."""
    at = " ".join(f"M{place}h0" for place in places)
    return Markup('<path class="dots" d="{}"/><path class="holes" d="{}"/>').format(at, at)


def _plot(title: str, lines: Sequence[Line], frame: Frame, axes: Axes) -> Markup:
    described = "; ".join(f"{line.name}: {format_number(line.y[0])} to {format_number(line.y[-1])}" for line in lines)
    across = [x for x in ticks(frame.left, frame.right) if not axes.is_count or x == round(x)]
    low, high = possible(lines, axes)
    up = ticks(max(low, frame.bottom), min(high, frame.top), about=5)
    labels = [
        Markup('<span class="x" style="left:{}%">{}</span>').format(_percent(x, frame.left, frame.right), text)
        for x, text in zip(across, tick_labels(across), strict=True)
    ]
    labels += [
        Markup('<span class="y" style="bottom:{}%">{}</span>').format(_percent(y, frame.bottom, frame.top), text)
        for y, text in zip(up, tick_labels(up), strict=True)
    ]
    svg = Markup('<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{}">{}{}</svg>').format(
        f"{title}. {described}", _grid(frame, axes, up), Markup().join(_line_svg(line, frame) for line in lines)
    )
    return Markup(
        '<div class="plot" tabindex="0" role="group" aria-label="{}: arrow keys read its values">{}{}{}{}'
        '<i class="cursor"></i><div class="readout" aria-live="polite"></div></div><p class="axis">{}</p>'
    ).format(title, svg, Markup().join(labels), _guide_name(frame, axes), _point_labels(lines, frame, axes), axes.x_name)


def _grid(frame: Frame, axes: Axes, up: Sequence[float]) -> Markup:
    """Lines at the labels of y; the guide, and the marks of x."""
    height = lambda y: 1000 - 10 * float(_percent(y, frame.bottom, frame.top))  # noqa: E731
    grid = Markup('<path class="grid" d="{}"/>').format(" ".join(f"M0 {height(y):.1f}H1000" for y in up))
    if axes.guide and frame.bottom < axes.guide[0] < frame.top:
        grid += Markup('<path class="guide" d="M0 {}H1000"/>').format(f"{height(axes.guide[0]):.1f}")
    if axes.marks:
        across = [10 * float(_percent(x, frame.left, frame.right)) for x in axes.marks]
        grid += Markup('<path class="mark-x" d="{}"/>').format(" ".join(f"M{x:.1f} 0V1000" for x in across))
    return grid


def _guide_name(frame: Frame, axes: Axes) -> Markup:
    if not axes.guide or not frame.bottom < axes.guide[0] < frame.top:
        return Markup()
    share = _percent(axes.guide[0], frame.bottom, frame.top)
    return Markup('<span class="guide-name" style="bottom:{}%">{}</span>').format(share, axes.guide[1])


def _percent(value: float, low: float, high: float) -> str:
    return f"{100 * (value - low) / (high - low):.2f}"


def _line_svg(line: Line, frame: Frame) -> Markup:
    """A line with its band or error bars, and its markers."""
    places = frame.project(line.x, line.y)
    parts = []
    if line.low is not None:
        below, above = (frame.project(line.x, bound) for bound in (line.low, line.high))
        if len(places) <= MAX_MARKERS:
            bars = " ".join(f"M{one}L{other}" for one, other in zip(below, above, strict=True))
            parts.append(Markup('<path class="bar" d="{}"/>').format(bars))
        else:
            parts.append(Markup('<polygon class="band" points="{}"/>').format(" ".join(below + above[::-1])))
    if line.raw is not None:
        parts.append(Markup('<polyline class="raw" points="{}"/>').format(" ".join(frame.project(line.x, line.raw))))
    # Few measurements say nothing of what is between them.
    if not line.labels and not (line.is_sparse and 1 < len(places) < FEWEST_JOINED):
        look = Markup(' class="faint"') if line.is_sparse and _has_markers(line) else Markup()
        parts.append(Markup('<polyline{} points="{}"/>').format(look, " ".join(places)))
    if _has_markers(line):
        parts.append(_markers(places))
    return Markup('<g class="s{}">{}</g>').format(line.style % NUM_STYLES, Markup().join(parts))


def _has_markers(line: Line) -> bool:
    """Whether to mark each point: many markers would hide the line."""
    return bool(line.labels) or len(line.x) == 1 or (line.is_sparse and len(line.x) <= MAX_MARKERS)


def _point_labels(lines: Sequence[Line], frame: Frame, axes: Axes) -> Markup:
    """Labels next to their points, where the narrowest plot has room; legend and table have them all."""
    width, height = PLOT
    points = [(line, k, *_narrow_position(line.x[k], line.y[k], frame)) for line in lines for k in range(len(line.labels))]
    taken = [(x - 5, x + 5, y - 5, y + 5) for _, _, x, y in points]
    if axes.guide:
        y = _narrow_position(frame.left, axes.guide[0], frame)[1]
        taken.append((width - CHARACTER[0] * len(axes.guide[1]) - 5, width, y - CHARACTER[1], y + 2 * CHARACTER[1]))
    found = []
    for line, k, x, y in points:
        half, high = len(line.labels[k]) * CHARACTER[0] / 2, CHARACTER[1]
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


def _narrow_position(x: float, y: float, frame: Frame) -> tuple[float, float]:
    """A point's position on the narrowest plot, from its lower left corner."""
    width, height = PLOT
    return (width * (x - frame.left) / (frame.right - frame.left), height * (y - frame.bottom) / (frame.top - frame.bottom))


def _table(title: str, lines: Sequence[Line], x_name: str) -> Markup:
    """The values in a few rows, for readers who cannot see the plot; means for long lines."""
    cells: dict[float, list[str]] = {}
    for number, line in enumerate(_table_lines(lines)):
        for k, (x, y) in enumerate(zip(line.x.tolist(), line.y.tolist(), strict=True)):
            interval = f" [{format_number(line.low[k])}, {format_number(line.high[k])}]" if line.low is not None else ""
            name = f"{line.labels[k]}: " if line.labels and line.labels[k] not in ("", line.name) else ""
            cells.setdefault(x, [""] * len(lines))[number] = f"{name}{format_number(y)}{interval}"
    head = Markup().join(Markup("<th>{}</th>").format(line.name) for line in lines)
    body = [(format_number(x), Markup().join(map(Markup("<td>{}</td>").format, row))) for x, row in sorted(cells.items())]
    rows = Markup().join(Markup("<tr><th>{}</th>{}</tr>").format(*row) for row in body)
    table = Markup("<table><thead><tr><th>{}</th>{}</tr></thead><tbody>{}</tbody></table>").format(x_name, head, rows)
    return Markup(
        '<details><summary>values</summary><div class="wide" tabindex="0" role="region" aria-label="values of {}">{}</div>'
        "</details>"
    ).format(title, table)


def _table_lines(lines: Sequence[Line]) -> list[Line]:
    """Lines reduced to a few points for the table: selected points of sparse lines, means near these for the others."""
    if any(line.labels for line in lines):
        return list(lines)
    marked = [_pick_points(line) if line.is_sparse else None for line in lines]
    x = [line.x for line in marked if line is not None] or [_pick_points(max(lines, key=lambda line: len(line.x))).x]
    places = numpy.unique(numpy.concatenate(x))
    return [_means_near(places, line) if few is None else few for few, line in zip(marked, lines, strict=True)]


def _pick_points(line: Line) -> Line:
    kept = numpy.unique(numpy.linspace(0, len(line.x) - 1, TABLE_ROWS).round().astype(int))
    bounds = [None if bound is None else bound[kept] for bound in (line.low, line.high)]
    return replace(line, x=line.x[kept], y=line.y[kept], low=bounds[0], high=bounds[1])


def _means_near(places: numpy.ndarray, line: Line) -> Line:
    """A line at some rising places: at each the mean of the points that are closest to it."""
    numbers, starts, counts = numpy.unique(
        numpy.searchsorted((places[1:] + places[:-1]) / 2, line.x), return_index=True, return_counts=True
    )
    return replace(line, x=places[numbers], y=numpy.add.reduceat(line.y, starts) / counts, low=None, high=None)


def _chart_data(lines: Sequence[Line], frame: Frame, x_name: str) -> str:
    """The chart's data for the page's script."""
    listed = [
        {"name": line.name, "labels": line.labels, "style": line.style % NUM_STYLES}
        | {name: _rounded(values) for name in ("x", "y", "low", "high") if (values := getattr(line, name)) is not None}
        for line in lines
    ]
    bounds = [frame.left, frame.right, frame.bottom, frame.top]
    return json_in_html({"x": x_name, "frame": bounds, "lines": listed})


def json_in_html(value) -> str:
    """A value as JSON that is safe inside an HTML element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _rounded(values: numpy.ndarray) -> list[float]:
    return [float(f"{value:.5g}") if abs(value) < 1e5 else round(value, 1) for value in values.tolist()]
