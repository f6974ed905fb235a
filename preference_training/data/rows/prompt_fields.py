"""The prompt of a row: a text or a conversation, with the system prompt, the earlier turns and the tools beside it."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from unicodedata import category

from preference_training.data.records.record import Prompt, Turn
from preference_training.data.records.validation import prompt_error, text_error
from preference_training.data.rows.conversations import (
    RowError,
    join_turns,
    json_type,
    occurs_in,
    parse_serialized_turns,
    parse_tools,
    parse_turns,
    turn_keys,
)
from preference_training.data.rows.templates import parse_dialogue
from preference_training.data.rows.values import check_text, field_value, parse_text_list, unlisted

INSTRUCTIONS = ("instruction",)
QUESTIONS = ("question", "query")
CONTEXT = "context"
SECOND_PARTS = ("input", CONTEXT)
SPELLED_PARTS = tuple(spelled for part in SECOND_PARTS for spelled in (part, part.title(), part.upper()))
USUAL = "prompt"
# So many letters of a script without capitals are more than a word or two; such scripts may not separate words.
LETTERS_OF_PROMPT = 6


def may_be_prompt(value) -> bool:
    """Whether a value is a text of several words, or has turns, as prompts are."""
    if isinstance(value, str):
        return " " in value.strip() or sum(category(letter) == "Lo" for letter in value) >= LETTERS_OF_PROMPT
    return any(turn_keys(item) for item in (value if isinstance(value, list) else [value]))


@dataclass(frozen=True)
class PromptFields:
    """The fields that a prompt is made of. prompt: "" if rows have none.

    found: the fields that were found unasked, which single rows may lack. others: fields that are something else.
    """

    prompt: str
    system: str | None = None
    history: str | None = None
    tools: str | None = None
    found: frozenset[str] = frozenset()
    others: frozenset[str] = frozenset()

    def names(self) -> list[str]:
        """The fields that are read."""
        return [name for name in (self.prompt, self.system, self.history, self.tools, *self._second_parts) if name]

    @cached_property
    def _second_parts(self) -> list[str]:
        """The names that second parts of the prompt may have."""
        spelled = SPELLED_PARTS if self.prompt.lower() in INSTRUCTIONS else ()
        return [name for name in spelled if name not in self.others]

    def in_row(self, row: dict) -> bool:
        """Whether the prompt is in a separate field: one that is configured, or that rows have anyway."""
        if not self.prompt:
            return False
        return self.prompt in row or self.prompt != USUAL or (self.system is not None and self.system not in self.found)

    def candidates(self, row: dict, answers: Iterable[str]) -> list[str]:
        """The columns that nothing reads and that may be the prompt: they have turns, or texts of several words."""
        if not self.prompt:
            return []
        read = {part for name in (*answers, *self.names(), *self.others) for part in (name, name.split(".")[0])}
        return [str(name) for name, value in row.items() if name not in read and may_be_prompt(value)]

    def read(self, row: dict, as_turns: bool = False) -> Prompt:
        """The prompt: a text, or a conversation if it is a list, or has a system prompt or earlier turns. Raises RowError."""
        if not self.prompt:
            return self.with_system(row, ()) or ""
        value = unlisted(parse_serialized_turns(field_value(row, self.prompt), self.prompt))
        value = [value] if turn_keys(value) else value
        if isinstance(value, list):
            self._refuse_second_part(row)
            return self.with_system(row, parse_turns(value, self.prompt))
        check_text(value, self.prompt)
        text = f"{value}\n{more}" if (more := self.second_part(row) or self.context(row)) else value
        if (
            not as_turns
            and not (self.system and (self.system not in self.found or self._system(row)))
            and not self._history(row)
        ):
            return text
        return self.with_system(row, parse_dialogue(text) or (Turn("user", text),))

    def before(self, row: dict, shared: tuple[Turn, ...], common: tuple[Turn, ...]) -> tuple[Turn, ...]:
        """The turns of the prompt field, if any, followed by those that the answers share. Raises RowError.

        common: all turns that the answers share, some of which may belong to the responses.
        """
        self._refuse_second_part(row)
        value = parse_text_list(self._value_beside_turns(row))
        if isinstance(value, list) and all(isinstance(text, str) for text in value):
            value = None  # The user's turns of the answers: see `rounds_in`.
        if not value or self.system == self.prompt:
            return self.with_system(row, shared)
        value = [value] if turn_keys(value) else value
        if isinstance(value, list):
            joined = join_turns(parse_turns(value, self.prompt), common)
            return self.with_system(row, joined[: len(joined) - len(common) + len(shared)])
        check_text(value, self.prompt)
        if all(turn.role == "system" for turn in shared):
            return self.with_system(row, (*shared, *(parse_dialogue(value) or (Turn("user", value),))))
        if not occurs_in(value, common):
            raise RowError(
                f"field {self.prompt!r} is a text that does not occur in the turns which the answers share, and would be lost. "
                f"If it is a system prompt, set system: {self.prompt}; if it is not part of the prompt, rename the column."
            )
        return self.with_system(row, shared)

    def beside_text(self, row: dict, prompt: str, responses: list[str]) -> tuple[Prompt, list[str]]:
        """A prompt that was told from its responses, with the system prompt and the earlier turns that the row has."""
        if not (self._system(row) or self._history(row)):
            return prompt, responses
        turns = parse_dialogue(prompt) or ((Turn("user", prompt),) if prompt else ())
        return self.with_system(row, turns), [response.removeprefix(" ") for response in responses]

    def _value_beside_turns(self, row: dict):
        if not self.prompt:
            return None
        try:
            return parse_serialized_turns(field_value(row, self.prompt), self.prompt)
        except RowError:
            if self.prompt in row:
                raise
            return None

    def second_part(self, row: dict) -> str | None:
        """The second parts, on separate lines, of a prompt in Alpaca's schema (or Dolly's), unless mapped to something else."""
        parts = []
        for name in self._second_parts:
            value = row.get(name)
            if value is None or (isinstance(value, str) and not value.strip()):
                continue
            check_text(value, name)
            parts.append(value)
        return "\n".join(dict.fromkeys(parts)) or None

    def context(self, row: dict) -> str | None:
        """The text in the column `context`, which belongs to a question unless it is mapped to something else."""
        if self.prompt not in self.found or self.prompt.lower() not in QUESTIONS:
            return None
        names = (name for name in SPELLED_PARTS if name.lower() == CONTEXT and name not in self.others)
        return next((row[name] for name in names if text_error(row.get(name)) is None), None)

    def _refuse_second_part(self, row: dict) -> None:
        if self.second_part(row):
            raise RowError(
                f"field {self.prompt!r} is a conversation, and has a second part beside it, which would be lost. Expected two "
                "texts, or one conversation."
            )

    def with_system(self, row: dict, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        """The turns behind the system prompt and the earlier turns in fields of their own. Raises RowError."""
        own = sum(1 for _ in takewhile(lambda turn: turn.role in ("system", "developer"), turns))
        turns = (*turns[:own], *self._history(row), *turns[own:])
        if turns and (problem := prompt_error(turns)):
            raise RowError(f"the prompt {problem}.")
        system = self._system(row)
        return (Turn("system", system), *turns) if system and not own else turns

    def _system(self, row: dict) -> str | None:
        if not self.system or (self.system in self.found and self.system not in row):
            return None
        system = system_text(field_value(row, self.system), self.system)
        if not system or (self.system in self.found and isinstance(system, str) and not system.strip()):
            return None
        if problem := text_error(system):
            raise RowError(f"field {self.system!r} {problem}.")
        return system

    def _history(self, row: dict) -> tuple[Turn, ...]:
        if not self.history or (self.history in self.found and self.history not in row):
            return ()
        value = parse_text_list(field_value(row, self.history)) or []
        if not isinstance(value, list) or not all(isinstance(item, list) and len(item) == 2 for item in value):
            raise RowError(f"field {self.history!r} is {json_type(value)}, expected a list of [question, answer].")
        texts = [text for item in value for text in item]
        for text in texts:
            check_text(text, self.history)
        return tuple(Turn(("user", "assistant")[place % 2], text) for place, text in enumerate(texts))

    def tools_text(self, row: dict) -> str:
        """The tools of a row as canonical JSON text, "" for none. Raises RowError."""
        if not self.tools or (self.tools in self.found and self.tools.split(".")[0] not in row):
            return ""
        return parse_tools(field_value(row, self.tools), self.tools)


def system_text(value, name: str):
    """A system prompt in parts, as a message, or a list of one, as its text; anything else as it is. Raises RowError."""
    if not isinstance(value, list | dict) or not value:
        return value
    items = value if isinstance(value, list) else [value]
    if all(isinstance(item, dict) and isinstance(item.get("text"), str) for item in items):
        return "".join(item["text"] for item in items)
    items = [item if turn_keys(item) or not isinstance(item, dict) else {"role": "system", **item} for item in items]
    return "\n\n".join(turn.content for turn in parse_turns(items, name))


def is_system(value) -> bool:
    """Whether a value is a system prompt."""
    try:
        return isinstance(system_text(value, ""), str)
    except RowError:
        return False
