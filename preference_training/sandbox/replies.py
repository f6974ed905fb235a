"""Extracting code from a model's reply. Models are asked for one fenced block, but reply in many formats.

Each way of marking code yields candidates, and the parser decides: the result is the last candidate that parses and defines
the requested function; or else the last one that defines a single function that can stand for it; or else the closest
candidate, with its fault.
"""

import ast
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Longer replies are truncated. Unit: characters.
LONGEST_REPLY = 200_000

# The fence of a block: at least three backticks or tildes, also in a list or a quotation.
FENCE = re.compile(r"^[ \t>]*(?:[-*+]|\d+[.)])?[ \t]*(`{3,}|~{3,})(.*)$")
PYTHON_TAGS = re.compile(r"\[PYTHON\](.*?)(?:\[/PYTHON\]|\Z)", re.DOTALL | re.IGNORECASE)
BETWEEN_FENCES = re.compile(r"```[ \t]*(?:python3?|py)?\b[ \t]*\n?(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
BEGINS_LIKE_CODE = re.compile(r"^(def |async def |class |import |from \S+ import |@)", re.MULTILINE)


@dataclass(frozen=True)
class Extracted:
    """Code, and the reply's fault as the end of a sentence; without a fault, the code parses and defines the function.

    function_name: the function that tests have to call, if the code gives it another name than was requested, or none was.
    """

    code: str | None
    fault: str | None
    function_name: str = ""


def extract_code(text: str, function_name: str = "", tests: Sequence[dict] = ()) -> Extracted:
    """The code in a reply that should define `function_name`; any code if that is empty and there are no tests.

    If there are tests, which call the function, another one that takes their arguments can stand for it.
    """
    answer = _without_thoughts(text[:LONGEST_REPLY].replace("\r\n", "\n"))
    if not answer.strip():
        return Extracted(None, "is empty" if not text.strip() else "ends before its answer")
    nearest = Extracted(None, "contains no code")
    standing_in = None
    for candidates in (_fenced, _tagged, _between_fences, _bare):
        for code in reversed([block for block in map(_tidy, candidates(answer)) if block]):
            fault = fault_of_code(code, function_name)
            if fault is None and (function_name or not tests):
                return Extracted(code, None)
            if tests and (other := only_function(code, tests)):
                standing_in = standing_in or Extracted(code, None, other)
                continue
            fault = fault or "does not define a single function that takes the arguments of the tests"
            if nearest.code is None or _is_nearer(fault, nearest.fault):
                nearest = Extracted(code, fault)
    return standing_in or nearest


def _is_nearer(fault: str, other: str) -> bool:
    return not fault.startswith("does not parse") and other.startswith("does not parse")


def fault_of_code(code: str, function_name: str) -> str | None:
    """The fault of code that should define a function, as the end of a sentence, or None."""
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        return f"does not parse: {error.msg}, line {error.lineno}"
    except (ValueError, RecursionError, MemoryError) as error:
        return f"does not parse: {error or type(error).__name__}"
    if not tree.body:
        return "does not parse: it contains only comments"
    if function_name and plain_name(function_name) not in {plain_name(name) for name in _names(tree)}:
        return f"does not define the function {function_name}"
    return None


def _names(tree: ast.Module) -> Iterator[str]:
    """The names of functions, and names that a lambda expression is given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def only_function(code: str, tests: Sequence[dict] = ()) -> str | None:
    """The one public function of code that takes the arguments of the tests, or None.

    It is a method of a class Solution, as in LeetCode's format, or a function of the module. None if there are several.
    """
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    counts = {len(test["args"]) for test in tests}
    solutions = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Solution"]
    for functions, is_method in (([n for c in solutions for n in c.body], True), (tree.body, False)):
        named = {node.name: node for node in functions if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")}
        fitting = [name for name, node in named.items() if all(_takes(node, count, is_method) for count in counts)]
        if len(fitting) == 1:
            return fitting[0]
    return None


def _takes(function: ast.FunctionDef, count: int, is_method: bool) -> bool:
    """Whether a function can be called with so many arguments."""
    is_static = any(isinstance(each, ast.Name) and each.id == "staticmethod" for each in function.decorator_list)
    taken, arguments = count + (is_method and not is_static), function.args
    names = len(arguments.posonlyargs) + len(arguments.args)
    needs_keywords = any(default is None for default in arguments.kw_defaults)
    return not needs_keywords and names - len(arguments.defaults) <= taken and (taken <= names or arguments.vararg is not None)


def plain_name(name: str) -> str:
    """A name in normalized spelling: two_sum, twoSum and TwoSum are the same."""
    return name.replace("_", "").lower()


def _without_thoughts(text: str) -> str:
    """The text after a model's reasoning, which ends with </think> and may lack the opening tag."""
    if "</think>" in text:
        return text.rpartition("</think>")[2]
    return "" if text.lstrip().startswith("<think>") else text


def _tidy(code: str) -> str:
    return textwrap.dedent(code).strip("\n").rstrip()


def _fenced(text: str) -> Iterator[str]:
    """Markdown code blocks; the last may be unclosed."""
    fence, lines = "", []
    for line in text.split("\n"):
        found = FENCE.match(line)
        if fence:
            if found and found[1][0] == fence[0] and len(found[1]) >= len(fence) and not found[2].strip():
                yield "\n".join(lines)
                fence = ""
            else:
                lines.append(line)
        elif found and not (found[1][0] == "`" and "`" in found[2]):
            fence, lines = found[1], []
    if fence:
        yield "\n".join(lines)


def _tagged(text: str) -> Iterator[str]:
    """Code in CodeLlama's [PYTHON] tags."""
    yield from PYTHON_TAGS.findall(text)


def _between_fences(text: str) -> Iterator[str]:
    """Code between fences that are not on lines of their own."""
    yield from BETWEEN_FENCES.findall(text)


def _bare(text: str) -> Iterator[str]:
    """Unmarked code: the whole text, or from the first line that looks like code to the last with which it still parses."""
    begin = BEGINS_LIKE_CODE.search(text)
    if not begin:
        return
    if fault_of_code(text, "") is None:
        yield text
        return
    lines = text[begin.start() :].split("\n")
    # Only short prose is expected after the code.
    for end in range(len(lines), max(0, len(lines) - 60), -1):
        code = "\n".join(lines[:end])
        if fault_of_code(code, "") is None:
            yield code
            return
