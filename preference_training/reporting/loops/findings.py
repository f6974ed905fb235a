"""What the reader of a loop must know first: what its judge's scores hide, and whether the last policy is the best.

What a step has found of its round stands in the round's summary, as `findings`; what all rounds together show is found here.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from preference_training.evaluation.phrasing import too_few, with_interval
from preference_training.reporting.findings import SEVERITIES, Finding
from preference_training.reporting.loops.record import LoopRecord
from preference_training.rounds.summary import policy_name
from preference_training.rounds.training import reference_moves

# Shares of the held-out responses: above the first the score is of the others only; above the second most are no whole ones.
MANY_UNJUDGED, MANY_TRUNCATED = 0.1, 0.5


def loop_findings(loop: LoopRecord) -> list[Finding]:
    """What there is to know of a loop: errors first, then warnings and notes; of the latest round first."""
    found = [*_of_rounds(loop), *_held_out(loop), *_compared(loop), *_reference(loop)]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def _of_rounds(loop: LoopRecord) -> Iterator[Finding]:
    """What the rounds' steps have found, of each kind the latest."""
    kinds: set[str] = set()
    for files, summary in reversed(list(zip(loop.rounds, loop.summaries, strict=True))):
        listed = summary.get("findings")
        given = [each for each in listed if isinstance(each, Mapping)] if isinstance(listed, list) else []
        new = [each for each in given if str(each.get("kind")) not in kinds]
        kinds |= {str(each.get("kind")) for each in given}
        for facts in new:
            severity = facts.get("severity") if facts.get("severity") in SEVERITIES else "warning"
            yield Finding(str(facts.get("kind")), severity, f"{files.name}: {facts.get('text')}")


def _held_out(loop: LoopRecord) -> Iterator[Finding]:
    """Whether the held-out numbers can be relied on."""
    if not loop.measured:
        if any(loop.summaries):
            yield Finding("held out", "warning", "Nothing is held out, so nothing compares policies. Set rounds.held_out.")
        return
    facts = loop.held_out(loop.measured[-1])
    if few := too_few(facts.get("prompts", 0), "held-out prompts"):
        yield Finding("held out", "warning", f"{few}. Raise rounds.held_out.")
    responses = facts.get("responses") or 1
    who = policy_name(loop.measured[-1])
    if facts.get("unjudged", 0) > MANY_UNJUDGED * responses:
        share = f"{facts['unjudged']:,} of {responses:,}"
        yield Finding("unjudged", "warning", f"The judge could not judge {share} held-out responses ({who}).")
    if facts.get("truncated", 0) > MANY_TRUNCATED * responses:
        share = f"{facts['truncated']:,} of {responses:,}"
        yield Finding("truncated", "warning", f"{share} held-out responses ({who}) were cut. Raise rounds.max_new_tokens.")


def _reference(loop: LoopRecord) -> Iterator[Finding]:
    """Whether a reference that is to follow the policy has."""
    every = loop.settings.get("loss.reference_update_every")
    trained = [files for files in loop.rounds if files.number is not None and files.is_done("train")]
    if isinstance(every, int) and trained and "never" in (words := reference_moves(trained[-1], every)):
        yield Finding("reference", "warning", f"{trained[-1].name}: {words}.")


def _compared(loop: LoopRecord) -> Iterator[Finding]:
    """Whether the last policy is better than the first, and than each between."""
    if len(loop.measured) < 2:
        return
    last = loop.measured[-1]
    rate, score = (loop.held_out(last).get(name) or {} for name in ("win_rate", "score"))
    if _has_interval(rate) and rate["low"] <= 0.5 <= rate["high"]:
        found = with_interval(rate["mean"], rate["low"], rate["high"])
        text = f"The policy {policy_name(last)} cannot be told from the first model: its win rate is {found}."
        yield Finding("no change", "warning", text)
    elif _has_interval(rate) and rate["high"] < 0.5:
        found = with_interval(rate["mean"], rate["low"], rate["high"])
        text = f"The judge finds the policy {policy_name(last)} worse than the first model: its win rate is {found}."
        yield Finding("worse", "error", text)
    for place in loop.measured[1:-1]:
        before = loop.held_out(place).get("score") or {}
        if _has_interval(before) and _has_interval(score) and before["low"] > score["high"]:
            better, worse = (with_interval(each["mean"], each["low"], each["high"]) for each in (before, score))
            text = (
                f"The policy {policy_name(place)} has a higher held-out score, {better}, than the last, {worse}: take "
                f"{loop.rounds[place - 1].name}/policy."
            )
            yield Finding("worse than before", "warning", text)
            return


def _has_interval(facts: Mapping[str, Any]) -> bool:
    return all(isinstance(facts.get(name), int | float) for name in ("mean", "low", "high"))
