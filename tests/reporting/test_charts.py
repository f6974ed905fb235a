"""Charts preserve what a line shows at any length, and are valid markup whatever its name."""

import json
import math

import numpy
import pytest
from bs4 import BeautifulSoup
from hypothesis import assume, given
from hypothesis import strategies as st

from preference_training.reporting.charts import (
    BUCKETS,
    FEWEST_JOINED,
    MAX_MAGNITUDE,
    MAX_MARKERS,
    Axes,
    Frame,
    Line,
    chart,
    downsample,
    json_in_html,
    metric_line,
    metric_values,
    running_mean,
    tick_labels,
    ticks,
)
from preference_training.reporting.examples import highlight_changes


def line(values, name: str = "loss", **more) -> Line:
    return Line(name, numpy.arange(len(values), dtype=float), numpy.array(values, float), **more)


def test_downsampling_keeps_the_mean_and_the_range_of_each_bucket():
    # 4 values fall into each of 2 parts: 0, 1, 2, 3 and 10, 11, 12, 13.
    found = downsample(line([0, 1, 2, 3, 10, 11, 12, 13]), buckets=2)
    assert found.x.tolist() == [1.5, 5.5]
    assert (found.low.tolist(), found.y.tolist(), found.high.tolist()) == ([0, 10], [1.5, 11.5], [3, 13])


def test_the_interval_of_a_bucket_is_the_mean_of_its_points_intervals():
    values = numpy.array([0.0, 2.0, 4.0, 6.0])
    found = downsample(line(values, low=values - 1, high=values + 3), buckets=2)
    assert (found.low.tolist(), found.high.tolist()) == ([0.0, 4.0], [4.0, 8.0])


def test_a_short_line_is_not_downsampled():
    short = line(range(BUCKETS))
    assert downsample(short) is short


FINITE = st.floats(-1e300, 1e300)


@given(st.lists(FINITE, min_size=1, max_size=200), st.integers(1, 20))
def test_no_bucket_is_empty_and_no_extreme_is_lost(values, buckets):
    found = downsample(line(values), buckets)
    assert 1 <= len(found.x) <= max(buckets, 1) or len(values) <= buckets
    if found.low is not None:
        assert found.low.min() == min(values) and found.high.max() == max(values)
        assert (numpy.diff(found.x) > 0).all()


@given(FINITE, FINITE)
def test_ticks_are_few_and_lie_within(low, high):
    low, high = sorted((low, high))
    assume(high - low > 1e-6 * max(abs(low), abs(high)) and high - low > 1e-290)
    found = ticks(low, high)
    assert 1 <= len(found) <= 16
    assert all(low - 1e-6 * (high - low) <= tick <= high + 1e-6 * (high - low) for tick in found)


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0], "0"), ([0.25], "0.25"), ([5000], "5,000"), ([20000], "20k"), ([6.4e6], "6.4M"), ([-15000], "-15k"),
        ([2e15], "2e15"),
        ([0, 0.25, 0.5], "0.00 0.25 0.50"),
        ([0, 5000, 10000], "0 5k 10k"),
        ([0.6931, 0.69312, 0.69314], "0.69310 0.69312 0.69314"),
        ([-1000.5, -1000, -999.5], "-1,000.5 -1,000.0 -999.5"),
        ([0, 5e-7, 1e-6], "0 0.5e-6 1.0e-6"),
    ],
)  # fmt: skip
def test_labels_of_axes_are_short_and_in_one_unit(values, texts):
    assert tick_labels(values) == [text if text.strip("0.") else "0" for text in texts.split()]


@given(FINITE, st.floats(1e-3, 1e3))
def test_no_two_labels_of_an_axis_are_equal(low, share):
    # Axes show no smaller range than a thousandth of their values.
    high = low + share * abs(low)
    assume(high > low and high - low > 1e-280 and abs(high) < 1e300)
    found = tick_labels(ticks(low, high, about=5))
    assert len(set(found)) == len(found)
    assert max(map(len, found)) <= 9 or not 1e-3 < abs(low) < 1e9


def labels(figure: str, axis: str) -> list[float]:
    return [float(label.text) for label in BeautifulSoup(figure, "html.parser").select(f".plot > .{axis}")]


