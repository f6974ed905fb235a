"""The charts of a single run: which metrics share one, and what it says about them."""

from dataclasses import dataclass

from markupsafe import Markup

from preference_training.reporting.charts import Line, chart
from preference_training.reporting.run_record import RunRecord
from preference_training.tracking.run_files import LOSS_AT_BETA_USED


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
        {"loss/train": "training", "loss/eval": "held out", LOSS_AT_BETA_USED: "held out, at the current beta"},
    ),
    ChartSpec(
        "Reward accuracy", "share of pairs whose preferred response has the higher reward; chance is 0.5",
        {f"rewards_{split}/accuracies": label for split, label in TRAIN_EVAL},
    ),
    ChartSpec(
        "Reward margin", "reward of the preferred response minus that of the rejected one",
        {f"rewards_{split}/margins": label for split, label in TRAIN_EVAL},
    ),
    ChartSpec(
        "Log-prob of responses", "nats per response; both may fall while the margin grows",
        {
            "logps_train/chosen": "preferred, training", "logps_train/rejected": "rejected, training",
            "logps_eval/chosen": "preferred, held out", "logps_eval/rejected": "rejected, held out",
        },
    ),
    ChartSpec(
        "Rewards", "beta times the log-ratio of policy and reference, per response",
        {
            "rewards_train/chosen": "preferred, training", "rewards_train/rejected": "rejected, training",
            "rewards_eval/chosen": "preferred, held out", "rewards_eval/rejected": "rejected, held out",
        },
    ),
    ChartSpec("Gradient norm", "before clipping to max_grad_norm", {"grad_norm": "norm"}),
    ChartSpec("Learning rate", "per step", {"lr": "lr"}),
    ChartSpec("Beta used", "per micro-batch", {"beta_DPO/beta_used": "beta"}),
    ChartSpec("Share of pairs kept", "by the filter of beta-DPO", {"beta_DPO/kept_fraction": "share"}),
    ChartSpec(
        "Margins of beta-DPO", "running statistics that set the filter and beta",
        {"beta_DPO/gap_mean": "mean", "beta_DPO/gap_std": "standard deviation"},
    ),
    ChartSpec("Throughput", "examples per second", {"examples_per_second": "examples/s"}),
    ChartSpec("Memory", "GiB on rank 0; on a GPU, the peak so far", {"memory_gib": "GiB"}),
)  # fmt: skip
# Metrics without a chart.
NOT_CHARTED = ("counters/", "epoch", "time", "tokens_per_second")


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
        if name not in charted and not name.startswith(NOT_CHARTED) and not name.endswith(("/low", "/high"))
    ]
