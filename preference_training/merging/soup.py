"""Model soups (Wortsman et al. 2022): the mean of the weights of a sweep's best runs.

Uniform: all of them. Greedy: in the order of their held-out metric, each only where the soup with it is better than without.
The metric is computed on the rows that the best run holds out, by its loss, for every ingredient alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from preference_training.checkpointing.checkpoint import Checkpoint
from preference_training.checkpointing.saved_run import newest_checkpoint
from preference_training.core.errors import UserError
from preference_training.core.files import check_destination
from preference_training.core.metric_names import EVAL_ACCURACY, EVAL_LOSS, smaller_is_better
from preference_training.core.values import dotted
from preference_training.evaluation.phrasing import with_interval
from preference_training.export.directory import new_directory
from preference_training.merging.card import MergeFacts, merge_card
from preference_training.merging.held_out import HeldOutRows, Measured
from preference_training.merging.ingredients import Ingredient, all_on_disk
from preference_training.merging.merge import Merge, write_merged
from preference_training.merging.recipe import Recipe
from preference_training.sweeps.jobs import JOBS, SweepDirectory
from preference_training.sweeps.sweep import comparison_warnings


@dataclass(frozen=True)
class Soup:
    """What to make a soup of: the `top` best runs of a sweep, or of a folder of runs, by a held-out metric.

    metric: None is the runs' objective. greedy: add a run only where it improves the soup. overrides: of the best run's
    configuration, for its evaluation.
    """

    directory: Path
    top: int = 3
    greedy: bool = False
    metric: str | None = None
    overrides: Sequence[str] = ()
    trust_remote_code: bool = False


def make_soup(soup: Soup, to: Path) -> list[str]:
    """Write the soup of a sweep's best runs; returns the lines to print. Raises UserError, and then leaves no directory."""
    check_destination(to)
    runs, metric, notes = best_runs(soup)
    models = [Ingredient.read(str(run), soup.trust_remote_code) for run in runs]
    whole = _task(models)
    whole.check(to)
    rows = HeldOutRows(runs[0], soup.overrides, soup.trust_remote_code)
    with new_directory(to) as partial, all_on_disk(models, partial) as found:
        measured = {each.name: rows.measure(each.weights) for each in found}
        ordered = sorted(found, key=lambda each: _badness(measured[each.name], metric))
        chosen, tried = _greedy(ordered, measured, rows, metric, partial) if soup.greedy else (ordered, [])
        task = _task(chosen, [*whole.notes, *notes, *tried])
        facts = write_merged(task, chosen, partial)
        merged = rows.measure(partial)
        facts.held_out = {name: each.metrics for name, each in measured.items()} | {MergeFacts.MERGED: merged.metrics}
        facts.name, facts.measured_on = to.resolve().name, rows.name
        facts.notes += _against_best(merged, measured[ordered[0].name], ordered[0].name, metric)
        (partial / "README.md").write_text(merge_card(facts), encoding="utf-8")
    return [facts.summary(to), *facts.table(), *(f"note: {note}" for note in facts.notes)]


def _task(models: Sequence[Ingredient], notes: Sequence[str] = ()) -> Merge:
    return Merge(Recipe("linear", (1 / len(models),) * len(models)), models, notes=list(notes))


def _badness(measured: Measured, metric: str) -> float:
    """A sort key: the best value of a metric first."""
    value = measured.metrics[metric]["mean"]
    return float("inf") if value is None else value if smaller_is_better(metric) else -value


def _greedy(
    ordered: Sequence[Ingredient], measured: dict[str, Measured], rows: HeldOutRows, metric: str, inside: Path
) -> tuple[list[Ingredient], list[str]]:
    """The ingredients of a greedy soup, and notes on those that were not added. Raises UserError where only one is left.

    inside: the directory in which the models that are tried lie for as long.
    """
    chosen, best, notes = [ordered[0]], _badness(measured[ordered[0].name], metric), []
    for each in ordered[1:]:
        with TemporaryDirectory(prefix=".soup_", dir=inside) as folder:
            trial = [*chosen, each]
            write_merged(_task(trial), trial, Path(folder))
            found = _badness(rows.measure(Path(folder)), metric)
        if found < best:
            chosen, best = trial, found
        else:
            notes.append(f"{each.name} is not in the soup: {metric} would be {abs(found):.4g} in place of {abs(best):.4g}")
    if len(chosen) == 1:
        raise UserError(
            f"--greedy: no run improves {metric} of the best one, {chosen[0].name}, which is {abs(best):.4g}; nothing is "
            f"merged. Export that run: python scripts/export.py {chosen[0].name} --to FOLDER"
        )
    return chosen, notes


