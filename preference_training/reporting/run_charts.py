"""The charts of a single run: which metrics share one, and what it says about them."""

from dataclasses import dataclass

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
    GAP_MEAN,
    GAP_STD,
    GRAD_NORM,
    KEPT_FRACTION,
    LEARNING_RATE,
    LOSS_AT_BETA_USED,
    MEMORY,
    TIME,
    TOKENS_PER_SECOND,
    TRAIN_CHOSEN_LOGPS,
    TRAIN_CHOSEN_REWARD,
    TRAIN_LOSS,
    TRAIN_REJECTED_LOGPS,
    TRAIN_REJECTED_REWARD,
)
from preference_training.reporting.charts import Line, chart
from preference_training.reporting.run_record import RunRecord


@dataclass(frozen=True)
class ChartSpec:
    """A chart's title, a note on how to read it, and its metrics with their labels."""

    title: str
    note: str
    metrics: dict[str, str]

    def lines(self, run: RunRecord) -> list[Line | None]:
        """The lines of the chart for a run; None for metrics that the run did not log."""
        return [run.line(metric, label, style) for style, (metric, label) in enumerate(self.metrics.items())]


TRAIN_EVAL = ("train", "training"), ("eval", "held out")
CHARTS = (
    ChartSpec(
        "Loss", "lower is better",
        {TRAIN_LOSS: "training", EVAL_LOSS: "held out", LOSS_AT_BETA_USED: "held out, at the current beta"},
    ),
    ChartSpec(
        "Reward accuracy", "share of pairs whose preferred response has the higher reward; chance is 0.5",
        {metric_names.reward(split, "accuracies"): label for split, label in TRAIN_EVAL},
    ),
    ChartSpec(
        "Reward margin", "reward of the preferred response minus that of the rejected one",
        {metric_names.reward(split, "margins"): label for split, label in TRAIN_EVAL},
    ),
    ChartSpec(
        "Log-prob of responses", "nats per response; both may fall while the margin grows",
        {
            TRAIN_CHOSEN_LOGPS: "preferred, training", TRAIN_REJECTED_LOGPS: "rejected, training",
            EVAL_CHOSEN_LOGPS: "preferred, held out", EVAL_REJECTED_LOGPS: "rejected, held out",
        },
    ),
    ChartSpec(
        "Rewards", "beta times the log-ratio of policy and reference, per response",
        {
            TRAIN_CHOSEN_REWARD: "preferred, training", TRAIN_REJECTED_REWARD: "rejected, training",
            EVAL_CHOSEN_REWARD: "preferred, held out", EVAL_REJECTED_REWARD: "rejected, held out",
        },
    ),
    ChartSpec("Gradient norm", "before clipping to max_grad_norm", {GRAD_NORM: "norm"}),
    ChartSpec("Learning rate", "per step", {LEARNING_RATE: "lr"}),
    ChartSpec("Beta used", "per micro-batch", {BETA_USED: "beta"}),
    ChartSpec("Share of pairs kept", "by the filter of beta-DPO", {KEPT_FRACTION: "share"}),
    ChartSpec(
        "Margins of beta-DPO", "running statistics that set the filter and beta",
        {GAP_MEAN: "mean", GAP_STD: "standard deviation"},
    ),
    ChartSpec("Throughput", "examples per second", {EXAMPLES_PER_SECOND: "examples/s"}),
    ChartSpec("Memory", "GiB on rank 0; on a GPU, the peak so far", {MEMORY: "GiB"}),
)  # fmt: skip
# Metrics without a chart.
NOT_CHARTED = (COUNTERS, EPOCH, TIME, TOKENS_PER_SECOND)


def run_charts(run: RunRecord) -> list[Markup]:
    """The charts for which there are values: those of CHARTS, and one for each metric in none of them."""
    specs = [*CHARTS, *(ChartSpec(metric, "", {metric: metric}) for metric in _other_metrics(run))]
    return [figure for spec in specs if (figure := chart(spec.title, spec.lines(run), spec.note))]


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
