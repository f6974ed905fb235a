"""Results of benchmarks as tables of text."""

from pathlib import Path

from preference_training.core.values import aligned
from preference_training.evaluation.phrasing import too_few, with_interval
from preference_training.evaluation.results_text import MAX_REASONS


def shown(value: dict | None) -> str:
    """An estimate with its interval."""
    return "-" if value is None or value["mean"] is None else with_interval(value["mean"], value["low"], value["high"])


def pair_lines(results: dict) -> list[str]:
    """The accuracies of all models: a table of categories, and one of RewardBench's sections where there are any."""
    accuracies, sections = _columns(results, "accuracy"), _columns(results, "sections")
    names = list(dict.fromkeys(name for each in accuracies.values() for name in each))
    pairs = {name: max(each[name]["pairs"] for each in accuracies.values() if name in each) for name in names}
    rows = [[name, f"{pairs[name]:,}", *(shown(each.get(name)) for each in accuracies.values())] for name in names]
    lines = [*map(str, results["models"]), *aligned([["accuracy", "pairs", *accuracies], *rows])]
    names = list(dict.fromkeys(name for each in sections.values() for name in each))
    if names:
        rows = [[name, "", *(shown(each.get(name)) for each in sections.values())] for name in names]
        lines += aligned([["RewardBench", "", *sections], *rows])
        if "score" not in names:
            lines.append(
                "no score: it is of the sections Chat, Chat Hard, Safety and Reasoning, and not all of them have pairs"
            )
    lines += [f"left out of {results['file']}: {count:,} x {reason}" for reason, count in results["left_out"].items()]
    for model, found in results["models"].items():
        lines += [f"not scored by {model}: {count:,} x {reason}" for reason, count in found["left_out"].items()]
    warning = _warning(pairs["all"], "accuracies")
    return [*lines, warning] if warning else lines


def _columns(results: dict, key: str) -> dict[str, dict]:
    """The accuracies or sections of each way to score by its name, that of the model before it where there are several."""
    several = len(results["models"]) > 1
    return {
        f"{Path(model).name}: {way}" if several else way: each
        for model, found in results["models"].items()
        for way, each in found[key].items()
    }


def _warning(prompts: int, what: str) -> str | None:
    text = too_few(prompts, what)
    return text and f"warning: {text}"


def win_rate_lines(results: dict) -> list[str]:
    """The win rates of all models as a table, with what has to be known of them."""
    heading = ["model", "won/tied/lost", "win rate", "length-controlled", "Arena-Hard score", "characters"]
    rows = [heading]
    for name, found in results["models"].items():
        counts = f"{found['wins']:,}/{found['ties']:,}/{found['losses']:,}"
        rates = [shown(found[key]) for key in ("rate", "length_controlled", "arena")]
        rows.append([name, counts, *rates, f"{found['mean_length']:,.0f} vs {found['mean_baseline_length']:,.0f}"])
    first = next(iter(results["models"].values()))
    difficulty = (
        "and difficulty of the instruction" if first["difficulty"] else "no difficulty of instructions (no such column)"
    )
    lines = [
        f"against {results['baseline']}, judged by {results['judge']}, {first['comparisons']:,} instructions",
        *aligned(rows),
        f"length-controlled: terms for model and length, {difficulty}",
    ]
    for name, found in results["models"].items():
        notes = [note for note in (found["note"], (found["length_controlled"] or {}).get("note")) if note]
        reasons = [f"not judged: {count:,} x {reason}" for reason, count in list(found["reasons"].items())[:MAX_REASONS]]
        lines += [f"{name}: {text}" for text in notes + reasons]
    return [line for line in [*lines, _warning(first["comparisons"], "win rates")] if line is not None]
