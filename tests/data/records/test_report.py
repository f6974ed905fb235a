"""What was read and skipped of a split: what is counted, and which faults are told."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preference_training.core.errors import UserError
from preference_training.data.records.report import DataReport


def test_a_bad_row_stops_the_run_and_its_message_names_the_remedy():
    report, fault = DataReport(), UserError("datasets: rows.jsonl, row 3: no text.")
    with pytest.raises(UserError) as refusal:
        report.bad_row(fault)
    assert str(refusal.value) == ("datasets: rows.jsonl, row 3: no text. Fix the row, or skip such rows with on_bad_row=skip.")
    assert refusal.value.__cause__ is fault
    assert report == DataReport()


def test_skipped_rows_are_counted_and_the_first_ten_kinds_are_listed_by_the_first_line_of_their_message():
    report = DataReport(skip_bad_rows=True)
    kinds = "abcdefghijkl"
    for number, kind in enumerate(kinds, start=1):
        report.bad_row(UserError(f"row {number} has {kind}\nand this is why"))
    assert report.num_bad_rows == 12
    assert report.bad_rows == [f"row {number} has {kind}" for number, kind in enumerate(kinds[:10], start=1)]
    assert report.lines() == ["12 bad rows skipped", *(f"  {message}" for message in report.bad_rows)]


def test_rows_that_fail_alike_are_one_line_with_their_number():
    report = DataReport(skip_bad_rows=True)
    for number, found in enumerate(["'much'", "'5 of 9'", "null", "'more'"], start=7):
        report.bad_row(UserError(f"data.jsonl, row {number}: field 'n' is {found}, expected a number."))
    assert report.lines() == [
        "4 bad rows skipped",
        "  data.jsonl, row 7: field 'n' is 'much', expected a number. (2 more rows like it)",
        "  data.jsonl, row 9: field 'n' is null, expected a number.",
    ]
    assert DataReport(**report.as_dict()) == report


def test_what_is_skipped_and_changed_is_added_up_by_reason_and_nothing_is_no_reason():
    report = DataReport()
    report.skip("too long", 2)
    report.skip("too short")
    report.skip("too long")
    report.skip("never", 0)
    report.change("prompts cut", 4)
    report.change("answers cut", 0)
    assert (report.left_out, report.changed) == ({"too long": 3, "too short": 1}, {"prompts cut": 4})
    assert report.lines() == ["3 skipped: too long; 1 skipped: too short; 4 prompts cut"]


def test_a_report_without_anything_to_say_has_no_lines():
    assert DataReport(rows_read=10, num_prompts=10).lines() == []


REPORTS = st.builds(
    DataReport,
    skip_bad_rows=st.booleans(),
    rows_read=st.integers(0),
    num_prompts=st.integers(0),
    num_bad_rows=st.integers(0),
    bad_rows=st.lists(st.text(), max_size=10),
)


@given(report=REPORTS, reasons=st.lists(st.tuples(st.text(), st.integers(0, 5))), changes=st.lists(st.text()))
def test_a_report_survives_json_and_continues_counting(report, reasons, changes):
    for reason, number in reasons:
        report.skip(reason, number)
    for what in changes:
        report.change(what)
    again = DataReport(**json.loads(json.dumps(report.as_dict())))
    assert again == report
    for each in (again, report):
        each.skip("once more")
        each.change("once more")
    assert again == report
    assert again.left_out["once more"] == 1 + sum(number for reason, number in reasons if reason == "once more")


def test_remarks_are_reported_once_and_survive_json():
    report = DataReport(left_out={"it is odd": 1}, bad_rows=["row 3"])
    for _ in range(2):
        report.not_read("system")
        report.note("weight has no effect")
    again = DataReport(**json.loads(json.dumps(report.as_dict())))
    assert again.lines() == [
        "1 skipped: it is odd",
        "columns not read: system (with system: system it becomes the system turn)",
        "weight has no effect",
        "  row 3",
    ]


def test_names_of_a_hundred_columns_are_kept():
    report = DataReport()
    for number in range(150):
        report.not_read(f"column {number}")
    assert list(report.columns_not_read) == [f"column {number}" for number in range(100)]
