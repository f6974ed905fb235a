"""Reading programming problems: from rows with a `description`, and from stores of the older layout.

A row has a `description` (or a `prompt` and `tests`), and optionally `id`, `title`, `difficulty`, `function_name`, `tests` (a
list, or its JSON: objects or assertions); and `version1`, `version2` with a `preference` (0: the first is better, 1: the
second; blank: not judged). A store of the older layout has such rows in a table `leetcode_problems`, and may have their tests
in `leetcode_tests`: see `older_tests`.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from preference_collection.exchange.literals import arguments_in, enclosed, literal_in, plain_value
from preference_collection.store.model import Task
from preference_collection.store.schema import connect
from preference_training.core.errors import UserError
from preference_training.data.files import EXPECTED
from preference_training.data.records.report import DataReport
from preference_training.data.records.validation import text_error, type_name
from preference_training.data.rows.column_names import MARK_OF_JUDGMENTS
from preference_training.data.rows.conversations import RowError
from preference_training.sandbox.assertions import read_tests

# The index of the better version.
LABELS = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}
BLANKS = ("", "none", "nan", "null")

OLDER_TABLE, OLDER_TESTS = "leetcode_problems", "leetcode_tests"
TABLES = "SELECT table_name FROM information_schema.tables WHERE table_catalog = current_database()"


@dataclass(frozen=True)
class CodeRow:
    """A problem, its two versions, and the index of the better one. No versions, or no label: nobody has written or judged.

    judgment: the id of the judgment that the row was exported of, or "".
    """

    task: Task
    versions: tuple[str, ...] = ()
    label: int | None = None
    judgment: str = ""


def code_row(row: dict) -> CodeRow:
    """The content of a row. Raises RowError."""
    task = problem_of(row)
    texts = tuple(_text(row, name) for name in ("version1", "version2"))
    label = _label(row)
    if label is not None and not all(texts):
        raise RowError("it has a preference, but version1 or version2 is empty")
    return CodeRow(task, texts if all(texts) else (), label, judgment_in(row))


def judgment_in(row: dict) -> str:
    """The id of the judgment that a row was exported of, "" for other rows."""
    id = row.get(MARK_OF_JUDGMENTS)
    return id if isinstance(id, str) else ""


def problem_of(row: dict) -> Task:
    """The problem of a row. Raises RowError."""
    description = _text(row, "prompt" if "prompt" in row and "description" not in row else "description", needed=True)
    id = _id(row) or content_id(description)[:12]
    title = _text(row, "title") or description.strip().splitlines()[0][:80]
    name, tests = _tests(row.get("tests"), function_name_in(row))
    return Task(id, title, _text(row, "difficulty").strip().lower(), description, name, tests, "code")


def content_id(*parts: str) -> str:
    """An id that says what it is of, so that a second import recognizes it: 32 hexadecimal digits."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def function_name_in(row: dict) -> str:
    """The name of the function that a row asks for, "" for none. Raises RowError."""
    name = _text(row, "function_name").strip()
    if name and not name.isidentifier():
        raise RowError(f"function_name {name!r} is not a valid function name")
    return name


def _id(row: dict) -> str:
    return _text(row, "id").removesuffix(".0")


def _text(row: dict, name: str, needed: bool = False) -> str:
    value = row.get(name)
    if not needed and (value is None or value != value):  # an empty number in Parquet is None or NaN
        return ""
    text = value if isinstance(value, str) else str(value) if type(value) in (int, float) else None
    if text is None:
        raise RowError(f"{name} is {type_name(value)}, expected a text")
    fault = text_error(text)
    if fault and (needed or fault != "is empty"):
        raise RowError(f"{name} {fault}")
    return "" if fault else text


def _label(row: dict) -> int | None:
    value = str(row.get("preference")).strip().lower()
    if value in BLANKS:
        return None
    if value not in LABELS:
        raise RowError(f"preference is {value[:40]!r}, expected 0 (version1 is better), 1 (version2 is better) or blank")
    return LABELS[value]


