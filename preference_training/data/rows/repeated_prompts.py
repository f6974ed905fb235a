"""Responses that repeat their prompt: if those of all rows do, it is removed from them."""

from collections.abc import Iterator
from itertools import chain, islice

from preference_training.data.rows.grouping import Row
from preference_training.data.rows.records import DataReport, Prompt, Response
from preference_training.data.rows.templates import ASSISTANT, parse_dialogue, split_dialogue

# Rows that are inspected first, at most and at least; a single row is no evidence.
ROWS_INSPECTED, MIN_ROWS = 1000, 2

CUT = "rows whose responses repeated their prompt, which was removed, as in all of the first rows"
LEFT = "rows whose responses repeat their prompt, which was kept because other rows' do not"


def strip_repeated_prompts(rows: Iterator[Row], report: DataReport) -> Iterator[Row]:
    """The rows, with the prompt removed from the responses if all of the first `ROWS_INSPECTED` rows repeat it in each.

    Otherwise a model would read it twice, and be trained to generate it. The report counts such rows either way.
    """
    rows = iter(rows)
    first = list(islice(rows, ROWS_INSPECTED))
    cuts = len(first) >= MIN_ROWS and all(map(_cut, first))
    for row in chain(first, rows):
        cut = _cut(row)
        if cut is None:
            yield row
        elif cuts:
            report.change(CUT)
            yield cut
        else:
            report.change(LEFT)
            yield row


def _cut(row: Row) -> Row | None:
    """The row with its prompt removed from all responses, if all start with it; else None."""
    found = []
    for response in row.responses:
        if (after := _after_prompt(row.prompt, response)) is None:
            return None
        found.append(after)
    if not found or len({prompt for prompt, _ in found}) > 1:
        return None
    return row._replace(prompt=found[0][0], responses=[rest for _, rest in found])


def _after_prompt(prompt: Prompt, response: Response) -> tuple[Prompt, str] | None:
    """Prompt and response, where the response, or the dialogue in it, starts with the prompt; else None."""
    asked = (prompt if isinstance(prompt, str) else prompt[-1].content).strip()
    if not isinstance(response, str) or not asked:
        return None
    start = len(response) - len(response.lstrip())
    if response.startswith(asked, start):
        rest = response[start + len(asked) :]
        # Whole words only: "Island" does not start with the prompt "Is".
        if rest.strip() and not (asked[-1].isalnum() and rest[0].isalnum()):
            ends_with_space = not isinstance(prompt, str) or prompt[-1].isspace()
            return prompt, rest.lstrip() if ends_with_space else rest
    if ASSISTANT not in response:
        return None
    before, rest = split_dialogue(response)
    turns = parse_dialogue(before)
    if turns and rest.strip() and [turn.content.strip() for turn in turns] == [asked] and isinstance(prompt, str):
        return before, rest
    return None
