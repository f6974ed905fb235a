"""What the reader of a run must know first: that it has learned nothing, has overfitted, or that its numbers decide nothing.

Everything is found in the run directory. A finding that cannot be told from noise is none: noise is what the steps' and
examples' own spread says, as 95% intervals.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from preference_training.configuration.optimizers import OPTIMIZERS, OptimizerFacts
from preference_training.core.metric_names import (
    EVAL_ACCURACY,
    EVAL_LOSS,
    EXAMPLES,
    GRAD_NORM,
    HELD_OUT_PROMPTS,
    HIGH,
    KEPT_FRACTION,
    LOW,
    change,
    loss_is_at_beta_used,
)
from preference_training.core.values import UNREADABLE
from preference_training.data.tokenization import RESPONSE_CUT
from preference_training.evaluation.improvement import Improvement, held_out_improvement, training_improvement
from preference_training.evaluation.phrasing import MIN_PROMPTS, MORE_HELD_OUT, OF_LOOPS, too_few, with_interval
from preference_training.losses.registry import evaluation_depends_on_run
from preference_training.reporting.experts.balance import balance_findings
from preference_training.reporting.observations import finite_values
from preference_training.reporting.run_record import RunRecord
from preference_training.tracking.run_files import is_of_loop
from preference_training.training.defaults import FAR, far_from_usual
from preference_training.training.monitors import warmup_warning

Severity = Literal["error", "warning", "note"]
SEVERITIES = ("error", "warning", "note")
# What only the run itself can see, and has put into events.jsonl.
SEEN_BY_RUN = {
    "unchanged weights": "error",
    "collapse": "warning",
    "accuracy": "warning",
    "samples repeat": "warning",
    "samples improbable": "warning",
    "best checkpoint": "note",
}
# The kind of what a run has said before its first step.
FEW_PROMPTS = "few prompts"
# A gradient norm below float32's rounding of 1 (2^-24): what remains of it is rounding error.
VANISHED = 2**-24
# Share of responses that are cut, and so lose their end-of-sequence token, above which a model hardly learns to end; above the
# second, nearly none is whole.
MANY_CUT, NEARLY_ALL_CUT = 0.5, 0.95
# Share of a split's examples that are skipped, above which the data is probably not read as it was meant. Some named sets
# select by scores, and keep a fifth.
MANY_SKIPPED = 0.9
# Share of the pairs that beta-DPO's filter keeps, below which most of a batch is computed for nothing.
FEW_KEPT = 0.1
# Of what training has gained, the share that held-out examples must have gained too.
SHARED_GAIN = 0.5
# How far apart, as a share, both may have begun: of training it is the mean of the first steps, which learn already.
BEGAN_ALIKE = 0.25


# The events with which a run ends itself.
ENDED_EARLY = ("early stopping: ", "pruned: ", "callback: ")


@dataclass(frozen=True)
class Finding:
    """Something that a run's reader must know. kind: a few words that name it. text: sentences, with what to do."""

    kind: str
    severity: Severity
    text: str

    @property
    def line(self) -> str:
        """The finding as a line of the terminal."""
        return f"{'note' if self.severity == 'note' else 'warning'}: {self.text}"


def findings(run: RunRecord) -> list[Finding]:
    """What the reader of a run must know first, the worst first; of a sound run nothing."""
    found = {finding.kind: finding for finding in _seen_by_run(run)}
    for check in CHECKS:
        found |= {finding.kind: finding for finding in _readable(check, run)}
    if any(finding.severity != "note" for finding in found.values()):
        found |= {finding.kind: finding for finding in _readable(_high_lr, run)}
    return sorted(found.values(), key=lambda finding: SEVERITIES.index(finding.severity))


def _readable(check: Callable[[RunRecord], Iterator[Finding]], run: RunRecord) -> list[Finding]:
    """The findings of a check; none where what it reads is damaged."""
    try:
        return list(check(run))
    except (*UNREADABLE, ArithmeticError):
        return []


def _seen_by_run(run: RunRecord) -> Iterator[Finding]:
    for event in run.events:
        kind, text = event.get("finding"), event.get("text")
        if kind in SEEN_BY_RUN and isinstance(text, str):
            yield Finding(kind, SEEN_BY_RUN[kind], text.removeprefix("warning: "))


