"""Rows of tables: CSV and its relatives, Parquet, and Arrow."""

import csv
import io
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from preference_training.core.errors import UserError, first_line
from preference_training.data.records.report import DataReport
from preference_training.data.rows.conversations import without_nones
from preference_training.data.rows.values import UntypedRow

DELIMITERS = ",;\t|"


def read_csv(file: BinaryIO, place: str, report: DataReport, delimiters: str = DELIMITERS) -> Iterator[tuple[int, dict]]:
    """Yield (row number, row) of a table with a header; row 1 is the first below it.

    The delimiter is the one that gives the header the most fields.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    # newline="" keeps line ends inside quoted fields; utf-8-sig removes a byte order mark.
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        header, delimiter, lines = _header(text, place, delimiters)
        if delimiter in ";|":
            report.note(f"fields are separated by {delimiter}")
        spaced = len(header) > 1 and all(name.startswith(" ") for name in header[1:])
        if spaced:
            # Quotes behind the space quote then.
            report.note("spaces behind delimiters are left out, since the header has them")
            header = [name.strip().strip('"') for name in header]
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise UserError(f"datasets: {place}: the header names {', '.join(twice)} twice. Rename one column.")
        if delimiter == "\t":
            records: Iterator[list[str] | str] = _tab_separated(text, len(header))
        else:
            records = _records(csv.reader(text, delimiter=delimiter, strict=True, skipinitialspace=spaced), lines, place)
        for number, values in enumerate(filter(None, records), start=1):
            if isinstance(values, list) and len(values) == len(header):
                yield number, UntypedRow(zip(header, values, strict=True))
                continue
            problem = (
                values
                if isinstance(values, str)
                else f"another number of fields than the header's {len(header)}. Quote fields that hold commas or line breaks."
            )
            report.bad_row(UserError(f"datasets: {place}, row {number}: {problem}"))


def _records(reader, lines: int, place: str) -> Iterator[list[str] | str]:
    """The fields of each record, or what is wrong with it. lines: how many were read before. Raises UserError."""
    while True:
        try:
            values = next(reader, None)
        except csv.Error as error:
            line = lines + reader.line_num
            if "unexpected end" in str(error):
                # An open quote takes the rest of the file with it.
                raise UserError(f"datasets: {place}, line {line}: not CSV: {error}.") from error
            values = f"not CSV: {error} (line {line})."
        if values is None:
            return
        yield values


def _tab_separated(lines: Iterable[str], width: int) -> Iterator[list[str]]:
    """The fields of each record of a table that is separated by tabs, in which a quote need not begin a quoted field.

    Quoted are fields as other programs write them, which may hold tabs and line ends: where that gives `width` fields.
    """
    waiting, lines = deque[str](), iter(lines)
    while (line := waiting.popleft() if waiting else next(lines, None)) is not None:
        plain = line.rstrip("\r\n").split("\t")
        if '"' not in line:
            yield plain if line.strip("\r\n") else []
            continue
        taken, quoted = [line], _quoted(line)
        while quoted is None and len(taken) < LONGEST_RECORD:
            more = waiting.popleft() if waiting else next(lines, None)
            if more is None:
                break
            taken.append(more)
            quoted = _quoted("".join(taken))
        if quoted is not None and len(quoted) == width:
            yield quoted
            continue
        waiting.extendleft(reversed(taken[1:]))
        yield plain


def _quoted(text: str) -> list[str] | None:
    """The fields of a record with quoted ones; [] for another text; None where a quote is open at its end."""
    try:
        records = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True))
    except csv.Error as error:
        return None if "unexpected end" in str(error) else []
    return records[0] if len(records) == 1 else []


# Lines that a record with quoted fields may take, of tables that need not quote.
LONGEST_RECORD = 1000
# Lines that a header may take, with line ends in quotes.
LONGEST_HEADER = 100


def _header(text: io.TextIOWrapper, place: str, delimiters: str) -> tuple[list[str], str, int]:
    """The names of the columns, the delimiter, and how many lines were read."""
    read: list[str] = []
    for line in text:
        read.append(line)
        headers, problems = {}, []
        for delimiter in delimiters:
            try:
                rows = [row for row in csv.reader(read, delimiter=delimiter, strict=True) if row]
            except csv.Error as error:
                problems.append(error)
            else:
                headers |= {delimiter: rows[0]} if rows else {}
        if headers:
            best = max(headers, key=lambda delimiter: len(headers[delimiter]))
            return headers[best], best, len(read)
        if len(read) > LONGEST_HEADER or (problems and not any("unexpected end" in str(problem) for problem in problems)):
            raise UserError(f"datasets: {place}, line {len(read)}: not CSV: {problems[0] if problems else 'no header'}.")
    if any(line.strip() for line in read):
        raise UserError(f"datasets: {place}, line {len(read)}: not CSV: {problems[0]}.")
    return [], delimiters[0], len(read)


def read_parquet(file: BinaryIO, place: str, report: DataReport) -> Iterator[tuple[int, dict]]:
    """Yield (row number, row) of a Parquet file."""
    import pyarrow.parquet

    def batches():
        with pyarrow.parquet.ParquetFile(file) as table:
            yield from table.iter_batches(batch_size=1024)

    return _arrow_rows(batches(), place, "Parquet", report)


def read_arrow(file: BinaryIO, place: str, report: DataReport) -> Iterator[tuple[int, dict]]:
    """Yield (row number, row) of an Arrow file, or of an Arrow stream, as the hub's library writes them."""
    import pyarrow

    def batches():
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        if is_file:
            table = pyarrow.ipc.open_file(file)
            yield from (table.get_batch(k) for k in range(table.num_record_batches))
        else:
            yield from pyarrow.ipc.open_stream(file)

    return _arrow_rows(batches(), place, "Arrow", report)


