"""Rows of JSON: one object a line, a list of objects, or an object that holds such a list or columns."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import BinaryIO

from preference_training.core.errors import UserError
from preference_training.data.records.report import DataReport
from preference_training.data.rows.column_names import PROMPTS
from preference_training.data.rows.conversations import json_type

# What json raises besides JSONDecodeError: ValueError for a number of thousands of digits, RecursionError for deep nesting.
UNREADABLE_JSON = (ValueError, RecursionError)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_json(file: BinaryIO, place: str, report: DataReport, one_object: bool = False) -> Iterator[tuple[int, dict]]:
    """Yield (row number, row). place: the file, for messages. Bad rows go to the report.

    one_object: whether the file may be a single object that holds the rows, in a single line too.
    """
    lines = enumerate(file, start=1)
    first = list(_up_to_content(lines))
    content = first[-1][1].removeprefix(BYTE_ORDER_MARK).strip() if first else b""
    numbered: Iterator[tuple[int, object]]
    if content.startswith(b"["):
        second = list(_up_to_content(lines))
        # A list in one line, and other lines: one of these may be no row.
        is_line = bool(second and second[-1][1].strip()) and _is_of(content, list)
        numbered = (
            _json_lines(chain(first, second, lines), place, report)
            if is_line
            else enumerate(_whole_list(_text([*first, *second], lines), place), start=1)
        )
    elif content == b"{" or (one_object and content.startswith(b"{")):
        second = list(_up_to_content(lines))
        alone = not second or not second[-1][1].strip()
        numbered = (
            _json_lines(chain(first, second, lines), place, report)
            if not alone and (_is_of(content, dict) or _is_of(second[-1][1], dict))
            else enumerate(_objects(_text([*first, *second], lines), place), start=1)
        )
    else:
        numbered = _json_lines(chain(first, lines), place, report)
    for number, row in numbered:
        if isinstance(row, dict):
            yield number, row
        elif isinstance(row, list) and row and _is_turns(row):
            yield number, {"messages": row}
        else:
            report.bad_row(UserError(f"datasets: {place}, row {number}: found {json_type(row)}, expected a JSON object."))


def _up_to_content(lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """The next lines up to the first that is not empty."""
    for number, line in lines:
        yield number, line
        if line.removeprefix(BYTE_ORDER_MARK).strip():
            return


def _text(read: list[tuple[int, bytes]], lines: Iterator[tuple[int, bytes]]) -> str:
    return b"".join(line for _, line in chain(read, lines)).decode("utf-8-sig")


def _is_of(line: bytes, kind: type) -> bool:
    """Whether a line is a JSON value of a kind."""
    try:
        return isinstance(json.loads(line), kind)
    except UNREADABLE_JSON:
        return False


@contextmanager
def _json_errors(place: str, expected: str) -> Iterator[None]:
    """Raise UserError where a whole text is not JSON; expected: what it should be."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise UserError(f"datasets: {place}, line {error.lineno}: not JSON: {error.msg}. Expected {expected}.") from error
    except UNREADABLE_JSON as error:
        raise UserError(f"datasets: {place}: cannot be read as JSON: {error}. Expected objects with texts.") from error


def _whole_list(text: str, place: str) -> list:
    with _json_errors(place, "a list of objects"):
        return json.loads(text)


def _json_lines(lines: Iterator[tuple[int, bytes]], place: str, report: DataReport) -> Iterator[tuple[int, object]]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
            yield number, json.loads(text)
            continue
        except UnicodeDecodeError as error:
            where, problem = f"line {number}, byte {error.start + 1} of the line", "not UTF-8 text. Convert it to UTF-8."
        except json.JSONDecodeError as error:
            ends = " where the line ends" if error.pos == len(text) else ""
            where, problem = (
                f"row {number}",
                f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}{ends}. Expected one object a line.",
            )
        except UNREADABLE_JSON as error:
            where, problem = f"row {number}", f"cannot be read as JSON: {error}. Expected objects with texts."
        report.bad_row(UserError(f"datasets: {place}, {where}: {problem}"))


# ---- objects over several lines ---------------------------------------------------------------------------------------------

WHITESPACE = re.compile(r"\s*")
CHOSEN = ("chosen", "text")
# Keys of an object beside which others describe its rows.
ROW_KEYS = ("data", "rows", "records", "examples", "instances", "items", "samples", "entries", "results", "train")


def _objects(text: str, place: str) -> list:
    """The rows of a text that holds one object, or one after the other over several lines each."""
    decoder, found, at = json.JSONDecoder(), [], 0
    with _json_errors(place, "objects, or a list of them"):
        while (at := WHITESPACE.match(text, at).end()) < len(text):
            value, at = decoder.raw_decode(text, at)
            found.append(value)
    return _rows_within(found[0], place) if len(found) == 1 else found


def _rows_within(value: dict, place: str) -> list:
    """The rows of an object: those of its one list, its columns (as pandas writes them), or itself as the only row."""
    lists = [key for key, rows in value.items() if _is_rows(rows)]
    # A row with a prompt may list its answers, under any other name.
    is_row = any(str(key).lower() in (*PROMPTS, *CHOSEN) for key in value)
    if lists and (len(value) == len(lists) or any(key in ROW_KEYS for key in lists) or (len(lists) == 1 and not is_row)):
        if len(lists) > 1:
            raise UserError(
                f"datasets: {place}: an object with {len(lists)} lists of rows: {', '.join(lists)}. Expected one; "
                "write each to a file of its own (path, test_path)."
            )
        return value[lists[0]]
    parts = list(value.values())
    if {"columns", "data"} <= value.keys() <= {"columns", "index", "data"}:
        return [dict(zip(value["columns"], row, strict=False)) for row in value["data"]]
    if parts and all(isinstance(part, dict) and part for part in parts):
        return _of_columns_or_rows(value)
    are_columns = len(parts) > 1 and all(isinstance(part, list) and part and not _is_turns(part) for part in parts)
    if are_columns and len({len(part) for part in parts}) == 1:
        return [dict(zip(value, row, strict=True)) for row in zip(*parts, strict=True)]
    return [value]


def _of_columns_or_rows(value: dict[str, dict]) -> list:
    """The rows of {column: {index: value}}, or of {index: row}."""
    if all(key.isdecimal() for key in value):
        return list(value.values())
    keys = next(iter(value.values())).keys()
    if any(part.keys() != keys for part in value.values()):
        return [value]
    if not all(key.isdecimal() for key in keys):
        return [value]
    return [{column: part[key] for column, part in value.items()} for key in keys]


def _is_rows(value) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value) and not _is_turns(value)


def _is_turns(value: list) -> bool:
    """Whether a list is a conversation rather than rows."""
    return all(isinstance(item, dict) and ({"role"} <= item.keys() or {"from", "value"} <= item.keys()) for item in value)
