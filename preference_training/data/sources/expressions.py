"""Conditions on the columns of a row, as texts such as `chosen_score - rejected_score >= 2 and source in ["a", "b"]`.

Python's parser reads them, and nothing is evaluated but what is listed here: comparisons, + - * /, and, or, not, in, columns,
numbers, texts, true, false and null.
"""

import ast
import operator
from collections.abc import Callable
from typing import NamedTuple

from preference_training.data.rows.conversations import RowError
from preference_training.data.rows.values import CONSTANTS, as_number, equal, field_value

Value = Callable[[dict], object]
ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
ORDERINGS = {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge}
EXPECTED = "comparisons of columns, numbers and texts, with + - * / and or not in: chosen_score - rejected_score >= 2"


class Expression(NamedTuple):
    """A parsed condition. columns: the fields that it reads. test: whether a row fulfills it; raises RowError."""

    text: str
    columns: tuple[str, ...]
    test: Callable[[dict], bool]


def parse_expression(text: str) -> Expression:
    """Parse a condition. Raises ValueError, with the reason, for anything else."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{error.msg if isinstance(error, SyntaxError) else error}") from error
    columns: dict[str, None] = {}
    try:
        value = _compiled(tree, columns)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not columns:
        raise ValueError("no column is compared")
    return Expression(text, tuple(columns), lambda row: _truth(value(row)))


def _compiled(node: ast.expr, columns: dict[str, None]) -> Value:
    """The function from a row to the value of a part; the columns that it reads are added."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as constant):
            return lambda _row: constant
        case ast.Name(id=name) if name.lower() in CONSTANTS:
            constant = CONSTANTS[name.lower()]
            return lambda _row: constant
        case ast.Name() | ast.Attribute():
            name = _column(node)
            columns[name] = None
            return lambda row: field_value(row, name)
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            items = [_compiled(part, columns) for part in parts]
            return lambda row: [item(row) for item in items]
        case ast.BoolOp(op=op, values=parts):
            tests, decisive = [_compiled(part, columns) for part in parts], isinstance(op, ast.Or)
            return lambda row: next((decisive for test in tests if _truth(test(row)) == decisive), not decisive)
        case ast.UnaryOp(op=ast.Not(), operand=part):
            negated = _compiled(part, columns)
            return lambda row: not _truth(negated(row))
        case ast.UnaryOp(op=ast.USub(), operand=part):
            opposite, what = _compiled(part, columns), ast.unparse(part)
            return lambda row: -as_number(opposite(row), what)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            return _arithmetic(ARITHMETIC[type(op)], left, right, columns)
        case ast.Compare():
            return _comparisons(node, columns)
    raise ValueError(f"{ast.unparse(node)!r} is no comparison, calculation, column, number or text")


def _column(node: ast.expr) -> str:
    """The name of a column, with dots for nested values."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=outer, attr=name):
            return f"{_column(outer)}.{name}"
    raise ValueError(f"{ast.unparse(node)!r} is no column")


def _arithmetic(compute: Callable, left: ast.expr, right: ast.expr, columns: dict[str, None]) -> Value:
    parts = [(_compiled(part, columns), ast.unparse(part)) for part in (left, right)]

    def value(row: dict) -> float:
        a, b = (as_number(part(row), name) for part, name in parts)
        try:
            return compute(a, b)
        except ZeroDivisionError:
            raise RowError(f"{parts[1][1]} is 0, and is divided by.") from None

    return value


def _comparisons(node: ast.Compare, columns: dict[str, None]) -> Value:
    """One comparison, or a chain such as 1 <= score < 5."""
    operands = [node.left, *node.comparators]
    parts = [(_compiled(part, columns), ast.unparse(part)) for part in operands]
    tests = [_comparison(op) for op in node.ops]

    def value(row: dict) -> bool:
        values = [(part(row), name) for part, name in parts]
        return all(test(a, b) for test, a, b in zip(tests, values, values[1:], strict=False))

    return value


Operand = tuple[object, str]


def _comparison(op: ast.cmpop) -> Callable[[Operand, Operand], bool]:
    match op:
        case ast.Eq():
            return lambda a, b: equal(a[0], b[0])
        case ast.NotEq():
            return lambda a, b: not equal(a[0], b[0])
        case ast.In():
            return lambda a, b: _contains(b, a)
        case ast.NotIn():
            return lambda a, b: not _contains(b, a)
        case ast.Lt() | ast.LtE() | ast.Gt() | ast.GtE():
            compare = ORDERINGS[type(op)]
            return lambda a, b: _ordered(compare, a, b)
    raise ValueError("'is' compares nothing here; == does")


def _contains(many: Operand, one: Operand) -> bool:
    if isinstance(many[0], list | tuple):
        return any(equal(one[0], item) for item in many[0])
    if isinstance(many[0], str) and isinstance(one[0], str):
        return one[0] in many[0]
    raise RowError(f"{many[1]} is {many[0]!r}, expected a list, or a text that another may be part of.")


def _ordered(compare: Callable, a: Operand, b: Operand) -> bool:
    """Compare numbers, or texts that are none, such as dates."""
    if isinstance(a[0], str) and isinstance(b[0], str):
        try:
            return compare(float(a[0]), float(b[0]))
        except ValueError:
            return compare(a[0], b[0])
    return compare(as_number(*a), as_number(*b))


def _truth(value: object) -> bool:
    """A value as a condition: the text "false" is false."""
    return value.strip().lower() not in ("", "false", "0") if isinstance(value, str) else bool(value)
