"""Conversations in rows: lists of messages in any of the common dialects, and texts that contain such lists, become turns."""

import ast
import json
import re
from collections.abc import Mapping
from contextlib import suppress

from preference_training.data.records.record import Turn, is_learned
from preference_training.data.records.validation import text_error, turn_error
from preference_training.data.rows.templates import parse_dialogue


class RowError(Exception):
    """An error in a row, as a sentence; the caller adds file and row number."""


def json_type(value) -> str:
    """The name of the type of a row's value, for messages: null for None, as in files."""
    return "null" if value is None else type(value).__name__


class NothingLearned(Exception):  # noqa: N818
    """A conversation all of whose turns say that they are not learned."""


# Names of roles, in any case. A "function_call" is an assistant's turn whose text is the JSON of a call.
ROLE_NAMES = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("developer",), "developer"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot", "ai", "chatgpt"), "assistant"),
    **dict.fromkeys(("tool", "function", "ipython", "observation", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
}
TURN_KEYS = (
    ("role", "content"), ("from", "value"), ("role", "parts"), ("author", "content"), ("role", "value"), ("role", "text"),
    ("role", "message"), ("from", "content"), ("from", "text"), ("speaker", "text"), ("speaker", "content"),
)  # fmt: skip
# What chat templates read of a message besides role and content.
MESSAGE_FIELDS = ("name", "reasoning", "reasoning_content", "thinking", "tool_call_id", "tool_calls")
LEGACY_CALL = "function_call"
# Each says whether a turn of the assistant's is learned; `Turn.rest` has the first of them where it is not.
WEIGHT_KEYS = ("weight", "train", "loss", "training")


def turn_keys(item) -> tuple[str, str] | None:
    """The keys of a turn's role and text; None for a value that is not a turn. In unions of dialects, absent keys are None."""
    if not isinstance(item, dict):
        return None
    for keys in TURN_KEYS:
        if all(item.get(key) is not None for key in keys):
            return keys
    calls = any(item.get(key) for key in ("tool_calls", LEGACY_CALL))
    return next((keys for keys in TURN_KEYS if item.get(keys[0]) is not None and (calls or keys[1] in item)), None)


ROUND_KEYS = (("input", "output"), ("human", "assistant"), ("user", "assistant"), ("question", "answer"))


def round_keys(item) -> tuple[str, str] | None:
    """The keys of a question and its answer in one item of a conversation; None for anything else."""
    return next((keys for keys in ROUND_KEYS if isinstance(item, dict) and item.keys() >= set(keys)), None)


def with_roles(row: dict, roles: Mapping[str, str]) -> dict:
    """A row with other names of the roles of all turns in it, also of those in texts. roles: name → what it is."""
    names = {str(name).strip().lower(): role for name, role in roles.items()}

    def renamed(value):
        try:
            value = parse_serialized_turns(value, "")
        except RowError:
            return value  # It is reported where it is read.
        if isinstance(value, list):
            return [renamed(item) for item in value]
        if not isinstance(value, dict):
            return value
        keys = turn_keys(value)
        role = names.get(str(value[keys[0]]).strip().lower()) if keys else None
        if keys is None:
            return {key: renamed(inner) for key, inner in value.items()}
        return value | {keys[0]: role} if role else value

    # The row may say that its values have no types.
    return type(row)({column: renamed(value) for column, value in row.items()})


def check_mask(row: dict) -> None:
    """Raise RowError where NeMo's column `mask` says that the assistant's turns are not learned."""
    mask = row.get("mask")
    if isinstance(mask, str) and ROLE_NAMES.get(mask.strip().lower()) == "assistant":
        raise RowError(
            f"field 'mask' is {mask!r}: the turns of this role are not learned, which are all that SFT learns here. Expected "
            "the role that asks, such as User; rename the column if it means something else."
        )


def parse_turns(value: list | dict, name: str) -> tuple[Turn, ...]:
    """The turns of a conversation, or of a single message, in the field `name`; empty system turns are left out.

    Raises RowError.
    """
    items = [value] if isinstance(value, dict) else value
    turns = (_plain_turn(item) or _turn(item, f"field {name!r}: turn {number}") for number, item in enumerate(items, start=1))
    kept = tuple(turn for turn in turns if turn.content or turn.role not in ("system", "developer"))
    if not kept:
        raise RowError(f"field {name!r} is a conversation without turns.")
    return kept


def _plain_turn(item) -> Turn | None:
    """A text of the user's or the assistant's as a turn, as most messages are; None for any other."""
    if not isinstance(item, dict) or len(item) != 2 or not isinstance(found := item.get("role"), str):
        return None
    role, content = ROLE_NAMES.get(found), item.get("content")
    return Turn(role, content) if role in ("user", "assistant") and text_error(content) is None else None


def _turn(item, place: str) -> Turn:
    """A message as a turn. Raises RowError."""
    keys = turn_keys(item)
    if keys is None:
        keys_found = f", it has {', '.join(map(str, item))}" if isinstance(item, dict) and len(item) > 1 else ""
        raise RowError(f"{place} is not {{role, content}}{keys_found}.")
    found, content = map(item.get, keys)
    role = ROLE_NAMES.get(found.strip().lower()) if isinstance(found, str) else None
    if role is None:
        raise RowError(
            f"{place} has the role {found!r}, expected one of {', '.join(ROLE_NAMES)}; roles: {{NAME: ROLE}} names others."
        )
    rest = {key: item[key] for key in MESSAGE_FIELDS if item.get(key) not in (None, "", [])}
    content = _text_of_result(content) if role == "tool" else _text_of_parts(content, place)
    if role == "function_call":
        role, content, rest["tool_calls"] = "assistant", "", content
    elif calls := item.get(LEGACY_CALL):
        rest.setdefault("tool_calls", calls)
    if "tool_calls" in rest:
        rest["tool_calls"] = _calls(rest["tool_calls"], place)
    content = "" if content is None and (rest or role in ("system", "developer", "tool")) else content
    if isinstance(content, str) and not content.strip() and (role in ("system", "developer", "tool") or "tool_calls" in rest):
        content = ""
    if role in ("system", "developer") and content == "":
        return Turn(role, "")
    if role == "assistant" and not _is_learned(item, place):
        rest["weight"] = 0
    turn = Turn(role, content, json.dumps(rest, ensure_ascii=False, sort_keys=False) if rest else "")
    if problem := turn_error(turn) if isinstance(content, str) else text_error(content):
        raise RowError(f"{place} {problem}.")
    return turn


def _text_of_parts(content, place: str):
    """The text of a content in parts; other contents as they are. Raises RowError for parts that are no text."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        present = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {"text": part}
        kind = present.get("type", "text")
        if not isinstance(text := present.get("text"), str) or kind not in ("text", "input_text", "output_text"):
            found = kind if kind != "text" else next((key for key in present if key not in ("type", "text")), json_type(text))
            raise RowError(
                f"{place} has a part of the type {found!r}, but models read only text here. Expected texts, or parts such as "
                '{"type": "text", "text": "..."}.'
            )
        texts.append(text)
    return "".join(texts)


def _text_of_result(content):
    """What a tool returned as text: other values than texts, and parts that are texts, as JSON."""
    with suppress(RowError):
        content = _text_of_parts(content, "")
    return content if isinstance(content, str | None) else json.dumps(content, ensure_ascii=False)


def _is_learned(item: dict, place: str) -> bool:
    """Whether SFT learns a turn of the assistant's: unless its weight is 0, or it says that it is not trained on."""
    for key in WEIGHT_KEYS:
        value = item.get(key)
        if value is not None and value not in (0, 1):
            raise RowError(f"{place} has {key}: {value!r}, expected 0 or 1 (false or true): whether the turn is learned.")
    return all(item.get(key) is None or item[key] for key in WEIGHT_KEYS)


def _calls(value, place: str) -> list[dict]:
    """Calls of tools as chat templates read them: {type, function: {name, arguments}}, with arguments as an object."""
    value = _of_json(value)
    calls = []
    for item in value if isinstance(value, list) else [value]:
        call = _of_json(item)
        call = {key: inner for key, inner in call.items() if inner is not None} if isinstance(call, dict) else call
        function = _of_json(call.get("function", call)) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(
                f"{place} has the tool call {item!r}. Expected {{function: {{name, arguments}}}}, or the JSON text of that."
            )
        outer = {key: value for key, value in call.items() if key != "function"} if "function" in call else {}
        # Null may be what an argument is.
        given = (function.get(key) for key in ("arguments", "parameters"))
        arguments = next((value for value in given if value is not None), {})
        function = {"name": function["name"], "arguments": _of_json(arguments)}
        calls.append({"type": "function"} | outer | {"function": function})
    return calls


def _of_json(value):
    """The value of a JSON text of an object or list; anything else as it is."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
    return parsed if isinstance(parsed, dict | list) else value


def without_nones(value):
    """A value without the keys that are None: in tables, each of some objects has the keys of all."""
    if isinstance(value, dict):
        return {key: without_nones(inner) for key, inner in value.items() if inner is not None}
    return [without_nones(inner) for inner in value] if isinstance(value, list) else value


def is_missing_word(text: str) -> bool:
    """Whether a text is a word that tables have where a value is missing, in any case, or is blank."""
    return text.strip().lower() in ("", "n/a", "na", "nan", "none", "null")


def parse_tools(value, name: str) -> str:
    """The tools in the field `name`, objects or their JSON text, as the JSON text of a list; "" for none. Raises RowError."""
    if isinstance(value, str) and is_missing_word(value):
        return ""
    found = without_nones(_of_json(value))
    found = [found] if isinstance(found, dict) and found else found
    items = [_of_json(item) for item in found] if isinstance(found, list) else found
    if not items:
        return ""
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise RowError(f"field {name!r} is {json_type(value)}, expected a list of tools (objects), or its JSON text.")
    return json.dumps(items, ensure_ascii=False)


# The beginning of a text that contains a conversation or a turn, as JSON or as Python prints it.
SERIALIZED_TURNS = re.compile(r"""\s*(\[\s*)?\{\s*["'](\w+)["']\s*:""")


def parse_literal(text: str):
    """The list, object or other value that a text contains, as JSON or as Python prints it; None for other texts."""
    for read in (json.loads, ast.literal_eval, _numbers):
        try:
            return read(text.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return None


def _numbers(text: str) -> list:
    """A list of numbers, of which some are missing, as Python prints it. Raises ValueError."""
    words = (word.strip() for word in text.removeprefix("[").removesuffix("]").split(","))
    return [None if is_missing_word(word) else float(word) for word in words]


def parse_serialized_turns(value, name: str):
    """The value, parsed if it is a text that contains a conversation or a turn, as columns of CSV files and tables do.

    Raises RowError for a text that cannot be parsed.
    """
    if isinstance(value, str) and value[:2] in ('"[', '"{') and isinstance(inner := parse_literal(value), str):
        # It was written as JSON twice.
        value = inner if SERIALIZED_TURNS.match(inner) else value
    if not isinstance(value, str) or not (start := SERIALIZED_TURNS.match(value)):
        return value
    found = parse_literal(value)
    if found is not None:
        return found if are_turns(found) else value
    if (
        start[1]
        and start[2] in {key for keys in TURN_KEYS for key in keys}
        and any(all(re.search(f"[\"']{key}[\"']\\s*:", value) for key in keys) for keys in TURN_KEYS)
    ):
        raise RowError(
            f"field {name!r} is a text that starts like a list of turns, but is not JSON. Expected a list, or a text such as "
            ' [{"role": "user", "content": "..."}].'
        )
    return value


def are_turns(value) -> bool:
    """Whether a value is a message with a known role, or a list of messages, whose roles are checked later."""
    items = value if isinstance(value, list) else [value]
    if not items or not all(turn_keys(item) for item in items):
        return False
    roles = [item[turn_keys(item)[0]] for item in items]
    return all(isinstance(role, str) and (items is value or role.strip().lower() in ROLE_NAMES) for role in roles)


def ends_with_answer(value) -> bool:
    """Whether a value is a conversation, also as a text, that ends with the assistant's turn."""
    try:
        value = parse_serialized_turns(value, "")
    except RowError:
        return False
    last = value[-1] if isinstance(value, list) and value else None
    keys = turn_keys(last)
    return keys is not None and ROLE_NAMES.get(str(last[keys[0]]).strip().lower()) == "assistant"


# ---- prompt and responses ---------------------------------------------------------------------------------------------------


def split_conversation(turns: tuple[Turn, ...], name: str) -> tuple[tuple[Turn, ...] | str, tuple[Turn, ...]]:
    """A conversation as prompt, the turns before the first that is learned, and response, which ends with such a turn.

    Those are the assistant's. Turns behind the last of them are left out. Raises RowError without any of the assistant's, and
    NothingLearned where none of these is learned.
    """
    places = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
    if not places:
        raise RowError(f"field {name!r} has no turn of the assistant's. Expected one at least, which is learned.")
    places = [place for place in places if is_learned(turns[place])]
    if not places:
        raise NothingLearned
    start = places[0]
    while start and turns[start - 1].role == "assistant":
        start -= 1  # A response would continue it.
    return turns[:start] or "", turns[start : places[-1] + 1]


def part_conversations(conversations: list[tuple[Turn, ...]]) -> tuple[tuple[Turn, ...], list[tuple[Turn, ...]]] | None:
    """Conversations as the turns that all share, and the rest of each, which begins with an assistant turn.

    Where one ends and others go on, or tools return different results, the assistant turn before that is the first of the rest.
    None where they part at another's turn: those are different prompts.
    """
    shared = end_of_common(conversations)
    following = {turns[shared].role if len(turns) > shared else None for turns in conversations}
    if following != {"assistant"}:
        if following - {"assistant", "tool"} and None not in following:
            return None
        places = [place for place, turn in enumerate(conversations[0][:shared]) if turn.role == "assistant"]
        if not places:
            return None
        shared = places[-1]
    while shared and conversations[0][shared - 1].role == "assistant":
        # Of assistant turns in a row none continues another's text, as it would behind a prompt that ends with one.
        shared -= 1
    return conversations[0][:shared], [turns[shared:] for turns in conversations]


def end_of_common(conversations: list[tuple[Turn, ...]]) -> int:
    """How many turns all of several conversations share at their beginning."""
    return next(
        (place for place, turns in enumerate(zip(*conversations, strict=False)) if turns.count(turns[0]) < len(turns)),
        min(map(len, conversations)),
    )


# ---- a prompt field beside conversations ----------------------------------------------------------------------------------


def join_turns(prompt: tuple[Turn, ...], shared: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns of the prompt field followed by those that chosen and rejected share, without repetition.

    Raises RowError where the second do not continue the first.
    """
    if _contains(shared, prompt):
        return shared
    if _contains(prompt[-len(shared) :], shared):
        return prompt
    if prompt[-1].role == shared[0].role or shared[0].role in ("system", "developer"):
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
