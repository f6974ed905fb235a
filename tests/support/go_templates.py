"""What Ollama does with a Modelfile, for tests: its reader, and the part of Go's text/template that our templates use.

After parser/parser.go and template/template.go of Ollama, and the documentation of Go's text/template.
"""

import json
import re
from dataclasses import dataclass

from preference_training.data.records.record import Turn


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """(instruction, value) in their order. A value ends with its line unless it is quoted; what cannot be printed is lost."""
    commands, at = [], 0
    while at < len(text):
        if text[at] in " \t\n":
            at += 1
        elif text[at] == "#":
            at = (text + "\n").index("\n", at) + 1
        else:
            name, at = re.compile(r"[A-Za-z]+").match(text, at)[0], re.compile(r"[A-Za-z]+[ \t]").match(text, at).end()
            if name.upper() == "PARAMETER":
                word = re.compile(r"[A-Za-z0-9_]+").match(text, at)
                name, at = f"PARAMETER {word[0]}", word.end() + 1
            end = next(
                k for k in range(at, len(text) + 1) if text[k : k + 1] in ("\n", "") and _unquoted(text[at:k]) is not None
            )
            kept = "".join(letter for letter in text[at:end] if letter.isprintable() or letter in "\n\t")
            commands.append((name.upper() if " " not in name else name, _unquoted(kept)))
            at = end
    return commands


def _unquoted(text: str) -> str | None:
    """The value in its quotes; None where they are still open."""
    text = text.strip()
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            return text[len(quotes) : -len(quotes)] if len(text) >= 2 * len(quotes) and text.endswith(quotes) else None
    return text


def collated(turns: list[Turn]) -> dict:
    """Ollama's data for a template: turns of one role that follow each other are one, and the system's texts stand apart."""
    messages: list[dict] = []
    for role, content, *_ in turns:
        if messages and messages[-1]["Role"] == role:
            messages[-1]["Content"] += f"\n\n{content}"
        else:
            messages.append({"Role": role, "Content": content})
    system = "\n\n".join(content for role, content, *_ in turns if role == "system")
    return {"System": system, "Messages": messages, "Response": ""}


# ---- text/template ----------------------------------------------------------------------------------------------------------

ACTION = re.compile(r'\{\{((?:"(?:[^"\\\n]|\\.)*"|[^"{}])*)\}\}')
WORD = re.compile(r'\s*(:=|[()]|"(?:[^"\\\n]|\\.)*"|\$\w+|\.\w+|\d+|\w+)')


@dataclass
class Branch:
    """An if, or a range, with what it writes; `otherwise` stands behind its else."""

    kind: str
    condition: list[str]
    nodes: list
    otherwise: list


def render(template: str, data: dict) -> str:
    """What a template writes for data."""
    pieces, at = [], 0
    for action in ACTION.finditer(template):
        pieces += [template[at : action.start()], WORD.findall(action[1])]
        at = action.end()
    pieces.append(template[at:])
    assert not any("{{" in piece for piece in pieces if isinstance(piece, str)), "an action that Go would not take either"
    nodes = _nodes(pieces)
    assert not pieces, "an end without its action"
    return _written(nodes, data, {})


def _nodes(pieces: list) -> list:
    """Nodes up to the else or end that closes them, which stays."""
    nodes = []
    while pieces and not (isinstance(pieces[0], list) and pieces[0][0] in ("else", "end")):
        branches = isinstance(pieces[0], list) and pieces[0][0] in ("if", "range")
        nodes.append(_branch(pieces) if branches else pieces.pop(0))
    return nodes


def _branch(pieces: list) -> Branch:
    kind, *condition = pieces.pop(0)
    nodes, otherwise = _nodes(pieces), []
    if pieces[0][0] == "else" and pieces[0][1:]:
        # An else with an if of its own shares its end.
        pieces[0] = pieces[0][1:]
        return Branch(kind, condition, nodes, [_branch(pieces)])
    if pieces[0][0] == "else":
        pieces.pop(0)
        otherwise = _nodes(pieces)
    assert pieces.pop(0) == ["end"]
    return Branch(kind, condition, nodes, otherwise)


def _written(nodes: list, dot, variables: dict) -> str:
    text = ""
    for node in nodes:
        if isinstance(node, str):
            text += node
        elif isinstance(node, Branch):
            value = _value([*node.condition], dot, variables)
            if node.kind == "range":
                text += "".join(_written(node.nodes, item, variables) for item in value)
            else:
                text += _written(node.nodes if value else node.otherwise, dot, variables)
        elif ":=" in node:
            variables[node[0]] = _value(node[2:], dot, variables)
        else:
            text += str(_value([*node], dot, variables))
    return text


def _value(words: list, dot, variables: dict):
    """The value of a pipeline: an operand, or a function of operands."""
    name = words[0]
    if name == "and":
        # Stops at the first empty one, as Go does.
        rest, value = words[1:], None
        while rest:
            value = _operand(rest, dot, variables)
            if not value:
                return value
        return value
    functions = {
        "eq": lambda a, b: a == b,
        "gt": lambda a, b: a > b,
        "not": lambda a: not a,
        "len": lambda a: len(a.encode()) if isinstance(a, str) else len(a),
        # Of bytes.
        "slice": lambda a, i, j: a.encode()[_within(i, a) : _within(j, a)].decode(errors="surrogateescape"),
    }
    if name not in functions:
        value = _operand(words, dot, variables)
        assert not words
        return value
    rest, values = words[1:], []
    while rest:
        values.append(_operand(rest, dot, variables))
    return functions[name](*values)


def _within(index: int, text: str) -> int:
    assert index <= len(text.encode()), "Go stops where an index is out of range"
    return index


def _operand(words: list, dot, variables: dict):
    word = words.pop(0)
    if word == "(":
        depth, inner = 1, []
        while True:
            word = words.pop(0)
            depth += {"(": 1, ")": -1}.get(word, 0)
            if depth == 0:
                return _value(inner, dot, variables)
            inner.append(word)
    if word.startswith('"'):
        return json.loads(re.sub(r"\\U([0-9a-f]{8})", lambda code: json.dumps(chr(int(code[1], 16)))[1:-1], word))
    if word.startswith("$"):
        return variables[word]
    return int(word) if word.isdigit() else dot[word.removeprefix(".")]
