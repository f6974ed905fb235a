"""Texts for a report: sampled responses over time, with their differences highlighted, and flagged training pairs."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher

from markupsafe import Markup, escape

from preference_training.reporting.charts import format_number
from preference_training.reporting.flagged_pairs import KINDS

# Limits of a page: prompts, evaluations of each prompt, pairs of each kind, and characters of a text.
MAX_PROMPTS, MAX_EVALUATIONS, MAX_PAIRS, MAX_CHARACTERS = 16, 4, 20, 1200
# The shape of a row of samples.jsonl.
SAMPLE = {"prompt": str, "policy": str, "examples": int}


@dataclass(frozen=True)
class Samples:
    """Responses to some prompts over time; num_hidden counts the prompts that are not shown."""

    prompts: list[dict]
    num_hidden: int

    @classmethod
    def select(cls, rows: Iterable[dict]) -> "Samples":
        """The first prompts with their responses at a few evaluations, and the differences of policy and reference."""
        by_prompt: dict[str, list[dict]] = {}
        for row in rows:
            if all(isinstance(row.get(name), kind) for name, kind in SAMPLE.items()):
                by_prompt.setdefault(row["prompt"], []).append(row)
        prompts = [
            {"prompt": truncate(prompt.strip()), "evaluations": [_responses(row) for row in _spread(found)]}
            for prompt, found in list(by_prompt.items())[:MAX_PROMPTS]
        ]
        return cls(prompts, len(by_prompt) - len(prompts))


def _spread(rows: list[dict]) -> list[dict]:
    """At most MAX_EVALUATIONS rows, evenly spread from the first to the last; the latest first."""
    last = len(rows) - 1
    kept = {round(last * number / (MAX_EVALUATIONS - 1)) for number in range(MAX_EVALUATIONS)}
    return [rows[place] for place in sorted(kept, reverse=True)]


def _responses(row: dict) -> dict:
    policy, reference = truncate(row["policy"].strip()), row.get("reference")
    if not isinstance(reference, str):
        return {"examples": row["examples"], "policy": policy, "reference": None}
    reference = truncate(reference.strip())
    marked = {"policy": highlight_changes(policy, reference), "reference": highlight_changes(reference, policy)}
    return {"examples": row["examples"], **marked}


def flagged_by_kind(rows: Iterable[dict]) -> dict[str, dict]:
    """The number of flagged pairs of each kind, and the first of them."""
    found: dict[str, dict] = {kind: {"number": 0, "shown": []} for kind in KINDS}
    for row in rows:
        if row["kind"] not in found:
            continue
        kind = found[row["kind"]]
        kind["number"] += 1
        if len(kind["shown"]) < MAX_PAIRS:
            texts = {name: truncate(row[name]) for name in ("prompt", "preferred", "other")}
            margins = ", ".join(format_number(margin) for margin in row.get("margins") or () if isinstance(margin, int | float))
            probability = row.get("wrong_label_probability")
            wrong_label = f"{probability:.0%}" if isinstance(probability, int | float) else None
            kind["shown"].append({"source": row["source"], "margins": margins, "wrong_label": wrong_label, **texts})
    return {kind: facts for kind, facts in found.items() if facts["number"]}


def truncate(text: str) -> str:
    """A text, cut to what a page has room for."""
    hidden = len(text) - MAX_CHARACTERS
    return text if hidden <= 0 else f"{text[:MAX_CHARACTERS]} [... {hidden:,} more characters]"


def highlight_changes(text: str, other: str) -> Markup:
    """A text with those words marked as insertions that another text does not have in that place."""
    if text == other:
        return escape(text)
    # Each word with the whitespace after it: separate whitespace tokens would match everywhere, which takes minutes.
    before, after = (re.findall(r"^\s+|\S+\s*", each) for each in (other, text))
    parts = []
    for change, _, _, start, end in SequenceMatcher(None, before, after).get_opcodes():
        words = escape("".join(after[start:end]))
        parts.append(Markup("<ins>{}</ins>").format(words) if change != "equal" and words.strip() else words)
    return Markup().join(parts)
