"""Conversations in rows: lists of turns, texts that contain such lists, and the prompt field beside them."""

import ast
import json
import re

from preference_training.data.rows.records import Turn, text_error
from preference_training.data.rows.templates import parse_dialogue


class RowError(Exception):
    """An error in a row, as a sentence; the caller adds file and row number."""


ROLE_NAMES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
}  # fmt: skip
# Roles that identify a turn, but are not supported.
OTHER_ROLES = ("bot", "developer", "function", "function_call", "ipython", "observation", "prompter", "tool")
TURN_KEYS = (("role", "content"), ("from", "value"))


def turn_keys(item) -> tuple[str, str] | None:
    """The keys of a turn's role and text; None for a value that is not a turn."""
    if not isinstance(item, dict):
        return None
    keys = TURN_KEYS[0] if "role" in item else TURN_KEYS[1]
    return keys if all(key in item for key in keys) else None


def parse_turns(value: list, name: str) -> tuple[Turn, ...]:
    """The turns of a conversation in the field `name`, as {role, content} or {from, value}. Raises RowError."""
    turns = []
    for number, item in enumerate(value, start=1):
        keys = turn_keys(item)
        if keys is None:
            raise RowError(f"field {name!r}: turn {number} is not {{role, content}}.")
        role, content = (item[key] for key in keys)
        if not isinstance(role, str) or role not in ROLE_NAMES:
            raise RowError(f"field {name!r}: turn {number} has the role {role!r}, expected one of {', '.join(ROLE_NAMES)}.")
        if problem := text_error(content):
            raise RowError(f"field {name!r}: turn {number} {problem}.")
        turns.append(Turn(ROLE_NAMES[role], content))
    if not turns:
        raise RowError(f"field {name!r} is a conversation without turns.")
    return tuple(turns)


# The beginning of a text that contains a conversation or a turn, as JSON or as Python prints it.
SERIALIZED_TURNS = re.compile(r"""\s*(\[\s*)?\{\s*["'](role|content|from|value)["']\s*:""")


def parse_serialized_turns(value, name: str):
    """The value, parsed if it is a text that contains a conversation or a turn, as columns of CSV files and tables do.

    Raises RowError for a text that cannot be parsed.
    """
    if not isinstance(value, str) or not (start := SERIALIZED_TURNS.match(value)):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return found if _are_turns(found) else value
    if start[1] and any(all(re.search(f"[\"']{key}[\"']\\s*:", value) for key in keys) for keys in TURN_KEYS):
        raise RowError(
            f"field {name!r} is a text that starts like a list of turns, but is not JSON. Expected a list, or a text such as "
            ' [{"role": "user", "content": "..."}].'
        )
    return value


def _are_turns(value) -> bool:
    items = value if isinstance(value, list) else [value]
    if not items or not all(turn_keys(item) for item in items):
        return False
    roles = [item[turn_keys(item)[0]] for item in items]
    return all(isinstance(role, str) and role.lower() in (*ROLE_NAMES, *OTHER_ROLES) for role in roles)


# ---- a prompt field beside conversations ----------------------------------------------------------------------------------


def join_turns(prompt: tuple[Turn, ...], shared: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns of the prompt field followed by those that chosen and rejected share, without repetition.

    Raises RowError where the second do not continue the first.
    """
    if _contains(shared, prompt):
        return shared
    if _contains(prompt[-len(shared) :], shared):
        return prompt
    if prompt[-1].role == shared[0].role or shared[0].role == "system":
        raise RowError(
            f"the prompt ends with the {prompt[-1].role}'s turn, and chosen and rejected start with the "
            f"{shared[0].role}'s. Expected conversations that continue the prompt, or repeat it."
        )
    return prompt + shared


def _contains(turns: tuple[Turn, ...], part: tuple[Turn, ...]) -> bool:
    stripped, searched = ([(turn.role, turn.content.strip()) for turn in some] for some in (turns, part))
    return any(stripped[at : at + len(searched)] == searched for at in range(len(stripped) - len(searched) + 1))


def occurs_in(text: str, turns: tuple[Turn, ...]) -> bool:
    """Whether a text occurs in these turns, ignoring whitespace."""
    found = parse_dialogue(text)
    if found and _contains(turns, found):
        return True
    return " ".join(text.split()) in " ".join(" ".join(turn.content for turn in turns).split())
