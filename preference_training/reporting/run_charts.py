"""The charts of a single run: which metrics share one, and what it says about them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, log

import numpy
from markupsafe import Markup

from preference_training.core import metric_names
from preference_training.core.metric_names import (
    BETA_USED,
    COUNTERS,
    EPOCH,
    EVAL_CHOSEN_LOGPS,
    EVAL_CHOSEN_REWARD,
    EVAL_LOSS,
    EVAL_REJECTED_LOGPS,
    EVAL_REJECTED_REWARD,
    EXAMPLES_PER_SECOND,
    EXPERTS,
    GAP_MEAN,
    GAP_STD,
    GRAD_NORM,
    KEPT_FRACTION,
    LEARNING_RATE,
    LOSS_AT_BETA_USED,
    MEMORY,
    MFU,
    TIME,
    TOKENS_PER_SECOND,
    TOKENS_SAVED,
    TRAIN_CHOSEN_LOGPS,
    TRAIN_CHOSEN_REWARD,
    TRAIN_LOSS,
    TRAIN_REJECTED_LOGPS,
    TRAIN_REJECTED_REWARD,
)
from preference_training.reporting.charts import DEFAULT_AXES, Axes, Line, chart
from preference_training.reporting.run_record import RunRecord


@dataclass(frozen=True)
class ChartSpec:
    """A chart's title, a note on how to read it, its metrics with their labels, and what its axes show."""

    title: str
    note: str
    metrics: dict[str, str]
    axes: Axes = DEFAULT_AXES

    def lines(self, run: RunRecord) -> list[Line | None]:
        """The lines of the chart for a run; None for metrics that the run did not log."""
        return [run.line(metric, label, style) for style, (metric, label) in enumerate(self.metrics.items())]


TRAIN_EVAL = ("train", "training"), ("eval", "held out")
SHARE = Axes(low=0, high=1)
ACCURACY_AXES = Axes(low=0, high=1, shown=(0.5,), guide=(0.5, "chance"))
# What has a natural zero: small changes of large values look small.
FROM_ZERO = Axes(low=0, shown=(0,))
LOGPS = ChartSpec(
    "Log-prob of responses", "nats per response; both may fall while the margin grows",
    {
        TRAIN_CHOSEN_LOGPS: "preferred, training", TRAIN_REJECTED_LOGPS: "rejected, training",
        EVAL_CHOSEN_LOGPS: "preferred, held out", EVAL_REJECTED_LOGPS: "rejected, held out",
    },
    Axes(high=0),
)  # fmt: skip
# The same where no response is rejected, as in SFT.
RESPONSE_LOGPS = replace(
    LOGPS, note="nats per response", metrics={TRAIN_CHOSEN_LOGPS: "training", EVAL_CHOSEN_LOGPS: "held out"}
)
REJECTED_LOGPS = {TRAIN_REJECTED_LOGPS, EVAL_REJECTED_LOGPS}
# What was learned, and how.
LEARNED = (
    ChartSpec(
        "Loss", "lower is better",
        {TRAIN_LOSS: "training", EVAL_LOSS: "held out", LOSS_AT_BETA_USED: "held out, at the current beta"}, Axes(low=0),
    ),
    ChartSpec(
        "Reward accuracy", "share of pairs whose preferred response has the higher reward",
        {metric_names.reward(split, "accuracies"): label for split, label in TRAIN_EVAL}, ACCURACY_AXES,
    ),
    ChartSpec(
        "Reward margin", "reward of the preferred response minus that of the rejected one",
        {metric_names.reward(split, "margins"): label for split, label in TRAIN_EVAL},
    ),
    LOGPS,
    ChartSpec(
        "Rewards", "how much more likely than under the reference; beta times nats, per response",
        {
            TRAIN_CHOSEN_REWARD: "preferred, training", TRAIN_REJECTED_REWARD: "rejected, training",
            EVAL_CHOSEN_REWARD: "preferred, held out", EVAL_REJECTED_REWARD: "rejected, held out",
        },
    ),
)  # fmt: skip
TRAINING = (
    ChartSpec("Learning rate", "of each step", {LEARNING_RATE: "lr"}, FROM_ZERO),
    ChartSpec("Gradient norm", "before clipping to max_grad_norm", {GRAD_NORM: "norm"}, Axes(low=0)),
    ChartSpec("Beta used", "per micro-batch", {BETA_USED: "beta"}, Axes(low=0)),
    ChartSpec("Share of pairs kept", "by the filter of beta-DPO", {KEPT_FRACTION: "share"}, SHARE),
    ChartSpec(
        "Margins of beta-DPO", "running statistics that set the filter and beta",
        {GAP_MEAN: "mean", GAP_STD: "standard deviation"},
    ),
    ChartSpec("Speed", "tokens per second; what responses share is counted once", {TOKENS_PER_SECOND: "tokens/s"}, FROM_ZERO),
    ChartSpec("Examples per second", "", {EXAMPLES_PER_SECOND: "examples/s"}, FROM_ZERO),
    ChartSpec("Use of the GPU", "MFU: share of its peak arithmetic that the model's needs take", {MFU: "MFU"}, FROM_ZERO),
    ChartSpec("Tokens saved", "share that prefix sharing did not have to compute", {TOKENS_SAVED: "share"}, FROM_ZERO),
    ChartSpec("Memory", "GiB on rank 0; on a GPU, the peak so far", {MEMORY: "GiB"}, FROM_ZERO),
)  # fmt: skip
CHARTS = (*LEARNED, *TRAINING)
# Metrics without a chart here: experts have a section of their own.
NOT_CHARTED = (COUNTERS, EPOCH, TIME, EXPERTS)
# The ends of more epochs than these are not marked.
MAX_EPOCHS = 12


