"""The page data_report.html: the results of the data checks, and which of them fail a strict dry run.

DataQuality, limits -> findings -> lines of the dry run, data_report.html
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
from markupsafe import Markup

from preference_training.configuration.sections import QualityConfig
from preference_training.core.errors import UserError
from preference_training.core.files import write_atomically
from preference_training.data.quality.checks import DataQuality
from preference_training.data.quality.near_duplicates import NOT_INSTALLED
from preference_training.data.quality.pairs import Baseline, Votes
from preference_training.data.quality.sample_size import DISAGREEMENT, pairs_needed, smallest_difference
from preference_training.data.quality.words import decode
from preference_training.evaluation.intervals import share_interval
from preference_training.reporting.charts import Axes, Line, chart
from preference_training.reporting.pages.rendering import render

PAGE = "data_report.html"
# Points of accuracy, and shares of pairs on which two models disagree, of the table of sample sizes.
DIFFERENCES, DISAGREEMENTS = (0.005, 0.01, 0.02, 0.05), (DISAGREEMENT, 0.3)
# Of prompts and items shown as examples. Unit: characters.
MOST_SHOWN = 600
LENGTHS = Axes("tokens", low=0, high=1)


@dataclass(frozen=True)
class Finding:
    """The result of a check. key: of the limit, "" without one. limit: in words. failed: a strict run refuses it."""

    name: str
    found: str
    key: str = ""
    limit: str = ""
    failed: bool = False

    @property
    def line(self) -> str:
        """The finding as a line of text."""
        return f"{self.name}: {self.found}" + f"; expected {self.limit}" * self.failed


def assess(quality: DataQuality, limits: QualityConfig) -> list[Finding]:
    """What was found, compared with the limits."""
    return [
        *_leaks(quality, limits),
        *_labels(quality, limits),
        *_contamination(quality, limits),
        _sample_size(quality),
        Finding(
            "languages, roughly", ", ".join(f"{name} {count / quality.language_sample:.0%}" for name, count in top(quality))
        ),
    ]


def top(quality: DataQuality, most: int = 6) -> list[tuple[str, int]]:
    """The most frequent languages, and how many of the sampled texts are in each."""
    return list(quality.languages.items())[:most]


def share_text(count: int, total: int) -> str:
    """A count, of how many, and its share."""
    return f"{count:,} of {total:,}" + (f" ({count / total:.2%})" if count and total else "")


def _at_most(name: str, count: int, total: int, key: str, limit: float | None) -> Finding:
    if limit is None:
        return Finding(name, share_text(count, total))
    return Finding(name, share_text(count, total), f"quality.{key}", f"at most {limit:.1%}", count > limit * total)


def _leaks(quality: DataQuality, limits: QualityConfig) -> Iterator[Finding]:
    yield _at_most(
        "held-out prompts that are also trained on", quality.leaked, quality.held_out.prompts, "max_leaked", limits.max_leaked
    )
    near = quality.near_duplicates
    if near is None:
        yield Finding("near-duplicates", NOT_INSTALLED)
    else:
        yield _at_most(
            "held-out prompts that resemble a training prompt",
            *(near.across, near.held_out, "max_near_leaked", limits.max_near_leaked),
        )
        yield _at_most(
            "training prompts that resemble an earlier one",
            *(near.within, near.train, "max_near_duplicates", limits.max_near_duplicates),
        )
    yield Finding("training prompts that occur again", share_text(quality.repeated, quality.train.prompts))


def _labels(quality: DataQuality, limits: QualityConfig) -> Iterator[Finding]:
    yield from (_baseline(each, limits.max_baseline_accuracy) for each in quality.baselines)
    votes: Votes = quality.train.votes
    if votes.compared:
        yield _at_most(
            "training pairs judged in both directions",
            *(votes.contradictory, votes.compared, "max_contradictions", limits.max_contradictions),
        )
    if len(votes.agreements):
        yield _agreement(votes.agreements, limits.min_agreement)
    elif votes.compared:
        yield Finding("label agreement", "unknown: no two responses were compared several times")
    if not quality.baselines:
        yield Finding("trivial baselines", "none: they need held-out pairs (a loss of pairs, and a held-out split)")
    elif not quality.position_known:
        yield Finding("position", "unknown: the preferred response stands first in all rows, or in none")


def _agreement(agreements: numpy.ndarray, least: float | None) -> Finding:
    low, high = share_interval(agreements)
    found = f"{agreements.mean():.1%} [{low:.1%}, {high:.1%}] on {len(agreements):,} pairs with several verdicts"
    limit = {} if least is None else {"key": "quality.min_agreement", "limit": f"an upper end of at least {least:.1%}"}
    return Finding("label agreement", found, **limit, failed=least is not None and high < least)


def bounds(baseline: Baseline) -> tuple[float, float]:
    """The 95% interval of a baseline's accuracy, over prompts."""
    several = len(numpy.unique(baseline.prompts)) < len(baseline.prompts)
    return share_interval(baseline.outcomes, baseline.prompts if several else None)


