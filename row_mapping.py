"""Rows of any schema become prompts and responses: a map says which field is what, so that no code is needed.

Understood are pairs (`chosen`, `rejected`), lists of responses with scores or ranks, one scored response a row, and prompts
with one response for SFT; texts or conversations (`list{role, content}`); prompts in a field of their own, or in the part that
chosen and rejected have in common.
"""

import heapq
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from prompt_templates import parse_dialogue, split_dialogue
from records import OTHER_PROMPT, DataReport, Prompt, Row, Turn, fault_of_prompt, fault_of_text, kind_of, pairs_by_score
from utils import UserError

# (row number, row), as files and hub sets give them.
NumberedRows = Iterable[tuple[int, dict]]


class RowError(Exception):
    """What is wrong with a row, as a sentence; whoever knows file and row number makes a message of it."""


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

    def rows_of(self, rows: NumberedRows, place: str, report: DataReport) -> Iterator[Row]:
        """The usable rows, filtered; `place` names the file or data set in messages. Others go to the report."""
        for number, row in self._chosen_rows(rows, place, report):
            try:
                mapped = self.row_of(row)
            except RowError as fault:
                report.bad_row(UserError(f"datasets: {place}, row {number}: {fault}"))
                continue
            if mapped is None:
                report.leave_out(OTHER_PROMPT)
            else:
                yield mapped

    def row_of(self, row: dict) -> Row | None:
        """What one row says; None where chosen and rejected answer different prompts. Raises RowError."""
        if self.responses is not None:
            return self._row_of_lists(row)
        if self.response is not None:
            response = _text(row, self.response)
            scores = None if self.score is None else [_number(row, self.score)]
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
            if fault := fault_of_text(response):
                raise RowError(f"field {self.responses!r}: response {index} {fault}.")
        sign = 1 if self.scores else -1
        scores = [sign * _as_number(number, self.scores or self.ranks) for number in numbers]
        if len(responses) == 0:
            raise RowError(f"field {self.responses!r} is an empty list.")
        best = max(range(len(scores)), key=scores.__getitem__)
        return Row(self._prompt_of(row), responses, pairs_by_score(scores), best)

    def _row_of_pair(self, row: dict) -> Row | None:
        chosen, rejected = (value_of(row, name) for name in (self.chosen, self.rejected))
        if isinstance(chosen, list) or isinstance(rejected, list):
            for name, value in ((self.chosen, chosen), (self.rejected, rejected)):
                if not isinstance(value, list):
                    raise RowError(f"field {name!r} is {kind_of(value)}, expected a conversation as in the other field.")
            return self._row_of_conversations(row, chosen, rejected)
        chosen, rejected = _text(row, self.chosen), _text(row, self.rejected)
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

    def _row_of_conversations(self, row: dict, chosen: list, rejected: list) -> Row | None:
        (*before, answer), (*other_before, other) = (
            _turns(value, name) for value, name in ((chosen, self.chosen), (rejected, self.rejected))
        )
        if before != other_before:
            return None
        for name, turn in ((self.chosen, answer), (self.rejected, other)):
            if turn.role != "assistant":
                raise RowError(f"the last turn of {name} is the {turn.role}'s. Expected the assistant's, which is the answer.")
        prompt = self._with_system(row, tuple(before)) if before else self._prompt_of(row, as_turns=True)
        return Row(prompt, [answer.content, other.content], [(0, 1)], 0)

    def _prompt_of(self, row: dict, as_turns: bool = False) -> Prompt:
        """The prompt in its own field: a text, or a conversation where it is a list or a system's turn belongs to it."""
        value = value_of(row, self.prompt)
        if isinstance(value, list):
            return self._with_system(row, _turns(value, self.prompt))
        text = _text(row, self.prompt)
        if self.system is None and not as_turns:
            return text
        return self._with_system(row, parse_dialogue(text) or (Turn("user", text),))

    def _with_system(self, row: dict, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        if fault := fault_of_prompt(turns):
            raise RowError(f"the prompt {fault}.")
        system = value_of(row, self.system) if self.system else None
        if not system or turns[0].role == "system":
            return turns
        if fault := fault_of_text(system):
            raise RowError(f"field {self.system!r} {fault}.")
        return (Turn("system", system), *turns)

    # ---- filters ------------------------------------------------------------------------------------------------------------

    def _chosen_rows(self, rows: NumberedRows, place: str, report: DataReport) -> NumberedRows:
        """Rows that fulfil `where`, and of these the `top_k`, in their order; counted in the report."""
        rows = self._filtered(rows, place, report)
        if self.top_k is None:
            return rows
        return self._largest(rows, place, report)

    def _filtered(self, rows: NumberedRows, place: str, report: DataReport) -> NumberedRows:
        conditions = {column: condition(value, column) for column, value in self.where.items()}
        for number, row in rows:
            report.rows_read += 1
            try:
                failed = next((column for column, test in conditions.items() if not test(value_of(row, column))), None)
            except RowError as fault:
                report.bad_row(UserError(f"datasets: {place}, row {number}: where: {fault}"))
                continue
            if failed is None:
                yield number, row
            else:
                report.leave_out(f"{failed} is not {self.where[failed]}")

    def _largest(self, rows: NumberedRows, place: str, report: DataReport) -> NumberedRows:
        column, k = self.top_k["column"], self.top_k["k"]
        heap: list[tuple[float, int, dict]] = []
        for number, row in rows:
            try:
                # Of equal values the earlier row stays.
                entry = (_number(row, column), -number, row)
            except RowError as fault:
                report.bad_row(UserError(f"datasets: {place}, row {number}: top_k: {fault}"))
                continue
            if len(heap) < k:
                heapq.heappush(heap, entry)
            else:
                heapq.heappushpop(heap, entry)
                report.leave_out(f"not among the {k} largest of {column}")
        yield from sorted((-negative, row) for _, negative, row in heap)


# ---- values of a row ----------------------------------------------------------------------------------------------------


def value_of(row: dict, name: str):
    """The value of a field; dots lead into nested values, and into each item of a list. Raises RowError."""
    if name in row:
        return row[name]
    value = row
    for part in name.split("."):
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, dict) and part in item for item in items):
            raise RowError(f"no field {name!r}, the row has {', '.join(map(str, row)) or 'no fields'}.")
        value = [item[part] for item in items] if isinstance(value, list) else value[part]
    return value


