"""Preference data as text: its structure, its errors, and which of it is held out.

A record is a prompt, its responses, and pairs of response indices. A prompt is a text, or a conversation: a tuple of `Turn`s.
If that ends with an assistant turn, responses continue it; an empty text is no prompt. A response is a text, or several turns:
the first and the last are the assistant's, the user's and the tools' between them are never scored. Loaders yield
`(prompt, record)` items, where a record is

    {"responses": list[Response], "pairs": list[tuple[int, int]], "sft_target": Response}

and a pair holds the indices of the preferred and of the dispreferred response. A record may have more: `sft_targets`, a list
of the responses that SFT learns, which ends with sft_target; `scores` and `labels` (True for a desirable response, False for an
undesirable one), with one number or label for each response, or None; `weights` and `margins`, with one number for each pair;
`tools`, the JSON text of a list of tools, which belongs to the prompt.
Everything here works on streams, in memory that does not grow with the data.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from math import inf, isfinite, isnan
from numbers import Integral, Real
from typing import NamedTuple

from preference_training.core.errors import UserError, visible


class Turn(NamedTuple):
    """One turn of a conversation; role is one of ROLES.

    rest: the other fields of the message (tool_calls, reasoning_content, ...) as the JSON text of an object; "" without any. Of
    an assistant turn that is not learned, it has "weight": 0.
    """

    role: str
    content: str
    rest: str = ""

    def __repr__(self) -> str:
        # Hashes of records depend on it: without other fields it is as before there were any.
        return f"Turn(role={self.role!r}, content={self.content!r}{f', rest={self.rest!r}' if self.rest else ''})"


Prompt = str | tuple[Turn, ...]
Response = str | tuple[Turn, ...]
Records = dict[Prompt, dict]
Items = Iterable[tuple[Prompt, dict]]
# (row number, row), from files and hub sets.
NumberedRows = Iterable[tuple[int, dict]]


@dataclass(frozen=True)
class PreferenceRecord:
    """One validated record. number: counts the records of its data set and split from 1. source: its name in messages.

    row: the number of its first row in the file; 0 if unknown.
    sft_targets: the responses that SFT learns, if there are more than sft_target. scores, labels: of each response, None where
    unknown. weights, margins: of each pair. All four are None if the data has none. tools: the JSON text of a list, or "".
    """

    prompt: Prompt
    responses: list[Response]
    pairs: list[tuple[int, int]]
    sft_target: Response
    number: int
    source: str
    sft_targets: tuple[Response, ...] = ()
    scores: list[float | None] | None = None
    labels: list[bool | None] | None = None
    weights: list[float] | None = None
    margins: list[float] | None = None
    tools: str = ""
    row: int = 0

    @property
    def targets(self) -> tuple[Response, ...]:
        """The responses that SFT learns."""
        return self.sft_targets or (self.sft_target,)


# ---- the report of a split ------------------------------------------------------------------------------------------------

SAME_TEXT = "chosen and rejected are the same"
OTHER_PROMPT = "chosen and rejected have different prompts"
EMPTY_TEXT = "a text is empty"

# Hints on some columns that were not read.
COLUMN_HINTS = {
    "system": "with system: system it becomes the system turn",
    "system_prompt": "with system: system_prompt it becomes the system turn",
    "tools": "with tools: tools they are given to the chat template",
    "score": "with response: ... and score: score it makes pairs of the rows of a prompt",
    "label": "with response: ... and label: label it labels a response",
    "margin": "with margin: margin it is the margin of the pair",
    "weight": "with example_weight: weight it is the weight of the pair",
}


@dataclass
class DataReport:
    """What was read of one split of a data set, and what was skipped or changed. Stored with the prepared data.

    left_out: numbers of skipped rows, pairs or examples, by reason. changed: numbers of changed texts, by change. num_prompts:
    the prompts that remain. bad_rows: messages for the first ten of the rows that cannot be used, which are errors unless
    `skip_bad_rows`; alike: the numbers of further ones like these. found: the format of the rows, if nobody named it.
    columns_not_read: the number of rows that have each such column. notes: sentences, mostly on settings without effect.
    """

    skip_bad_rows: bool = False
    rows_read: int = 0
    num_prompts: int = 0
    num_bad_rows: int = 0
    bad_rows: list[str] = field(default_factory=list)
    alike: dict[str, int] = field(default_factory=dict)
    found: str = ""
    left_out: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    columns_not_read: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def bad_row(self, error: UserError, remedy: str = "Fix the row, or skip") -> None:
        """Count a row that cannot be used. Raises `error`, with what to do about it, unless such rows are skipped."""
        if not self.skip_bad_rows:
            raise UserError(f"{error} {remedy} such rows with on_bad_row=skip.") from error
        self.num_bad_rows += 1
        message = str(error).splitlines()[0]
        kind = next((known for known in self.bad_rows if _kind_of(known) == _kind_of(message)), None)
        if kind is not None:
            self.alike[kind] = self.alike.get(kind, 0) + 1
        elif len(self.bad_rows) < 10:
            self.bad_rows.append(message)

    def skip(self, reason: str, count: int = 1) -> None:
        """Count what is skipped."""
        if count:
            self.left_out[reason] = self.left_out.get(reason, 0) + count

    def change(self, what: str, count: int = 1) -> None:
        """Count texts that were changed; a negative number corrects an earlier count."""
        if count:
            self.changed[what] = self.changed.get(what, 0) + count
            if not self.changed[what]:
                del self.changed[what]

    def not_read(self, column: str) -> None:
        """Count a row with a column that is not read. Names beyond the first hundred are dropped: they are no columns."""
        if column in self.columns_not_read or len(self.columns_not_read) < 100:
            self.columns_not_read[column] = self.columns_not_read.get(column, 0) + 1

    def note(self, sentence: str) -> None:
        """Add a note, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def as_dict(self) -> dict:
        """Plain values, for JSON; `DataReport(**...)` reads them back."""
        return asdict(self)

    def counts(self) -> Iterator[tuple[int, str]]:
        """The counts of everything that was skipped or changed, with descriptions."""
        yield from ((count, f"skipped: {reason}") for reason, count in self.left_out.items())
        yield from ((count, what) for what, count in self.changed.items())
        if self.num_bad_rows:
            yield self.num_bad_rows, f"bad row{'s' * (self.num_bad_rows != 1)} skipped"

    def remarks(self) -> list[str]:
        """Lines without a count: columns that were not read, and settings without effect."""
        names = list(self.columns_not_read)
        hints = "; ".join(COLUMN_HINTS[name] for name in names if name in COLUMN_HINTS)
        # The index of a table becomes a column without a name in CSV files.
        columns = f"columns not read: {', '.join(name or repr(name) for name in names)}" + f" ({hints})" * bool(hints)
        line = "; ".join([self.found] * bool(self.found) + [columns] * bool(names))
        return [visible(each) for each in [line] * bool(line) + self.notes]

    def lines(self) -> list[str]:
        """The report as text: a line of counts, if there are any, remarks, and the first bad rows."""
        counts = [f"{count} {what}" for count, what in self.counts()]
        return ["; ".join(counts)] * bool(counts) + self.remarks() + [f"  {line}" for line in self.bad_row_lines()]

    def bad_row_lines(self) -> list[str]:
        """The first bad rows, each with the number of further ones like it."""
        alike = ((message, self.alike.get(message, 0)) for message in self.bad_rows)
        return [message + f" ({more} more rows like it)" * bool(more) for message, more in alike]


