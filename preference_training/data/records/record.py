"""Preference data as text: its structure.

A record is a prompt, its responses, and pairs of response indices. A prompt is a text, or a conversation: a tuple of `Turn`s.
If that ends with an assistant turn, responses continue it; an empty text is no prompt. A response is a text, or several turns:
the first and the last are the assistant's, the user's and the tools' between them are never scored. Loaders yield
`(prompt, record)` items, where a record is

    {"responses": list[Response], "pairs": list[tuple[int, int]], "sft_target": Response}

and a pair holds the indices of the preferred and of the dispreferred response. A record may have more: `sft_targets`, a list
of the responses that SFT learns, which ends with sft_target; `scores` and `labels` (True for a desirable response, False for an
undesirable one), with one number or label for each response, or None; `weights` and `margins`, with one number for each pair;
`tools`, the JSON text of a list of tools, which belongs to the prompt.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


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


def response_of(turns: tuple[Turn, ...]) -> Response:
    """The response of some turns: a single one without other fields is its text."""
    return turns[0].content if len(turns) == 1 and not turns[0].rest and turns[0].content else turns


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one text, whatever template it will be written with."""
    if isinstance(prompt, str):
        return prompt
    # A turn without other fields gives the text that it gave before there were any, and stays on its side of the split.
    return "\0".join(part for turn in prompt for part in (*turn[:2], *filter(None, turn[2:])))
