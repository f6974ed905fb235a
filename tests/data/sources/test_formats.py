"""Formats besides the usual ones, and their faults: objects that hold rows or columns, tables with other delimiters, texts."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from preference_training.core.errors import UserError
from preference_training.data.entries import load_records, read_entry
from preference_training.data.files import FORMATS, read_rows
from preference_training.data.records.report import DataReport
from preference_training.data.sources.tables import NOT_OF_THIS_CALL

ROWS = [{"prompt": "q0", "chosen": "a", "rejected": "b"}, {"prompt": "q1", "chosen": "c", "rejected": "d"}]
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def rows_of(path: Path, report: DataReport | None = None) -> list[dict]:
    return [row for _, row in read_rows(path, report)]


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as refused:
        rows_of(path)
    return str(refused.value)


# ---- JSON -----------------------------------------------------------------------------------------------------------------

COLUMNS = {column: {str(n): row[column] for n, row in enumerate(ROWS)} for column in ROWS[0]}
OBJECTS = {
    "one list": {"data": ROWS},
    "one list beside facts": {"version": "1.0", "data": ROWS, "n": 2},
    "one list under any name": {"mine": ROWS},
    "one list under any name beside facts": {"version": "1.0", "pairs": ROWS, "n": 2},
    "columns by index, as pandas writes": COLUMNS,
    "columns as lists": {column: [row[column] for row in ROWS] for column in ROWS[0]},
    "rows by index": {str(n): row for n, row in enumerate(ROWS)},
    "split, as pandas writes": {"columns": list(ROWS[0]), "index": [0, 1], "data": [list(row.values()) for row in ROWS]},
    "table, as pandas writes": {"schema": {"fields": []}, "data": ROWS},
}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("value", OBJECTS.values(), ids=OBJECTS)
def test_an_object_that_holds_rows_or_columns_gives_the_rows(tmp_path, value, indent):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(value, indent=indent))
    assert list(read_rows(path)) == list(enumerate(ROWS, start=1))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"chosen": TURNS, "rejected": TURNS},
        {"prompt": "q", "chosen": "a", "meta": [{"score": 1}]},
        ROWS[0],
    ],
    ids=["turns", "two conversations", "a list beside texts", "texts"],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_that_is_a_row_is_the_only_one(tmp_path, row, indent):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(row, indent=indent))
    assert rows_of(path) == [row]


def test_an_object_with_several_lists_of_rows_is_refused_with_their_names(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"train": ROWS, "test": ROWS}))
    text = refusal(path)
    assert text.startswith(f"datasets: {path}: an object with 2 lists of rows: train, test. Expected one;")


def test_objects_over_several_lines_each_are_rows(tmp_path):
    for name in ("rows.jsonl", "rows.json"):
        (tmp_path / name).write_text("\n".join(json.dumps(row, indent=2) for row in ROWS))
        assert rows_of(tmp_path / name) == ROWS
    (tmp_path / "rows.jsonl").write_text("\n\n".join(json.dumps(row, indent=2) for row in ROWS)[:-9])
    assert "not JSON" in refusal(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_a_list_in_a_file_of_lines_is_a_bad_row_and_a_file_that_is_one_list_is_its_rows(tmp_path, ending):
    path, report = tmp_path / f"rows.{ending}", DataReport(skip_bad_rows=True)
    lines = [json.dumps(row) for row in ROWS]
    path.write_text("\n".join(["[1, 2]", *lines]))
    assert list(read_rows(path, report)) == [(2, ROWS[0]), (3, ROWS[1])]
    assert report.bad_rows == [f"datasets: {path}, row 1: found list, expected a JSON object."]
    for text in (json.dumps(ROWS), json.dumps(ROWS, indent=1) + "\n\n", json.dumps(ROWS) + "\n"):
        path.write_text(text)
        assert rows_of(path) == ROWS


def test_json_lines_in_a_json_file_whose_first_is_damaged_are_skipped_one_by_one(tmp_path):
    path, report = tmp_path / "rows.json", DataReport(skip_bad_rows=True)
    path.write_text('{"prompt": \n' + "".join(json.dumps(row) + "\n" for row in ROWS))
    assert rows_of(path, report) == ROWS
    assert report.num_bad_rows == 1


# ---- CSV ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "delimiter"), [("a.tsv", "\t"), ("a.csv", ";"), ("a.csv", "\t"), ("A.CSV", ","), ("A.TSV", "\t")]
)
@pytest.mark.parametrize("quote", ["", '"'])
def test_the_delimiter_is_the_one_of_the_header(tmp_path, name, delimiter, quote):
    lines = [ROWS[0].keys(), *(row.values() for row in ROWS)]
    (tmp_path / name).write_text("".join(delimiter.join(f"{quote}{text}{quote}" for text in line) + "\r\n" for line in lines))
    report = DataReport()
    assert rows_of(tmp_path / name, report) == ROWS
    assert report.notes == (["fields are separated by ;"] if delimiter == ";" else [])


def test_a_comma_in_a_tab_separated_header_and_a_semicolon_in_a_quoted_name_separate_nothing(tmp_path):
    (tmp_path / "a.tsv").write_text("a,b\tc\n1,2\t3\n")
    (tmp_path / "a.csv").write_text('"a;b;c",d\n1,2\n')
    (tmp_path / "one.csv").write_text("text\na; b, c\n")
    assert rows_of(tmp_path / "a.tsv") == [{"a,b": "1,2", "c": "3"}]
    assert rows_of(tmp_path / "a.csv") == [{"a;b;c": "1", "d": "2"}]
    assert "another number of fields" in refusal(tmp_path / "one.csv")


def test_a_header_may_hold_line_ends_and_stand_below_empty_lines(tmp_path):
    (tmp_path / "a.csv").write_text('\n"a\nb",c\n1,2\n')
    assert rows_of(tmp_path / "a.csv") == [{"a\nb": "1", "c": "2"}]
    (tmp_path / "a.csv").write_text('"a\nb,c\n1,2\n')
    assert "not CSV: unexpected end of data" in refusal(tmp_path / "a.csv")


def test_a_bad_quote_is_a_bad_row(tmp_path):
    path, report = tmp_path / "a.csv", DataReport(skip_bad_rows=True)
    path.write_text('a,b\n1,2\n"3" x,4\n5,6\n')
    assert list(read_rows(path, report)) == [(1, {"a": "1", "b": "2"}), (3, {"a": "5", "b": "6"})]
    told = f"datasets: {path}, row 2: not CSV: ',' expected after '\"' (line 3)."
    assert (report.num_bad_rows, report.bad_rows) == (1, [told])
    assert refusal(path) == f"{told} Fix the row, or skip such rows with on_bad_row=skip."


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ('"Mars\tMoon\n', ('"Mars', "Moon")),
        ('"Mars" it is\tMoon\n', ('"Mars" it is', "Moon")),
        ('5" tall\t"\n', ('5" tall', '"')),
        ('"Mars, ""red"""\t"two\nlines"\n', ('Mars, "red"', "two\nlines")),
        ('"a\tb"\tc\n', ("a\tb", "c")),
    ],
    ids=["not closed", "text behind", "inches", "quoted as others write", "a tab in quotes"],
)
def test_a_quote_in_a_table_of_tabs_is_text_unless_it_encloses_a_field(tmp_path, text, values):
    path = tmp_path / "a.tsv"
    path.write_text("a\tb\n1\t2\n" + text + "3\t4\n")
    expected = [("1", "2"), values, ("3", "4")]
    assert list(read_rows(path)) == [(n, dict(zip("ab", row, strict=True))) for n, row in enumerate(expected, start=1)]


