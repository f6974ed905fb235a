"""Select the rows of a file or table that are used."""

import heapq
from dataclasses import dataclass

from preference_training.core.errors import UserError
from preference_training.data.rows.conversations import RowError
from preference_training.data.rows.records import DataReport, NumberedRows
from preference_training.data.rows.values import condition, field_number, field_value


@dataclass(frozen=True)
class RowFilter:
    """where: column → a value, a list of values, or a comparison such as ">= 0.5", rows fulfill all. top_k: {column, k}."""

    where: dict
    top_k: dict | None = None

    def apply(self, rows: NumberedRows, place: str, report: DataReport) -> NumberedRows:
        """The rows that fulfill `where`, and of these the `top_k`, in their order. The report counts the others."""
        rows = self._filtered(rows, place, report)
        if self.top_k is None:
            return rows
        return self._largest(rows, place, report)

    def _filtered(self, rows: NumberedRows, place: str, report: DataReport) -> NumberedRows:
        conditions = {column: condition(value, column) for column, value in self.where.items()}
        without_effect, kept = set(conditions), 0
        for number, row in rows:
            report.rows_read += 1
            try:
                failed = next((column for column, test in conditions.items() if not test(field_value(row, column))), None)
            except RowError as error:
                report.bad_row(UserError(f"datasets: {place}, row {number}: where: {error}"))
                continue
            if failed is None:
                kept += 1
                yield number, row
            else:
                without_effect.discard(failed)
                report.skip(f"{failed} is not {self.where[failed]}")
        for column in sorted(without_effect) if kept else ():
            report.note(f"where skips no row by {column}: {self.where[column]}")

    def _largest(self, rows: NumberedRows, place: str, report: DataReport) -> NumberedRows:
        column, k = self.top_k["column"], self.top_k["k"]
        heap: list[tuple[float, int, dict]] = []
        cut = False
        for number, row in rows:
            try:
                # Of equal values the earlier row is kept.
                entry = (field_number(row, column), -number, row)
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
        yield from sorted((-negative, row) for _, negative, row in heap)