def _text(row: dict, name: str) -> str:
    value = value_of(row, name)
    if fault := fault_of_text(value):
        raise RowError(f"field {name!r} {fault}.")
    return value


def _number(row: dict, name: str) -> float:
    return _as_number(value_of(row, name), name)


def _as_number(value, name: str) -> float:
    try:
        # CSV has texts for numbers.
        number = float(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or number != number:
        raise RowError(f"field {name!r} is {value!r}, expected a number.")
    return number


ROLE_NAMES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
}  # fmt: skip


def _turns(value: list, name: str) -> tuple[Turn, ...]:
    """The turns of a conversation, as {role, content} or {from, value}. Raises RowError."""
    turns = []
    for number, item in enumerate(value, start=1):
        keys = ("role", "content") if isinstance(item, dict) and "role" in item else ("from", "value")
        if not isinstance(item, dict) or not all(key in item for key in keys):
            raise RowError(f"field {name!r}: turn {number} is no {{role, content}}.")
        role, content = (item[key] for key in keys)
        if not isinstance(role, str) or role not in ROLE_NAMES:
            raise RowError(f"field {name!r}: turn {number} has the role {role!r}, expected one of {', '.join(ROLE_NAMES)}.")
        if fault := fault_of_text(content):
            raise RowError(f"field {name!r}: turn {number} {fault}.")
        turns.append(Turn(ROLE_NAMES[role], content))
    if not turns:
        raise RowError(f"field {name!r} is a conversation without turns.")
    return tuple(turns)


def _dialogue_prompt(dialogue: str, name: str) -> str:
    try:
        return split_dialogue(dialogue)[0]
    except ValueError:
        raise RowError(
            f"{name} has no '\\n\\nAssistant:' turn. Expected a dialogue of '\\n\\nHuman:' and '\\n\\nAssistant:' turns, or a "
            "field prompt beside chosen and rejected (implicit_prompt=true takes what both begin with)."
        ) from None


def _shared_beginning(chosen: str, rejected: str) -> str:
    """What both texts begin with, up to its last white space, so that no word is cut. Raises RowError where there is none."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    length = next((k for k, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    shared = chosen[:length]
    end = max((k + 1 for k, character in enumerate(shared) if character.isspace()), default=0)
    if not shared[:end].strip():
        raise RowError("chosen and rejected begin with different words, so there is no prompt that they share.")
    return shared[:end]


OPERATORS = {
    ">=": operator.ge, "<=": operator.le, "!=": operator.ne, "==": operator.eq, ">": operator.gt, "<": operator.lt,
}  # fmt: skip


def condition(wanted, column: str = "value"):
    """A test of a column's values: equality, membership of a list, or a comparison with a number such as ">= 0.5".

    Raises ValueError for a comparison with something that is no number.
    """
    if isinstance(wanted, list):
        texts = {_comparable(value) for value in wanted}
        return lambda value: _comparable(value) in texts
    sign = next((sign for sign in OPERATORS if isinstance(wanted, str) and wanted.startswith(sign)), None)
    if sign is None:
        return lambda value: _comparable(value) == _comparable(wanted)
    compare, bound_text = OPERATORS[sign], wanted.removeprefix(sign).strip()
    if sign in ("!=", "=="):
        return lambda value: compare(_comparable(value), bound_text)
    bound = float(bound_text)
    return lambda value: compare(_as_number(value, column), bound)


def _comparable(value) -> str:
    """A value as text; 1.0 is 1, for a column with blanks holds whole numbers as floats."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