def run_charts(run: RunRecord) -> dict[str, list[Markup]]:
    """The charts for which there are values, by their section: those of CHARTS, and one for each metric in none of them."""
    ends = epoch_ends(run)
    others = [ChartSpec(metric, "", {metric: metric}) for metric in _other_metrics(run)]
    sections = {"What was learned": LEARNED, "How it trained": (*TRAINING, *others)}
    found = {name: [figure for spec in specs if (figure := _figure(spec, run, ends))] for name, specs in sections.items()}
    return {name: figures for name, figures in found.items() if figures}


def axes_of(metric: str) -> Axes:
    """What the axes of a metric's chart show."""
    return next((spec.axes for spec in CHARTS if metric in spec.metrics), DEFAULT_AXES)


def _figure(spec: ChartSpec, run: RunRecord, ends: tuple[float, ...]) -> Markup:
    if spec is LOGPS and not any(REJECTED_LOGPS & row.keys() for row in (*run.steps[:1], *run.evaluations[:1])):
        spec = RESPONSE_LOGPS
    lines = spec.lines(run)
    axes = replace(spec.axes, marks=ends)
    if spec.title == "Loss" and (guide := start_of_pairs(lines)):
        axes = replace(axes, guide=guide)
    return chart(spec.title, lines, spec.note, axes)


def start_of_pairs(lines: Sequence[Line | None]) -> tuple[float, str] | None:
    """A line at ln 2 for losses that begin there, as DPO's does: the policy is still equal to the reference."""
    first = [line.y[0] for line in lines if line is not None]
    return (log(2), "ln 2: as the reference") if first and min(abs(value - log(2)) for value in first) < 1e-3 else None


def epoch_ends(run: RunRecord) -> tuple[float, ...]:
    """After how many examples each epoch but the last ended."""
    line = run.line(EPOCH, EPOCH)
    if line is None or not 1 < line.y[-1] <= MAX_EPOCHS or (numpy.diff(line.y) < 0).any():
        return ()
    ends = numpy.arange(1, ceil(line.y[-1] - 1e-6))
    return tuple(numpy.interp(ends, line.y, line.x).tolist())


def _other_metrics(run: RunRecord) -> list[str]:
    charted = {metric for spec in CHARTS for metric in spec.metrics}
    logged = dict.fromkeys(name for row in (*run.steps[:1], *run.steps[-1:], *run.evaluations[-1:]) for name in row)
    return [
        name
        for name in logged
        if name not in charted
        and not name.startswith(NOT_CHARTED)
        and not name.endswith((metric_names.LOW, metric_names.HIGH, metric_names.CHANGE))
    ]
