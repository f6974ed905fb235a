"""Files of rows: every format reads the same, and whatever is wrong with a file is said with its name and row."""

import csv
import gzip
import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preference_training.core.errors import UserError
from preference_training.data.entries import load_records, read_entry
from preference_training.data.files import is_data_file, read_rows
from preference_training.data.records.report import DataReport
from tests.support.files import DATA_SUFFIXES

ROWS = [
    {"prompt": "Say hello.", "chosen": "Hello!", "rejected": "No."},
    {"prompt": 'Commas, "quotes",\nline breaks', "chosen": "Ünïcode 🙂 漢字", "rejected": "\ttabs and \\ backslashes"},
    {"prompt": "[1, 2]", "chosen": "  spaces  ", "rejected": "\u2028 is no end of a row"},
]
# Hypothesis runs one function many times; each example writes its own file, so that sharing tmp_path is harmless.
SHARES_FOLDER = [HealthCheck.function_scoped_fixture]


def write(path: Path, rows: list[dict]) -> Path:
    """Write rows in the format that the path's ending says, with the writers that users have."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode(), mtime=0))
    elif path.suffix == ".jsonl":
        path.write_bytes(lines.encode())
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def message(path: Path) -> str:
    """What the user is told about a faulty file. It must name the file, and be one paragraph."""
    with pytest.raises(UserError) as refusal:
        list(read_rows(path))
    text = str(refusal.value)
    assert text.startswith(f"datasets: {path}")
    assert "\n" not in text
    return text


# ---- sound files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", DATA_SUFFIXES)
def test_every_format_reads_the_same_rows_numbered_from_1(tmp_path, suffix):
    assert list(read_rows(write(tmp_path / f"rows{suffix}", ROWS))) == list(enumerate(ROWS, start=1))


@pytest.mark.parametrize("suffix", DATA_SUFFIXES)
def test_the_ending_of_a_name_makes_it_a_data_file(suffix):
    assert is_data_file(f"folder/name{suffix}")
    assert not is_data_file(f"folder/name{suffix}.doc")


def test_a_json_file_may_also_hold_json_lines_and_a_jsonl_file_a_list(tmp_path):
    lines = write(tmp_path / "rows.jsonl", ROWS).rename(tmp_path / "lines.json")
    whole = write(tmp_path / "rows.json", ROWS).rename(tmp_path / "list.jsonl")
    assert list(read_rows(lines)) == list(read_rows(whole)) == list(enumerate(ROWS, start=1))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".csv"])
def test_a_byte_order_mark_is_no_part_of_the_first_field(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix}", ROWS)
    content = gzip.decompress(path.read_bytes()) if suffix.endswith(".gz") else path.read_bytes()
    content = b"\xef\xbb\xbf" + content
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    assert [row for _, row in read_rows(path)] == ROWS


def test_empty_lines_are_skipped_but_counted_as_an_editor_counts_them(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"a": "first"}\n\n  \n{"a": "second"}')
    assert list(read_rows(path)) == [(2, {"a": "first"}), (5, {"a": "second"})]


def test_windows_line_ends_between_rows_are_not_part_of_them(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": "x"}\r\n{"a": "y"}\r\n')
    (tmp_path / "rows.csv").write_bytes(b'a\r\nx\r\n"y\r\nz"\r\n')
    assert [row["a"] for _, row in read_rows(tmp_path / "rows.jsonl")] == ["x", "y"]
    assert [row["a"] for _, row in read_rows(tmp_path / "rows.csv")] == ["x", "y\r\nz"]


def test_a_csv_field_may_be_longer_than_the_csv_modules_own_limit(tmp_path):
    long = "x" * 200_000
    (tmp_path / "rows.csv").write_text(f"a,b\n{long},1\n")
    assert list(read_rows(tmp_path / "rows.csv")) == [(1, {"a": long, "b": "1"})]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_an_empty_file_has_no_rows(tmp_path, suffix):
    (tmp_path / f"rows{suffix}").touch()
    assert list(read_rows(tmp_path / f"rows{suffix}")) == []


def test_rows_are_read_one_by_one_so_that_an_error_further_down_does_not_hide_the_first_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\nfault\n')
    rows = read_rows(path)
    assert [next(rows), next(rows)] == [(1, {"a": 1}), (2, {"a": 2})]
    with pytest.raises(UserError, match="row 3"):
        next(rows)


# ---- faults -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", DATA_SUFFIXES)
def test_a_missing_file_is_refused(tmp_path, suffix):
    assert "cannot be read" in message(tmp_path / f"missing{suffix}")


@pytest.mark.parametrize("suffix", DATA_SUFFIXES)
def test_a_directory_is_refused(tmp_path, suffix):
    (tmp_path / f"folder{suffix}").mkdir()
    assert re.search("directory|regular file", message(tmp_path / f"folder{suffix}"))


@pytest.mark.parametrize("suffix", DATA_SUFFIXES)
def test_a_file_that_the_system_does_not_let_us_open_is_refused(tmp_path, suffix):
    # A link to itself: unlike permission bits, it also stops root.
    (tmp_path / f"loop{suffix}").symlink_to(tmp_path / f"loop{suffix}")
    assert "Too many levels of symbolic links" in message(tmp_path / f"loop{suffix}")


def test_a_file_whose_permission_is_refused_is_named(tmp_path, monkeypatch):
    def refuse(*_arguments, **_keywords):
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.setattr(Path, "open", refuse)
    assert "Permission denied" in message(path)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.95])
def test_a_gzip_file_that_was_cut_short_is_refused(tmp_path, share):
    path = write(tmp_path / "rows.jsonl.gz", ROWS)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert "cannot be read" in message(path)


def test_a_file_that_is_not_gzip_in_spite_of_its_name_is_refused(tmp_path):
    write(tmp_path / "rows.jsonl", ROWS).rename(tmp_path / "rows.jsonl.gz")
    assert "Not a gzipped file" in message(tmp_path / "rows.jsonl.gz")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".csv"])
def test_text_in_another_encoding_is_refused_with_its_line_however_far_down(tmp_path, suffix):
    # 20,000 lines are more than one block of the decoder.
    content = b'{"a": "plain"}\n' * 20_000 + '{"a": "Grüße"}\n'.encode("latin-1")
    content = content.replace(b'"', b"").replace(b"{a: ", b"").replace(b"}", b"") if suffix == ".csv" else content
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    text = message(path)
    assert "line 20001" in text and "not UTF-8" in text and "Convert it to UTF-8" in text


def test_malformed_json_is_refused_with_row_and_column(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": }\n')
    assert "row 2: not JSON" in message(path) and "column 7" in message(path)


def test_a_malformed_json_list_is_refused_with_its_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[\n{"a": 1},\n{"a": 2\n]')
    assert "line 4: not JSON" in message(path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(("value", "kind"), [("3", "int"), ('"text"', "str"), ("null", "null"), ("[]", "list")])
def test_a_list_of_things_that_are_no_objects_is_refused_with_the_row_and_what_it_is(tmp_path, suffix, value, kind):
    path = tmp_path / f"rows{suffix}"
    path.write_text(f'[{{"a": 1}}, {value}]')
    assert f"row 2: found {kind}, expected a JSON object" in message(path)


def test_a_line_that_is_no_object_is_refused_with_the_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n"text"\n')
    assert "row 2: found str, expected a JSON object" in message(path)


@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 5_000], ids=["nested too deep", "a number of 5000 digits"])
@pytest.mark.parametrize("opening", ['{"a": ', '[{"a": '], ids=["lines", "list"])
def test_json_that_the_parser_gives_up_on_is_refused(tmp_path, opening, value):
    path = tmp_path / "rows.json"
    path.write_text(opening + value + ("}" if opening[0] == "{" else "}]"))
    assert "cannot be read as JSON" in message(path)


@pytest.mark.parametrize("row", ["1", "1,2,3"], ids=["too few", "too many"])
def test_a_csv_row_with_another_number_of_fields_than_the_header_is_refused_with_its_number(tmp_path, row):
    path = tmp_path / "rows.csv"
    path.write_text(f"a,b\n1,2\n{row}\n")
    assert "row 2: another number of fields than the header's 2" in message(path)


def test_a_csv_header_with_a_name_twice_is_refused_with_the_name(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen,chosen\n1,2,3\n")
    assert "the header names chosen twice" in message(path)


def test_an_unclosed_quote_in_csv_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('a,b\n1,"never closed\n')
    assert "not CSV" in message(path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"hello, I am text", b"PAR1" + bytes(64) + b"PAR1"])
def test_a_file_that_is_not_parquet_is_refused(tmp_path, content):
    path = tmp_path / "rows.parquet"
    path.write_bytes(content)
    assert "not Parquet" in message(path)


def test_parquet_strings_that_are_not_utf8_are_refused(tmp_path):
    path = write(tmp_path / "rows.parquet", [{"chosen": "markmark", "rejected": "x"}])
    # The text lies uncompressed, or lightly compressed, in the file: every copy of it is spoilt, also in the statistics.
    path.write_bytes(path.read_bytes().replace(b"markmark", b"mark\xff\xfe\xffk"))
    assert "not Parquet, or damaged" in message(path)


# ---- rows that may be skipped ---------------------------------------------------------------------------------------------

FIX = " Fix the row, or skip such rows with on_bad_row=skip."


@pytest.mark.parametrize(
    ("name", "content", "faults"),
    [
        (
            "rows.jsonl",
            b'{"a": "1"}\n{"a": }\n"text"\n{"a": "Gr\xfc\xdfe"}\n' + b'{"a": ' + b"9" * 5000 + b'}\n{"a": "6"}\n',
            [
                "row 2: not JSON: Expecting value at column 7. Expected one object a line.",
                "row 3: found str, expected a JSON object.",
                "line 4, byte 10 of the line: not UTF-8 text. Convert it to UTF-8.",
                "row 5: cannot be read as JSON: Exceeds the limit",
            ],
        ),
        (
            "rows.json",
            b'[{"a": "1"}, 2, [], "4", null, {"a": "6"}]',
            [f"row {n}: found {kind}, expected a JSON object." for n, kind in enumerate(["int", "list", "str", "null"], 2)],
        ),
        (
            "rows.csv",
            b"a,b\n1,2\n1\n1,2,3\n,,,\n\n1,2,3\n6,2\n",
            [
                f"row {n}: another number of fields than the header's 2. Quote fields that hold commas or line breaks."
                for n in (2, 3, 4, 5)
            ],
        ),
    ],
    ids=["JSON lines", "a JSON list", "CSV"],
)
def test_invalid_rows_stop_the_reading_or_are_counted_and_skipped(tmp_path, name, content, faults):
    path = tmp_path / name
    path.write_bytes(content)
    stopped = message(path)
    assert stopped.startswith(f"datasets: {path}, {faults[0]}") and stopped.endswith(FIX)
    report = DataReport(skip_bad_rows=True)
    assert [(number, row["a"]) for number, row in read_rows(path, report)] == [(1, "1"), (6, "6")]
    assert report.num_bad_rows == len(faults) == len(report.bad_rows) + sum(report.alike.values())
    # Of faults of one kind the first is listed.
    kinds = {fault.partition(": ")[2]: fault for fault in reversed(faults)}.values()
    listed = [fault for fault in faults if fault in kinds]
    for found, fault in zip(report.bad_rows, listed, strict=True):
        assert found.startswith(f"datasets: {path}, {fault}")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", b'[{"a": 1},'),
        ("rows.json", b'[{"a": "Gr\xfc\xdfe"}]'),
        ("rows.csv", b"a,a\n1,2\n"),
        ("rows.csv", b'a,b\n1,"never closed\n'),
        ("rows.csv", b"a\nGr\xfc\xdfe\n"),
        ("rows.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9]),
        ("rows.parquet", b"PAR1"),
    ],
    ids=[
        "a list cut short",
        "a list not UTF-8",
        "a column twice",
        "an open quote",
        "CSV not UTF-8",
        "gzip cut short",
        "no Parquet",
    ],
)
def test_an_error_of_the_whole_file_stops_the_reading_even_where_invalid_rows_are_skipped(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^datasets: {path}") as refusal:
        list(read_rows(path, DataReport(skip_bad_rows=True)))
    assert not str(refusal.value).endswith(FIX)


# ---- any damage ---------------------------------------------------------------------------------------------------------


@st.composite
def damage(draw, length: int) -> list[tuple[str, int, bytes]]:
    """One to four edits of a file of `length` bytes: overwrite, insert, delete or cut, at a place."""
    edits = []
    for _ in range(draw(st.integers(1, 4))):
        what = draw(st.sampled_from(["overwrite", "insert", "delete", "cut"]))
        edits.append((what, draw(st.integers(0, length)), draw(st.binary(min_size=1, max_size=8))))
    return edits


def damaged(content: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    for what, place, some in edits:
        if what == "cut":
            content = content[:place]
        else:
            kept_from = place if what == "insert" else place + len(some)
            content = content[:place] + (b"" if what == "delete" else some) + content[kept_from:]
    return content


@pytest.mark.parametrize("suffix", DATA_SUFFIXES)
@settings(max_examples=100, deadline=None, suppress_health_check=SHARES_FOLDER)
@given(data=st.data())
def test_a_damaged_file_gives_rows_or_one_message_and_never_another_exception(tmp_path, suffix, data):
    path = write(tmp_path / f"rows{suffix}", ROWS)
    path.write_bytes(damaged(path.read_bytes(), data.draw(damage(path.stat().st_size))))
    try:
        assert all(isinstance(row, dict) for _, row in read_rows(path))
    except UserError as refusal:
        assert str(path) in str(refusal)
    # What the loader makes of such rows is no other: records, or a message.
    try:
        assert all(record.responses for record in load_records(read_entry(str(path)), "train"))
    except UserError as refusal:
        assert str(path) in str(refusal)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
@settings(max_examples=60, deadline=None, suppress_health_check=SHARES_FOLDER)
@given(content=st.text(alphabet='{}[]",:\\n\r\n au0d8-e.\x00\ufeff', max_size=60))
def test_any_text_gives_rows_or_one_message_and_never_another_exception(tmp_path, suffix, content):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content.encode())
    try:
        assert all(isinstance(row, dict) for _, row in read_rows(path))
    except UserError as refusal:
        assert str(path) in str(refusal)
