"""docs/intervals.md: the coverage of confidence intervals, this project's and others.

python scripts/interval_coverage.py [--check]

Shares are exact, summed over all outcomes; means and correlations are simulated with fixed seeds, which takes a few minutes.
--check writes nothing, and exits with status 1 if the page is out of date.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy
from scipy import integrate, stats

from preference_training.evaluation.intervals import correlation, mean_interval, share_interval

ROOT = Path(__file__).resolve().parent.parent

PAGE = ROOT / "docs" / "intervals.md"
Z = stats.norm.ppf(0.975)
SHARE_SIZES, TIE_SIZES, GROUPS = (8, 16, 32, 64, 128, 256), (8, 16, 24), (5, 10, 32)
SIZES, CORRELATED = (4, 8, 10, 16, 32, 64, 128), (5, 10, 32)
ROUNDS, RESAMPLES = 1000, 500
# Log-ratios of policy and reference for 384 responses of a DPO run on the toy data: their 5% quantiles. Unit: nats.
KL_TWENTIETHS = (
    -2.6, -0.4, 0.2, 0.9, 1.2, 1.9, 2.6, 3.4, 4.2, 5.7, 7.5, 8.9, 11.9, 13.9, 16.7, 22.3, 28.1, 36.5, 46.7, 78.0, 178.2,
)  # fmt: skip

HEAD = """# Confidence intervals

```bash
python scripts/evaluate.py runs/my_run_DATE
```

```text
held out               examples                  loss           accuracy             margin
all                         256   0.11 [0.109, 0.112]       1 [0.981, 1]  2.16 [2.14, 2.17]
```

Every held-out metric has a 95% confidence interval over prompts. This page shows the coverage of each kind of interval: how
often it contains the true value. `python scripts/interval_coverage.py` computes it: exactly for shares, by summing over all
outcomes, and with {rounds:,} simulations per cell for the rest, whose own error is about ±1.4 points.

