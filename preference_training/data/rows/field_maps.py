"""Map rows of any schema to prompts and responses: a field map says which field is which, so that no code is needed.

What a map does not say is found in the columns of the first rows (`formats.py`). Supported are pairs, lists of answers with
scores or ranks, two answers with a verdict, one scored or labeled answer per row, prompts with one answer, whole conversations
and plain text; texts or conversations; prompts in a separate field, or in the common beginning of the answers.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import chain, islice
from math import inf, isfinite

from preference_training.core.errors import UserError
from preference_training.data.records.record import NumberedRows, response_of
from preference_training.data.records.report import DataReport
from preference_training.data.records.validation import text_error
from preference_training.data.rows.answers import (
    EMPTY_ANSWER,
    NO_ANSWER,
    LeftOut,
    Splitting,
    answer_in,
    answer_of,
    answers_in,
    conversation_in,
    last_turns_replaced,
    rounds_in,
    without_empty,
)
from preference_training.data.rows.column_names import CONVERSATIONS
from preference_training.data.rows.conversations import NothingLearned, RowError, check_mask, split_conversation, with_roles
from preference_training.data.rows.formats import find
from preference_training.data.rows.grouping import RECORD_COLUMNS, Row, pairs_by_score, record_row, strip_repeated_prompts
from preference_training.data.rows.nearest_entry import with_nearest
from preference_training.data.rows.prompt_fields import CONTEXT, PromptFields
from preference_training.data.rows.unread_columns import ReadColumns, note_verdict
from preference_training.data.rows.values import (
    NO_VERDICT,
    TIE,
    UntypedRow,
    as_label,
    as_number,
    better_answer,
    check_text,
    comparable_number,
    field_number,
    field_value,
    is_empty,
    is_missing_number,
    is_plain_text,
    is_text_list,
    listed_names,
    parse_text_list,
    shown_names,
    values_in,
)
from preference_training.data.sources.filters import RowFilter, Where, where_columns

# What a report counts of rows, besides those it skips.
CONTEXT_JOINED = "prompts joined from question and context, on separate lines"
INPUT_JOINED = "prompts joined from instruction and input, on separate lines"
OWN_SYSTEM_TURN = "conversations with their own system turn, which replaces the field {!r}"
LAST_TURNS = "conversations whose turns behind the assistant's last one were left out"
LISTS_IN_CELLS = "rows whose cells are lists of answers, each read as several"
NO_REJECTED = "no rejected answer"
NO_SCORE = "answers left out that have no score or rank"
NO_LABEL = "the answer has no label"
NOTHING_LEARNED = "all of the assistant's turns have weight 0"
NO_RATED = "no answer has a score or rank"
OTHER_FORMAT = "rows of another format: {}"

# The rows from which a format is found.
FIRST_ROWS = 100


@dataclass(frozen=True)
class FieldMap:
    """The fields of a row. A dotted name selects a nested value and, for lists, a value of each item.

    Pairs: `chosen`, `rejected` (or a list of columns; the same column: a list whose first answer is preferred), and numbers
    of the pair, its `margin` and `example_weight`. Lists: `responses` with `scores` (higher is better) or `ranks` (lower is
    better), as a column or as a list of columns. Verdicts: two `answers`, and which is `better`: a column, or {column: [values
    for the first, values for the second]}. One response per row: `response`, with a `score` (pairs are then formed between the
    rows of a prompt), a `label` (desirable or not), or neither (SFT only). `messages`: whole conversations, whose assistant
    turns SFT learns. `text`: plain text. Beside the `prompt` ("": there is none): `system`, `history` (earlier [question,
    answer] turns), `tools`.

    roles: further names of roles, with what they are.

    where: column → a value, a list of values, or a comparison such as ">= 0.5", or an expression over columns; rows that fail
    any are skipped.
    top_k: {column, k}: the k rows with the largest values are kept.
    """

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str | list = "rejected"
    system: str | None = None
    response: str | None = None
    score: str | None = None
    responses: str | list | None = None
    scores: str | list | None = None
    ranks: str | list | None = None
    implicit_prompt: bool = False
    where: Where = field(default_factory=dict)
    top_k: dict | None = None
    label: str | None = None
    margin: str | None = None
    example_weight: str | None = None
    messages: str | None = None
    text: str | None = None
    answers: str | list | None = None
    better: str | dict | None = None
    history: str | None = None
    tools: str | None = None
    roles: dict[str, str] | None = None

    def map_rows(self, rows: NumberedRows, place: str, report: DataReport, known: bool = False) -> Iterator[Row]:
        """The usable rows, filtered; others go to the report. place: the file or data set, for messages.

        known: the schema of the set is known, so that nothing is searched for, and unread columns and repeated prompts are not
        reported.
        """
        if known:
            filtered = RowFilter(self.where, self.top_k).apply(rows, place, report)
            return _mapped(_Formats(self, self), filtered, place, report, known)
        rows = iter(rows)
        first = list(islice(rows, FIRST_ROWS))
        found = self.found_in(row for _, row in first)
        return found.map_rows(chain(first, rows), place, report)

    def found_in(self, rows: Iterable[dict]) -> "FoundMap":
        """This map, with what it does not say as found in rows."""
        values, usual = ({item.name: getattr(of, item.name) for item in fields(FieldMap)} for of in (self, FieldMap()))
        given = {name: value for name, value in values.items() if value != usual[name]}
        rows = [with_roles(row, self.roles) for row in rows] if self.roles else list(rows)
        found = find(rows, {name: value for name, value in given.items() if name != "roles"})
        names = frozenset(value for value in found.keys.values() if isinstance(value, str))
        keys = found.keys if found.words else {}
        columns = tuple(dict.fromkeys(str(name) for row in rows for name in row))
        of = FoundMap(**{**given, **found.keys}, found=names, found_keys=keys, words=found.words, asked=self, columns=columns)
        is_joined = not (of.text or of.messages) and any(of.prompts.context(row) for row in rows)
        return replace(of, found_keys={**keys, "joined": CONTEXT}) if is_joined else of

    @property
    def found(self) -> frozenset[str]:
        """The fields that were found unasked: single rows may lack those beside the prompt and the answers."""
        return frozenset()

    @cached_property
    def answer_fields(self) -> list[str]:
        """The fields of the answers, and of the numbers and verdicts on them."""
        if self.messages:
            found = [self.messages, self.label]
        elif self.text:
            found = [self.text]
        elif self.responses:
            found = [*listed_names(self.responses), *listed_names(self.scores or self.ranks)]
        elif self.answers:
            found = [*listed_names(self.answers), *(self.better if isinstance(self.better, dict) else [self.better])]
        elif self.response:
            found = [self.response, self.score, self.label]
        else:
            found = [self.chosen, *listed_names(self.rejected), self.margin, self.example_weight]
        return [name for name in found if name is not None]

    @cached_property
    def prompts(self) -> PromptFields:
        """The fields of the prompt."""
        others = frozenset([*self.answer_fields, *filter(None, (self.system, self.history, self.tools))])
        return PromptFields(self.prompt, self.system, self.history, self.tools, self.found, others)

    @cached_property
    def splitting(self) -> Splitting:
        """How prompts are told from answers: only answers that are compared may hold their prompt."""
        return Splitting(self.prompts, self.implicit_prompt, apart=bool(self.responses or self.response))

    @property
    def names(self) -> list[str]:
        """The fields that are read, including filters."""
        of_prompt = [] if self.text else self.prompts.names()
        if self.messages:
            of_prompt = [name for name in (self.system, self.history, self.tools) if name]
        return [*of_prompt, *self.answer_fields, *where_columns(self.where), *([self.top_k["column"]] if self.top_k else [])]

    def map_row(self, row: dict, report: DataReport | None = None) -> Row:
        """One mapped row. Raises RowError, and LeftOut where it has nothing to compare."""
        report = report if report is not None else DataReport()
        if self.text:
            check_text(text := field_value(row, self.text), self.text)
            return Row("", [text], [], 0)
        if self.messages:
            mapped = self._conversation(row, report)
        elif self.responses:
            mapped = self._list(row, report)
        elif self.answers:
            mapped = self._verdict(row)
        elif self.response:
            mapped = self._single(row)
        else:
            mapped = self._pair(row, report)
        return mapped._replace(tools=self.prompts.tools_text(row)) if self.tools else mapped

    # ---- kinds of rows ----------------------------------------------------------------------------------------------------

    def _conversation(self, row: dict, report: DataReport) -> Row:
        check_mask(row)
        turns = conversation_in(field_value(row, self.messages), self.messages)
        try:
            prompt, response = split_conversation(turns, self.messages)
        except NothingLearned:
            raise LeftOut(NOTHING_LEARNED) from None
        report.change(LAST_TURNS, len(prompt) + len(response) < len(turns))
        labels = None
        if self.label:
            labels = self._labels(row)
            prompt, response = (*prompt, *response[:-1]), response[-1:]
        prompt = self.prompts.with_system(row, tuple(prompt)) or ""
        return Row(prompt, [response_of(response)], [], 0, labels=labels)

    def _labels(self, row: dict) -> list[bool]:
        """The label of a row's answer. Raises RowError, and LeftOut without one where labels were found unasked."""
        if self.label in self.found and (is_empty(row.get(self.label)) or is_missing_number(row[self.label])):
            raise LeftOut(NO_LABEL)
        return [as_label(field_value(row, self.label), self.label)]

    def _single(self, row: dict) -> Row:
        answer = answer_in(field_value(row, self.response), self.response)
        scores = labels = None
        if self.score is not None and not (self.score in self.found and is_missing_number(row.get(self.score))):
            scores = [as_number(comparable_number(field_value(row, self.score)), self.score)]
        if self.label is not None:
            labels = self._labels(row)
        prompt, responses = self.splitting.split(row, [(str(self.response), answer)])
        return Row(prompt, responses, [], 0, scores, labels, forms_pairs=scores is not None)

    def _list(self, row: dict, report: DataReport) -> Row:
        numbers_name = self.scores or self.ranks
        answers, numbers = (values_in(row, name) for name in (self.responses, numbers_name))
        if isinstance(answers, list) and is_missing_number(numbers):
            raise LeftOut(NO_RATED)
        if not isinstance(answers, list) or not isinstance(numbers, list) or len(answers) != len(numbers):
            raise RowError(
                f"{shown_names(self.responses)} and {shown_names(numbers_name)} are not two lists of the same length. "
                "Expected one number for each response."
            )
        if not answers:
            raise RowError(f"field {self.responses!r} is an empty list.")
        present = [k for k, answer in enumerate(answers) if not is_empty(answer)]
        rated = [k for k in present if not is_missing_number(numbers[k])]
        if not rated:
            raise LeftOut(NO_RATED)
        missing = sum(answer is None for answer in answers)
        report.change(NO_ANSWER, missing)
        report.change(EMPTY_ANSWER, len(answers) - missing - len(present))
        report.change(NO_SCORE, len(present) - len(rated))
        columns = [self.responses[k] for k in rated] if isinstance(self.responses, list) else self.responses
        found = rounds_in(row, self.prompt, columns) or [answer_of(answers, self.responses, k) for k in rated]
        sign = 1 if self.scores else -1
        scores = [sign * as_number(comparable_number(numbers[k]), shown_names(numbers_name)) for k in rated]
        pairs = pairs_by_score(scores, report)
        if isinstance(self.responses, list) and not pairs and len(answers) > 1:
            raise LeftOut(TIE if len(rated) > 1 else NO_VERDICT)
        prompt, responses = self.splitting.split(row, found)
        return Row(prompt, responses, pairs, max(range(len(scores)), key=scores.__getitem__), scores)

    def _verdict(self, row: dict) -> Row:
        values = values_in(row, self.answers)
        names = self.answers if isinstance(self.answers, list) else [self.answers] * 2
        if not isinstance(values, list) or len(values) != 2:
            raise RowError(f"field {shown_names(self.answers)!r} is not a list of two answers.")
        better = better_answer(row, self.better, " and ".join(dict.fromkeys(names)))
        if better is None:
            column = next(iter(self.better))
            raise LeftOut(NO_VERDICT if is_empty(field_value(row, column)) else TIE)
        answers = rounds_in(row, self.prompt, self.answers) or [
            (name, answer_in(value, name)) for name, value in zip(names, values, strict=True)
        ]
        prompt, responses = self.splitting.split(row, answers)
        return Row(prompt, responses, [(better, 1 - better)], better)

    def _pair(self, row: dict, report: DataReport) -> Row:
        two = [(name, row.get(name)) for name in (self.chosen, self.rejected)] if isinstance(self.rejected, str) else []
        if two and two[0][0] != two[1][0] and all(is_plain_text(text) and text_error(text) is None for _, text in two):
            prompt, responses = self.splitting.split(row, two)
            return Row(prompt, responses, [(0, 1)], 0, **self._numbers_of_pair(row, 1))
        others = listed_names(self.rejected)
        # Of several columns of rejected answers, those that a row lacks are left out.
        given = [row.get(name, row.get(name.split(".")[0])) for name in others]
        present = [name for name, value in zip(others, given, strict=True) if len(others) == 1 or not is_empty(value)]
        names = [self.chosen] if [self.chosen] == others else [self.chosen, *(present or others[:1])]
        values = [_answer(row, name) for name in names]
        cells = list(map(parse_text_list, values)) if isinstance(row, UntypedRow) else []
        if self.chosen in self.found and self.chosen in CONVERSATIONS:
            report.change(LISTS_IN_CELLS, any(map(is_text_list, cells[1:])))
            values = last_turns_replaced(cells or values, names)
        elif cells and all(map(is_text_list, cells)):
            report.change(LISTS_IN_CELLS)
            values = cells  # One alone may be an answer in brackets.
        if any(value == [] for value in given) and all(map(is_empty, given)):
            answers_in(values[0], self.chosen)  # Its faults are told first.
            raise LeftOut(NO_REJECTED)
        values[1:] = (without_empty(value, report) for value in values[1:])
        named = zip(names, values, strict=True)
        first, *found = [[(name, answer) for answer in answers_in(value, name)] for name, value in named]
        chosen, rejected = (first, [*chain(*found)]) if found else (first[:1], first[1:])
        report.change(NO_ANSWER, len(others) - len(present))
        if not rejected:
            raise RowError(f"field {self.rejected!r} has one answer, expected the preferred one and others.")
        prompt, responses = self.splitting.split(row, chosen + rejected)
        pairs = [(i, len(chosen) + k) for i in range(len(chosen)) for k in range(len(rejected))]
        more = tuple(range(1, len(chosen)))
        return Row(prompt, responses, pairs, 0, more_targets=more, **self._numbers_of_pair(row, len(pairs)))

    def _numbers_of_pair(self, row: dict, count: int) -> dict[str, list[float]]:
        """The margin and the weight of a row's pairs, where they are mapped. Raises RowError."""
        numbers: dict[str, list[float]] = {}
        for key, name, least in (("margins", self.margin, -inf), ("weights", self.example_weight, 0)):
            if name is None or (name in self.found and is_missing_number(row.get(name))):
                continue
            numbers[key] = [number := field_number(row, name)] * count
            if not (isfinite(number) and number >= least):
                raise RowError(f"field {name!r} is {number}, expected a finite number{' of at least 0' * (least == 0)}.")
        return numbers


