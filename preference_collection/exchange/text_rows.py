"""Reading rows of prompts and answers from any file that training reads, and from files that only a labeler can use.

Rows are read by the readers of an entry of `datasets`, with the same field map, found in the columns unless it is given. What
these skip is read here: ties, answers that nobody has compared, prompts with one answer or with none.

    file, field map -> (row number, TextRow)
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice

from preference_collection.exchange.code_rows import judgment_in
from preference_collection.store.model import ranks_of_scores
from preference_training.core.errors import UserError
from preference_training.data.entries import read_entry
from preference_training.data.records.record import Prompt, Response, response_of
from preference_training.data.records.report import DataReport
from preference_training.data.rows.answers import LeftOut, answer_in, conversation_in
from preference_training.data.rows.column_names import LISTED_TEXTS, LISTS, PROMPTS, TWO_ANSWERS, Columns
from preference_training.data.rows.conversations import RowError, are_turns, with_roles
from preference_training.data.rows.field_maps import FIRST_ROWS, FieldMap, FoundMap
from preference_training.data.rows.grouping import Row
from preference_training.data.rows.unread_columns import ReadColumns
from preference_training.data.rows.values import (
    better_answer,
    field_value,
    is_empty,
    is_missing_number,
    listed_names,
    parse_text_list,
    shown_names,
    values_in,
)
from preference_training.data.sources.filters import RowFilter, where_columns
from preference_training.data.sources.locations import Part, Source, find_source

# Columns that a row gets so that training's readers read answers that nothing compares: different ranks, which are ignored.
PLACES = "\0place {}"
# The last letters or numbers of columns that have one answer each.
SUFFIXES = (tuple("abcde"), tuple("01234"), tuple("12345"))
# Columns that describe the task.
DESCRIBING = ("id", "title", "difficulty")

SAID_MORE = "rows with reasons or a comment of a labeler, which are not kept"
NO_ORDER = "rows whose pairs form no ranking, and are imported without a judgment"
NUMBERS_OF_PAIRS = "rows with a margin or a weight of their pair, which is not kept"


@dataclass(frozen=True)
class TextRow:
    """A prompt with the answers to it, and what the row says of them.

    choice is "ranked", "tie" or "bad" (see `Judgment`), "" if nobody has compared them; ranks is given if it is "ranked". score
    and label are of a single answer, which is compared with others to the same prompt. edited is an answer that a labeler
    wrote. tools is the JSON text of a list, or "". judgment is the id of the judgment that the row was exported of, or "".
    """

    prompt: Prompt
    answers: tuple[Response, ...] = ()
    choice: str = ""
    ranks: tuple[int, ...] = ()
    score: float | None = None
    label: bool | None = None
    edited: Response = ""
    tools: str = ""
    title: str = ""
    difficulty: str = ""
    judgment: str = ""


def open_rows(path: str, given: dict, report: DataReport) -> tuple[Source, FieldMap, Iterator[tuple[int, dict]]]:
    """The source of a file's rows, the field map that is given, and the rows. given: keys of an entry of `datasets`.

    Columns of answers alone, `responses` or `answers` without numbers or a verdict, are not part of the map.
    Raises UserError for an invalid map, and for a file that cannot be read.
    """
    entry = read_entry({"path": path, **{key: value for key, value in given.items() if key not in compared(given)}})
    own = entry.user_data
    if own is None or entry.tokenized_file:
        raise UserError(f"datasets: {path}: a file of token ids. Expected rows of texts.")
    source = find_source(own.path, Part(own.split, own.test_split or own.split, own.subset, own.data_dir, own.streaming), None)
    return source, own.field_map, source.rows(report)


def compared(given: dict) -> dict:
    """The keys of a map that name columns of answers, if it names nothing that compares them."""
    if given.keys() & {"scores", "ranks", "better"}:
        return {}
    return {key: given[key] for key in ("responses", "answers") if key in given}


def text_rows(path: str, given: dict, report: DataReport) -> Iterator[tuple[int, TextRow]]:
    """(row number, what it has) of each usable row; the others, and what is not kept, go to the report.

    Raises UserError for an invalid map, and for a file that cannot be read or has neither prompts nor answers.
    """
    source, field_map, rows = open_rows(path, given, report)
    first = list(islice(rows, FIRST_ROWS))
    shown = [row for _, row in first]
    rows = RowFilter(field_map.where, field_map.top_k).apply(chain(first, rows), source.place, report)
    asked = replace(field_map, where={}, top_k=None)
    found = asked.found_in(shown)
    if found.text and not given.get("prompt"):
        raise UserError(
            f"datasets: {path}: plain text in `{found.text}`, without prompts or answers. Expected rows of prompts; if these "
            f"texts are prompts: --map prompt={found.text}."
        )
    named = any(not is_empty(row.get(str(name).split(".")[0])) for row in shown for name in found.answer_fields)
    if named and not compared(given) and not found.text:
        yield from _Judged(found, source.place, report).read(rows)
    elif first:
        answers = next(iter(compared(given).values()), None) or answer_columns(Columns(shown))
        yield from _Unjudged.of(asked, answers, shown, source.place, report).read(rows)
    filtering = [*where_columns(field_map.where), *([field_map.top_k["column"]] if field_map.top_k else [])]
    for name in (*DESCRIBING, *filtering):
        report.columns_not_read.pop(name, None)


def answer_columns(columns: Columns) -> str | list[str]:
    """The columns of answers that nothing compares: a list in one column, or one answer in each; [] if there are none."""
    for name in filter(None, map(columns.get, LISTS)):
        values = [parse_text_list(value) for value in columns.values[name]]
        if all(isinstance(value, list) and not are_turns(value) for value in values):
            return columns.inner(name, LISTED_TEXTS) or name
    for stem in TWO_ANSWERS:
        for suffixes in SUFFIXES:
            found = [name for suffix in suffixes if (name := columns.get(f"{stem}_{suffix}"))]
            if len(found) > 1:
                return found
    return []


def answers_in_row(field_map: FieldMap, columns: str | list[str], row: dict) -> Row:
    """The prompt and the answers of a row, whatever compares them; missing answers are left out. Raises RowError, LeftOut."""
    values = values_in(row, columns)
    if not isinstance(values, list):
        raise RowError(f"field {shown_names(columns)!r} is not a list of answers.")
    numbers: str | list[str]
    if isinstance(columns, list):
        columns = [name for name, value in zip(columns, values, strict=True) if not is_empty(value)]
        numbers = [PLACES.format(k) for k in range(len(columns))]
        more = dict(zip(numbers, range(len(columns)), strict=True))
    else:
        numbers, more = PLACES.format(""), {PLACES.format(""): list(range(len(values)))}
    by_place = replace(field_map, answers=None, better=None, responses=columns, ranks=numbers, scores=None)
    return by_place.map_row(row | more)


def _text_row(row: dict, mapped: Row | Prompt, **more) -> TextRow:
    """A row with the title and the difficulty that it has."""
    described = {name: row[name].strip() for name in DESCRIBING[1:] if isinstance(row.get(name), str)}
    described["judgment"] = judgment_in(row)
    if not isinstance(mapped, Row):
        return TextRow(mapped, **described, **more)
    answers = more.pop("answers", tuple(mapped.responses))
    return TextRow(mapped.prompt, answers, tools=mapped.tools, **described, **more)


# ---- rows that training reads -----------------------------------------------------------------------------------------------


class _Judged:
    """Rows of a format that training reads, and what it leaves out of them."""

    def __init__(self, found: FoundMap, place: str, report: DataReport):
        self.found, self.place, self.report = found, place, report
        # What training says of the rows that it leaves out is not what becomes of them here.
        self.of_training = DataReport(skip_bad_rows=True)

    def read(self, rows: Iterable[tuple[int, dict]]) -> Iterator[tuple[int, TextRow]]:
        """(row number, what it has) of each usable row."""
        for number, row, mapped in self._mapped(rows):
            try:
                yield number, self._of(row, mapped)
            except RowError as error:
                self.report.bad_row(UserError(f"datasets: {self.place}, row {number}: {error}"))
            except LeftOut as reason:
                self.report.skip(str(reason))
        of = self.of_training
        self.report.found, self.report.notes = of.found, self.report.notes + of.notes
        for what, count in of.changed.items():
            self.report.change(what, count)
        self.report.columns_not_read |= of.columns_not_read

    def _mapped(self, rows: Iterable[tuple[int, dict]]) -> Iterator[tuple[int, dict, Row | None]]:
        """Each row with what training reads of it, None for nothing. The readers look ahead, and keep the order."""
        ahead: dict[int, dict] = {}

        def remembered():
            for number, row in rows:
                ahead[number] = row
                yield number, row

        for mapped in self.found.map_rows(remembered(), self.place, self.of_training):
            while (number := next(iter(ahead))) != mapped.number:
                yield number, ahead.pop(number), None
            yield number, ahead.pop(number), mapped
        yield from ((number, row, None) for number, row in ahead.items())

    def _of(self, row: dict, mapped: Row | None) -> TextRow:
        """What a row has. Raises RowError, and LeftOut where it is nothing to label."""
        found = self.found
        row = with_roles(row, found.asked.roles) if found.asked.roles else row
        if found.messages and not is_empty(row.get(found.messages)):
            return self._of_conversation(row, mapped)
        if mapped is None:
            return self._left_out(row)
        self.report.change(NUMBERS_OF_PAIRS, any((mapped.weights, mapped.margins)))
        if found.records and isinstance(row.get("responses"), list):
            return self._of_record(row, mapped)
        if len(mapped.responses) == 1:
            score, label = (numbers[0] if numbers else None for numbers in (mapped.scores, mapped.labels))
            return _text_row(row, mapped, score=score, label=label)
        choice, ranks = self._ranking(mapped)
        return _text_row(row, mapped, choice=choice, ranks=ranks)

    def _ranking(self, mapped: Row) -> tuple[str, tuple[int, ...]]:
        """The choice and the ranks that pairs or scores are."""
        n = len(mapped.responses)
        scores = mapped.scores or [sum((i == k) - (j == k) for i, j in set(mapped.pairs)) for k in range(n)]
        ranks = ranks_of_scores(scores)
        if {(i, j) for i in range(n) for j in range(n) if ranks[i] < ranks[j]} != set(mapped.pairs):
            self.report.change(NO_ORDER)
            return "", ()
        return ("ranked", ranks) if mapped.pairs else ("tie", ())

    def _of_record(self, row: dict, mapped: Row) -> TextRow:
        """A row of an export of the app, which has a further response if a labeler wrote one."""
        self.report.change(SAID_MORE, not (is_empty(row.get("reasons")) and is_empty(row.get("comment"))))
        n = len(row["responses"])
        judged = mapped._replace(responses=mapped.responses[:n], scores=None, labels=(mapped.labels or [None])[:n])
        more = {"edited": mapped.responses[n]} if len(mapped.responses) > n else {}
        if not mapped.pairs:
            labels = set(judged.labels)
            choice = {frozenset([False]): "bad", frozenset([True]): "tie"}.get(frozenset(labels), "skip" if more else "")
            return _text_row(row, judged, choice=choice, **more)
        choice, ranks = self._ranking(judged)
        return _text_row(row, judged, choice=choice, ranks=ranks, **more)

    def _of_conversation(self, row: dict, mapped: Row | None) -> TextRow:
        """A conversation: its last turn is the answer, if it is the assistant's; if not, an answer is wanted."""
        found = self.found
        turns = conversation_in(field_value(row, found.messages), found.messages)
        label = mapped.labels[0] if mapped and mapped.labels else None
        answers = (response_of(turns[-1:]),) if turns[-1].role == "assistant" else ()
        prompt = found.prompts.with_system(row, turns[:-1] if answers else turns) or ""
        tools = found.prompts.tools_text(row) if found.tools else ""
        return _text_row(row, prompt, answers=answers, label=label if answers else None, tools=tools)

    def _left_out(self, row: dict) -> TextRow:
        """A row of which training reads nothing: a tie, answers without a verdict, or a prompt alone."""
        found = self.found
        if name := ReadColumns(found.names).media(row):
            raise RowError(f"field {name!r} is not empty, but only texts can be compared here.")
        if not _has_answers(found, row):
            other = replace(found.asked, roles=None).found_in([row])
            if not other.text and _has_answers(other, row):
                return _Judged(other, self.place, self.report)._left_out(row)
            return _text_row(row, found.prompts.read(row), tools=found.prompts.tools_text(row))
        columns = found.answers or found.responses
        if not columns or found.records:
            found.map_row(row)
            raise RowError("the row cannot be read.")
        if found.answers:
            (column,) = found.better if isinstance(found.better, dict) else (found.better,)
            better_answer(row, found.better, shown_names(found.answers))  # A verdict that cannot be read is an error.
            is_tie = not is_empty(field_value(row, column))
        else:
            numbers = values_in(row, found.scores or found.ranks)
            is_tie = isinstance(numbers, list) and len(numbers) > 1 and not any(map(is_missing_number, numbers))
        return _text_row(row, answers_in_row(found, columns, row), choice="tie" if is_tie else "")


