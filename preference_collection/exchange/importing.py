"""Importing problems from CSV, JSON (lines) and Parquet files, and from stores of the older layout with one table.

A row has a `description`, and optionally `id`, `title`, `difficulty`, `function_name`, `tests` (a list, or its JSON); and
`version1`, `version2` with a `preference` (0: the first is better, 1: the second; blank: not judged), which become a pair and a
judgment. Importing a row twice adds it once.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import duckdb

from preference_collection.generation.replies import extract_code
from preference_collection.sandbox.sandbox import COMPARISONS
from preference_collection.store.model import Answer, Comparison, Judgment, Task, ranks_of_pick
from preference_collection.store.schema import connect
from preference_collection.store.store import Store
from preference_training.core.errors import UserError, first_line
from preference_training.data.files import is_data_file, read_rows
from preference_training.data.rows.records import DataReport, text_error, type_name

SAMPLES = Path(__file__).parent.parent / "samples" / "problems.jsonl"

# The labeler and model of imported rows.
IMPORTED = "imported"

# The index of the better version.
LABELS = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}
BLANKS = ("", "none", "nan", "null")

OLDER_TABLE = "leetcode_problems"


class RowError(Exception):
    """The fault of a row, as the end of a sentence."""


@dataclass
class Import:
    """The content of the rows, and the counts after adding it."""

    tasks: dict[str, Task] = field(default_factory=dict)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    judgments: dict[str, Judgment] = field(default_factory=dict)
    num_bad_rows: int = 0
    added: int = 0
    known: int = 0

    def line(self) -> str:
        """A one-line summary."""
        parts = [f"{self.added} problems added", f"{self.known} known", f"{len(self.comparisons)} new pairs"]
        parts += [f"{len(self.judgments)} judgments", f"{self.num_bad_rows} invalid rows skipped"]
        return ", ".join(part for part in parts if not part.startswith("0 ")) or "nothing new"


def import_into(store: Store, path: Path, skip_bad_rows: bool = False) -> Import:
    """Add the content of a file to a store, all or nothing.

    Raises UserError for an unreadable file and, unless skip_bad_rows, for invalid rows, listing the first ten kinds with
    their numbers, counted from 1.
    """
    report = DataReport(skip_bad_rows=True)
    found = Import()
    for number, row in _read(path, report):
        try:
            _take(row, found)
        except RowError as fault:
            report.bad_row(UserError(f"datasets: {path}, row {number}: {fault}."))
    found.num_bad_rows = report.num_bad_rows
    if report.num_bad_rows and not skip_bad_rows:
        rows = "\n".join(f"  {line.removeprefix('datasets: ')}" for line in report.bad_row_lines())
        raise UserError(
            f"import: {report.num_bad_rows} rows of {path} are invalid, and nothing was imported. Fix them, or skip them with "
            f"--skip-bad-rows. The first of them:\n{rows}"
        )
    return _add(store, found)


def _add(store: Store, found: Import) -> Import:
    found.added, found.known = store.add_tasks(found.tasks.values())
    known = set(store.comparison_ids())
    found.comparisons = {id: comparison for id, comparison in found.comparisons.items() if id not in known}
    found.judgments = {id: judgment for id, judgment in found.judgments.items() if judgment.comparison not in known}
    store.add_comparisons(found.comparisons.values(), found.judgments.values())
    return found


# ---- reading ----------------------------------------------------------------------------------------------------------------


def _read(path: Path, report: DataReport) -> Iterator[tuple[int, dict]]:
    if not path.exists():
        raise UserError(f"import: {path}: no such file. Expected CSV, JSON lines, Parquet, or a store of the older layout.")
    if not is_data_file(path.name):
        yield from _rows_of_older_store(path)
        return
    try:
        yield from read_rows(path, report)
    except UserError as error:
        raise UserError(f"import: {str(error).removeprefix('datasets: ')}") from error


def _rows_of_older_store(path: Path) -> Iterator[tuple[int, dict]]:
    with closing(connect(str(path), read_only=True)) as connection:
        try:
            cursor = connection.execute("SELECT * FROM leetcode_problems")
        except duckdb.Error as error:
            raise UserError(
                f"import: {path} is not a store of the older layout: {first_line(error)}. Expected a table {OLDER_TABLE}, or a "
                "file ending in .csv, .jsonl, .json or .parquet."
            ) from error
        names = [column[0] for column in cursor.description]
        number = 0
        while rows := cursor.fetchmany(1000):
            for row in rows:
                number += 1
                yield number, dict(zip(names, row, strict=True))


def _take(row: dict, found: Import) -> None:
    """Add the content of one row. Raises RowError."""
    task = problem_of(row)
    texts = [_text(row, name) for name in ("version1", "version2")]
    label = _label(row)
    if label is not None and not all(texts):
        raise RowError("it has a preference, but version1 or version2 is empty")
    if not found.tasks.setdefault(task.id, task).same_prompt(task):
        raise RowError(f"id {task.id!r} belongs to a different problem in an earlier row")
    if not all(texts):
        return
    # Ids are content hashes, so that a second import recognizes them.
    first, second = answers = tuple(_answer(task, text) for text in texts)
    comparison = Comparison(_hash(first.id, second.id), task.id, answers)
    found.comparisons[comparison.id] = comparison
    if label is not None:
        id, ranks = _hash(comparison.id, IMPORTED), ranks_of_pick(label, len(answers))
        judgment = Judgment(id, comparison.id, IMPORTED, "ranked", (0, 1), ranks)
        if found.judgments.setdefault(judgment.id, judgment) != judgment:
            raise RowError("the same two solutions have the opposite preference in an earlier row")


def problem_of(row: dict) -> Task:
    """The problem of a row. Raises RowError."""
    description = _text(row, "description", needed=True)
    id = _text(row, "id").removesuffix(".0") or _hash(description)[:12]
    title = _text(row, "title") or description.strip().splitlines()[0][:80]
    name = _text(row, "function_name").strip()
    if name and not name.isidentifier():
        raise RowError(f"function_name {name!r} is not a valid function name")
    tests = _tests(row.get("tests"))
    if tests and not name:
        raise RowError("it has tests but no function_name")
    return Task(id, title, _text(row, "difficulty").strip().lower(), description, name, tests, "code")


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


def _tests(value) -> tuple[dict, ...]:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(f"tests are not JSON: {error}") from error
    if not value or value != value:
        return ()
    if not isinstance(value, list):
        raise RowError(f"tests are {type_name(value)}, expected a list")
    for number, test in enumerate(value, start=1):
        if not isinstance(test, dict) or not isinstance(test.get("args"), list) or "expected" not in test:
            raise RowError(f"test {number} is not an object with args (a list) and expected")
        if test.get("compare", "equal") not in COMPARISONS:
            raise RowError(f"test {number} has compare {test['compare']!r}, expected one of {', '.join(COMPARISONS)}")
    kept = ("args", "expected", "compare")
    return tuple({key: test[key] for key in kept if key in test} for test in value)


def _answer(task: Task, text: str) -> Answer:
    code = extract_code(text, task.function_name).code
    return Answer(_hash(task.id, text), IMPORTED, task.prompt, {}, text, code)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
