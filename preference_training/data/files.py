"""Read the rows of files, with their numbers: JSON, CSV, Parquet, Arrow and plain text become dicts.

Every error is a UserError that names the file and, if there is one, the row, counted from 1. An error in a single row goes to
the report, which stops the run or counts it; one in the file always stops the run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import BinaryIO

from preference_training.core.errors import UserError
from preference_training.data.records.report import DataReport
from preference_training.data.sources.json_rows import read_json
from preference_training.data.sources.storage import COMPRESSIONS, UNREADABLE, cloud_errors, is_remote, opened
from preference_training.data.sources.tables import read_arrow, read_csv, read_parquet


def read_document(file: BinaryIO, _place: str, _report: DataReport) -> Iterator[tuple[int, dict]]:
    """A file of plain text as one row, {"text": ...}: a document."""
    yield 1, {"text": file.read().decode("utf-8-sig")}


Reader = Callable[[BinaryIO, str, DataReport], Iterator[tuple[int, dict]]]
FORMATS: dict[str, Reader] = {
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".json": partial(read_json, one_object=True),
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiters="\t"),
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": read_document,
}
# Formats that are compressed within.
COMPRESSED = (".parquet", ".arrow")
EXPECTED = f"{', '.join(FORMATS)} (of texts also {', '.join(COMPRESSIONS)})"


def format_of(name: str | Path) -> str | None:
    """The ending in FORMATS of a data file's path, in any case, below that of its compression; None for other files."""
    path = Path(str(name).lower())
    if path.suffix in COMPRESSIONS:
        path = path.with_suffix("")
        return path.suffix if path.suffix in FORMATS and path.suffix not in COMPRESSED else None
    return path.suffix if path.suffix in FORMATS else None


def is_data_file(name: str) -> bool:
    """Whether `name` looks like a data file's path."""
    return format_of(name) is not None


def check_data_file(path: str, key: str) -> None:
    """Raise UserError, which names a key or an option, where a path is no data file that is there."""
    if not is_data_file(path) or not (is_remote(path) or Path(path).expanduser().is_file()):
        raise UserError(f"{key}: {path}: no such data file. Expected one of {EXPECTED}; paths are relative to {Path.cwd()}.")


def read_whole_file(path: str, key: str) -> Iterator[tuple[int, dict]]:
    """The rows of a data file of which none is skipped. Raises UserError, which names a key or an option, for any fault."""
    check_data_file(path, key)
    with faults_of(key):
        yield from read_rows(path)


@contextmanager
def faults_of(key: str) -> Iterator[None]:
    """Faults of rows are those of a key or an option which skips none, instead of `datasets`."""
    try:
        yield
    except UserError as error:
        text = str(error).removeprefix("datasets: ").replace(", or skip such rows with on_bad_row=skip", "")
        raise UserError(f"{key}: {text}") from error


def read_rows(path: str | Path, report: DataReport | None = None) -> Iterator[tuple[int, dict]]:
    """Yield (row number, row) of a file, local or at a URL of fsspec's; bad rows go to `report`; without one they raise.

    Raises UserError where the file cannot be read, is truncated, or does not have the format of its suffix.
    """
    report = report if report is not None else DataReport()
    read = FORMATS[format_of(path) or ".jsonl"]
    try:
        with cloud_errors(str(path)) if is_remote(str(path)) else nullcontext(), opened(path) as file:
            yield from read(file, str(path), report)
    except UnicodeDecodeError as error:
        # The error counts from the start of a block of the file, not of a line.
        raise UserError(f"datasets: {path}{_first_line_not_utf8(path)}: not UTF-8 text. Convert it to UTF-8.") from error
    except UNREADABLE as error:
        suffix = Path(path).suffix
        raise UserError(f"datasets: {path}: cannot be read: {error}. Expected a whole, readable {suffix} file.") from error


def _first_line_not_utf8(path: str | Path) -> str:
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f", line {number}, byte {error.start + 1} of the line"
    return ""