def _tests(value, name: str) -> tuple[str, tuple[dict, ...]]:
    """(the function that the tests call, the tests)."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(f"tests are not JSON: {error}") from error
    if not value or value != value:
        return name, ()
    if not isinstance(value, list):
        raise RowError(f"tests are {type_name(value)}, expected a list")
    try:
        return read_tests(value, name)
    except ValueError as error:
        raise RowError(str(error)) from error


# ---- stores of the older layout ---------------------------------------------------------------------------------------------


def older_rows(address: str, report: DataReport) -> Iterator[tuple[int, dict]]:
    """(number, row) of the problems in a store of the older layout, with their tests. address: a file, or `md:`.

    Faulty rows of tests go to the report. Raises UserError for a database that cannot be opened or is of another layout.
    """
    try:
        opened = connect(str(address), read_only=True)
    except UserError as error:
        raise UserError(f"{str(error).rstrip()} Of files of rows, names end in {EXPECTED}.") from error
    with closing(opened) as connection:
        found = {name for (name,) in connection.execute(TABLES).fetchall()}
        if OLDER_TABLE not in found:
            raise UserError(
                f"import: {address} is not a store of the older layout: it has {', '.join(sorted(found)[:5]) or 'no tables'}. "
                f"Expected a table {OLDER_TABLE}, or a file of rows such as .csv, .jsonl or .parquet."
            )
        problems = list(_numbered(connection.execute("SELECT * FROM leetcode_problems")))
        rows = list(_numbered(connection.execute("SELECT * FROM leetcode_tests"))) if OLDER_TESTS in found else []
    known = {_id(row) for _, row in problems if not isinstance(row.get("id"), bool | list | dict)}
    tests = older_tests(rows, known, Path(address).name if not str(address).startswith("md:") else address, report)
    for number, row in problems:
        name, found_tests = tests.get(str(row.get("id")).removesuffix(".0"), ("", []))
        own = {"function_name": row.get("function_name") or name, "tests": row.get("tests") or found_tests}
        yield number, row | (own if found_tests else {})


def _numbered(cursor) -> Iterator[tuple[int, dict]]:
    names = [column[0] for column in cursor.description]
    number = 0
    while rows := cursor.fetchmany(1000):
        for row in rows:
            number += 1
            yield number, dict(zip(names, row, strict=True))


def older_tests(
    rows: Iterable[tuple[int, dict]], known: set[str], place: str, report: DataReport
) -> dict[str, tuple[str, list[dict]]]:
    """The tests in rows (id, function_name, inputs, outputs): problem -> (name of the function, tests).

    A problem has one row with a list of inputs and of outputs, or one row for each test. Each input is the list of a call's
    arguments, and each of them and of the outputs a value, or its text as JSON or as Python prints it. Where the text of every
    output is one value in brackets, as the arguments are, these are taken off. Rows without inputs are no tests; faulty
    ones go to the report. known: the ids of problems.
    """
    rows = [(number, row) for number, row in rows if row.get("inputs") is not None]
    ids = [str(row.get("id")) for _, row in rows]
    is_single = len(set(ids)) < len(ids)
    cases: dict[str, tuple[str, list[tuple]]] = {}
    for number, row in rows:
        try:
            id = _id(row)
            if id not in known:
                raise RowError(f"no problem has the id {id!r}")
            if not (name := function_name_in(row)):
                raise RowError("it has no function_name")
            if row.get("outputs") is None:
                raise RowError("it has no outputs")
            found = cases.setdefault(id, (name, []))
            if found[0] != name:
                raise RowError(f"its function is {name}, and that of an earlier test of the problem {found[0]}")
            found[1].extend((number, *case) for case in _cases(row, is_single))
        except RowError as fault:
            report.bad_row(UserError(f"datasets: {place}, {OLDER_TESTS} row {number}: {fault}."))
    texts = [output for _, some in cases.values() for *_, output in some]
    strips = bool(texts) and all(map(enclosed, texts))
    tests: dict[str, tuple[str, list[dict]]] = {}
    for id, (name, some) in cases.items():
        for number, given, output in some:
            try:
                test = {"args": arguments_in(given), "expected": literal_in(output, strips)}
            except ValueError as fault:
                report.bad_row(UserError(f"datasets: {place}, {OLDER_TESTS} row {number}: {fault}."))
            else:
                tests.setdefault(id, (name, []))[1].append(test)
    return tests


def _cases(row: dict, is_single: bool) -> list[tuple]:
    """The (input, output) of each test in a row. Raises RowError."""
    inputs, outputs = (_listed(row.get(name)) for name in ("inputs", "outputs"))
    if is_single or not isinstance(inputs, list) or not isinstance(outputs, list):
        return [(row["inputs"], row.get("outputs"))]
    if len(inputs) != len(outputs):
        raise RowError(f"it has {len(inputs)} inputs and {len(outputs)} outputs, expected one output for each input")
    return list(zip(inputs, outputs, strict=True))


def _listed(value):
    """The list in a value or in its text; anything else as it is."""
    if isinstance(value, str):
        try:
            value = literal_in(value)
        except ValueError:
            return value
    return plain_value(value) if isinstance(value, list | tuple) else value