def _baseline(baseline: Baseline, most: float | None) -> Finding:
    low, high = bounds(baseline)
    found = f"{baseline.accuracy:.1%} [{low:.1%}, {high:.1%}] of {len(baseline.outcomes):,} held-out pairs"
    limit = {} if most is None else {"key": "quality.max_baseline_accuracy", "limit": f"a lower end of at most {most:.1%}"}
    return Finding(f"accuracy of a trivial baseline, {baseline.name}", found, **limit, failed=most is not None and low > most)


def _contamination(quality: DataQuality, limits: QualityConfig) -> Iterator[Finding]:
    for file in quality.contamination:
        yield _at_most(
            f"rows of {file.path} in the training data",
            *(file.found, file.items, "max_contaminated", limits.max_contaminated),
        )


def _sample_size(quality: DataQuality) -> Finding:
    number = len(quality.held_out.pairs)
    needed = f"{pairs_needed():,} held-out pairs, if two models disagree on {DISAGREEMENT:.0%} of them"
    smallest = smallest_difference(number)
    shown = f"{number:,} show {100 * smallest:.1f} points" if smallest else f"{number:,} show none"
    return Finding("a difference of one point of accuracy needs", f"{needed}; {shown}")


# ---- the page ---------------------------------------------------------------------------------------------------------------


def write_data_report(folder: Path, names: Sequence[str], quality: DataQuality, findings: Sequence[Finding], tokenizer) -> Path:
    """Write data_report.html into a folder; returns its path. Raises UserError where that fails.

    names: of the data sets.
    """
    path = folder / PAGE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data_page(names, quality, findings, tokenizer), concurrent=True)
    except OSError as error:
        raise UserError(f"local_dirs: cannot write {path}: {error.strerror or error}. Expected a writable folder.") from error
    return path


def data_page(names: Sequence[str], quality: DataQuality, findings: Sequence[Finding], tokenizer) -> str:
    """The HTML of a data report."""
    near = quality.near_duplicates
    return render(
        "data_report.html",
        names=names,
        failed=[finding for finding in findings if finding.failed],
        findings=findings,
        numbers=_numbers(quality),
        baselines=[{"name": each.name, "accuracy": each.accuracy, "bounds": bounds(each)} for each in quality.baselines],
        near=[
            {"texts": list(map(shown, decode(tokenizer, [pair.one, pair.other]))), "similarity": pair.similarity}
            for pair in (near.examples if near else ())
        ],
        charts=[figure for figure in length_charts(quality) if figure],
        lengths=_lengths(quality),
        languages=top(quality, 20),
        language_sample=quality.language_sample,
        contamination=[(file, [shown(text) for text in file.examples]) for file in quality.contamination],
        disagreements=DISAGREEMENTS,
        sizes=[(each, [pairs_needed(each, share) for share in DISAGREEMENTS]) for each in DIFFERENCES],
    )


def shown(text: str) -> str:
    """A text, or its beginning and its end."""
    half = MOST_SHOWN // 2
    return text if len(text) <= MOST_SHOWN else f"{text[:half]} [...] {text[-half:]}"


def _numbers(quality: DataQuality) -> list[dict]:
    """The numbers at the top of the page."""
    return [
        {
            "name": f"{name} prompts",
            "value": f"{facts.prompts:,}",
            "more": f"{len(facts.pairs):,} pairs, {facts.tokens:,} tokens",
        }
        for name, facts in (("training", quality.train), ("held-out", quality.held_out))
    ]


def length_charts(quality: DataQuality) -> Iterator[Markup]:
    """Which share of prompts and of responses is up to how long."""
    train = quality.train
    prompts = [cumulative(train.prompt_lengths, "training", 0), cumulative(quality.held_out.prompt_lengths, "held-out", 1)]
    yield chart("Prompts", prompts, "share with at most so many tokens", LENGTHS)
    if len(train.pairs):
        sides = {"preferred": train.pairs.preferred_lengths, "dispreferred": train.pairs.other_lengths}
        lines = [cumulative(lengths, name, style) for style, (name, lengths) in enumerate(sides.items())]
    else:
        lines = [cumulative(train.response_lengths, "training", 0)]
    yield chart("Responses", lines, "share with at most so many tokens", LENGTHS)


def cumulative(lengths: numpy.ndarray, name: str, style: int) -> Line | None:
    """The cumulative distribution of lengths; None without any. The longest hundredth is left out."""
    if not len(lengths):
        return None
    shares = numpy.arange(0, 100) / 100
    x = numpy.quantile(lengths, shares, method="inverted_cdf")
    values, first = numpy.unique(x[::-1], return_index=True)
    return Line(name, values.astype(float), shares[::-1][first], style=style)


def _lengths(quality: DataQuality) -> list[tuple[str, list[int]]]:
    """Median, 95th and 99th percentile and maximum of the lengths of each split."""
    columns = [
        (f"{name} {what}", lengths)
        for name, facts in (("training", quality.train), ("held-out", quality.held_out))
        for what, lengths in (("prompts", facts.prompt_lengths), ("responses", facts.response_lengths))
    ]
    found = [(name, numpy.percentile(lengths, [50, 95, 99, 100])) for name, lengths in columns if len(lengths)]
    return [(name, values.round().astype(int).tolist()) for name, values in found]