# ---- nothing is learned -----------------------------------------------------------------------------------------------------


def _warmup(run: RunRecord) -> Iterator[Finding]:
    settings, steps = run.settings, total_steps(run)
    share, warmup = settings.get("warmup_share"), settings.get("warmup_steps")
    if steps and share is None and (text := warmup_warning(warmup, steps, settings["lr"])):
        if lower := _far_above_usual(run):
            # To rise to such a rate would not help.
            text = f"{text.partition(', and the run will')[0]}. {lower}"
        yield Finding("warm-up", "error", text)


def total_steps(run: RunRecord) -> int | None:
    """How many optimizer steps a run has; None where that is not known."""
    steps, examples = run.about.get("steps"), run.about.get("examples")
    if not isinstance(steps, int) and isinstance(examples, int):
        # Of an earlier version. Epochs may end with smaller batches.
        steps = math.ceil(examples / run.settings["batch_size"])
    return steps if isinstance(steps, int) else None


def _nothing_learned(run: RunRecord) -> Iterator[Finding]:
    if not is_complete(run) or run.settings.get("loss.reference_update_every") is not None:
        # A reference that follows the policy takes the loss back to where it began.
        return
    found = [improvement for improvement in (_held_out(run), _training(run)) if improvement is not None]
    if found and all(improvement.is_nothing for improvement in found):
        shown = " and ".join(improvement.words for improvement in found)
        yield Finding(
            "nothing learned",
            "error",
            f"the run has learned next to nothing: {shown}. {_what_to_do(run)}",
        )


def _held_out(run: RunRecord) -> Improvement | None:
    return None if evaluation_depends_on_run(*run.loss) else held_out_improvement(run.evaluations)


def _training(run: RunRecord) -> Improvement | None:
    return training_improvement(run.steps, run.config.get("loss"))


def _what_to_do(run: RunRecord) -> str:
    if _readable(_warmup, run):
        return _far_above_usual(run) or "Its learning rate never rose to lr: set warmup_share=0.1."
    lr, usual = run.settings.get("lr"), run.about.get("usual_lr")
    # Steps of SGD are not of the size of lr.
    if isinstance(lr, float) and isinstance(usual, float) and lr < usual / FAR and _has_usual_lr(run):
        return f"lr={lr:g} is far below what is usual for such a loss and model, {usual:g} (docs/defaults.md): raise it."
    return f"Is lr={lr} too low, the run too short, or do the examples say nothing to learn?"


def _has_usual_lr(run: RunRecord) -> bool:
    """Whether a learning rate is usual for the optimizer of a run."""
    return OPTIMIZERS.get(str(run.settings.get("optimizer")), OptimizerFacts()).lr_factor is not None


def _far_above_usual(run: RunRecord) -> str | None:
    """What to do about a learning rate far above what is usual that a warm-up has not let rise; None for any other."""
    lr, usual = run.settings.get("lr"), run.about.get("usual_lr")
    if not isinstance(usual, float) or not (far := _times_usual(run)):
        return None
    return f"lr={lr:g} is {far} what is usual for such a loss and model, {usual:g}: set lr={usual:g} and warmup_share=0.1."


def _times_usual(run: RunRecord) -> str | None:
    """How far a learning rate is above what is usual, in words; None where it is not, or nothing is usual."""
    settings, lr, usual = run.settings, run.settings["lr"], run.about["usual_lr"]
    from_scratch = settings.get("model.name_or_path") is None and settings.get("model.archive") is None
    return far_from_usual(lr, usual) if lr > usual and not from_scratch and _has_usual_lr(run) else None


def _high_lr(run: RunRecord) -> Iterator[Finding]:
    """A learning rate far above what is usual, in a run of which other findings say that it went badly."""
    if (far := _times_usual(run)) and not _readable(_warmup, run):
        yield Finding(
            "learning rate",
            "warning",
            f"lr={run.settings['lr']:g} is {far} what is usual for such a loss and model, {run.about['usual_lr']:g} "
            "(docs/defaults.md), which may be why: lower it.",
        )


