"""The process in the sandbox: calls of a model-written function.

Reads {code, name, calls, limits} from stdin, as `marshal` writes it, where `calls` has the arguments of each call, and writes a
line of JSON each to stdout: {"value": ...} or {"error": ..., "line": ...}. It knows the arguments but not the expected values,
so code cannot fake a result without solving the problem. Each call executes the code anew. Only the standard library is
available. The isolation does not depend on this file: the kernel enforces it.

It imports little, since a program takes no longer than its imports: without `json` and `traceback` half as long.
"""

import marshal
import os
import resource
import sys
from _json import encode_basestring_ascii


def main():
    """Run the calls, under limits that cannot be raised again."""
    work = marshal.loads(sys.stdin.buffer.read())
    # Redirect the code's own output, so that it does not mix with the answers.
    answer_to = os.dup(1)
    os.dup2(2, 1)
    for name, value in work["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    for args in work["calls"]:
        data = answer(work["code"], work["name"], args) + b"\n"
        while data:
            data = data[os.write(answer_to, data) :]
    # Skip the interpreter's shutdown, so that exit handlers of the code do not run.
    sys.stdout.flush()
    os._exit(0)


def answer(code, name, args):
    """The result of one call as JSON."""
    try:
        found = {"value": plain(call(code, name, args))}
    except MemoryError:
        found = {"error": "MemoryError: memory limit exceeded"}
    except BaseException as error:
        found = fault(error)
    try:
        return "".join(as_json(found)).encode()
    except (RecursionError, MemoryError, ValueError) as error:
        return "".join(as_json(fault(error))).encode()


def call(code, name, args):
    """Execute the code, and call its function."""
    scope = {"__name__": "solution"}
    exec(compile(code, "solution.py", "exec"), scope)
    return find(scope, name)(*args)


def find(scope, name):
    """The function with a name: of the module, or a method of an instance of one of its classes."""
    wanted = name.replace("_", "").lower()
    classes = [value for value in scope.values() if isinstance(value, type) and value.__module__ == "solution"]
    for named in (lambda key: key == name, lambda key: key.replace("_", "").lower() == wanted):
        for key, value in scope.items():
            if named(key) and callable(value):
                return value
        for owner in classes:
            for key in vars(owner):
                if named(key):
                    return getattr(owner(), key)
    raise NameError(f"no function named {name}")


def plain(value):
    """A value as plain JSON. Raises TypeError for one that cannot be compared."""
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=repr)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"it returned a {type(value).__name__}, which cannot be compared")


def as_json(value):
    """The parts of plain JSON as text."""
    if isinstance(value, str):
        yield encode_basestring_ascii(value)
    elif value is None or isinstance(value, bool):
        yield {None: "null", True: "true", False: "false"}[value]
    elif isinstance(value, int):
        yield int.__repr__(value)
    elif isinstance(value, float):
        # As the module json writes what JSON does not have.
        yield "NaN" if value != value else float.__repr__(value).replace("inf", "Infinity")
    elif isinstance(value, list):
        yield "["
        for number, item in enumerate(value):
            yield "," if number else ""
            yield from as_json(item)
        yield "]"
    else:
        yield "{"
        for number, (key, item) in enumerate(value.items()):
            yield ("," if number else "") + encode_basestring_ascii(key) + ":"
            yield from as_json(item)
        yield "}"


def fault(error):
    """An error as the answer, with the last line of the solution in its traceback."""
    try:
        message = f"{type(error).__name__}: {error}"[:300]
    except BaseException:
        message = type(error).__name__[:300]
    line, frame = None, error.__traceback__
    while frame is not None:
        line = frame.tb_lineno if frame.tb_frame.f_code.co_filename == "solution.py" else line
        frame = frame.tb_next
    return {"error": message, "line": getattr(error, "lineno", None) if line is None else line}


main()