@dataclass(frozen=True)
class FoundMap(FieldMap):
    """A field map as it was found in rows.

    found_keys, words: what was found, if it is not usual. asked: the user's map. columns: all columns of these rows. records:
    the rows are records.
    """

    found: frozenset[str] = frozenset()
    found_keys: dict = field(default_factory=dict)
    words: str = ""
    asked: FieldMap = field(default_factory=FieldMap)
    columns: tuple[str, ...] = ()
    records: bool = False

    @property
    def names(self) -> list[str]:
        """The fields that are read, including filters."""
        return [*super().names, *(RECORD_COLUMNS if self.records else ())]

    def map_row(self, row: dict, report: DataReport | None = None) -> Row:
        """One mapped row. Raises RowError, and LeftOut where it has nothing to compare."""
        if not self.records:
            return super().map_row(row, report)
        return record_row(row, self.prompts)._replace(tools=self.prompts.tools_text(row))

    def map_rows(self, rows: NumberedRows, place: str, report: DataReport, known: bool = False) -> Iterator[Row]:
        """The usable rows, filtered; others go to the report, with what was found."""
        report.found = self.words
        rows = RowFilter(self.where, self.top_k).apply(rows, place, report)
        mapped = _mapped(_Formats(self.asked, self), rows, place, report, known)
        return mapped if self.records else strip_repeated_prompts(mapped, report)


