"""The answers in the fields of a row, and how a prompt is told from them."""

import json

from preference_training.data.rows.conversations import RowError, parse_serialized_turns, parse_turns, turn_keys
from preference_training.data.rows.records import Turn, text_error
from preference_training.data.rows.templates import split_dialogue

Turns = tuple[Turn, ...]

# Where a dict holds one text, this is its key.
TEXT_KEYS = ("content", "value", "text", "response")


def check_text(value, name: str) -> None:
    """Raise RowError where a field's value is not a non-empty text."""
    if problem := text_error(value):
        raise RowError(f"field {name!r} {problem}.")


def answers_in(value, name: str) -> list[str | Turns]:
    """The answers in a field: a text, a turn, a conversation, or a list of any of these. Raises RowError."""
    value = parse_serialized_turns(value, name)
    if isinstance(value, list) and value and not isinstance(value[0], dict):
        return [answer_in(item, name) for item in value]
    return [answer_in(value, name)]


def answer_in(value, name: str) -> str | Turns:
    """One answer: a text, a turn or a conversation. Raises RowError."""
    value = parse_serialized_turns(value, name)
    if turn_keys(value):
        value = [value]
    if isinstance(value, list):
        return parse_turns(value, name)
    if isinstance(value, dict) and (key := next((key for key in TEXT_KEYS if isinstance(value.get(key), str)), None)):
        value = value[key]
    check_text(value, name)
    return value


def parse_text_list(value):
    """The value, parsed if it is a text that contains a list, as in CSV files."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


# ---- conversations --------------------------------------------------------------------------------------------------------


def conversation_in(value, name: str) -> Turns:
    """The turns of a whole conversation; also a list of {input, output}, or of texts of user and assistant in turn."""
    value = parse_text_list(parse_serialized_turns(value, name))
    items = value if isinstance(value, list) else [value]
    if items and all(isinstance(item, dict) and item.keys() >= {"input", "output"} for item in items):
        items = [text for item in items for text in (item["input"], item["output"])]
    if items and all(isinstance(item, str) for item in items) and isinstance(value, list):
        for text in items:
            check_text(text, name)
        return tuple(Turn(("user", "assistant")[place % 2], text) for place, text in enumerate(items))
    if not all(isinstance(item, dict) for item in items):
        check_text(None if items is value else value, name)
        raise RowError(f"field {name!r} is a text, expected a conversation: a list of {{role, content}}.")
    return parse_turns(items, name)


def end_of_common(conversations: list[Turns]) -> int:
    """How many turns all of several conversations share at their beginning."""
    return next(
        (place for place, turns in enumerate(zip(*conversations, strict=False)) if len(set(turns)) > 1),
        min(map(len, conversations)),
    )


# ---- texts ----------------------------------------------------------------------------------------------------------------


def dialogue_prompt(dialogue: str, name: str) -> str:
    """The prompt of an HH dialogue. Raises RowError."""
    try:
        return split_dialogue(dialogue)[0]
    except ValueError:
        raise RowError(
            f"{name} has no '\\n\\nAssistant:' turn. Expected a dialogue of '\\n\\nHuman:' and '\\n\\nAssistant:' turns, or a "
            "field prompt beside chosen and rejected (implicit_prompt=true uses their common beginning)."
        ) from None


def shared_beginning(texts: list[str]) -> str:
    """The common beginning of texts, up to its last whitespace, so that no word is cut. Raises RowError without any.

    A space before the responses is theirs: tokenizers merge it with the next word.
    """
    columns = enumerate(zip(*texts, strict=False))
    length = next((k for k, characters in columns if len(set(characters)) > 1), min(map(len, texts)))
    shared = texts[0][:length]
    end = max((k + 1 for k, character in enumerate(shared) if character.isspace()), default=0)
    if not shared[:end].strip():
        raise RowError("chosen and rejected start with different words, so they share no prompt.")
    return shared[:end].removesuffix(" ")
