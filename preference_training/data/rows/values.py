"""Values of a row's fields, conditions on them, and verdicts on two answers."""

import operator
from collections.abc import Callable, Iterable
from decimal import Decimal
from math import isnan
from numbers import Real

from preference_training.data.records.validation import shown, text_error
from preference_training.data.rows.conversations import RowError, is_missing_word, parse_literal


class UntypedRow(dict):
    """A row of a table without types, such as a CSV file: lists are written into its cells as texts.

    In rows of other sources a list is a list, and the text of one, such as structured output, is a text.
    """


def is_empty(value) -> bool:
    """Whether a value is empty, as in tables where a row lacks the column."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def is_missing(value) -> bool:
    """Whether a value is empty, or the number that tables have for none."""
    return is_empty(value) or (isinstance(value, float) and isnan(value))


def is_plain_text(value) -> bool:
    """Whether a value is a text that contains no list or object: most are, and need not be parsed."""
    return isinstance(value, str) and value.lstrip()[:1] not in ("", "[", "{")


def check_text(value, name: str) -> None:
    """Raise RowError where a field's value is not a non-empty text."""
    if problem := text_error(value):
        raise RowError(f"field {name!r} {problem}.")


def parse_text_list(value, starts: str = "["):
    """The value, parsed if it is a text that contains a list, as JSON or as Python prints it, as in CSV files.

    starts: "[{" parses objects too.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(tuple(starts)):
        return value
    found = parse_literal(value)
    return found if isinstance(found, list | dict) else value


def is_text_list(value) -> bool:
    """Whether a value is a list of texts, one at least."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def is_text_pair(value) -> bool:
    """Whether a value is a list of a question and its answer."""
    return is_text_list(value) and len(value) == 2


def unlisted(value):
    """The text of a list of one text; anything else as it is."""
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) else value


def field_value(row: dict, name: str):
    """The value of a field; a dotted name selects nested values, also of each item of a list. Raises RowError."""
    if name in row:
        return row[name]
    value = row
    for part in name.split("."):
        value = parse_text_list(value, "[{")
        items = value if isinstance(value, list) else [value]
        # Of a list, single items may lack the part, such as a score.
        if not all(isinstance(item, dict) for item in items) or (items and not any(part in item for item in items)):
            raise RowError(f"no field {name!r}, the row has {', '.join(map(str, row)) or 'no fields'}.")
        value = [item.get(part) for item in items] if isinstance(value, list) else value[part]
    return value


def has_field(row: dict, name: str) -> bool:
    """Whether a row has a field, which may be nested."""
    try:
        field_value(row, name)
    except RowError:
        return False
    return True


def listed_names(names: str | list) -> list:
    """One column or several, as a list."""
    return names if isinstance(names, list) else [names]


def shown_names(names: str | list) -> str:
    """One column or several, for messages."""
    return ", ".join(listed_names(names))


def values_in(row: dict, names: str | list):
    """The values of a list in one column, or of several columns."""
    return [field_value(row, name) for name in names] if isinstance(names, list) else parse_text_list(field_value(row, names))


def comparable_number(value):
    """A value as it is compared: true above false."""
    return int(value) if isinstance(value, bool) else value


def is_missing_number(number) -> bool:
    """Whether a number is missing, also as a text."""
    if isinstance(number, str):
        return is_missing_word(number)
    return number is None or (isinstance(number, float) and isnan(number))


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
        raise RowError(f"field {name!r} is {shown(value)}, expected a number.")
    return number


def is_finite_number(value) -> bool:
    """Whether a value is a finite number, also as a text."""
    try:
        return isinstance(value, Real | Decimal | str) and not isinstance(value, bool) and abs(float(value)) < float("inf")
    except ValueError:
        return False


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
        raise RowError(f"field {name!r} is {shown(value)}, expected one of {', '.join(LABELS)}.")
    return label


# Names of values in conditions, in lower case.
CONSTANTS = {"true": True, "false": False, "null": None}
OPERATORS = {
    ">=": operator.ge, "<=": operator.le, "!=": operator.ne, "==": operator.eq, ">": operator.gt, "<": operator.lt,
}  # fmt: skip


def condition(wanted, column: str = "value") -> Callable[[object], bool]:
    """A test of a column's values: equality, membership of a list, or a comparison with a number such as ">= 0.5".

    Raises ValueError for a comparison with something that is no number.
    """
    if isinstance(wanted, list):
        # Lists may be long: only those of the same form are compared.
        by_form: dict[object, list] = {}
        for one in wanted:
            by_form.setdefault(_form(one), []).append(one)
        return lambda value: any(equal(value, one) for one in by_form.get(_form(value), ()))
    sign = next((sign for sign in OPERATORS if isinstance(wanted, str) and wanted.startswith(sign)), None)
    if sign is None:
        return lambda value: equal(value, wanted)
    compare, bound_text = OPERATORS[sign], wanted.removeprefix(sign).strip()
    if sign in ("!=", "=="):
        constant, is_wanted = _constant(bound_text), sign == "=="
        return lambda value: equal(value, constant) == is_wanted
    bound = float(bound_text)
    return lambda value: compare(as_number(value, column), bound)


