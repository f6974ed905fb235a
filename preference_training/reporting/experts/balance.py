"""The balance of experts in a run's report: charts, a table by layer, and what a reader must know in words."""

import statistics
from collections.abc import Iterator, Sequence

import numpy
from markupsafe import Markup

from preference_training.core.metric_names import AUX_LOSS, DEAD_EXPERTS, MAX_LOAD, ROUTING_ENTROPY
from preference_training.core.values import format_number
from preference_training.reporting.charts import Axes, Line, chart
from preference_training.reporting.run_record import RunRecord

# Title, note, metric, label and lowest value of a chart.
CHARTS = (
    ("Busiest expert", "its tokens as a multiple of the mean, in the worst layer; 1 is balanced", MAX_LOAD, "worst layer", 1),
    ("Entropy of routing", "of a token, mean over layers; 1 is no preference, 0 certainty", ROUTING_ENTROPY, "mean", 0),
    ("Experts without tokens", "of all layers, in one batch", DEAD_EXPERTS, "experts", 0),
    (
        "Load-balancing loss",
        "before its coefficient; the number of experts of a token where all are balanced",
        AUX_LOSS,
        "loss",
        0,
    ),
)
# From so many steps on, their first quarter is compared with their last.
FEWEST_STEPS = 8
# The balance has collapsed where the busiest expert's load has become so many times what it was.
COLLAPSED = 2.0


def expert_section(run: RunRecord) -> dict:
    """Charts, and a row for each layer; empty for a model without experts."""
    if not any(MAX_LOAD in row for row in (*run.steps[:1], *run.steps[-1:])):
        return {}
    figures = [chart(title, [run.line(metric, label)], note, Axes(low=low)) for title, note, metric, label, low in CHARTS]
    return {"charts": [_by_layer(run), *figures], "layers": layer_rows(run)}


def layer_rows(run: RunRecord) -> list[dict]:
    """Of each layer the means of the last quarter of the steps: busiest expert, entropy, experts without tokens."""
    steps = last_quarter(run.steps)
    return [
        {"layer": layer, "values": [format_number(float(f"{_mean(steps, f'{metric}/{layer}'):.3g}")) for metric in BY_LAYER]}
        for layer in layers(run)
    ]


BY_LAYER = (MAX_LOAD, ROUTING_ENTROPY, DEAD_EXPERTS)


def layers(run: RunRecord) -> list[str]:
    """What the layers with experts are called, in their order."""
    prefix = f"{MAX_LOAD}/"
    return [name.removeprefix(prefix) for name in (run.steps[-1] if run.steps else {}) if name.startswith(prefix)]


def _by_layer(run: RunRecord) -> Markup:
    """The load of each layer's busiest expert, in the first and in the last quarter of the steps."""
    names = layers(run)
    if not all(name.isdigit() for name in names):
        return Markup()
    x = numpy.array(names, float)
    lines = [
        Line(label, x, numpy.array([_mean(steps, f"{MAX_LOAD}/{name}") for name in names]), style=style, is_sparse=True)
        for style, (label, steps) in enumerate((("first quarter", first_quarter(run.steps)), ("last", last_quarter(run.steps))))
    ]
    note = "tokens of its busiest expert as a multiple of the mean, in the first and the last quarter of the steps"
    return chart("Load by layer", lines, note, Axes(x_name="layer", low=1, is_count=True))


def first_quarter(steps: Sequence[dict]) -> Sequence[dict]:
    """The first quarter of the steps, at least one."""
    return steps[: max(1, len(steps) // 4)]


def last_quarter(steps: Sequence[dict]) -> Sequence[dict]:
    """The last quarter of the steps, at least one."""
    return steps[-max(1, len(steps) // 4) :]


def _mean(steps: Sequence[dict], metric: str) -> float:
    return statistics.fmean(row[metric] for row in steps)


def balance_findings(run: RunRecord) -> Iterator[tuple[str, str]]:
    """What a reader must know of the balance: kind and text. Raises KeyError for a model without experts."""
    steps = [row for row in run.steps if MAX_LOAD in row]
    if len(steps) < FEWEST_STEPS:
        return
    first, last = first_quarter(steps), last_quarter(steps)
    coefficient = run.settings.get("model.router_aux_loss")
    raised = f"raise model.router_aux_loss, {coefficient:g}" if coefficient else "set model.router_aux_loss=0.001"
    remedy = f"Lower lr, or {raised} (docs/models.md, Mixtures of experts)."
    # A batch may miss an expert by chance: more than in any step at first, in all steps at last.
    before, now = (pick(row[DEAD_EXPERTS] for row in rows) for pick, rows in ((max, first), (min, last)))
    if now > before:
        text = (
            f"experts have died: no token was sent to {now:.0f} of them or more in any of the last {len(last)} steps, and to "
            f"at most {before:.0f} in the first {len(first)}. {remedy}"
        )
        yield "dead experts", text
    before, now = (statistics.median(row[MAX_LOAD] for row in rows) for rows in (first, last))
    if now >= COLLAPSED * before:
        worst = max(layers(run), key=lambda name: _mean(last, f"{MAX_LOAD}/{name}"), default="")
        text = (
            f"the balance of the experts has collapsed: the busiest one of a layer gets {now:.3g} times the mean, and got "
            f"{before:.3g} at first; layer {worst} is the worst. {remedy}"
        )
        yield "expert balance", text
