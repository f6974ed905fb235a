"""Answers that begin with their prompt: where all rows are so, the prompt is cut from the answers."""

from collections.abc import Iterator
from itertools import chain, islice

from preference_training.data.rows.records import DataReport, Prompt, Row
from preference_training.data.rows.templates import parse_dialogue, split_dialogue

# Rows that are looked at before it is decided. One alone would decide nothing.
ROWS_LOOKED_AT, FEWEST_ROWS = 1000, 2

CUT = "rows whose answers begin with their prompt, which was cut from them, as in all of the first rows"
LEFT = "rows whose answers begin with their prompt; other rows' do not, so that it stands there twice"


def without_repeated_prompts(rows: Iterator[Row], report: DataReport) -> Iterator[Row]:
    """The rows; where all of the first `ROWS_LOOKED_AT` begin every answer with the prompt, without it there.

    A model would read it twice, and be trained to write it. Rows are counted in the report either way.
    """
    rows = iter(rows)
    first = list(islice(rows, ROWS_LOOKED_AT))
    cuts = len(first) >= FEWEST_ROWS and all(map(_cut, first))
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
    """The row without its prompt at the beginning of the answers, if it begins all of them."""
    found = [_after_prompt(row.prompt, response) for response in row.responses]
    if not all(found) or len({prompt for prompt, _ in found}) > 1:
        return None
    return row._replace(prompt=found[0][0], responses=[answer for _, answer in found])


def _after_prompt(prompt: Prompt, response: str) -> tuple[Prompt, str] | None:
    """Prompt and answer of a response that begins with its prompt, or that is a dialogue which does; else None."""
    asked = (prompt if isinstance(prompt, str) else prompt[-1].content).strip()
    start = len(response) - len(response.lstrip())
    if response.startswith(asked, start):
        answer = response[start + len(asked) :]
        # No word is cut: a prompt "Is" does not begin "Island".
        if answer.strip() and not (asked[-1].isalnum() and answer[0].isalnum()):
            ends_with_space = not isinstance(prompt, str) or prompt[-1].isspace()
            return prompt, answer.lstrip() if ends_with_space else answer
    try:
        before, answer = split_dialogue(response)
    except ValueError:
        return None
    turns = parse_dialogue(before)
    if turns and answer.strip() and [turn.content.strip() for turn in turns] == [asked] and isinstance(prompt, str):
        return before, answer
    return None