def _has_answers(found: FieldMap, row: dict) -> bool:
    """Whether a row has a field of answers."""
    names = found.responses or found.answers or found.response or [found.chosen, *listed_names(found.rejected)]
    return any(not is_empty(row.get(name.split(".")[0])) for name in listed_names(names))


# ---- rows without a preference ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Unjudged:
    """Rows with answers that nothing compares, or with prompts alone. columns: those of the answers, [] for none."""

    found: FoundMap
    columns: str | list[str]
    place: str
    report: DataReport

    @classmethod
    def of(cls, asked: FieldMap, columns: str | list[str], first: list[dict], place: str, report: DataReport) -> "_Unjudged":
        """The reader of rows that begin like these. Raises UserError if no column has prompts."""
        taken = listed_names(columns)
        with_answers = replace(asked, responses=columns or PLACES, scores=PLACES)
        found = with_answers.found_in(first)
        if found.prompt and not any(found.prompt.split(".")[0] in row for row in first):
            # The names that prompts have, of which training knows others where answers stand beside them.
            spelled = Columns([{name: value for name, value in row.items() if name not in taken} for row in first])
            if (name := spelled.get(*PROMPTS)) is None:
                have = ", ".join(map(str, dict.fromkeys(chain(*first)))) or "no fields"
                raise UserError(
                    f"datasets: {place}: no prompts; the rows have {have}. Expected a column prompt, or its name: --map "
                    "prompt=COLUMN."
                )
            found = replace(with_answers, prompt=name).found_in(first)
        return cls(found, columns, place, report)

    def read(self, rows: Iterable[tuple[int, dict]]) -> Iterator[tuple[int, TextRow]]:
        """(row number, what it has) of each usable row."""
        said = f"answers in `{'`, `'.join(listed_names(self.columns))}`, not compared" if self.columns else "no answers"
        self.report.found = f"prompts in `{self.found.prompt}`, {said}" if self.found.prompt else said
        used = [name for name in self.found.names if not name.startswith("\0")]
        read = ReadColumns([*used, *listed_names(self.columns)])
        for number, row in rows:
            row = with_roles(row, self.found.asked.roles) if self.found.asked.roles else row
            try:
                if name := read.media(row):
                    raise RowError(f"field {name!r} is not empty, but only texts can be compared here.")
                yield number, self._of(row)
            except RowError as error:
                self.report.bad_row(UserError(f"datasets: {self.place}, row {number}: {error}"))
                continue
            except LeftOut as reason:
                self.report.skip(str(reason))
                continue
            for name in read.unread(row):
                self.report.not_read(name)

    def _of(self, row: dict) -> TextRow:
        prompts = self.found.prompts
        values = values_in(row, self.columns) if self.columns else []
        present = [value for value in values if not is_empty(value)] if isinstance(values, list) else values
        if not present:
            return _text_row(row, prompts.read(row), tools=prompts.tools_text(row))
        if not isinstance(self.columns, list) or len(present) > 1:
            return _text_row(row, answers_in_row(self.found, self.columns, row))
        # One of several columns.
        name = self.columns[values.index(present[0])]
        prompt, responses = self.found.splitting.split(row, [(name, answer_in(present[0], name))])
        return _text_row(row, prompt, answers=tuple(responses), tools=prompts.tools_text(row))
