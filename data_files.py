"""Rows of a local file, with their numbers: JSON lines (plain or gzip), JSON, CSV and Parquet become dicts.

Every fault of a file is a UserError that names the file and, where there is one, the row, counted from 1.
"""

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

from utils import UserError

DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")


def is_data_file(name: str) -> bool:
    """Whether `name` looks like a data file's path: it ends in one of DATA_SUFFIXES."""
    return name.endswith(DATA_SUFFIXES)


def read_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield (row number, row) of a data file.

    Raises UserError where the file cannot be read, is cut short, is not in the format its name says, or a row is no object.
    """
    read = _read_parquet if path.suffix == ".parquet" else _read_csv if path.suffix == ".csv" else _read_json
    try:
        try:
            yield from read(path)
        except UnicodeDecodeError as error:
            # The error counts from the start of a block of the file, which would help nobody.
            raise UserError(f"datasets: {path}{_first_line_not_utf8(path)}: not UTF-8 text. Convert it to UTF-8.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"datasets: {path}: cannot be read: {error}. Expected a whole, readable {path.suffix} file.") from error


def _open_text(path: Path):
    # newline="" leaves line ends inside quoted CSV fields as they are; utf-8-sig takes a byte order mark away.
    opened = partial(gzip.open, path) if path.suffix == ".gz" else path.open
    return opened(mode="rt", encoding="utf-8-sig", newline="")


def _first_line_not_utf8(path: Path) -> str:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f", line {number}, byte {error.start + 1} of the line"
    return ""


def _read_json(path: Path) -> Iterator[tuple[int, dict]]:
    """JSON lines, or one JSON list of objects (which a `.json` file may also be)."""
    with _open_text(path) as file:
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
        file.seek(0)
        rows = enumerate(_whole_list(path, file), start=1) if first == "[" else _json_lines(path, file)
        for number, row in rows:
            if not isinstance(row, dict):
                raise UserError(f"datasets: {path}, row {number}: found {type(row).__name__}, expected a JSON object.")
            yield number, row


# What else than JSONDecodeError json raises: ValueError for a number of thousands of digits, RecursionError for deep nesting.
UNREADABLE_JSON = (ValueError, RecursionError)


def _not_json(path: Path, error: Exception, place: str = "") -> NoReturn:
    if isinstance(error, UnicodeDecodeError):
        raise error
    raise UserError(f"datasets: {path}{place}: cannot be read as JSON: {error}. Expected objects with texts.") from error


def _whole_list(path: Path, file) -> list:
    try:
        return json.load(file)
    except json.JSONDecodeError as error:
        raise UserError(f"datasets: {path}, line {error.lineno}: not JSON: {error.msg}. Expected a list of objects.") from error
    except UNREADABLE_JSON as error:
        _not_json(path, error)


def _json_lines(path: Path, file) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"datasets: {path}, row {number}: not JSON: {error.msg} at column {error.colno}. Expected one object a line."
            ) from error
        except UNREADABLE_JSON as error:
            _not_json(path, error, f", row {number}")


def _read_csv(path: Path) -> Iterator[tuple[int, dict]]:
    """CSV with a header line; row 1 is the first below it."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with _open_text(path) as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for number, row in enumerate(reader, start=1):
                if None in row or None in row.values():
                    raise UserError(
                        f"datasets: {path}, row {number}: another number of fields than the header's {len(reader.fieldnames)}. "
                        "Quote fields that hold commas or line breaks."
                    )
                yield number, row
        except csv.Error as error:
            raise UserError(f"datasets: {path}, line {reader.line_num}: not CSV: {error}.") from error


def _read_parquet(path: Path) -> Iterator[tuple[int, dict]]:
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except Exception as error:  # pyarrow raises half a dozen types for a file that is damaged or not its own
        if isinstance(error, OSError) and error.errno:
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        place = f", after row {number}" if number else ""
        raise UserError(f"datasets: {path}{place}: not Parquet, or damaged: {reason}.") from error