# ---- Arrow and texts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", [pyarrow.ipc.new_file, pyarrow.ipc.new_stream])
def test_arrow_files_and_streams_are_read(tmp_path, writer):
    table = pyarrow.Table.from_pylist(ROWS)
    with writer(str(tmp_path / "rows.arrow"), table.schema) as file:
        file.write_table(table, max_chunksize=1)
    assert list(read_rows(tmp_path / "rows.arrow")) == list(enumerate(ROWS, start=1))
    (tmp_path / "rows.arrow").write_bytes(b"no arrow file at all")
    assert "not Arrow, or damaged" in refusal(tmp_path / "rows.arrow")


def test_a_file_of_plain_text_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffA text.\n\nIts second paragraph.\n")
    assert rows_of(tmp_path / "a.txt") == [{"text": "A text.\n\nIts second paragraph.\n"}]
    (tmp_path / "a.txt").write_bytes(b"one\nGr\xfc\xdfe\n")
    assert ", line 2, byte 3 of the line: not UTF-8 text." in refusal(tmp_path / "a.txt")


@pytest.mark.parametrize("ending", FORMATS)
def test_a_missing_file_of_any_format_is_refused_before_anything_is_read(tmp_path, ending):
    with pytest.raises(UserError, match="no such file"):
        read_entry(str(tmp_path / f"missing{ending.upper()}"))


