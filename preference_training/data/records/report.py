"""What was read of a split of a data set, and what was skipped or changed."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from preference_training.core.errors import UserError, visible

SAME_TEXT = "chosen and rejected are the same"
OTHER_PROMPT = "chosen and rejected have different prompts"
EMPTY_TEXT = "a text is empty"


# Hints on some columns that were not read.
COLUMN_HINTS = {
    "system": "with system: system it becomes the system turn",
    "system_prompt": "with system: system_prompt it becomes the system turn",
    "tools": "with tools: tools they are given to the chat template",
    "score": "with response: ... and score: score it makes pairs of the rows of a prompt",
    "label": "with response: ... and label: label it labels a response",
    "margin": "with margin: margin it is the margin of the pair",
    "weight": "with example_weight: weight it is the weight of the pair",
}


@dataclass
class DataReport:
    """What was read of one split of a data set, and what was skipped or changed. Stored with the prepared data.

    left_out: numbers of skipped rows, pairs or examples, by reason. changed: numbers of changed texts, by change. num_prompts:
    the prompts that remain. bad_rows: messages for the first ten of the rows that cannot be used, which are errors unless
    `skip_bad_rows`; alike: the numbers of further ones like these. found: the format of the rows, if nobody named it.
    columns_not_read: the number of rows that have each such column. notes: sentences, mostly on settings without effect.
    """

    skip_bad_rows: bool = False
    rows_read: int = 0
    num_prompts: int = 0
    num_bad_rows: int = 0
    bad_rows: list[str] = field(default_factory=list)
    alike: dict[str, int] = field(default_factory=dict)
    found: str = ""
    left_out: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    columns_not_read: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def bad_row(self, error: UserError, remedy: str = "Fix the row, or skip") -> None:
        """Count a row that cannot be used. Raises `error`, with what to do about it, unless such rows are skipped."""
        if not self.skip_bad_rows:
            raise UserError(f"{error} {remedy} such rows with on_bad_row=skip.") from error
        self.num_bad_rows += 1
        message = str(error).splitlines()[0]
        kind = next((known for known in self.bad_rows if _kind_of(known) == _kind_of(message)), None)
        if kind is not None:
            self.alike[kind] = self.alike.get(kind, 0) + 1
        elif len(self.bad_rows) < 10:
            self.bad_rows.append(message)

    def skip(self, reason: str, count: int = 1) -> None:
        """Count what is skipped."""
        if count:
            self.left_out[reason] = self.left_out.get(reason, 0) + count

    def change(self, what: str, count: int = 1) -> None:
        """Count texts that were changed; a negative number corrects an earlier count."""
        if count:
            self.changed[what] = self.changed.get(what, 0) + count
            if not self.changed[what]:
                del self.changed[what]

    def not_read(self, column: str) -> None:
        """Count a row with a column that is not read. Names beyond the first hundred are dropped: they are no columns."""
        if column in self.columns_not_read or len(self.columns_not_read) < 100:
            self.columns_not_read[column] = self.columns_not_read.get(column, 0) + 1

    def note(self, sentence: str) -> None:
        """Add a note, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def as_dict(self) -> dict:
        """Plain values, for JSON; `DataReport(**...)` reads them back."""
        return asdict(self)

    def counts(self) -> Iterator[tuple[int, str]]:
        """The counts of everything that was skipped or changed, with descriptions."""
        yield from ((count, f"skipped: {reason}") for reason, count in self.left_out.items())
        yield from ((count, what) for what, count in self.changed.items())
        if self.num_bad_rows:
            yield self.num_bad_rows, f"bad row{'s' * (self.num_bad_rows != 1)} skipped"

    def remarks(self) -> list[str]:
        """Lines without a count: columns that were not read, and settings without effect."""
        names = list(self.columns_not_read)
        hints = "; ".join(COLUMN_HINTS[name] for name in names if name in COLUMN_HINTS)
        # The index of a table becomes a column without a name in CSV files.
        columns = f"columns not read: {', '.join(name or repr(name) for name in names)}" + f" ({hints})" * bool(hints)
        line = "; ".join([self.found] * bool(self.found) + [columns] * bool(names))
        return [visible(each) for each in [line] * bool(line) + self.notes]

    def lines(self) -> list[str]:
        """The report as text: a line of counts, if there are any, remarks, and the first bad rows."""
        counts = [f"{count} {what}" for count, what in self.counts()]
        return ["; ".join(counts)] * bool(counts) + self.remarks() + [f"  {line}" for line in self.bad_row_lines()]

    def bad_row_lines(self) -> list[str]:
        """The first bad rows, each with the number of further ones like it."""
        alike = ((message, self.alike.get(message, 0)) for message in self.bad_rows)
        return [message + f" ({more} more rows like it)" * bool(more) for message, more in alike]


def _kind_of(message: str) -> str:
    """A message without the numbers, texts and lines in it: what rows that fail alike have in common."""
    return re.sub(r"(?<=is )'.*?'(?=,)|\d+", "#", message)