def test_an_axis_names_no_value_that_is_impossible():
    shares = line([0.5, 1.0], low=numpy.array([0.3, 0.9]), high=numpy.array([0.7, 1.05]))
    found = labels(chart("Accuracy", [shares], axes=Axes(low=0, high=1)), "y")
    assert min(found) >= 0 and max(found) == 1
    losses = line([0.7, 0.01], low=numpy.array([0.6, -0.1]), high=numpy.array([0.8, 0.1]))
    assert min(labels(chart("Loss", [losses], axes=Axes(low=0)), "y")) == 0
    assert min(labels(chart("Loss", [line([0.7, -0.5])], axes=Axes(low=0)), "y")) < 0, "a loss that can be negative"


def test_what_is_within_rounding_of_equal_is_drawn_flat():
    stuck = math.log(2) + 1e-6 * numpy.sin(numpy.arange(50))
    frame = Frame.around([line(stuck)])
    assert frame.top - frame.bottom > 0.1, "and not as a moving line"
    found = labels(chart("Loss", [line(stuck)]), "y")
    assert len(set(found)) == len(found) >= 3


def test_a_guide_is_drawn_where_it_is_visible_and_a_value_that_must_be_shown_is():
    guided = BeautifulSoup(chart("Accuracy", [line([0.8, 0.9])], axes=Axes(guide=(0.5, "chance"))), "html.parser")
    assert guided.select(".guide") == guided.select(".guide-name") == []
    shown = BeautifulSoup(chart("Accuracy", [line([0.8, 0.9])], axes=Axes(shown=(0.5,), guide=(0.5, "chance"))), "html.parser")
    assert shown.select_one(".guide-name").text == "chance" and len(shown.select(".guide")) == 1


def test_a_noisy_line_is_drawn_as_its_running_mean_over_its_values():
    noisy = numpy.arange(40) + 5.0 * (-1) ** numpy.arange(40)
    page = BeautifulSoup(chart("Loss", [line(noisy, is_noisy=True)]), "html.parser")
    raw, mean = ([float(point.split(",")[1]) for point in path["points"].split()] for path in page.select(".plot polyline"))
    assert numpy.abs(numpy.diff(mean[2:-2])).max() < numpy.abs(numpy.diff(raw)).min()
    # 40 values: two neighbors on each side, as far as there are two.
    assert running_mean(noisy)[20] == pytest.approx(noisy[18:23].mean())
    assert (running_mean(noisy)[0], running_mean(noisy)[1]) == (noisy[0], pytest.approx(noisy[:3].mean()))


def test_a_few_measurements_are_not_joined_and_more_only_faintly():
    for points, joined in ((1, 1), (FEWEST_JOINED - 1, 0), (FEWEST_JOINED, 1)):
        page = BeautifulSoup(chart("Loss", [line(range(points), is_sparse=True)]), "html.parser")
        assert len(page.select(".plot polyline")) == joined
    assert page.select_one(".plot polyline")["class"] == ["faint"]


def read(rows: list[dict], name: str) -> Line | None:
    return metric_line(rows, metric_values(rows, "counters/examples"), name, "held out")


def test_a_metrics_line_has_its_finite_values_and_their_intervals():
    rows = [
        {"counters/examples": 4, "loss/eval": 0.5, "loss/eval/low": 0.4, "loss/eval/high": 0.7},
        {"counters/examples": 6, "other": 1.0},
        {"counters/examples": 8, "loss/eval": math.nan},
        {"counters/examples": 12, "loss/eval": 0.25, "loss/eval/low": 0.2, "loss/eval/high": 0.3},
    ]
    found = read(rows, "loss/eval")
    assert (found.x.tolist(), found.y.tolist(), found.low.tolist()) == ([4, 12], [0.5, 0.25], [0.4, 0.2])
    assert read(rows[1:], "loss/eval").high.tolist() == [0.3]
    assert read([*rows, {"counters/examples": 16, "loss/eval": 1.0}], "loss/eval").low is None
    assert read(rows, "absent") is None


VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("1e", max_size=2) | st.lists(st.integers(), max_size=2)
)


