"""Select the rows of a file or table that are used."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from preference_training.core.errors import UserError
from preference_training.data.records.record import NumberedRows
from preference_training.data.records.report import DataReport
from preference_training.data.rows.conversations import RowError
from preference_training.data.rows.values import condition, field_number, field_value
from preference_training.data.sources.expressions import EXPECTED, Expression, parse_expression

# An expression, or a column → a value, a list of values, or a comparison such as ">= 0.5".
Where = dict | str


def where_columns(where: Where) -> tuple[str, ...]:
    """The fields that a condition reads."""
    return parse_expression(where).columns if isinstance(where, str) else tuple(where)


def where_error(where) -> str | None:
    """The error in a condition as a configuration gives it, after its key, or None."""
    if isinstance(where, str):
        try:
            parse_expression(where)
        except ValueError as error:
            return f"found {where!r} ({error}), expected {EXPECTED}."
        return None
    if not isinstance(where, dict):
        return f"found {where!r}, expected {{COLUMN: VALUE}}, or a text of {EXPECTED}."
    for column, value in where.items():
        if not isinstance(column, str):
            return f"found the column {column!r}, expected the name of a field."
        try:
            condition(value)
        except ValueError:
            return f"{column}: found {value!r}, expected a value, a list of values, or a comparison such as '>= 0.5'."
    return None


@dataclass(frozen=True)
class RowFilter:
    """where: what rows fulfill. top_k: {column, k}. counts_all: whether the report counts the rows that pass as read, too."""

    where: Where
    top_k: dict | None = None
    counts_all: bool = True

    def apply(self, rows: NumberedRows, place: str, report: DataReport) -> NumberedRows:
        """The rows that fulfill `where`, and of these the `top_k`, in their order. The report counts the others."""
        rows = self._filtered(rows, place, report)
        if self.top_k is None:
            return rows
        return self._largest(rows, place, report)

    def _filtered(self, rows: NumberedRows, place: str, report: DataReport) -> NumberedRows:
        conditions = self._conditions()
        without_effect, kept = set(conditions), 0
        for number, row in rows:
            report.rows_read += self.counts_all
            try:
                failed = next((what for what, test in conditions.items() if not test(row)), None)
            except RowError as error:
                report.rows_read += not self.counts_all
                report.bad_row(UserError(f"datasets: {place}, row {number}: where: {error}"))
                continue
            if failed is None:
                kept += 1
                yield number, row
            else:
                report.rows_read += not self.counts_all
                without_effect.discard(failed)
                report.skip(self._reason(failed))
        for what in sorted(without_effect) if kept else ():
            by = what if isinstance(self.where, str) else f"{what}: {self.where[what]}"
            report.note(f"where skips no row by {by}")

    def _conditions(self) -> dict[str, Callable[[dict], bool]]:
        """A test of a row for the expression, or for each column."""
        if isinstance(self.where, str):
            parsed: Expression = parse_expression(self.where)
            return {self.where: parsed.test}
        return {column: _of_column(column, wanted) for column, wanted in self.where.items()}

    def _reason(self, failed: str) -> str:
        return f"not {failed}" if isinstance(self.where, str) else f"{failed} is not {self.where[failed]}"

    def _largest(self, rows: NumberedRows, place: str, report: DataReport) -> NumberedRows:
        column, k = self.top_k["column"], self.top_k["k"]
        heap: list[tuple[float, int, int, dict]] = []
        cut = False
        for order, (number, row) in enumerate(rows):
            try:
                # Of equal values the earlier row is kept.
                entry = (field_number(row, column), -order, number, row)
            except RowError as error:
                report.bad_row(UserError(f"datasets: {place}, row {number}: top_k: {error}"))
                continue
            if len(heap) < k:
                heapq.heappush(heap, entry)
            else:
                heapq.heappushpop(heap, entry)
                cut = True
                report.skip(f"not among the {k} largest of {column}")
        if heap and not cut:
            report.note(f"top_k has no effect: there are {len(heap)} rows, and {k} are kept")
        yield from ((number, row) for _, _, number, row in sorted(heap, key=lambda entry: -entry[1]))


def _of_column(column: str, wanted) -> Callable[[dict], bool]:
    test = condition(wanted, column)
    return lambda row: test(field_value(row, column))