class _Formats:
    """The field maps of the rows of a file: one for most of them, others for rows without its answers."""

    def __init__(self, given: FieldMap, main: FieldMap):
        self.given, self.main = given, main
        self.roots = {part for name in main.answer_fields for part in (name, name.split(".")[0])}
        self.others: dict[tuple, FieldMap] = {}
        self.columns = {id(main): ReadColumns(main.names)}

    def of(self, row: dict) -> FieldMap:
        """The map that reads a row."""
        if self.main is self.given or any(not is_empty(row.get(name)) for name in self.roots):
            return self.main
        names = tuple(name for name, value in row.items() if not is_empty(value))
        if names not in self.others and len(self.others) < FIRST_ROWS:
            # Its roles have been renamed.
            found = replace(self.given, roles=None).found_in([row])
            fits = found.words and any(not is_empty(row.get(name.split(".")[0])) for name in found.answer_fields)
            self.others[names] = found if fits else self.main
        return self.others.get(names, self.main)

    def columns_of(self, field_map: FieldMap) -> ReadColumns:
        """The columns that a map reads."""
        if id(field_map) not in self.columns:
            self.columns[id(field_map)] = ReadColumns(field_map.names)
        return self.columns[id(field_map)]


def _mapped(formats: _Formats, rows: NumberedRows, place: str, report: DataReport, known: bool) -> Iterator[Row]:
    usable, implicit = 0, 0
    if roles := formats.given.roles:
        rows = ((number, with_roles(row, roles)) for number, row in rows)
    for number, row in rows:
        field_map = formats.of(row)
        columns = formats.columns_of(field_map)
        try:
            if not known and (name := columns.media(row)):
                raise RowError(
                    f"field {name!r} is not empty, but models read only text here. Expected rows of texts; remove the "
                    "column if they do not depend on it."
                )
            mapped = field_map.map_row(row, report)
        except RowError as error:
            report.bad_row(UserError(f"datasets: {place}, row {number}: {error}"))
            continue
        except LeftOut as reason:
            usable += 1
            report.skip(str(reason))
            continue
        usable += 1
        mapped = mapped if known else mapped._replace(number=number)
        implicit += field_map.implicit_prompt and not field_map.prompts.in_row(row) and isinstance(mapped.prompt, str)
        if not known:
            _count_unused(field_map, row, mapped, columns, report)
            if field_map is not formats.main and isinstance(field_map, FoundMap):
                report.change(OTHER_FORMAT.format(field_map.words))
        yield mapped
    if formats.given.implicit_prompt and usable and not implicit:
        report.note("implicit_prompt has no effect: prompts are in separate fields, or in turns")


