"""Extracting code from a model's reply. Models are asked for one fenced block, but reply in many formats.

Each way of marking code yields candidates, and the parser decides: the result is the last candidate that parses and defines
the requested function, or else the closest candidate, with its fault.
"""

import ast
import re
import textwrap
from collections.abc import Iterator
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
    """Code, and the reply's fault as the end of a sentence; without a fault, the code parses and defines the function."""

    code: str | None
    fault: str | None


def extract_code(text: str, function_name: str = "") -> Extracted:
    """The code in a reply that should define `function_name`; any code if that is empty."""
    answer = _without_thoughts(text[:LONGEST_REPLY].replace("\r\n", "\n"))
    if not answer.strip():
        return Extracted(None, "is empty" if not text.strip() else "ends before its answer")
    nearest = Extracted(None, "contains no code")
    for candidates in (_fenced, _tagged, _between_fences, _bare):
        for code in reversed([block for block in map(_tidy, candidates(answer)) if block]):
            fault = fault_of_code(code, function_name)
            if fault is None:
                return Extracted(code, None)
            if nearest.code is None or (not fault.startswith("does not parse") and nearest.fault.startswith("does not parse")):
                nearest = Extracted(code, fault)
    return nearest


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
    names = {plain_name(node.name) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    if function_name and plain_name(function_name) not in names:
        return f"does not define the function {function_name}"
    return None


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
    """Unmarked code: from the first line that looks like code to the last line with which it still parses."""
    begin = BEGINS_LIKE_CODE.search(text)
    if not begin:
        return
    lines = text[begin.start() :].split("\n")
    # Only short prose is expected after the code.
    for end in range(len(lines), max(0, len(lines) - 60), -1):
        code = "\n".join(lines[:end])
        if fault_of_code(code, "") is None:
            yield code
            return