def equal(a: object, b: object) -> bool:
    """Whether two values are the same, be they numbers, true, false and null or, as in CSV files, their texts; 1.0 is 1.

    Two texts are the same only as they are written: "1.0" is not "1".
    """
    if isinstance(a, str) and isinstance(b, str):
        return comparable(a) == comparable(b)
    if any(one is None or isinstance(one, bool) for one in (a, b)):
        return _form(a) == _form(b)
    one, other = _number(a), _number(b)
    return comparable(a) == comparable(b) if one is None or other is None else one == other


def _form(value: object) -> object:
    """What equal values have in common: a number, or a text."""
    number = None if value is None or isinstance(value, bool) else _number(value)
    text = comparable(value).strip().lower()
    return number if number is not None else "none" if text == "null" else text


def _number(value: object) -> Decimal | None:
    """The number that a value is, or is the text of, exactly; None for others."""
    try:
        number = Decimal(str(value)) if isinstance(value, Real | Decimal | str) else None
    except ArithmeticError:
        return None
    return None if number is None or number.is_nan() else number


def _constant(text: str) -> object:
    """A value as conditions write it: a number, true, false or null, or else a text."""
    number = _number(text)
    return number if number is not None else (CONSTANTS | {"none": None}).get(text.lower(), text)


def comparable(value) -> str:
    """A value as text; 1.0 is 1, since columns with missing values hold integers as floats, and "true" is true."""
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    return text.lower() if text.lower() in ("true", "false") else text


# ---- verdicts -------------------------------------------------------------------------------------------------------------

TIE = "the verdict is a tie"
NO_VERDICT = "there is no verdict"

TIES = {
    "tie", "ties", "tied", "draw", "both", "neither", "none", "equal", "same", "bothbad", "bothgood", "tiebothbad", "na", "nan",
}  # fmt: skip
# Verdicts that are numbers halfway between two answers, or missing.
NEITHER = TIES | {"0", "0.5", ""}


def verdict_word(value) -> str:
    """A verdict as it is compared: numbers keep their sign, true is 1, other texts keep only their letters and digits."""
    text = comparable(value).strip().lower()
    text = {"true": "1", "false": "0"}.get(text, text)
    try:
        return comparable(float(text))
    except ValueError:
        return "".join(character for character in text if character.isalnum())


def is_tie(value) -> bool:
    """Whether a verdict that means neither answer says so."""
    return verdict_word(value) in NEITHER


def verdict_values(values: Iterable, answers: list[str]) -> list[list] | None:
    """The values that mean the first and the second answer; None where that is not evident.

    Evident are the names of the columns, their last letters or numbers, and 0 and 1, or 1 and 2, where both occur.
    """
    values = [value for value in values if not is_empty(value)]
    if any(comparable(value).strip().lower() in ("true", "false") for value in values):
        return None  # Either may mean the first.
    found = {verdict_word(value) for value in values}
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
    suffix = verdict_word(answer[-1:])
    stems = ("model", "response", "answer", "assistant", "output", "completion", "conversation", "option")
    return {
        suffix,
        verdict_word(answer),
        ("first", "second")[place],
        ("left", "right")[place],
        *(stem + suffix for stem in stems),
    }


def better_answer(row: dict, better: str | dict, place_names: str) -> int | None:
    """The index of the better of two answers; None for a tie. Raises RowError where the verdict cannot be read."""
    if isinstance(better, str):
        raise RowError(
            f"field {better!r} is {shown(field_value(row, better))}, and it is not evident which of {place_names} that means. "
            f"Write better: {{{better}: [VALUE, VALUE]}} with the values for the first and the second, such as [0, 1], "
            "[model_a, model_b] or ['< 0', '> 0']."
        )
    ((column, wanted),) = better.items()
    value = field_value(row, column)
    for index, values in enumerate(wanted):
        if _means(value, values, column):
            return index
    named = [_names_value(value, values, row) for values in wanted]
    if any(named):
        return None if all(named) else named.index(True)
    if is_empty(value) or is_tie(value):
        return None
    raise RowError(f"field {column!r} is {shown(value)}, expected a value for one of {place_names}, or a tie.")


def _names_value(value, wanted, row: dict) -> bool:
    """Whether what is wanted is the name of a column, such as model_a, that holds this value."""
    return isinstance(wanted, str) and not is_empty(value) and row.get(wanted) == value


def _means(value, wanted, column: str) -> bool:
    if isinstance(wanted, list):
        return verdict_word(value) in {verdict_word(one) for one in wanted}
    if not isinstance(wanted, str) or not wanted.startswith(("<", ">", "=", "!")):
        return verdict_word(value) == verdict_word(wanted)
    if is_empty(value) or verdict_word(value) in NEITHER - {"0", "0.5"}:
        return False
    return condition(wanted, column)(value)