def _arrow_rows(batches: Iterator, place: str, what: str, report: DataReport) -> Iterator[tuple[int, dict]]:
    number = 0
    try:
        for batch in batches:
            for row in rows_of_batch(batch, report):
                number += 1
                yield number, row
    except Exception as error:  # pyarrow raises half a dozen types for damaged and other files
        if isinstance(error, OSError) and error.errno:
            raise
        after = f", after row {number}" if number else ""
        raise UserError(f"datasets: {place}{after}: not {what}, or damaged: {first_line(error)}.") from error


# ---- calls of tools -------------------------------------------------------------------------------------------------------

ARGUMENTS = ("arguments", "parameters")
NOT_OF_THIS_CALL = "arguments of tool calls that are null were left out: Arrow gives each call the arguments of all others"


def rows_of_batch(batch, report: DataReport) -> list[dict]:
    """The rows of an Arrow batch or table; calls of tools in them have only the arguments that are not null."""
    rows = batch.to_pylist()
    columns = [field.name for field in batch.schema if _holds_arguments(field.type)]
    return [_with_own_arguments(row, columns, report) for row in rows] if columns else rows


def _holds_arguments(kind) -> bool:
    """Whether an Arrow type has the arguments of calls as a struct, which has those of all calls in a file."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        return _holds_arguments(kind.value_type)
    return types.is_struct(kind) and any(
        (part.name in ARGUMENTS and types.is_struct(part.type)) or _holds_arguments(part.type) for part in kind
    )


def _with_own_arguments(row: dict, columns: list[str], report: DataReport) -> dict:
    """A row whose calls have only the arguments that are not null."""
    changed = {name: _own_arguments(row[name]) for name in columns}
    if any(row[name] != changed[name] for name in columns):
        report.note(NOT_OF_THIS_CALL)
    return row | changed


def _own_arguments(value):
    if isinstance(value, list):
        return [_own_arguments(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: without_nones(inner) if key in ARGUMENTS else _own_arguments(inner) for key, inner in value.items()}
