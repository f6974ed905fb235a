"""Read the rows of local files, with their numbers: JSON lines (plain or gzip), JSON, CSV and Parquet become dicts.

Every error is a UserError that names the file and, if there is one, the row, counted from 1. An error in a single row goes to
the report, which stops the run or counts it; one in the file always stops the run.
"""

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from preference_training.core.errors import UserError, first_line
from preference_training.core.files import hash_file
from preference_training.data.rows.records import DataReport

DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")


def is_data_file(name: str) -> bool:
    """Whether `name` looks like a data file's path: it ends in one of DATA_SUFFIXES."""
    return name.endswith(DATA_SUFFIXES)


def read_rows(path: Path, report: DataReport | None = None) -> Iterator[tuple[int, dict]]:
    """Yield (row number, row) of a data file; bad rows go to `report`; without one they raise.

    Raises UserError where the file cannot be read, is truncated, or does not have the format of its suffix.
    """
    report = report if report is not None else DataReport()
    read = _read_parquet if path.suffix == ".parquet" else _read_csv if path.suffix == ".csv" else _read_json
    try:
        yield from read(path, report)
    except UnicodeDecodeError as error:
        # The error counts from the start of a block of the file, not of a line.
        raise UserError(f"datasets: {path}{_first_line_not_utf8(path)}: not UTF-8 text. Convert it to UTF-8.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"datasets: {path}: cannot be read: {error}. Expected a whole, readable {path.suffix} file.") from error


def content_hash(path: Path) -> str:
    """Hash of a file's bytes: 32 hexadecimal digits. Raises UserError where it cannot be read."""
    try:
        return hash_file(path)
    except OSError as error:
        raise UserError(f"datasets: {path}: cannot be read: {error}. Expected a whole, readable {path.suffix} file.") from error


def _open(path: Path):
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _first_line_not_utf8(path: Path) -> str:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f", line {number}, byte {error.start + 1} of the line"
    return ""


def _read_json(path: Path, report: DataReport) -> Iterator[tuple[int, dict]]:
    """JSON lines, or one JSON list of objects (which a `.json` file may also be)."""
    with _open(path) as file:
        first = file.read(3)
        first = file.read(1) if first == b"\xef\xbb\xbf" else first[:1]
        while first.isspace():
            first = file.read(1)
        file.seek(0)
        rows = enumerate(_whole_list(path, file), start=1) if first == b"[" else _json_lines(path, file, report)
        for number, row in rows:
            if isinstance(row, dict):
                yield number, row
            else:
                found = type(row).__name__
                report.bad_row(UserError(f"datasets: {path}, row {number}: found {found}, expected a JSON object."))


# What json raises besides JSONDecodeError: ValueError for a number of thousands of digits, RecursionError for deep nesting.
UNREADABLE_JSON = (ValueError, RecursionError)


def _whole_list(path: Path, file) -> list:
    try:
        return json.loads(file.read().decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except json.JSONDecodeError as error:
        raise UserError(f"datasets: {path}, line {error.lineno}: not JSON: {error.msg}. Expected a list of objects.") from error
    except UNREADABLE_JSON as error:
        raise UserError(f"datasets: {path}: cannot be read as JSON: {error}. Expected objects with texts.") from error


def _json_lines(path: Path, file, report: DataReport) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            continue
        except UnicodeDecodeError as error:
            place, problem = f"line {number}, byte {error.start + 1} of the line", "not UTF-8 text. Convert it to UTF-8."
        except json.JSONDecodeError as error:
            place, problem = f"row {number}", f"not JSON: {error.msg} at column {error.colno}. Expected one object a line."
        except UNREADABLE_JSON as error:
            place, problem = f"row {number}", f"cannot be read as JSON: {error}. Expected objects with texts."
        report.bad_row(UserError(f"datasets: {path}, {place}: {problem}"))


def _read_csv(path: Path, report: DataReport) -> Iterator[tuple[int, dict]]:
    """CSV with a header line; row 1 is the first below it."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    # newline="" keeps line ends inside quoted fields; utf-8-sig removes a byte order mark.
    opened = partial(gzip.open, path) if path.suffix == ".gz" else path.open
    with opened(mode="rt", encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            twice = {name for name in reader.fieldnames or () if reader.fieldnames.count(name) > 1}
            if twice:
                raise UserError(f"datasets: {path}: the header names {', '.join(sorted(twice))} twice. Rename one column.")
            for number, row in enumerate(reader, start=1):
                if None not in row and None not in row.values():
                    yield number, row
                    continue
                report.bad_row(
                    UserError(
                        f"datasets: {path}, row {number}: another number of fields than the header's {len(reader.fieldnames)}. "
                        "Quote fields that hold commas or line breaks."
                    )
                )
        except csv.Error as error:
            raise UserError(f"datasets: {path}, line {reader.line_num}: not CSV: {error}.") from error


def _read_parquet(path: Path, _report: DataReport) -> Iterator[tuple[int, dict]]:
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except Exception as error:  # pyarrow raises half a dozen types for damaged and other files
        if isinstance(error, OSError) and error.errno:
            raise
        place = f", after row {number}" if number else ""
        raise UserError(f"datasets: {path}{place}: not Parquet, or damaged: {first_line(error)}.") from error
