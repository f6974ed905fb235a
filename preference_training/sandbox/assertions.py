"""Unit tests as rows have them: objects with `args` and `expected`, or Python's assert statements, which become such objects.

An assertion is never executed. Executed beside the code under test it would show what is expected, and an object that claims to
equal everything would pass it.
"""

import ast
from collections.abc import Sequence

from preference_training.sandbox.sandbox import COMPARISONS

SHAPES = "assert f(1, [2]) == 3, assert f(1), assert not f(1), or assert abs(f(1) - 0.5) < 1e-6"


def read_tests(tests: Sequence[str | dict], function_name: str = "") -> tuple[str, tuple[dict, ...]]:
    """(name of the function under test, tests with `args`, `expected` and optionally `compare`).

    function_name: the name, where the row says it; assertions must call it. Raises ValueError with the fault of the first
    faulty test, counted from 1.
    """
    found = []
    for number, test in enumerate(tests, start=1):
        name, plain = ("", test) if isinstance(test, dict) else _of_assertion(test, number)
        _check(plain, number)
        if name and function_name and name != function_name:
            raise ValueError(f"test {number} calls {name}, expected {function_name}")
        function_name = function_name or name
        found.append({key: plain[key] for key in ("args", "expected", "compare") if key in plain})
    if found and not function_name:
        raise ValueError("it has tests but no function_name")
    return function_name, tuple(found)


def _check(test: dict, number: int) -> None:
    if not isinstance(test.get("args"), list) or "expected" not in test:
        raise ValueError(f"test {number} is not an object with args (a list) and expected")
    if test.get("compare", "equal") not in COMPARISONS:
        raise ValueError(f"test {number} has compare {test['compare']!r}, expected one of {', '.join(COMPARISONS)}")


def _of_assertion(text: str, number: int) -> tuple[str, dict]:
    try:
        [statement] = ast.parse(text.strip()).body
        condition = statement.test  # type: ignore[attr-defined]
        compare = "equal"
        match condition:
            case ast.Compare(left=ast.Call() as call, ops=[ast.Eq()], comparators=[value]):
                expected = ast.literal_eval(value)
            case ast.Compare(
                left=ast.Call(func=ast.Name(id="abs"), args=[ast.BinOp(left=ast.Call() as call, op=ast.Sub(), right=value)]),
                ops=[ast.Lt()],
            ):
                expected, compare = ast.literal_eval(value), "close"
            case ast.UnaryOp(op=ast.Not(), operand=ast.Call() as call):
                expected = False
            case ast.Call() as call:
                expected = True
            case _:
                raise ValueError
        args, expected = [_plain(ast.literal_eval(each)) for each in call.args], _plain(expected)
        if call.keywords or not isinstance(call.func, ast.Name):
            raise ValueError
    except (SyntaxError, ValueError, AttributeError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"test {number} is {str(text)[:60]!r}, expected an assertion such as {SHAPES}") from error
    test = {"args": args, "expected": expected}
    return call.func.id, test | ({"compare": compare} if compare != "equal" else {})


def _plain(value):
    """A literal as the JSON that stands for it in the sandbox: tuples are lists, and keys are texts."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set):
        return sorted(map(_plain, value), key=repr)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{value!r} has no JSON")
