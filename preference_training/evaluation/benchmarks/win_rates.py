"""Win rates of one or several models against a baseline: raw, length-controlled (AlpacaEval 2), and as Arena-Hard's scores.

The judge is asked once for all three: in both orders, if it may have a position bias.
"""

from collections.abc import Sequence
from pathlib import Path

from preference_training.data.records.record import prompt_text
from preference_training.evaluation.benchmarks.arena import GRADES, Battle, arena_scores
from preference_training.evaluation.benchmarks.length_control import length_controlled
from preference_training.evaluation.benchmarks.outputs import Output, difficulties
from preference_training.evaluation.judges import Judge
from preference_training.evaluation.win_rates import Comparison, Judged, VerdictStore, judge_all, summary


def compare_with_baseline(
    judge: Judge, baseline: Sequence[Output], models: dict[str, Sequence[Output]], path: Path, settings
) -> dict[str, dict]:
    """Name -> its counts and rates against the baseline, in plain values; all outputs in the order of the baseline's.

    path: the file of verdicts. settings: the section `evaluation`. A model with too many missing verdicts has None for rates.
    """
    found, battles = {}, []
    gamma = difficulties(baseline)
    for number, (name, outputs) in enumerate(models.items(), start=1):
        comparisons = [
            Comparison(prompt_text(mine.prompt), mine.text, other.text) for mine, other in zip(outputs, baseline, strict=True)
        ]
        judged = judge_all(judge, comparisons, path, settings)
        known = [k for k, value in enumerate(judged.outcomes) if value is not None]
        lengths = [(len(comparisons[k].policy), len(comparisons[k].other)) for k in known]
        found[name] = summary(judge, judged, settings) | {
            "length_controlled": None,
            "arena": None,
            "difficulty": gamma is not None,
            "mean_length": sum(one for one, _ in lengths) / max(1, len(lengths)),
            "mean_baseline_length": sum(other for _, other in lengths) / max(1, len(lengths)),
        }
        if judged.is_enough:
            outcomes, (mine, theirs) = [judged.outcomes[k] for k in known], zip(*lengths, strict=True)
            rate = length_controlled(outcomes, mine, theirs, gamma and [gamma[k] for k in known])
            found[name]["length_controlled"] = rate.as_dict()
            battles += battles_of(judge, comparisons, judged, number)
    enough = [name for name in models if found[name]["rate"] is not None]
    if enough:
        # Numbers without gaps: models with too many missing verdicts have no battles.
        numbers = {list(models).index(name) + 1: k for k, name in enumerate(enough, start=1)}
        renumbered = [battle._replace(first=numbers[battle.first]) for battle in battles]
        for name, score in zip(enough, arena_scores(renumbered, len(enough) + 1), strict=True):
            found[name]["arena"] = score
    return found


def battles_of(judge: Judge, comparisons: Sequence[Comparison], judged: Judged, model: int) -> list[Battle]:
    """The battles of a model, by its number, against the baseline, number 0: one for each verdict; a tie for equal outputs."""
    battles = []
    for prompt, comparison in enumerate(comparisons):
        questions = comparison.questions(judge)
        if not questions:
            battles.append(Battle(prompt, model, 0, 0.5))
        if judged.outcomes[prompt] is None:
            continue
        for order, question in enumerate(questions):
            outcome, weight = GRADES[judged.store.known[VerdictStore.key(judge, question)]]
            # In the second order the baseline's output comes first.
            battles.append(Battle(prompt, model, 0, 1 - outcome if order else outcome, weight))
    return battles
