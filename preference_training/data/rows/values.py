"""Values of a row's fields, conditions on them, and verdicts on two answers."""

import json
import operator
from collections.abc import Callable, Iterable

from preference_training.data.rows.conversations import RowError
from preference_training.data.rows.records import text_error


def is_empty(value) -> bool:
    """Whether a value is empty, as in tables where a row lacks the column."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def check_text(value, name: str) -> None:
    """Raise RowError where a field's value is not a non-empty text."""
    if problem := text_error(value):
        raise RowError(f"field {name!r} {problem}.")


def parse_text_list(value):
    """The value, parsed if it is a text that contains a list, as in CSV files."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def unlisted(value):
    """The text of a list of one text; anything else as it is."""
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) else value


def field_value(row: dict, name: str):
    """The value of a field; a dotted name selects nested values, also of each item of a list. Raises RowError."""
    if name in row:
        return row[name]
    value = row
    for part in name.split("."):
        items = value if isinstance(value, list) else [value]
        # Of a list, single items may lack the part, such as a score.
        if not all(isinstance(item, dict) for item in items) or (items and not any(part in item for item in items)):
            raise RowError(f"no field {name!r}, the row has {', '.join(map(str, row)) or 'no fields'}.")
        value = [item.get(part) for item in items] if isinstance(value, list) else value[part]
    return value


def field_number(row: dict, name: str) -> float:
    """The number in a field. Raises RowError."""
    return as_number(field_value(row, name), name)


def as_number(value, name: str) -> float:
    """A value as a number; `name` is its field's. Raises RowError."""
    try:
        # CSV files have text for numbers.
        number = float(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or number != number:
        raise RowError(f"field {name!r} is {value!r}, expected a number.")
    return number


LABELS = dict.fromkeys(("true", "1", "desirable", "yes", "good", "positive", "chosen", "like"), True) | dict.fromkeys(
    ("false", "0", "-1", "undesirable", "no", "bad", "negative", "rejected", "dislike"), False
)


def label_word(value) -> str:
    """A label as it is written in LABELS."""
    return comparable(value).strip().lower().removesuffix(".0")


def as_label(value, name: str) -> bool:
    """A value as a label: whether a response is desirable; `name` is its field's. Raises RowError."""
    label = LABELS.get(label_word(value))
    if label is None:
        raise RowError(f"field {name!r} is {value!r}, expected true or false, 1 or 0, desirable or undesirable.")
    return label


OPERATORS = {
    ">=": operator.ge, "<=": operator.le, "!=": operator.ne, "==": operator.eq, ">": operator.gt, "<": operator.lt,
}  # fmt: skip


def condition(wanted, column: str = "value") -> Callable[[object], bool]:
    """A test of a column's values: equality, membership of a list, or a comparison with a number such as ">= 0.5".

    Raises ValueError for a comparison with something that is no number.
    """
    if isinstance(wanted, list):
        texts = {comparable(value) for value in wanted}
        return lambda value: comparable(value) in texts
    sign = next((sign for sign in OPERATORS if isinstance(wanted, str) and wanted.startswith(sign)), None)
    if sign is None:
        return lambda value: comparable(value) == comparable(wanted)
    compare, bound_text = OPERATORS[sign], wanted.removeprefix(sign).strip()
    if sign in ("!=", "=="):
        wanted_text = comparable(bound_text)
        return lambda value: compare(comparable(value), wanted_text)
    bound = float(bound_text)
    return lambda value: compare(as_number(value, column), bound)


def comparable(value) -> str:
    """A value as text; 1.0 is 1, since columns with missing values hold integers as floats, and "true" is true."""
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    return text.lower() if text.lower() in ("true", "false") else text


# ---- verdicts -------------------------------------------------------------------------------------------------------------

TIE = "the verdict is a tie"
NO_VERDICT = "there is no verdict"

TIES = {"tie", "ties", "tied", "draw", "both", "neither", "none", "equal", "same", "bothbad", "bothgood", "tiebothbad", "na"}


def _word(value) -> str:
    return "".join(character for character in comparable(value).lower() if character.isalnum())


def verdict_values(values: Iterable, answers: list[str]) -> list[list] | None:
    """The values that mean the first and the second answer; None where that is not evident.

    Evident are the names of the columns, their last letters or numbers, and 0 and 1, or 1 and 2, where both occur.
    """
    found = {_word(value) for value in values if not is_empty(value)}
    seen = found - TIES
    words = [_words_for(name, place) for place, name in enumerate(answers)]
    # A single number may count from 0 or from 1.
    is_evident = len(seen) > 1 or not any(word.isdigit() for word in seen)
    if found and is_evident and seen <= words[0] | words[1]:
        return [sorted(these, key=lambda word: (word not in seen, len(word), word)) for these in words]
    numbered = any(answer[-1:].isdigit() for answer in answers)
    for pair in (("0", "1"), ("1", "2")):
        if seen == set(pair) and not numbered:
            return [[int(number)] for number in pair]
    return None


def _words_for(answer: str, place: int) -> set[str]:
    suffix = _word(answer[-1:])
    stems = ("model", "response", "answer", "assistant", "output", "completion", "conversation", "option")
    return {suffix, _word(answer), ("first", "second")[place], ("left", "right")[place], *(stem + suffix for stem in stems)}


def better_answer(row: dict, better: str | dict, place_names: str) -> int | None:
    """The index of the better of two answers; None for a tie. Raises RowError where the verdict cannot be read."""
    if isinstance(better, str):
        raise RowError(
            f"field {better!r} is {field_value(row, better)!r}, and it is not evident which of {place_names} that means. Write "
            f"better: {{{better}: [VALUE, VALUE]}} with the values for the first and the second, such as [0, 1], "
            "[model_a, model_b] or ['< 0', '> 0']."
        )
    ((column, wanted),) = better.items()
    value = field_value(row, column)
    for index, values in enumerate(wanted):
        if _means(value, values, column):
            return index
    if is_empty(value) or isinstance(value, int | float) or _word(value) in TIES or _word(value).lstrip("0") == "":
        return None
    raise RowError(f"field {column!r} is {value!r}, expected a value for one of {place_names}, or a tie.")


def _means(value, wanted, column: str) -> bool:
    if isinstance(wanted, list):
        return _word(value) in {_word(one) for one in wanted}
    if isinstance(wanted, str) and not wanted.startswith(("<", ">", "=", "!")):
        return _word(value) == _word(wanted)
    return not is_empty(value) and condition(wanted, column)(value)