def _against_best(merged: Measured, best: Measured, name: str, metric: str) -> list[str]:
    """A sentence on whether the soup is better than its best ingredient."""
    difference = merged.minus(best, metric)
    if difference is None:
        return []
    worse, better = ("higher", "lower") if smaller_is_better(metric) else ("lower", "higher")
    _, low, high = difference if smaller_is_better(metric) else (0, -difference[2], -difference[1])
    word = f"{better}: better" if high < 0 else f"{worse}: worse" if low > 0 else "no different beyond noise"
    return [f"{metric} of the soup minus that of {name}, the best ingredient: {with_interval(*difference)}; {word}"]


# ---- which runs ---------------------------------------------------------------------------------------------------------


def best_runs(soup: Soup) -> tuple[list[Path], str, list[str]]:
    """The best runs of a sweep or a folder of runs, the best first; the metric, and notes. Raises UserError for too few."""
    if soup.top < 2:
        raise UserError(f"--top: found {soup.top}, expected at least 2: a soup is of several runs.")
    checkpoints = {run: found for run in _runs(soup.directory) if (found := _newest(run)) is not None}
    if len(checkpoints) < 2:
        raise UserError(
            f"--soup: {soup.directory} has {len(checkpoints)} complete runs, expected at least 2. Name the directory of a "
            "sweep (sweep_dir), or a folder of run directories."
        )
    metric, notes = soup.metric, []
    if metric is None:
        metric, notes = _metric([each.config for each in checkpoints.values()])
    values = {run: value for run, each in checkpoints.items() if (value := each.held_out(metric)) is not None}
    if len(values) < 2:
        known = sorted(next(iter(checkpoints.values())).state["held_out"] or {})
        raise UserError(
            f"--metric: {len(values)} of the runs have a held-out {metric}, expected at least 2. They have: {', '.join(known)}."
        )
    ordered = sorted(values, key=lambda run: values[run] if smaller_is_better(metric) else -values[run])[: soup.top]
    first = checkpoints[ordered[0]]
    for run in ordered[1:]:
        if checkpoints[run].run.get("began_with") != first.run.get("began_with"):
            raise UserError(
                f"--soup: {run} started from other weights than {ordered[0]}. A soup is of runs that started from one model. "
                "Sweep with one model (model.archive=CHECKPOINT in place of one from scratch)."
            )
    return ordered, metric, notes


def _runs(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise UserError(f"--soup: {directory}: no such directory. Expected that of a sweep (sweep_dir), or a folder of runs.")
    if (directory / JOBS).is_file():
        return [job.directory for job in SweepDirectory(directory).jobs() if job.state == "complete"]
    return sorted(path for path in directory.iterdir() if path.is_dir())


def _newest(run: Path) -> Checkpoint | None:
    """The checkpoint that is merged: the one that LATEST is, where a run has it."""
    try:
        return Checkpoint.read(newest_checkpoint(run))
    except (OSError, ValueError, TypeError, LookupError):
        return None


def _metric(configs: Sequence[dict]) -> tuple[str, list[str]]:
    """The metric that compares runs: their objective, or, where that does not compare them, the accuracy."""
    objective, first = configs[0].get("objective", EVAL_LOSS), dotted({"loss": configs[0]["loss"]})
    differing = {key for each in configs for key, value in dotted({"loss": each["loss"]}).items() if first.get(key) != value}
    warnings = comparison_warnings(objective, configs[0]["loss"]["name"], differing, configs[0]["loss"].get("parts"))
    if not warnings:
        return objective, []
    return EVAL_ACCURACY, [f"the runs were chosen by {EVAL_ACCURACY}: {warnings[0]}"]
