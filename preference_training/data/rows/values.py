"""Values of a row's fields, and conditions on them."""

import operator
from collections.abc import Callable

from preference_training.data.rows.conversations import RowError


def field_value(row: dict, name: str):
    """The value of a field; a dotted name selects nested values, also of each item of a list. Raises RowError."""
    if name in row:
        return row[name]
    value = row
    for part in name.split("."):
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, dict) and part in item for item in items):
            raise RowError(f"no field {name!r}, the row has {', '.join(map(str, row)) or 'no fields'}.")
        value = [item[part] for item in items] if isinstance(value, list) else value[part]
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


LABELS = {"true": True, "1": True, "desirable": True, "false": False, "0": False, "undesirable": False}


def as_label(value, name: str) -> bool:
    """A value as a label: whether a response is desirable; `name` is its field's. Raises RowError."""
    label = LABELS.get(comparable(value).strip().lower())
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
        return lambda value: compare(comparable(value), bound_text)
    bound = float(bound_text)
    return lambda value: compare(as_number(value, column), bound)


def comparable(value) -> str:
    """A value as text; 1.0 is 1, since columns with missing values hold integers as floats."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
