"""Results of benchmarks as tables of text."""

from collections.abc import Sequence

from preference_training.evaluation.phrasing import too_few, with_interval
from preference_training.evaluation.results_text import MAX_REASONS


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines with columns of one width; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def shown(value: dict | None) -> str:
    """An estimate with its interval."""
    return "-" if value is None or value["mean"] is None else with_interval(value["mean"], value["low"], value["high"])


def pair_lines(results: dict) -> list[str]:
    """The accuracies of all models: a table of categories, and one of RewardBench's sections where there are any."""
    accuracies = {
        f"{model}: {way}": each for model, found in results["models"].items() for way, each in found["accuracy"].items()
    }
    names = list(dict.fromkeys(name for each in accuracies.values() for name in each))
    lines = []
    for title, found in accuracies.items():
        rows = [
            ["accuracy", "pairs", title],
            *([name, f"{found[name]['pairs']:,}", shown(found[name])] for name in names if name in found),
        ]
        lines += [*table(rows), ""]
    sections = {
        f"{model}: {way}": each for model, found in results["models"].items() for way, each in found["sections"].items()
    }
    names = list(dict.fromkeys(name for each in sections.values() for name in each))
    if names:
        rows = [
            ["RewardBench", *names],
            *([title, *(shown(each.get(name)) for name in names)] for title, each in sections.items()),
        ]
        lines += [*table(rows), ""]
        if "score" not in names:
            lines.append(
                "no score: it is the mean of the sections Chat, Chat Hard, Safety and Reasoning, and not all of them have pairs"
            )
    for model, found in results["models"].items():
        lines += [f"not scored by {model}: {count:,} x {reason}" for reason, count in found["left_out"].items()]
    prompts = min(each["all"]["pairs"] for each in accuracies.values())
    return [line for line in [*lines, _warning(prompts, "accuracies")] if line is not None]


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
        *table(rows),
        f"length-controlled: terms for model and length, {difficulty}",
    ]
    for name, found in results["models"].items():
        notes = [note for note in (found["note"], (found["length_controlled"] or {}).get("note")) if note]
        reasons = [f"not judged: {count:,} x {reason}" for reason, count in list(found["reasons"].items())[:MAX_REASONS]]
        lines += [f"{name}: {text}" for text in notes + reasons]
    return [line for line in [*lines, _warning(first["comparisons"], "win rates")] if line is not None]