def _count_unused(field_map: FieldMap, row: dict, mapped: Row, columns: ReadColumns, report: DataReport) -> None:
    """Count the columns of a row that are not read, or are joined."""
    of_prompt = not (field_map.text or field_map.messages)
    context = field_map.prompts.context(row) if of_prompt else None
    asked = mapped.prompt if isinstance(mapped.prompt, str) else "".join(turn.content for turn in mapped.prompt[-1:])
    report.change(CONTEXT_JOINED, is_joined := context is not None and asked.endswith(context))
    for name in columns.unread(row):
        if not is_joined or row.get(name) != context:
            report.not_read(name)
            if field_map.response or field_map.messages:
                note_verdict(row, name, report)
    if of_prompt and field_map.prompts.second_part(row):
        report.change(INPUT_JOINED)
    if field_map.system and not isinstance(mapped.prompt, str):
        system, first = row.get(field_map.system), mapped.prompt[0]
        if isinstance(system, str) and system.strip() and system.strip() != first.content.strip():
            report.change(OWN_SYSTEM_TURN.format(field_map.system))


def _answer(row: dict, name: str):
    """The chosen or rejected field of a row. Without it, the error suggests an entry that would read the row."""
    try:
        return field_value(row, name)
    except RowError as error:
        if name not in (FieldMap.chosen, FieldMap.rejected):
            raise
        raise RowError(with_nearest(str(error), row)) from None