def is_complete(run: RunRecord) -> bool:
    """Whether a run has come to its end: to its last example, or to where evaluations end it."""
    total = run.about.get("examples")
    seen = max((row[EXAMPLES] for row in run.steps), default=0)
    return bool(run.steps) and (ended_early(run) is not None or (isinstance(total, int) and seen >= total))


def ended_early(run: RunRecord) -> str | None:
    """Why a run has ended of its own accord before its last example; None where it has not, or was stopped from outside."""
    texts = [event["text"] for event in run.events if isinstance(event.get("text"), str)]
    last_start = max((number for number, text in enumerate(texts) if text in ("begins", "goes on")), default=0)
    return next((text for text in texts[last_start:] if text.startswith(ENDED_EARLY)), None)


def _no_gradient(run: RunRecord) -> Iterator[Finding]:
    norms = finite_values(run.steps, GRAD_NORM)
    first = sorted(norms[: max(1, len(norms) // 10)])
    if not norms or first[len(first) // 2] > VANISHED:
        return
    what = "no gradient" if max(norms) == 0 else f"next to no gradient (norm {max(norms):.1g} at most)"
    yield Finding(
        "gradient",
        "error",
        f"the loss has {what} from the first steps on, so that nothing is learned. Are the two responses of each pair the "
        "same, all weights frozen, or is beta extreme?",
    )


# ---- the data ---------------------------------------------------------------------------------------------------------------


def _truncated(run: RunRecord) -> Iterator[Finding]:
    sizes, reports = run.about["train"], run.about["data"]["train"]
    cut = sum(report["changed"].get(RESPONSE_CUT, 0) for report in reports)
    share = cut / sizes["responses"]
    if share > MANY_CUT:
        settings = run.settings
        yield Finding(
            "truncated",
            "error" if share > NEARLY_ALL_CUT else "warning",
            f"{share:.0%} of the training responses are cut and lose their end, so that the model hardly learns to end a "
            f"response. Raise max_length ({settings.get('max_length')}), lower max_prompt_length "
            f"({settings.get('max_prompt_length')}), or skip such rows with truncation_mode=drop.",
        )


def _skipped(run: RunRecord) -> Iterator[Finding]:
    reasons: dict[str, int] = {}
    for report in run.about["data"]["train"]:
        for reason, count in [*report["left_out"].items(), ("bad rows", report["num_bad_rows"])]:
            reasons[reason] = reasons.get(reason, 0) + count
    skipped, left = sum(reasons.values()), run.about["train"]["examples"]
    if skipped > MANY_SKIPPED * (skipped + left):
        most = max(reasons, key=reasons.__getitem__)
        yield Finding(
            "skipped data",
            "warning",
            f"of {skipped + left:,} training examples {left:,} are left; most were skipped because: {most} "
            f"({reasons[most]:,}). dry_run=true shows the rows as they were read.",
        )


def _filtered(run: RunRecord) -> Iterator[Finding]:
    kept = finite_values(run.steps, KEPT_FRACTION)
    if kept and sum(kept) / len(kept) < FEW_KEPT:
        yield Finding(
            "filtered pairs",
            "warning",
            f"the filter of beta-DPO kept {sum(kept) / len(kept):.0%} of the pairs of each batch: the others were computed for "
            "nothing. Lower loss.mode_weight.",
        )


def _experts(run: RunRecord) -> Iterator[Finding]:
    for kind, text in balance_findings(run):
        yield Finding(kind, "warning", text)


# ---- held-out examples ------------------------------------------------------------------------------------------------------


def _few_prompts(run: RunRecord) -> Iterator[Finding]:
    last = run.last_evaluation
    prompts = last.get(HELD_OUT_PROMPTS)
    if not isinstance(prompts, int | float) or not (warning := too_few(prompts, "held-out metrics")):
        return
    accuracy = ""
    if f"{EVAL_ACCURACY}{LOW}" in last:
        low, high = (last[f"{EVAL_ACCURACY}{end}"] for end in (LOW, HIGH))
        accuracy = f". A reward accuracy of {last[EVAL_ACCURACY]:.3g} may be anything from {low:.2g} to {high:.2g}"
    yield Finding(FEW_PROMPTS, "note", f"{warning}{accuracy}. {OF_LOOPS if is_of_loop(run.directory) else MORE_HELD_OUT}")


def _decides(run: RunRecord) -> bool:
    """Whether the held-out examples are enough to say that something went wrong."""
    prompts = run.last_evaluation.get(HELD_OUT_PROMPTS)
    return not isinstance(prompts, int | float) or prompts >= MIN_PROMPTS


def _worse_than_before(run: RunRecord) -> Iterator[Finding]:
    if not _decides(run) or not is_complete(run):
        return
    found, last = _held_out(run), run.last_evaluation
    accuracy, low, high = (last.get(name) for name in change(EVAL_ACCURACY))
    words = []
    # A loss may rise while the policy learns to tell the responses apart: DiscoPOP's does, around 0.
    if found is not None and found.high < 0 and not (low is not None and low > 0):
        words.append(found.words)
    if high is not None and high < 0:
        before = last[EVAL_ACCURACY] - accuracy
        words.append(f"reward accuracy {before:.3g} before training and {last[EVAL_ACCURACY]:.3g} after")
    if words:
        remedy = "Lower lr, train for fewer epochs, or use an earlier checkpoint."
        yield Finding(
            "worse than before",
            "warning",
            f"on held-out examples the model is worse than before: {' and '.join(words)}. {remedy}",
        )


def _below_chance(run: RunRecord) -> Iterator[Finding]:
    last = run.last_evaluation
    low, high = last.get(f"{EVAL_ACCURACY}{LOW}"), last.get(f"{EVAL_ACCURACY}{HIGH}")
    if run.steps and low is not None and high is not None and high < 0.5:
        yield Finding(
            "accuracy",
            "warning",
            f"held-out reward accuracy is {with_interval(last[EVAL_ACCURACY], low, high)}, below chance. Are chosen and "
            "rejected swapped in the data?",
        )


def _overfitting(run: RunRecord) -> Iterator[Finding]:
    if evaluation_depends_on_run(*run.loss) or not _decides(run):
        return
    if text := _rising_loss(run.evaluations) or (is_complete(run) and _unshared_gain(run)):
        yield Finding("overfitting", "warning", text)


def _rising_loss(rows: Sequence[dict]) -> str | None:
    # An earlier version logged beta-DPO's loss at a beta that changes between evaluations.
    evaluations = [row for row in rows if not loss_is_at_beta_used(row)] or rows
    losses = finite_values(evaluations, EVAL_LOSS)
    if len(losses) != len(evaluations) or len(losses) < 3:
        return None
    best = min(range(len(losses)), key=losses.__getitem__)
    low = evaluations[-1].get(f"{EVAL_LOSS}{LOW}")
    # Lowest before training is no overfitting: such a run never became better.
    if low is None or losses[best] >= low or evaluations[best][EXAMPLES] == 0:
        return None
    return (
        f"held-out loss was lowest after {evaluations[best][EXAMPLES]:,.0f} examples ({losses[best]:.4g}) and is "
        f"{losses[-1]:.4g} at the end: the run has overfitted since. Use an earlier checkpoint, or train for fewer epochs."
    )


def _unshared_gain(run: RunRecord) -> str | None:
    """Training loss that fell far more than held-out loss: examples are remembered, not learned from."""
    held_out, training = _held_out(run), _training(run)
    if None in (held_out, training) or not training.is_learned or not _same_measure(held_out, training):
        return None
    if held_out.high >= SHARED_GAIN * training.low:
        return None
    return (
        f"the model learns the training examples, not the task: {training.words}, and {held_out.words}. Train for fewer "
        "epochs, lower lr, or use more data."
    )


def _same_measure(held_out: Improvement, training: Improvement) -> bool:
    """Whether both losses began alike, and so are of alike examples and of the same definition."""
    return abs(held_out.before - training.before) <= BEGAN_ALIKE * abs(held_out.before)


CHECKS = (
    _warmup, _nothing_learned, _no_gradient, _truncated, _skipped, _filtered, _experts, _worse_than_before,
    _below_chance, _overfitting, _few_prompts,
)  # fmt: skip
