"""Conversations in rows: lists of turns, texts that hold such lists, and the prompt that stands beside them."""

import ast
import json
import re

from preference_training.data.rows.records import Turn, text_error
from preference_training.data.rows.templates import parse_dialogue


class RowError(Exception):
    """What is wrong with a row, as a sentence; the caller adds file and row number."""


ROLE_NAMES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
}  # fmt: skip
# Roles that mark a value as a turn, though it cannot be read.
OTHER_ROLES = ("bot", "developer", "function", "function_call", "ipython", "observation", "prompter", "tool")
TURN_KEYS = (("role", "content"), ("from", "value"))


def keys_of_turn(item) -> tuple[str, str] | None:
    """The names under which a turn has its role and its text; None for a value that is no turn."""
    if not isinstance(item, dict):
        return None
    keys = TURN_KEYS[0] if "role" in item else TURN_KEYS[1]
    return keys if all(key in item for key in keys) else None


def turns_of(value: list, name: str) -> tuple[Turn, ...]:
    """The turns of a conversation in the field `name`, as {role, content} or {from, value}. Raises RowError."""
    turns = []
    for number, item in enumerate(value, start=1):
        keys = keys_of_turn(item)
        if keys is None:
            raise RowError(f"field {name!r}: turn {number} is no {{role, content}}.")
        role, content = (item[key] for key in keys)
        if not isinstance(role, str) or role not in ROLE_NAMES:
            raise RowError(f"field {name!r}: turn {number} has the role {role!r}, expected one of {', '.join(ROLE_NAMES)}.")
        if fault := text_error(content):
            raise RowError(f"field {name!r}: turn {number} {fault}.")
        turns.append(Turn(ROLE_NAMES[role], content))
    if not turns:
        raise RowError(f"field {name!r} is a conversation without turns.")
    return tuple(turns)


# How a text begins that holds a conversation or a turn, as JSON or as Python prints it.
WRITTEN_TURNS = re.compile(r"""\s*(\[\s*)?\{\s*["'](role|content|from|value)["']\s*:""")


def read_written_turns(value, name: str):
    """The value; where it is a text that holds a conversation or a turn as JSON, what the text holds.

    Columns of CSV files and of tables hold conversations so. Raises RowError for one that cannot be read.
    """
    if not isinstance(value, str) or not (start := WRITTEN_TURNS.match(value)):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return found if _holds_turns(found) else value
    if start[1] and any(all(re.search(f"[\"']{key}[\"']\\s*:", value) for key in keys) for keys in TURN_KEYS):
        raise RowError(
            f"field {name!r} is a text that begins as a list of turns, and cannot be read as JSON. Expected a list, or a text "
            'as in [{"role": "user", "content": "..."}].'
        )
    return value


def _holds_turns(value) -> bool:
    items = value if isinstance(value, list) else [value]
    if not items or not all(keys_of_turn(item) for item in items):
        return False
    roles = [item[keys_of_turn(item)[0]] for item in items]
    return all(isinstance(role, str) and role.lower() in (*ROLE_NAMES, *OTHER_ROLES) for role in roles)


# ---- a prompt beside conversations --------------------------------------------------------------------------------------


def join_turns(prompt: tuple[Turn, ...], shared: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns of a prompt's field, then those with which both answers' conversations begin; what is in both stands once.

    Raises RowError where one does not go on from the other.
    """
    if _contains(shared, prompt):
        return shared
    if _contains(prompt[-len(shared) :], shared):
        return prompt
    if prompt[-1].role == shared[0].role or shared[0].role == "system":
        raise RowError(
            f"the prompt ends with the {prompt[-1].role}'s turn, and chosen and rejected begin with another one, the "
            f"{shared[0].role}'s. Expected conversations that go on from the prompt, or repeat it."
        )
    return prompt + shared


def _contains(turns: tuple[Turn, ...], part: tuple[Turn, ...]) -> bool:
    stripped, wanted = ([(turn.role, turn.content.strip()) for turn in some] for some in (turns, part))
    return any(stripped[at : at + len(wanted)] == wanted for at in range(len(stripped) - len(wanted) + 1))


def is_said_in(text: str, turns: tuple[Turn, ...]) -> bool:
    """Whether all that a text says is in these turns, white space aside."""
    found = parse_dialogue(text)
    if found and _contains(turns, found):
        return True
    return " ".join(text.split()) in " ".join(" ".join(turn.content for turn in turns).split())
