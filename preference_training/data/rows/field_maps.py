"""Rows of any schema become prompts and responses: a map says which field is what, so that no code is needed.

Understood are pairs (`chosen`, `rejected`), lists of responses with scores or ranks, one scored response a row, and prompts
with one response for SFT; texts or conversations (`list{role, content}`); prompts in a field of their own, or in the part that
chosen and rejected have in common.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from preference_training.core.errors import UserError
from preference_training.data.rows.conversations import (
    RowError,
    is_said_in,
    join_turns,
    keys_of_turn,
    read_written_turns,
    turns_of,
)
from preference_training.data.rows.filters import RowFilter
from preference_training.data.rows.records import (
    OTHER_PROMPT,
    DataReport,
    NumberedRows,
    Prompt,
    Row,
    Turn,
    pairs_by_score,
    prompt_error,
    text_error,
    type_name,
)
from preference_training.data.rows.repeated_prompts import without_repeated_prompts
from preference_training.data.rows.templates import parse_dialogue, split_dialogue
from preference_training.data.rows.unread_columns import ColumnsRead
from preference_training.data.rows.values import as_number, value_of

# What a report says of rows, besides what it skips.
INPUT_JOINED = "prompts made of instruction and input, with a line end between them"
OWN_SYSTEM_TURN = "conversations with a system turn of their own, which stays in place of the field {!r}"


@dataclass(frozen=True)
class FieldMap:
    """Which field of a row is what. A name with dots leads into nested values and, for lists, into each of their items.

    Pairs: `chosen`, `rejected`. Lists: `responses` with `scores` (higher is better) or `ranks` (lower is better). One response
    a row: `response`, with a `score` (pairs then form between the rows of a prompt) or without (SFT alone).

    where: column → a value, a list of values, or a comparison such as ">= 0.5"; rows that do not fulfil all are left out.
    top_k: {column, k}: the k rows with the largest values are kept.
    """

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    system: str | None = None
    response: str | None = None
    score: str | None = None
    responses: str | None = None
    scores: str | None = None
    ranks: str | None = None
    implicit_prompt: bool = False
    where: dict = field(default_factory=dict)
    top_k: dict | None = None

    def rows_of(self, rows: NumberedRows, place: str, report: DataReport, known: bool = False) -> Iterator[Row]:
        """The usable rows, filtered; `place` names the file or data set in messages. Others go to the report.

        known: the set's form is known, so that unread columns and answers that begin with their prompt are not reported.
        """
        mapped = self._mapped(rows, place, report, known)
        return mapped if known else without_repeated_prompts(mapped, report)

    def _mapped(self, rows: NumberedRows, place: str, report: DataReport, known: bool) -> Iterator[Row]:
        columns = ColumnsRead(self.names())
        usable, implicit = 0, 0
        for number, row in RowFilter(self.where, self.top_k).apply(rows, place, report):
            try:
                if not known and (name := columns.media(row)):
                    raise RowError(
                        f"field {name!r} is not empty, and no model here is shown anything but text. Expected rows of texts; "
                        "take the column out where they stand without it."
                    )
                mapped = self.row_of(row)
            except RowError as fault:
                report.bad_row(UserError(f"datasets: {place}, row {number}: {fault}"))
                continue
            usable += 1
            implicit += self.implicit_prompt and self._has_implicit_prompt(row)
            if mapped is None:
                report.skip(OTHER_PROMPT)
                continue
            if not known:
                self._count_unused(row, mapped, columns, report)
            yield mapped
        if self.implicit_prompt and usable and not implicit:
            report.note("implicit_prompt has no effect: prompts stand in fields of their own, or in turns")

    def _count_unused(self, row: dict, mapped: Row, columns: ColumnsRead, report: DataReport) -> None:
        """Count the columns of a row that are unused or joined."""
        for name in columns.unread(row):
            report.not_read(name)
        if self._input_of(row):
            report.change(INPUT_JOINED)
        if self.system and not isinstance(mapped.prompt, str):
            system, first = value_of(row, self.system), mapped.prompt[0]
            if isinstance(system, str) and system.strip() and system.strip() != first.content.strip():
                report.change(OWN_SYSTEM_TURN.format(self.system))

    def names(self) -> list[str]:
        """The fields that are read, filters included."""
        if self.responses is not None:
            texts = [self.responses, self.scores, self.ranks if not self.scores else None]
        elif self.response is not None:
            texts = [self.response, self.score]
        else:
            texts = [self.chosen, self.rejected]
        names = [self.prompt, self.system, *texts, *self.where, self.top_k and self.top_k["column"]]
        names += [INPUT] * (self.prompt == INSTRUCTION)
        return [name for name in names if name is not None]

    def row_of(self, row: dict) -> Row | None:
        """What one row says; None where chosen and rejected answer different prompts. Raises RowError."""
        if self.responses is not None:
            return self._row_of_lists(row)
        if self.response is not None:
            response = _answer_text(row, self.response)
            scores = None if self.score is None else [_score(row, self.score)]
            return Row(self._prompt_of(row), [response], [], 0, scores)
        return self._row_of_pair(row)

    def _row_of_lists(self, row: dict) -> Row:
        responses = value_of(row, self.responses)
        numbers = value_of(row, self.scores or self.ranks)
        if not isinstance(responses, list) or not isinstance(numbers, list) or len(responses) != len(numbers):
            raise RowError(
                f"{self.responses} and {self.scores or self.ranks} are not two lists of the same length. "
                "Expected one number for each response."
            )
        for index, response in enumerate(responses):
            if fault := text_error(read_written_turns(response, self.responses)):
                raise RowError(f"field {self.responses!r}: response {index} {fault}.")
        sign = 1 if self.scores else -1
        scores = [sign * as_number(number, self.scores or self.ranks) for number in numbers]
        if len(responses) == 0:
            raise RowError(f"field {self.responses!r} is an empty list.")
        best = max(range(len(scores)), key=scores.__getitem__)
        return Row(self._prompt_of(row), responses, pairs_by_score(scores), best)

    def _row_of_pair(self, row: dict) -> Row | None:
        chosen, rejected = (read_written_turns(_answer(row, name), name) for name in (self.chosen, self.rejected))
        if isinstance(chosen, list) or isinstance(rejected, list):
            for name, value in ((self.chosen, chosen), (self.rejected, rejected)):
                if not isinstance(value, list):
                    raise RowError(f"field {name!r} is {type_name(value)}, expected a conversation as in the other field.")
            return self._row_of_conversations(row, chosen, rejected)
        for name, value in ((self.chosen, chosen), (self.rejected, rejected)):
            _check_text(value, name)
        if self._has_prompt_field(row):
            return Row(self._prompt_of(row), [chosen, rejected], [(0, 1)], 0)
        if self.implicit_prompt:
            prompt = _shared_beginning(chosen, rejected)
        else:
            prompt = _dialogue_prompt(chosen, self.chosen)
            if not rejected.startswith(prompt):
                return None
        answers = [chosen[len(prompt) :], rejected[len(prompt) :]]
        for name, answer in zip((self.chosen, self.rejected), answers, strict=True):
            if not answer.strip():
                raise RowError(f"the answer in field {name!r} is empty.")
        return Row(prompt, answers, [(0, 1)], 0)

    def _has_prompt_field(self, row: dict) -> bool:
        """Whether the prompt stands in a field of its own: it does where that is named, and where rows have it unasked."""
        return self.prompt in row or self.prompt != FieldMap.prompt or self.system is not None

    def _has_implicit_prompt(self, row: dict) -> bool:
        """Whether implicit_prompt says where this row's prompt is."""
        if self.responses is not None or self.response is not None or self._has_prompt_field(row):
            return False
        return isinstance(read_written_turns(value_of(row, self.chosen), self.chosen), str)

    def _row_of_conversations(self, row: dict, chosen: list, rejected: list) -> Row | None:
        (*before, answer), (*other_before, other) = (
            turns_of(value, name) for value, name in ((chosen, self.chosen), (rejected, self.rejected))
        )
        if before != other_before:
            return None
        for name, turn in ((self.chosen, answer), (self.rejected, other)):
            if turn.role != "assistant":
                raise RowError(f"the last turn of {name} is the {turn.role}'s. Expected the assistant's, which is the answer.")
        prompt = self._prompt_before(row, tuple(before)) if before else self._prompt_of(row, as_turns=True)
        return Row(prompt, [answer.content, other.content], [(0, 1)], 0)

    def _prompt_before(self, row: dict, shared: tuple[Turn, ...]) -> tuple[Turn, ...]:
        """The turns that both answers share, behind those of the prompt's own field, where there is one. Raises RowError."""
        try:
            value = read_written_turns(value_of(row, self.prompt), self.prompt)
        except RowError:
            if self.prompt in row:
                raise
            value = None
        if not value or self.system == self.prompt:
            return self._with_system(row, shared)
        value = [value] if keys_of_turn(value) else value
        if isinstance(value, list):
            return self._with_system(row, join_turns(turns_of(value, self.prompt), shared))
        if not isinstance(value, str):
            _check_text(value, self.prompt)
        if not is_said_in(value, shared):
            raise RowError(
                f"field {self.prompt!r} is a text that is none of the turns which {self.chosen} and {self.rejected} share, and "
                f"would be lost. If it is the system's, say system: {self.prompt}; if it is no part of the prompt, rename the "
                "column."
            )
        return self._with_system(row, shared)

    def _prompt_of(self, row: dict, as_turns: bool = False) -> Prompt:
        """The prompt in its own field: a text, or a conversation where it is a list or a system's turn belongs to it."""
        value = read_written_turns(_prompt_value(row, self.prompt), self.prompt)
        if isinstance(value, list):
            return self._with_system(row, turns_of(value, self.prompt))
        _check_text(value, self.prompt)
        text = f"{value}\n{more}" if (more := self._input_of(row)) else value
        if self.system is None and not as_turns:
            return text
        return self._with_system(row, parse_dialogue(text) or (Turn("user", text),))

    def _input_of(self, row: dict) -> str | None:
        """The second part of a prompt that rows in Alpaca's form have, in a field that nothing else is said about."""
        if self.prompt != INSTRUCTION or INPUT not in row or INPUT in (self.system, self.response, self.chosen, self.rejected):
            return None
        value = row[INPUT]
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        _check_text(value, INPUT)
        return value

    def _with_system(self, row: dict, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        if fault := prompt_error(turns):
            raise RowError(f"the prompt {fault}.")
        system = value_of(row, self.system) if self.system else None
        if not system or turns[0].role == "system":
            return turns
        if fault := text_error(system):
            raise RowError(f"field {self.system!r} {fault}.")
        return (Turn("system", system), *turns)


# ---- values of a row ----------------------------------------------------------------------------------------------------


def _score(row: dict, name: str) -> float:
    value = value_of(row, name)
    if isinstance(value, bool):
        raise RowError(f"field {name!r} is {value}, expected a number, as 1 and 0.")
    return as_number(value, name)


def _check_text(value, name: str) -> None:
    """Raise RowError for a field's value that is no text with something in it, naming a map that would read it."""
    fault = text_error(value)
    if fault is None:
        return
    keys = keys_of_turn(value)
    remedy = f" The text of such a turn is read as {name}.{keys[1]}." if keys else ""
    raise RowError(f"field {name!r} {fault}.{remedy}")


def _answer_text(row: dict, name: str) -> str:
    value = read_written_turns(value_of(row, name), name)
    _check_text(value, name)
    return value


# Names of fields under which data sets are known to have answers and prompts, for messages.
ANSWER_NAMES = ("completion", "response", "output", "answer")
PROMPT_NAMES = ("instruction", "question", "query", "input", "messages", "conversations", "conversation")
INSTRUCTION, INPUT = "instruction", "input"


def _answer(row: dict, name: str):
    """chosen or rejected of a row. Where there is no such field the error names a map that would read the row."""
    try:
        return value_of(row, name)
    except RowError as fault:
        found = next((other for other in ANSWER_NAMES if other in row), None)
        if name not in (FieldMap.chosen, FieldMap.rejected) or found is None:
            raise
        prompt = next((other for other in PROMPT_NAMES if other in row), None) if FieldMap.prompt not in row else None
        keys = f"prompt: {prompt}, " if prompt else ""
        raise RowError(
            f"{fault} Rows of one answer are read by a map, {{path: ..., {keys}response: {found}}}, for loss=sft; a number "
            "beside it, named as score, makes pairs."
        ) from None


def _prompt_value(row: dict, name: str):
    """The prompt's field. Where rows have none of the usual name, the error names one that they have."""
    try:
        return value_of(row, name)
    except RowError as fault:
        found = next((other for other in PROMPT_NAMES if other in row), None)
        if name != FieldMap.prompt or found is None:
            raise
        raise RowError(f"{fault} Say which one is the prompt, as in prompt: {found}.") from None


def _dialogue_prompt(dialogue: str, name: str) -> str:
    try:
        return split_dialogue(dialogue)[0]
    except ValueError:
        raise RowError(
            f"{name} has no '\\n\\nAssistant:' turn. Expected a dialogue of '\\n\\nHuman:' and '\\n\\nAssistant:' turns, or a "
            "field prompt beside chosen and rejected (implicit_prompt=true takes what both begin with)."
        ) from None


def _shared_beginning(chosen: str, rejected: str) -> str:
    """What both texts begin with, up to its last white space, so that no word is cut. Raises RowError where there is none.

    A blank before the answers is theirs: tokenizers write a word and the blank before it as one token.
    """
    pairs = enumerate(zip(chosen, rejected, strict=False))
    length = next((k for k, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    shared = chosen[:length]
    end = max((k + 1 for k, character in enumerate(shared) if character.isspace()), default=0)
    if not shared[:end].strip():
        raise RowError("chosen and rejected begin with different words, so there is no prompt that they share.")
    return shared[:end].removesuffix(" ")