@given(st.lists(VALUES) | st.lists(st.floats()))
def test_metric_values_are_the_numbers_that_can_be_drawn_and_nan_elsewhere(values):
    found = metric_values([{"a": value} for value in values], "a").tolist()
    assert len(found) == len(values)
    assert math.isnan(metric_values([{"a": 10**400}], "a")[0]) and math.isnan(metric_values([{}], "a")[0])
    for value, number in zip(values, found, strict=False):
        is_number = isinstance(value, int | float) and abs(value) < MAX_MAGNITUDE
        assert number == float(value) if is_number else math.isnan(number)


def test_a_chart_without_lines_is_empty():
    assert chart("Loss", [None]) == ""


NAMES = st.text(max_size=20) | st.sampled_from(
    ["</script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & b"]
)


@given(NAMES, NAMES, st.lists(FINITE, min_size=1, max_size=300))
def test_a_chart_is_valid_markup_and_json_whatever_its_names(title, name, values):
    page = BeautifulSoup(chart(title, [line(values, name=name)]), "html.parser")
    assert len(page.find_all("script")) == 1 and page.find("img") is None
    data = json.loads(page.script.string)
    assert data["lines"][0]["name"] == name
    assert len(data["lines"][0]["x"]) == min(len(values), BUCKETS) or len(data["lines"][0]["x"]) <= BUCKETS
    assert len(page.find_all("polyline")) == 1
    for point in page.polyline["points"].split():
        x, y = map(float, point.split(","))
        assert -1 <= x <= 1001 and math.isfinite(y)


def test_json_cannot_close_its_html_element():
    assert "<" not in json_in_html({"a": "</script>"}) and json.loads(json_in_html("</script>&")) == "</script>&"


def test_the_table_has_the_values_of_the_plot():
    page = BeautifulSoup(chart("Loss", [line([0.5, 0.25], name="held out", is_sparse=True)]), "html.parser")
    assert [[cell.text for cell in row.find_all(["th", "td"])] for row in page.find_all("tr")] == [
        ["examples", "held out"],
        ["0", "0.5"],
        ["1", "0.25"],
    ]


def test_the_table_has_means_near_the_points_of_a_sparse_line():
    marked = Line("held out", numpy.array([1.0, 5.0]), numpy.array([0.5, 0.25]), is_sparse=True)
    # 0 to 3 are nearer to 1, or as near as to 5.
    page = BeautifulSoup(chart("Loss", [line([0, 1, 2, 3, 4, 5, 9]), marked]), "html.parser")
    rows = [[cell.text for cell in row.find_all(["th", "td"])] for row in page.find_all("tr")]
    assert rows[1:] == [["1", "1.5", "0.5"], ["5", "6", "0.25"]]


def test_a_constant_line_is_drawn_flat_despite_rounding():
    page = BeautifulSoup(chart("Share", [line([0.8] * 100_003)]), "html.parser")
    assert {point.split(",")[1] for point in page.polyline["points"].split()} == {"500.0"}


def test_the_frame_of_a_long_line_covers_the_spread_of_its_values():
    frame = Frame.around([line([0, 10] * 5000)])
    assert frame.bottom <= 0 and frame.top >= 10, "its means are all 5"


@pytest.mark.parametrize(("points", "marks"), [(MAX_MARKERS, 1), (MAX_MARKERS + 1, 0)])
def test_only_a_few_points_are_marked(points, marks):
    page = BeautifulSoup(chart("Loss", [line(range(points), is_sparse=True)]), "html.parser")
    assert len(page.select(".plot .dots")) == marks


def test_two_texts_with_little_in_common_have_no_marks():
    assert highlight_changes("one two three four", "five six seven four") == "one two three four"


def test_changed_words_are_highlighted():
    marked = highlight_changes("Of course! Start <small> today.", "Of course! Start now.")
    assert str(marked) == "Of course! Start <ins>&lt;small&gt; today.</ins>"


@given(st.text(max_size=30), st.text(max_size=30))
def test_highlighting_preserves_the_text(text, other):
    # NUL and carriage returns are not kept by a parser of HTML.
    assume(not {"\0", "\r"} & set(text))
    assert BeautifulSoup(f"<p>{highlight_changes(text, other)}</p>", "html.parser").text == text
