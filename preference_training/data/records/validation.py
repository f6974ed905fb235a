"""Errors in the records of loaders, in their prompts, responses, turns and tools."""

import json
from math import inf, isfinite, isnan
from numbers import Integral, Real

from preference_training.data.records.record import Turn, message_of

REQUIRED_KEYS = frozenset(("responses", "pairs", "sft_target"))


def item_error(item) -> str | None:
    """The error in a (prompt, record) item of a loader, or None."""
    if not isinstance(item, tuple) or len(item) != 2 or not isinstance(item[1], dict):
        found = " and ".join(map(type_name, item)) if isinstance(item, tuple) else type_name(item)
        return f"found {found}, expected a prompt and a dict"
    prompt, record = item
    if missing := REQUIRED_KEYS - record.keys():
        return f"the record has no {', '.join(sorted(missing))}"
    for key in ("responses", "pairs"):
        if not isinstance(record[key], list | tuple):
            return f"{key} is {type_name(record[key])}, expected a list"
    if problem := prompt_error(prompt):
        return f"the prompt {problem}"
    if "tools" in record and (problem := tools_error(record["tools"])):
        return f"tools {problem}"
    responses, targets = record["responses"], record.get("sft_targets", ())
    if not isinstance(targets, list | tuple):
        return f"sft_targets is {type_name(targets)}, expected a list"
    learned = [text for text in (*targets, record["sft_target"]) if not any(text is known for known in responses)]
    if any(map(response_error, (*responses, *learned))):
        return _texts_error(record)
    if error := next((error for pair in record["pairs"] if (error := _pair_error(pair, len(responses)))), None):
        return error
    return _numbers_error(record) if len(record) > 3 else None


def _texts_error(record: dict) -> str | None:
    """The error in the first wrong text of a record."""
    for key, texts in (("response", record["responses"]), ("sft_targets", record.get("sft_targets", ()))):
        for index, text in enumerate(texts):
            if problem := response_error(text):
                return f"{key} {index} {problem}"
    return f"sft_target {response_error(record['sft_target'])}"


# The optional lists of a record: what each has a value for, what a value must be, and a test of it.
LISTS_OF_VALUES = {
    "scores": ("responses", "a number or None", lambda value: value is None or _is_number(value)),
    "labels": ("responses", "True, False or None", lambda value: value is None or isinstance(value, bool)),
    "weights": ("pairs", "a number of at least 0", lambda value: _is_number(value) and 0 <= value < inf),
    "margins": ("pairs", "a number or None", lambda value: value is None or (_is_number(value) and isfinite(value))),
}


def _is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and not isnan(value)


def _numbers_error(record: dict) -> str | None:
    """The error in the optional lists of a record, or None."""
    for key, (of, expected, is_valid) in LISTS_OF_VALUES.items():
        values = record.get(key)
        if values is None:
            continue
        if not isinstance(values, list | tuple):
            return f"{key} is {type_name(values)}, expected a list"
        if len(values) != len(record[of]):
            return f"{key} has {len(values)} values for {len(record[of])} {of}, expected one for each"
        if wrong := next((f"{key} {k} is {value!r}" for k, value in enumerate(values) if not is_valid(value)), None):
            return f"{wrong}, expected {expected}"
    return None


def _pair_error(pair, count: int) -> str | None:
    if type(pair) is tuple and len(pair) == 2 and type(pair[0]) is type(pair[1]) is int:
        i, j = pair
        if 0 <= i < count and 0 <= j < count and i != j:
            return None
    if not isinstance(pair, list | tuple) or not all(isinstance(n, Integral) and not isinstance(n, bool) for n in pair):
        return f"pair {pair!r} is not two whole numbers"
    if len(pair) != 2 or not all(0 <= index < count for index in pair) or pair[0] == pair[1]:
        return f"pair {tuple(pair)} does not name two of the {count} responses"
    return None


ROLES = ("system", "developer", "user", "assistant", "tool")


def prompt_error(prompt) -> str | None:
    """The error in a prompt, as the end of a sentence, or None."""
    if isinstance(prompt, tuple):
        return _turns_error(prompt)
    return None if isinstance(prompt, str) and not prompt else text_error(prompt)


def response_error(response) -> str | None:
    """The error in a response, as the end of a sentence, or None."""
    if not isinstance(response, tuple):
        return text_error(response)
    if problem := _turns_error(response):
        return problem
    for turn, place in ((response[0], "starts"), (response[-1], "ends")):
        if turn[0] != "assistant":
            return f"{place} with the {turn[0]}'s turn, expected the assistant's"
    return None


def _turns_error(turns: tuple) -> str | None:
    for number, turn in enumerate(turns, start=1):
        if _is_plain(turn):
            continue
        if not _is_turn(turn):
            return f"has a turn {number} that is not (role, content) with one of the roles {', '.join(ROLES)}"
        if problem := turn_error(Turn(*turn)):
            return f"has a turn {number} that {problem}"
    return None if turns else "is a conversation without turns"


def _is_plain(turn) -> bool:
    """Whether a turn has nothing but a role and a text, as most have."""
    if type(turn) is not Turn or not isinstance(turn.role, str) or turn.rest != "":
        return False
    return turn.role in ROLES and text_error(turn.content) is None


def _is_turn(turn) -> bool:
    if not isinstance(turn, tuple) or len(turn) not in (2, 3) or not isinstance(turn[0], str) or turn[0] not in ROLES:
        return False
    return len(turn) == 2 or turn[2] == "" or _parsed(turn[2], dict) is not None


def turn_error(turn: Turn) -> str | None:
    """The error in the texts of a turn, as the end of a sentence, or None.

    Calls of tools, and what tools return, may be without text, and so may system turns, which are none then.
    """
    may_be_empty = turn.role in ("system", "tool") or (turn.role == "assistant" and "tool_calls" in message_of(turn))
    content = turn.content
    is_blank = isinstance(content, str) and (content == "" or (turn.role == "tool" and content.isspace()))
    problem = None if is_blank and may_be_empty else text_error(content)
    return problem or (text_error(turn.rest) if turn.rest else None)


def tools_error(tools) -> str | None:
    """The error in the tools of a record, as the end of a sentence, or None."""
    if tools == "" or _parsed(tools, list) is not None:
        return None
    return f"is {type_name(tools)}, expected the JSON text of a list"


def _parsed(text, kind: type):
    """The value of a JSON text, if it is of a kind; else None."""
    try:
        value = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        return None
    return value if isinstance(value, kind) else None


def text_error(value) -> str | None:
    """Why a value is not a non-empty text, as the end of a sentence, or None if it is one."""
    if not isinstance(value, str):
        return f"is {'null' if value is None else type_name(value)}, expected a text"
    if not value or value.isspace():
        return "is empty"
    if value.isascii():
        return None
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"holds half a surrogate pair ({value[error.start]!a} at character {error.start}), which is not text"
    return None


def type_name(value) -> str:
    """The name of a value's type, for messages."""
    return "None" if value is None else type(value).__name__


def shown(value) -> str:
    """A value as messages show it."""
    return "null" if value is None else repr(value)
