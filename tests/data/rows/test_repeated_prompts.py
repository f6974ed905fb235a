"""Answers that begin with their prompt: cut where all rows are so, else left, and counted either way."""

import pytest

from preference_training.data.records.record import Turn
from preference_training.data.records.report import DataReport
from preference_training.data.rows.grouping import CUT, LEFT, Row, strip_repeated_prompts


def pair(prompt, *responses: str) -> Row:
    return Row(prompt, list(responses), [(0, 1)], 0)


def cut(*rows: Row) -> tuple[list[Row], dict]:
    report = DataReport()
    return list(strip_repeated_prompts(iter(rows), report)), report.changed


def test_where_all_responses_start_with_their_prompt_it_is_cut_from_them():
    rows = [pair(f"Name {n}.\n", f"Name {n}.\nBlue.", f"Name {n}.\nSeven.") for n in range(3)]
    assert cut(*rows) == ([pair(f"Name {n}.\n", "Blue.", "Seven.") for n in range(3)], {CUT: 3})


@pytest.mark.parametrize(
    ("prompt", "response", "answer"),
    [
        # What is between prompt and answer stays with the answer, unless the prompt has it.
        ("Why?", "Why? So.", " So."),
        ("Why? ", "Why? So.", "So."),
        ("Why?\n", " Why?\n\nSo.", "So."),
        ((Turn("system", "s"), Turn("user", "Why?")), "Why?\nSo.", "So."),
    ],
)
def test_what_follows_the_prompt_is_the_response(prompt, response, answer):
    found, _ = cut(*[pair(prompt, response, response + " x")] * 2)
    assert found == [pair(prompt, answer, answer + " x")] * 2


def test_responses_that_are_dialogues_of_their_prompt_are_cut_behind_the_last_assistant():
    row = pair("Why?", "\n\nHuman: Why?\n\nAssistant: So.", "\n\nHuman: Why?\n\nAssistant: No.")
    assert cut(row, row)[0] == [pair("\n\nHuman: Why?\n\nAssistant:", " So.", " No.")] * 2


@pytest.mark.parametrize(
    "other",
    [
        pair("Why?", "So.", "No."),
        pair("Is", "Island", "Is not"),
        pair("Why?", "Why?", "Why? No."),
        pair("Why?", "Why? So.", "No."),
    ],
)
def test_where_one_row_is_not_so_all_stay_and_the_others_are_counted(other):
    row = pair("Why?", "Why? So.", "Why? No.")
    assert cut(row, other, row) == ([row, other, row], {LEFT: 2})


def test_one_row_decides_nothing():
    row = pair("Why?", "Why? So.", "Why? No.")
    assert cut(row) == ([row], {LEFT: 1})


def test_rows_without_repetition_are_as_they_were():
    assert cut(pair("Why?", "So.", "No."), pair("How?", "So.", "No.")) == (
        [pair("Why?", "So.", "No."), pair("How?", "So.", "No.")],
        {},
    )
