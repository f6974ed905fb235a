"""Map rows of any schema to prompts and responses: a field map says which field is which, so that no code is needed.

Supported are pairs (`chosen`, `rejected`), lists of responses with scores or ranks, one scored or labeled response per row, and
prompts with one response for SFT; texts or conversations (`list{role, content}`); prompts in a separate field, or in the common
beginning of chosen and rejected.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf, isfinite

from preference_training.core.errors import UserError
from preference_training.data.rows.conversations import (
    RowError,
    join_turns,
    occurs_in,
    parse_serialized_turns,
    parse_turns,
    turn_keys,
)
from preference_training.data.rows.grouping import Row, pairs_by_score
from preference_training.data.rows.records import (
    OTHER_PROMPT,
    DataReport,
    NumberedRows,
    Prompt,
    Turn,
    prompt_error,
    text_error,
    type_name,
)
from preference_training.data.rows.repeated_prompts import strip_repeated_prompts
from preference_training.data.rows.templates import parse_dialogue, split_dialogue
from preference_training.data.rows.unread_columns import ReadColumns
from preference_training.data.rows.values import as_label, as_number, field_number, field_value
from preference_training.data.sources.filters import RowFilter, Where, where_columns

# What a report counts of rows, besides those it skips.
INPUT_JOINED = "prompts joined from instruction and input, on separate lines"
OWN_SYSTEM_TURN = "conversations with their own system turn, which replaces the field {!r}"


@dataclass(frozen=True)
class FieldMap:
    """The fields of a row. A dotted name selects a nested value and, for lists, a value of each item.

    Pairs: `chosen`, `rejected`, and numbers of the pair, its `margin` and `example_weight`. Lists: `responses` with `scores`
    (higher is better) or `ranks` (lower is better). One response per row: `response`, with a `score` (pairs are then formed
    between the rows of a prompt), a `label` (desirable or not), or neither (SFT only).

    where: column → a value, a list of values, or a comparison such as ">= 0.5", or an expression over columns; rows that fail
    any are skipped.
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
    where: Where = field(default_factory=dict)
    top_k: dict | None = None
    label: str | None = None
    margin: str | None = None
    example_weight: str | None = None

    def map_rows(self, rows: NumberedRows, place: str, report: DataReport, known: bool = False) -> Iterator[Row]:
        """The usable rows, filtered; others go to the report. place: the file or data set, for messages.

        known: the schema of the set is known, so unread columns and repeated prompts are not reported.
        """
        mapped = self._mapped(rows, place, report, known)
        return mapped if known else strip_repeated_prompts(mapped, report)

    def _mapped(self, rows: NumberedRows, place: str, report: DataReport, known: bool) -> Iterator[Row]:
        columns = ReadColumns(self.names())
        usable, implicit = 0, 0
        for number, row in RowFilter(self.where, self.top_k).apply(rows, place, report):
            try:
                if not known and (name := columns.media(row)):
                    raise RowError(
                        f"field {name!r} is not empty, but models read only text here. Expected rows of texts; remove the "
                        "column if they do not depend on it."
                    )
                mapped = self.map_row(row)
            except RowError as error:
                report.bad_row(UserError(f"datasets: {place}, row {number}: {error}"))
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
            report.note("implicit_prompt has no effect: prompts are in separate fields, or in turns")

    def _count_unused(self, row: dict, mapped: Row, columns: ReadColumns, report: DataReport) -> None:
        """Count the columns of a row that are not read, or are joined."""
        for name in columns.unread(row):
            report.not_read(name)
        if self._input(row):
            report.change(INPUT_JOINED)
        if self.system and not isinstance(mapped.prompt, str):
            system, first = field_value(row, self.system), mapped.prompt[0]
            if isinstance(system, str) and system.strip() and system.strip() != first.content.strip():
                report.change(OWN_SYSTEM_TURN.format(self.system))

    def names(self) -> list[str]:
        """The fields that are read, including filters."""
        if self.responses is not None:
            texts = [self.responses, self.scores, self.ranks if not self.scores else None]
        elif self.response is not None:
            texts = [self.response, self.score, self.label]
        else:
            texts = [self.chosen, self.rejected, self.margin, self.example_weight]
        names = [self.prompt, self.system, *texts, *where_columns(self.where), self.top_k and self.top_k["column"]]
        names += [INPUT] * (self.prompt == INSTRUCTION)
        return [name for name in names if name is not None]

    def map_row(self, row: dict) -> Row | None:
        """One mapped row; None where chosen and rejected have different prompts. Raises RowError."""
        if self.responses is not None:
            return self._map_lists(row)
        if self.response is not None:
            response = _response_text(row, self.response)
            scores = None if self.score is None else [_score(row, self.score)]
            labels = None if self.label is None else [as_label(field_value(row, self.label), self.label)]
            return Row(self._prompt(row), [response], [], 0, scores, labels, forms_pairs=scores is not None)
        mapped = self._map_pair(row)
        return mapped and mapped._replace(**self._numbers_of_pair(row))

    def _numbers_of_pair(self, row: dict) -> dict[str, list[float]]:
        """The margin and the weight of a row's pair, where they are mapped. Raises RowError."""
        numbers = {}
        for key, name, least in (("margins", self.margin, -inf), ("weights", self.example_weight, 0)):
            if name is not None:
                numbers[key] = [number := field_number(row, name)]
                if not (isfinite(number) and number >= least):
                    raise RowError(f"field {name!r} is {number}, expected a finite number{' of at least 0' * (least == 0)}.")
        return numbers

    def _map_lists(self, row: dict) -> Row:
        responses = field_value(row, self.responses)
        numbers = field_value(row, self.scores or self.ranks)
        if not isinstance(responses, list) or not isinstance(numbers, list) or len(responses) != len(numbers):
            raise RowError(
                f"{self.responses} and {self.scores or self.ranks} are not two lists of the same length. "
                "Expected one number for each response."
            )
        for index, response in enumerate(responses):
            if problem := text_error(parse_serialized_turns(response, self.responses)):
                raise RowError(f"field {self.responses!r}: response {index} {problem}.")
        sign = 1 if self.scores else -1
        scores = [sign * as_number(number, self.scores or self.ranks) for number in numbers]
        if len(responses) == 0:
            raise RowError(f"field {self.responses!r} is an empty list.")
        best = max(range(len(scores)), key=scores.__getitem__)
        return Row(self._prompt(row), responses, pairs_by_score(scores), best, scores)

    def _map_pair(self, row: dict) -> Row | None:
        chosen, rejected = (parse_serialized_turns(_response(row, name), name) for name in (self.chosen, self.rejected))
        if isinstance(chosen, list) or isinstance(rejected, list):
            for name, value in ((self.chosen, chosen), (self.rejected, rejected)):
                if not isinstance(value, list):
                    raise RowError(f"field {name!r} is {type_name(value)}, expected a conversation as in the other field.")
            return self._map_conversations(row, chosen, rejected)
        for name, value in ((self.chosen, chosen), (self.rejected, rejected)):
            _check_text(value, name)
        if self._has_prompt_field(row):
            return Row(self._prompt(row), [chosen, rejected], [(0, 1)], 0)
        if self.implicit_prompt:
            prompt = _shared_beginning(chosen, rejected)
        else:
            prompt = _dialogue_prompt(chosen, self.chosen)
            if not rejected.startswith(prompt):
                return None
        responses = [chosen[len(prompt) :], rejected[len(prompt) :]]
        for name, response in zip((self.chosen, self.rejected), responses, strict=True):
            if not response.strip():
                raise RowError(f"the response in field {name!r} is empty.")
        return Row(prompt, responses, [(0, 1)], 0)

    def _has_prompt_field(self, row: dict) -> bool:
        """Whether the prompt is in a separate field: one that is configured, or that rows have anyway."""
        return self.prompt in row or self.prompt != FieldMap.prompt or self.system is not None

    def _has_implicit_prompt(self, row: dict) -> bool:
        """Whether this row's prompt is found by implicit_prompt."""
        if self.responses is not None or self.response is not None or self._has_prompt_field(row):
            return False
        return isinstance(parse_serialized_turns(field_value(row, self.chosen), self.chosen), str)

    def _map_conversations(self, row: dict, chosen: list, rejected: list) -> Row | None:
        (*before, response), (*other_before, other) = (
            parse_turns(value, name) for value, name in ((chosen, self.chosen), (rejected, self.rejected))
        )
        if before != other_before:
            return None
        for name, turn in ((self.chosen, response), (self.rejected, other)):
            if turn.role != "assistant":
                raise RowError(
                    f"the last turn of {name} is the {turn.role}'s. Expected the assistant's, which is the response."
                )
        prompt = self._prompt_before(row, tuple(before)) if before else self._prompt(row, as_turns=True)
        return Row(prompt, [response.content, other.content], [(0, 1)], 0)

    def _prompt_before(self, row: dict, shared: tuple[Turn, ...]) -> tuple[Turn, ...]:
        """The turns of the prompt field, if any, followed by those that chosen and rejected share. Raises RowError."""
        try:
            value = parse_serialized_turns(field_value(row, self.prompt), self.prompt)
        except RowError:
            if self.prompt in row:
                raise
            value = None
        if not value or self.system == self.prompt:
            return self._with_system(row, shared)
        value = [value] if turn_keys(value) else value
        if isinstance(value, list):
            return self._with_system(row, join_turns(parse_turns(value, self.prompt), shared))
        if not isinstance(value, str):
            _check_text(value, self.prompt)
        if not occurs_in(value, shared):
            raise RowError(
                f"field {self.prompt!r} is a text that does not occur in the turns which {self.chosen} and {self.rejected} "
                f"share, and would be lost. If it is a system prompt, set system: {self.prompt}; if it is not part of the "
                "prompt, rename the column."
            )
        return self._with_system(row, shared)

    def _prompt(self, row: dict, as_turns: bool = False) -> Prompt:
        """The prompt in a separate field: a text, or a conversation if it is a list or gets a system turn."""
        value = parse_serialized_turns(_prompt_value(row, self.prompt), self.prompt)
        if isinstance(value, list):
            return self._with_system(row, parse_turns(value, self.prompt))
        _check_text(value, self.prompt)
        text = f"{value}\n{more}" if (more := self._input(row)) else value
        if self.system is None and not as_turns:
            return text
        return self._with_system(row, parse_dialogue(text) or (Turn("user", text),))

    def _input(self, row: dict) -> str | None:
        """The second part of a prompt in Alpaca's schema, unless its field is mapped to something else."""
        if self.prompt != INSTRUCTION or INPUT not in row or INPUT in (self.system, self.response, self.chosen, self.rejected):
            return None
        value = row[INPUT]
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        _check_text(value, INPUT)
        return value

    def _with_system(self, row: dict, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        if problem := prompt_error(turns):
            raise RowError(f"the prompt {problem}.")
        system = field_value(row, self.system) if self.system else None
        if not system or turns[0].role == "system":
            return turns
        if problem := text_error(system):
            raise RowError(f"field {self.system!r} {problem}.")
        return (Turn("system", system), *turns)


# ---- values of a row ----------------------------------------------------------------------------------------------------


def _score(row: dict, name: str) -> float:
    value = field_value(row, name)
    if isinstance(value, bool):
        raise RowError(f"field {name!r} is {value}, expected a number such as 1 or 0.")
    return as_number(value, name)


def _check_text(value, name: str) -> None:
    """Raise RowError where a field's value is not a non-empty text, suggesting a map that would read it."""
    if (problem := text_error(value)) is None:
        return
    keys = turn_keys(value)
    remedy = f" {name}.{keys[1]} reads the text of such a turn." if keys else ""
    raise RowError(f"field {name!r} {problem}.{remedy}")


def _response_text(row: dict, name: str) -> str:
    value = parse_serialized_turns(field_value(row, name), name)
    _check_text(value, name)
    return value


# Common field names of responses and prompts, for messages.
RESPONSE_NAMES = ("completion", "response", "output", "answer")
PROMPT_NAMES = ("instruction", "question", "query", "input", "messages", "conversations", "conversation")
INSTRUCTION, INPUT = "instruction", "input"


def _response(row: dict, name: str):
    """The chosen or rejected field of a row. Without it, the error suggests a map that would read the row."""
    try:
        return field_value(row, name)
    except RowError as error:
        found = next((other for other in RESPONSE_NAMES if other in row), None)
        if name not in (FieldMap.chosen, FieldMap.rejected) or found is None:
            raise
        prompt = next((other for other in PROMPT_NAMES if other in row), None) if FieldMap.prompt not in row else None
        keys = f"prompt: {prompt}, " if prompt else ""
        raise RowError(
            f"{error} Rows with one response are read by a field map, {{path: ..., {keys}response: {found}}}, for loss=sft; "
            "a number beside it, mapped to score, makes pairs; a label, mapped to label, makes examples for losses such as kto."
        ) from None


def _prompt_value(row: dict, name: str):
    """The prompt field. Without the usual name, the error suggests another field of the row."""
    try:
        return field_value(row, name)
    except RowError as error:
        found = next((other for other in PROMPT_NAMES if other in row), None)
        if name != FieldMap.prompt or found is None:
            raise
        raise RowError(f"{error} Name the field of the prompt, for example prompt: {found}.") from None


def _dialogue_prompt(dialogue: str, name: str) -> str:
    try:
        return split_dialogue(dialogue)[0]
    except ValueError:
        raise RowError(
            f"{name} has no '\\n\\nAssistant:' turn. Expected a dialogue of '\\n\\nHuman:' and '\\n\\nAssistant:' turns, or a "
            "field prompt beside chosen and rejected (implicit_prompt=true uses their common beginning)."
        ) from None


def _shared_beginning(chosen: str, rejected: str) -> str:
    """The common beginning of both texts, up to its last whitespace, so that no word is cut. Raises RowError without any.

    A space before the responses is theirs: tokenizers merge it with the next word.
    """
    pairs = enumerate(zip(chosen, rejected, strict=False))
    length = next((k for k, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    shared = chosen[:length]
    end = max((k + 1 for k, character in enumerate(shared) if character.isspace()), default=0)
    if not shared[:end].strip():
        raise RowError("chosen and rejected start with different words, so they share no prompt.")
    return shared[:end].removesuffix(" ")
