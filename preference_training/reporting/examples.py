"""Texts for a report: sampled responses over time, with their differences highlighted, and flagged training pairs."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher

from markupsafe import Markup, escape

from preference_training.core.values import format_number
from preference_training.reporting.flagged_pairs import KINDS

# Limits of a page: prompts, evaluations of each prompt, pairs of each kind, and characters of a text.
MAX_PROMPTS, MAX_EVALUATIONS, MAX_PAIRS, MAX_CHARACTERS = 16, 4, 20, 1200
# Of two texts that have less in common, differences are not marked: all of it is different.
LEAST_ALIKE = 0.4
# What the reference is in most runs.
BEFORE_TRAINING = "reference, which is the model before training"
# The shape of a row of samples.jsonl.
SAMPLE = {"prompt": str, "policy": str, "examples": int}


# How templates begin a turn of the user, and what ends it.
USER = re.compile(r"(?:<\|?[\w ]*\|?>\s*|\A|\n\n|\[)(?:user|User|USER|Human|INST)\b(?:<\|?\w+\|?>|[:\]\s])*|<\|user\|>\s*")
END = re.compile(r"<\|?/?\w+\|?>|\[/INST\]|\n\nAssistant:")


@dataclass(frozen=True)
class Samples:
    """Responses to some prompts over time; num_hidden counts the prompts that are not shown."""

    prompts: list[dict]
    num_hidden: int

    @classmethod
    def select(cls, rows: Iterable[dict], reference: str = BEFORE_TRAINING) -> "Samples":
        """The first prompts with the responses before training and now, and at a few evaluations between.

        reference: what the reference is called.
        """
        by_prompt = rows_by_prompt(rows)
        prompts = [
            {
                "question": truncate(last_question(prompt)),
                "prompt": truncate(prompt.strip()),
                "columns": before_and_after(found, reference),
                "between": [(row["examples"], truncate(row["policy"].strip())) for row in _between(found)],
            }
            for prompt, found in list(by_prompt.items())[:MAX_PROMPTS]
        ]
        return cls(prompts, len(by_prompt) - len(prompts))


def rows_by_prompt(rows: Iterable[dict]) -> dict[str, list[dict]]:
    """The valid rows of a samples.jsonl by their prompts, the latest last."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        if all(isinstance(row.get(name), kind) for name, kind in SAMPLE.items()):
            found.setdefault(row["prompt"], []).append(row)
    return found


def last_question(prompt: str) -> str:
    """The last user turn of a prompt as a template has rendered it; the whole prompt where no template is recognized."""
    *_, begins = (0, *(match.end() for match in USER.finditer(prompt)))
    ends = END.search(prompt, begins)
    return prompt[begins : ends.start() if ends else None].strip() or prompt.strip()


def response_before(rows: list[dict], title: str = BEFORE_TRAINING) -> tuple[str, str] | None:
    """What the response to a prompt was before training, of the samples in its rows, and how that is known; None if it is not.

    title: what the reference is, whose response was sampled from the same noise as the latest one, so that a reader sees what
    has changed.
    """
    if isinstance(reference := rows[-1].get("reference"), str):
        return title, truncate(reference.strip())
    if rows[0]["examples"] == 0:
        return "before training", truncate(rows[0]["policy"].strip())
    return None


def before_and_after(rows: list[dict], reference: str = BEFORE_TRAINING) -> list[tuple[str, str]]:
    """The responses to a prompt that are shown side by side: title and text, with their differences marked."""
    last = rows[-1]
    title, after = f"after {last['examples']:,} examples", truncate(last["policy"].strip())
    before = response_before(rows, reference)
    if before is None or last["examples"] == 0:
        return [(title if last["examples"] else "before training", after)]
    return [(before[0], highlight_changes(before[1], after)), (title, highlight_changes(after, before[1]))]


def _between(rows: list[dict]) -> list[dict]:
    """At most MAX_EVALUATIONS rows besides the last, evenly spread, the latest first."""
    rows = [row for row in rows[:-1] if row["examples"]]
    last = len(rows) - 1
    kept = {round(last * number / (MAX_EVALUATIONS - 1)) for number in range(MAX_EVALUATIONS)} if rows else set()
    return [rows[place] for place in sorted(kept, reverse=True)]


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


def truncate(text: str, room: int = MAX_CHARACTERS) -> str:
    """A text, cut to what a page has room for."""
    hidden = len(text) - room
    return text if hidden <= 0 else f"{text[:room]} [... {hidden:,} more characters]"


def highlight_changes(text: str, other: str) -> Markup:
    """A text with those words marked as insertions that another text does not have in that place; none where most differ."""
    if text == other:
        return escape(text)
    # Each word with the whitespace after it: separate whitespace tokens would match everywhere, which takes minutes.
    before, after = (re.findall(r"^\s+|\S+\s*", each) for each in (other, text))
    matcher = SequenceMatcher(None, before, after)
    if matcher.ratio() < LEAST_ALIKE:
        return escape(text)
    parts = []
    for change, _, _, start, end in matcher.get_opcodes():
        words = escape("".join(after[start:end]))
        parts.append(Markup("<ins>{}</ins>").format(words) if change != "equal" and words.strip() else words)
    return Markup().join(parts)
