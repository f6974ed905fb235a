"""Conditions over columns: what they select, and that nothing else can be written in them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preference_training.data.records.report import DataReport
from preference_training.data.rows.conversations import RowError
from preference_training.data.rows.values import condition
from preference_training.data.sources.expressions import parse_expression
from preference_training.data.sources.filters import RowFilter

ROW = {
    "chosen_score": 8.5, "rejected_score": "6", "source": "web", "tags": ["code", "math"], "ok": "True", "none": None,
    "date": "2024-05-01", "meta": {"votes": 3}, "n": 0, "bad": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("chosen_score - rejected_score >= 2", True),
        ("chosen_score - rejected_score >= 2.6", False),
        ("(chosen_score + rejected_score) / 2 == 7.25", True),
        ("chosen_score * 2 - 1 > 16 and source == 'web'", False),
        ("chosen_score > 9 or source != 'book'", True),
        ("not (chosen_score > 9)", True),
        ("6 <= rejected_score < chosen_score", True),
        ("source in ['web', 'book']", True),
        ("source not in ('web', 'book')", False),
        ("'code' in tags", True),
        ("'eb' in source", True),
        ("rejected_score in [5, 6]", True),
        ("ok == true", True),
        ("ok", True),
        ("not bad", True),
        ("n or meta.votes == 3", True),
        ("meta.votes / 2 > 1.5", False),
        ("none == null", True),
        ("source == None", False),
        ("date >= '2024-01-01'", True),
        ("date < '2024-01-01'", False),
        ("-n == 0 and -chosen_score < 0", True),
    ],
)
def test_a_condition_is_what_it_says(text, expected):
    assert parse_expression(text).test(ROW) is expected


NUMBERS = st.integers(-3, 3) | st.integers(2**53, 2**53 + 2) | st.sampled_from([0.5, 1.0, 2.0, 1e16])
CONSTANTS = NUMBERS | st.booleans() | st.none() | st.sampled_from(["en", "de", "1 b", "0x1", "-"])
TEXTS = ["True", "false", "null", "None", "", "1.0", "1e0", "nan"]
CELLS = CONSTANTS | NUMBERS.map(str) | st.sampled_from([*TEXTS, float("nan"), [1]])


@given(CELLS, CONSTANTS)
def test_all_forms_of_a_condition_agree(value, wanted):
    row, written = {"x": value}, {"True": "true", "None": "null"}.get(repr(wanted), repr(wanted))
    is_same = parse_expression(f"x == {written}").test(row)
    assert parse_expression(f"x != {written}").test(row) is not is_same
    assert parse_expression(f"x in [{written}, 'other']").test(row) is is_same
    word = wanted if isinstance(wanted, str) else written
    for same in (wanted, [wanted], ["other", wanted], f"== {word}"):
        assert condition(same)(value) is is_same
    assert condition(f"!= {word}")(value) is not is_same


def test_a_condition_knows_its_columns():
    assert parse_expression("a.b - c >= 2 and d in ['e'] or not a.b").columns == ("a.b", "c", "d")


@pytest.mark.parametrize(
    "text",
    [
        "", "a >", "a = 1", "__import__('os').system('x')", "a.b()", "(lambda: 1)()", "[x for x in a]", "a[0]", "a if b else c",
        "f'{a}'", "a ** 9", "a // 2", "a % 2", "a is b", "a := 1", "{1: a}", "1 < 2", "b'x' == a", "1j == a", "(a).b.c() > 1",
        "not " * 100_000 + "a", "(" * 500 + "a" + ")" * 500, "+a", "~a", "a\nb", "a > 1; b", "import os", "...", "*a",
    ],
)  # fmt: skip
def test_nothing_else_is_a_condition(text):
    with pytest.raises(ValueError):
        parse_expression(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("missing > 1", "no field 'missing', the row has chosen_score, "),
        ("source > 1", "field 'source' is 'web', expected a number."),
        ("none - 1 > 1", "field 'none' is null, expected a number."),
        ("1 / n > 1", "n is 0, and is divided by."),
        ("'x' in n", "n is 0, expected a list, or a text"),
    ],
)
def test_a_row_that_has_no_such_value_is_told(text, told):
    with pytest.raises(RowError) as refused:
        parse_expression(text).test(ROW)
    assert str(refused.value).startswith(told)


def test_rows_are_counted_with_the_condition_that_they_fail():
    rows = list(enumerate(({"a": n, "b": 3} for n in range(6)), start=1))
    report = DataReport()
    assert [number for number, _ in RowFilter("a - b >= 1").apply(rows, "rows", report)] == [5, 6]
    assert (report.rows_read, report.left_out, report.notes) == (6, {"not a - b >= 1": 4}, [])
    report = DataReport()
    assert len(list(RowFilter("a < 9").apply(rows, "rows", report))) == 6
    assert report.notes == ["where skips no row by a < 9"]