| metric | interval |
|---|---|
| accuracies, win rates, shares of independent examples | Clopper-Pearson (scipy's `binomtest`), extended to ties |
| shares where a prompt has several pairs | Korn-Graubard: Clopper-Pearson with the effective number of examples |
| losses, margins, KL and other means | Student's t over prompts, corrected for skewness by Hall's transformation |
| the correlation of reward and length | Student's t on Fisher's transformation, with a jackknife over prompts |

The interval of a loss that cannot be negative ends at 0. The true mean is never below, so its coverage stays what the tables
say. `robust`, a `mix` with it, and losses of your own may be negative.

An interval does not cover the variation between training seeds (compare several runs: `comparison.html` shows their deviation),
a shift in the distribution of prompts, or the judge's own errors. With fewer than ten prompts, the report, the terminal, the
pages and the results file say that there are too few for a conclusion: such intervals are wide, and for heavy tails still too
narrow.

The interval of a share always has a width, even where all outcomes are the same or all are ties. Wilson's interval is narrower,
but covers shares near 0 and 1 too rarely, and is wider than Clopper-Pearson's there.

Two runs that are scored on the same prompts are paired: a prompt that is hard for one is hard for the other, so they differ by
less than their two intervals suggest. `comparison.html` shows no interval of the difference; `held_out_examples.jsonl` of two
evaluations has what a paired comparison needs. A win rate does compare two models
prompt by prompt: with `--against`, two checkpoints. The two responses to a prompt are sampled independently.
"""


def percent(value: float) -> str:
    """A coverage, formatted for a table cell."""
    return f"{100 * value:.1f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


# ---- shares -----------------------------------------------------------------------------------------------------------------


def clopper_pearson(n: int) -> numpy.ndarray:
    """Bounds for each number of hits, [n + 1, 2], like all functions below. `share_interval` returns these."""
    hits = numpy.arange(n + 1)
    bounds = numpy.column_stack([stats.beta.ppf(0.025, hits, n - hits + 1), stats.beta.ppf(0.975, hits + 1, n - hits)])
    bounds[0, 0], bounds[-1, 1] = 0, 1
    return bounds


def wilson(n: int) -> numpy.ndarray:
    """Wilson's score interval."""
    share = numpy.arange(n + 1) / n
    center, half = share + Z**2 / (2 * n), Z * numpy.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return numpy.column_stack([center - half, center + half]) / (1 + Z**2 / n)


def jeffreys(n: int) -> numpy.ndarray:
    """Quantiles of the posterior under Jeffreys' prior."""
    hits = numpy.arange(n + 1)
    return numpy.column_stack([stats.beta.ppf(end, hits + 0.5, n - hits + 0.5) for end in (0.025, 0.975)])


def percentile_bootstrap(n: int) -> numpy.ndarray:
    """The percentile bootstrap with infinitely many resamples."""
    share = numpy.arange(n + 1) / n
    return numpy.column_stack([stats.binom.ppf(end, n, share) / n for end in (0.025, 0.975)])


SHARE_METHODS = {
    "Clopper-Pearson (ours)": clopper_pearson, "Wilson": wilson, "Jeffreys": jeffreys,
    "percentile bootstrap": percentile_bootstrap,
}  # fmt: skip


def coverage(bounds: numpy.ndarray) -> numpy.ndarray:
    """How often bounds [n + 1, 2] cover each share from 0.01 to 0.99, including shares right next to the bounds."""
    low, high = bounds.T
    n = len(bounds) - 1
    near = numpy.concatenate([low - 1e-9, low + 1e-9, high - 1e-9, high + 1e-9])
    shares = numpy.concatenate([numpy.linspace(0.01, 0.99, 491), near[(near > 0.01) & (near < 0.99)]])[:, None]
    return (stats.binom.pmf(numpy.arange(n + 1), n, shares) * ((low <= shares) & (shares <= high))).sum(1)


def shares() -> str:
    """The tables of shares: the lowest coverage over all true shares, and the widths of the intervals."""
    rows, widths = [], []
    for name, method in SHARE_METHODS.items():
        bounds = {n: method(n) for n in SHARE_SIZES}
        rows.append([name, *(percent(coverage(bounds[n]).min()) for n in SHARE_SIZES)])
        wide = [numpy.diff(bounds[n]).mean() / numpy.diff(clopper_pearson(n)).mean() for n in SHARE_SIZES]
        widths.append([name, *(f"{each:.2f}" for each in wide)])
    head = [f"n = {n}" for n in SHARE_SIZES]
    every = min(coverage(clopper_pearson(n)).min() for n in range(8, 257))
    return "\n".join(
        [
            "## Shares\n",
            "The lowest coverage over all true shares from 0.01 to 0.99, in percent:\n",
            table(["interval of n independent examples", *head], rows),
            f"Over every n from 8 to 256 the lowest coverage of Clopper-Pearson is {percent(every)}.\n",
            "Mean width, relative to Clopper-Pearson:\n",
            table(["interval", *head], widths),
        ]
    )


def ties() -> str:
    """The table of win rates with ties: the lowest coverage over all true rates."""
    rows = []
    for tie in (0.05, 0.2, 0.5, 0.8, 0.95):
        rows.append([f"{tie:.0%}", *(percent(least_with_ties(n, tie)) for n in TIE_SIZES)])
    text = "Win rates with a given true share of ties, the lowest coverage over all rates from 0.01 to 0.99:\n"
    return text + "\n" + table(["ties", *(f"n = {n}" for n in TIE_SIZES)], rows)


def least_with_ties(n: int, tie: float) -> float:
    """The lowest coverage of a win rate of n comparisons, each a tie with probability `tie`."""
    outcomes = numpy.array([(wins, n - wins - losses, losses) for wins in range(n + 1) for losses in range(n + 1 - wins)])
    low, high = numpy.array([share_interval(numpy.repeat([1, 0.5, 0], counts)) for counts in outcomes]).T
    found = []
    for lose in numpy.linspace(0, 1 - tie, 61):
        win = 1 - tie - lose
        rate = win + tie / 2
        if 0.01 <= rate <= 0.99:
            chances = stats.multinomial.pmf(outcomes, n, [max(0.0, win), tie, lose])
            found.append(chances[(low <= rate) & (rate <= high)].sum())
    return min(found)


def several_pairs() -> str:
    """The table of shares where a prompt has up to four correlated pairs."""
    rows = []
    for share in (0.05, 0.3, 0.5, 0.9):
        rows.append([f"{share}", *(percent(of_alike(groups, share)) for groups in GROUPS)])
    text = (
        "Prompts with one to four correlated pairs each, whose share is drawn from a beta distribution (parameter sum 2):\n\n"
    )
    return text + table(["true share", *(f"{n} prompts" for n in GROUPS)], rows)


def of_alike(groups: int, share: float) -> float:
    """The coverage of a share over groups of one to four correlated examples."""
    draw, held = numpy.random.default_rng(0), 0
    for _ in range(ROUNDS):
        prompts = numpy.repeat(numpy.arange(groups), draw.integers(1, 5, groups))
        values = draw.random(len(prompts)) < draw.beta(2 * share, 2 * (1 - share), groups)[prompts]
        low, high = share_interval(values, prompts)
        held += low <= share <= high
    return held / ROUNDS


# ---- means ------------------------------------------------------------------------------------------------------------------

Draw = Callable[[numpy.random.Generator, tuple[int, int]], numpy.ndarray]


def shapes() -> dict[str, tuple[Draw, float]]:
    """The distributions of the means: how values are drawn, and their true mean."""
    loss = integrate.quad(lambda x: numpy.logaddexp(0, -x) * stats.norm.pdf(x, 1.5, 2), -15, 20)[0]
    twentieths = numpy.array(KL_TWENTIETHS)
    places = numpy.linspace(0, 1, len(twentieths))
    return {
        "normal": (lambda draw, size: draw.standard_normal(size), 0.0),
        "DPO losses (margins normal, 1.5 ± 2)": (lambda draw, size: numpy.logaddexp(0, -draw.normal(1.5, 2, size)), loss),
        "KL of responses (from a run on the toy data)": (
            lambda draw, size: numpy.interp(draw.random(size), places, twentieths),
            float((twentieths[1:] + twentieths[:-1]).mean() / 2),
        ),
        "lognormal (sigma 1)": (lambda draw, size: draw.lognormal(0, 1, size), math.exp(0.5)),
    }


def students(values: numpy.ndarray) -> tuple[float, float]:
    """Student's t interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return values.mean() - half, values.mean() + half


def bootstrap(kind: str) -> Callable[[numpy.ndarray], tuple[float, float]]:
    """The interval of a bootstrap method of scipy."""

    def bounds(values: numpy.ndarray) -> tuple[float, float]:
        found = stats.bootstrap((values,), numpy.mean, n_resamples=RESAMPLES, method=kind, axis=-1, vectorized=True, rng=0)
        return found.confidence_interval

    return bounds


MEAN_METHODS = {
    "Student's t, corrected for skewness (ours)": mean_interval,
    "Student's t": students,
    "BCa bootstrap": bootstrap("BCa"),
    "percentile bootstrap": bootstrap("percentile"),
}


def of_means(shape: tuple[Draw, float], n: int, method: Callable) -> float:
    """The coverage of the interval of the mean of n values."""
    draw, mean = shape
    samples = draw(numpy.random.default_rng(n), (ROUNDS, n))
    bounds = numpy.array([method(values) for values in samples])
    return float(((bounds[:, 0] <= mean) & (mean <= bounds[:, 1])).mean())


def means() -> str:
    """The tables of means."""
    parts = ["## Means\n"]
    for title, shape in shapes().items():
        rows = [[name, *(percent(of_means(shape, n, of)) for n in SIZES)] for name, of in MEAN_METHODS.items()]
        parts.append(table([title, *(f"n = {n}" for n in SIZES)], rows))
    return "\n".join(parts)


# ---- correlations -----------------------------------------------------------------------------------------------------------


def correlations() -> str:
    """The table of correlations."""
    rows = [[f"{r}", *(percent(of_correlations(r, n)) for n in CORRELATED)] for r in (0.0, 0.3, 0.6, 0.9)]
    text = "## Correlations\n\nOf normally distributed values:\n\n"
    return text + table(["true correlation", *(f"n = {n}" for n in CORRELATED)], rows)


def of_correlations(r: float, n: int) -> float:
    """The coverage of the interval of a correlation r of n normally distributed values."""
    draw, held = numpy.random.default_rng(n), 0
    for _ in range(ROUNDS):
        x, noise = draw.standard_normal((2, n))
        _, (low, high) = correlation(x, r * x + math.sqrt(1 - r * r) * noise, numpy.arange(n))
        held += low <= r <= high
    return held / ROUNDS


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD.format(rounds=ROUNDS), shares(), ties(), several_pairs(), means(), correlations()])


def main() -> None:
    """Write the page, or check it."""
    from generated import write_or_check

    write_or_check(PAGE, page())


if __name__ == "__main__":
    main()