def _kind_of(message: str) -> str:
    """A message without the numbers, texts and lines in it: what rows that fail alike have in common."""
    return re.sub(r"(?<=is )'.*?'(?=,)|\d+", "#", message)


# ---- errors -------------------------------------------------------------------------------------------------------------


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


def message_of(turn: Turn) -> dict:
    """A turn as a message for chat templates: role, content, and its other fields."""
    message = {"role": turn[0], "content": turn[1]} | (json.loads(turn[2]) if len(turn) > 2 and turn[2] else {})
    message.pop("weight", None)
    return message


def is_learned(turn: Turn) -> bool:
    """Whether SFT learns a turn of the assistant's: unless its weight is 0."""
    return len(turn) < 3 or '"weight"' not in turn[2] or json.loads(turn[2]).get("weight") != 0


def reasoning_of(message: dict) -> str:
    """The reasoning that a message has beside its content; "" for none."""
    return next((message[key] for key in ("reasoning_content", "reasoning", "thinking") if message.get(key)), "")


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


def response_of(turns: tuple[Turn, ...]) -> Response:
    """The response of some turns: a single one without other fields is its text."""
    return turns[0].content if len(turns) == 1 and not turns[0].rest and turns[0].content else turns


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


# ---- held out -----------------------------------------------------------------------------------------------------------


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one text, whatever template it will be written with."""
    if isinstance(prompt, str):
        return prompt
    # A turn without other fields gives the text that it gave before there were any, and stays on its side of the split.
    return "\0".join(part for turn in prompt for part in (*turn[:2], *filter(None, turn[2:])))


def prompt_hash(prompt: Prompt) -> float:
    """A number in [0, 1) that depends only on the prompt's text: the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256(prompt_text(prompt).encode()).digest()[:8], "big") / 2**64


def is_held_out(prompt: Prompt, share: float) -> bool:
    """Whether a prompt belongs to the held-out `share` of its data set."""
    return prompt_hash(prompt) < share


def split_by_hash(
    items: Items, split: str, share: float, text_of: Callable[[Prompt], str] = prompt_text
) -> Iterator[tuple[Prompt, dict]]:
    """The items of one split, chosen by a hash of the prompt; "test" has about `share` of all prompts.

    text_of returns the text that is hashed: what the model reads, so that the split does not depend on how a prompt is stored.
    If none of two or more prompts would be held out, the one with the smallest hash is; therefore its items wait until a
    smaller hash comes.
    """
    lowest, waiting, several, held_out_any = 1.0, [], False, False
    if share == 0:
        # All are read, also for the split that is empty, since reading reports their errors.
        yield from (item for item in items if split == "train")
        return
    for item in items:
        prompt, record = item
        # Answers without a prompt, as plain texts are, are held out one by one.
        value = prompt_hash(text_of(prompt) if prompt else prompt_text(record["sft_target"]))
        held_out_any |= value < share
        if held_out_any:
            released, waiting = waiting, []
            if split == "train":
                yield from released
            if (value < share) == (split == "test"):
                yield item
        elif value == lowest:
            waiting.append(item)
        else:
            several |= bool(waiting)
            released = [item]
            if value < lowest:
                lowest, waiting, released = value, [item], waiting
            if split == "train":
                yield from released
    if several == (split == "test"):
        yield from waiting