def test_the_text_true_of_a_csv_file_is_true_in_where(tmp_path):
    words = ["true", "True", "TRUE", "false", "False", "no"]
    lines = "".join(f"q{n},a,b,{word}\n" for n, word in enumerate(words))
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected,is_valid\n" + lines)

    def kept(where) -> list[str]:
        entry = read_entry({"path": str(tmp_path / "a.csv"), "where": where, "held_out_share": 0})
        return [record.prompt for record in load_records(entry, "train")]

    assert kept({"is_valid": True}) == kept("is_valid == true") == kept("is_valid == True") == ["q0", "q1", "q2"]
    assert kept({"is_valid": False}) == ["q3", "q4"]
    assert kept({"is_valid": [True, "no"]}) == ["q0", "q1", "q2", "q5"]


# ---- tables as people write them --------------------------------------------------------------------------------------------


def test_fields_may_be_separated_by_bars(tmp_path):
    report = DataReport()
    (tmp_path / "a.csv").write_text("prompt|chosen|rejected\nWhat, now?|a, b|c\n")
    assert rows_of(tmp_path / "a.csv", report) == [{"prompt": "What, now?", "chosen": "a, b", "rejected": "c"}]
    assert report.notes == ["fields are separated by |"]


def test_where_the_header_has_spaces_behind_delimiters_no_field_begins_with_one(tmp_path):
    report = DataReport()
    (tmp_path / "a.csv").write_text('prompt, chosen, "rejected"\nWhy?, so, "a, b"\n')
    assert rows_of(tmp_path / "a.csv", report) == [{"prompt": "Why?", "chosen": "so", "rejected": "a, b"}]
    assert report.notes == ["spaces behind delimiters are left out, since the header has them"]
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\nWhy?, so, no\n")
    assert rows_of(tmp_path / "a.csv") == [{"prompt": "Why?", "chosen": " so", "rejected": " no"}]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_conversation_that_is_a_row_by_itself_is_its_messages(tmp_path, name):
    lines = [TURNS, [*TURNS, *TURNS]]
    text = json.dumps(lines) if name == "a.json" else "\n".join(map(json.dumps, lines))
    (tmp_path / name).write_text(text)
    assert rows_of(tmp_path / name) == [{"messages": TURNS}, {"messages": [*TURNS, *TURNS]}]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_calls_do_not_get_the_arguments_that_other_calls_have(tmp_path, name):
    given = [{"a": 1}, {"b": "x", "c": {"d": 2}}, {"c": {"e": 3}}]
    calls = [[{"role": "assistant", "calls": [{"function": {"name": "f", "arguments": one}}]}] for one in given]
    table = pyarrow.Table.from_pylist([{"messages": call} for call in calls])
    if name == "a.parquet":
        pyarrow.parquet.write_table(table, tmp_path / name)
    else:
        with pyarrow.ipc.new_file(str(tmp_path / name), table.schema) as file:
            file.write_table(table)
    assert table.column("messages")[0].as_py()[0]["calls"][0]["function"]["arguments"] == {"a": 1, "b": None, "c": None}
    report = DataReport()
    rows = rows_of(tmp_path / name, report)
    assert [row["messages"][0]["calls"][0]["function"]["arguments"] for row in rows] == given
    assert report.notes == [NOT_OF_THIS_CALL]


def test_arguments_are_as_they_are_where_no_call_lacks_any(tmp_path):
    calls = [{"messages": [{"calls": [{"arguments": {"a": n}}]}], "score": None} for n in range(2)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(calls), tmp_path / "a.parquet")
    report = DataReport()
    assert (rows_of(tmp_path / "a.parquet", report), report.notes) == (calls, [])
