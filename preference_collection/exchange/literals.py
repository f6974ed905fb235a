"""Values in the texts of older tests, as JSON or as Python prints them. They are parsed, and never executed.

"[[2, 7], 9]"   "([2, 7], 9)"   "nums = [2, 7], target = 9"   "true"
"""

import ast
import json
from contextlib import suppress
from math import isfinite

from preference_training.data.records.validation import text_error

# Longer texts are no tests. Unit: characters.
LONGEST = 100_000
BRACKETS = {"(": ")", "[": "]", "{": "}"}
# What JSON calls otherwise than Python does.
JSON_NAMES = {"true": True, "false": False, "null": None}


def literal_in(value, strips: bool = False):
    """The value that a text contains, for JSON; other values than texts as they are. strips: without its outer brackets.

    Raises ValueError, with the fault as a sentence's end, for a text that contains none, and for values that JSON lacks.
    """
    if not isinstance(value, str):
        return plain_value(value)
    _check_present(value)
    values = _values(value.strip()[1:-1] if strips else value)
    # Several values without brackets are a tuple.
    return values[0] if len(values) == 1 else values


def arguments_in(value) -> list:
    """The arguments of a call: those in a list or in its text, which may lack its brackets; another value is the only one.

    Raises ValueError as `literal_in` does.
    """
    if isinstance(value, list | tuple):
        return plain_value(value)
    if not isinstance(value, str):
        return [plain_value(value)]
    _check_present(value)
    text = value.strip()
    return _values(text[1:-1] if enclosed(text) is not None else text)


def _check_present(text: str) -> None:
    if not text.strip():
        raise ValueError("a text is empty, expected a value")


def enclosed(value) -> int | None:
    """The number of values in the one pair of round or square brackets around a whole text; None without such a pair."""
    text = value.strip() if isinstance(value, str) else ""
    if text[:1] not in ("(", "[") or text[-1:] != BRACKETS[text[0]]:
        return None
    try:
        return len(_values(text[1:-1]))
    except ValueError:
        return None  # As in "[1], [2]", whose first bracket ends before the last.


def _values(text: str) -> list:
    """The values in a text, separated by commas, each perhaps with a name: those of `f(text)`."""
    if len(text) > LONGEST:
        raise ValueError(f"a value has {len(text)} characters, expected at most {LONGEST}")
    with suppress(ValueError, RecursionError):
        # First, since only JSON writes a character as two escapes.
        return [plain_value(value) for value in json.loads(f"[{text}]")]
    try:
        call = ast.parse(f"f({text.strip()}\n)", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != "f":
            raise ValueError
        given = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg)]
        if len(given) < len(call.args) + len(call.keywords):
            raise ValueError
        values = [ast.literal_eval(_Constants().visit(node)) for node in given]
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise ValueError(f"{text[:60]!r} is no value, as JSON or as Python prints it") from None
    return [plain_value(value) for value in values]


class _Constants(ast.NodeTransformer):
    """Replaces the constants of JSON."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """A constant for a name that is one in JSON."""
        return ast.copy_location(ast.Constant(JSON_NAMES[node.id]), node) if node.id in JSON_NAMES else node


def plain_value(value):
    """A value as JSON has it: lists for tuples. Raises ValueError for what JSON lacks."""
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("an object has a key that is no text")
        return {key: plain_value(inner) for key, inner in value.items()}
    if isinstance(value, str) and (problem := text_error(value)) and problem != "is empty":
        raise ValueError(f"a text {problem}")
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and isfinite(value)):
        return value
    raise ValueError(f"a value is {type(value).__name__}, which JSON lacks")
