"""Prompt templates: raw, HH dialogues, ChatML, or the tokenizer's own chat template.

A template renders a prompt and its responses as texts that are concatenated. `tokenization.py` adds the special tokens: exactly
one beginning-of-sequence token where the tokenizer adds one, exactly one end-of-sequence token after each response.
"""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import takewhile
from typing import NamedTuple

from preference_training.data.records.record import Prompt, Response, Turn, message_of, reasoning_of, response_of
from preference_training.data.rendering.chat_rendering import (
    ChatTemplate,
    ConversationError,
    Spanned,
    rendered,
    response_opening,
)

HUMAN, ASSISTANT, TOOL = "\n\nHuman:", "\n\nAssistant:", "\n\nTool:"

# A template: prompt, responses and perhaps tools → text of the prompt, texts of the responses. A response of several turns has
# the spans of the assistant's.
Template = Callable[..., tuple[str, list[str | Spanned]]]


# ---- HH dialogues -------------------------------------------------------------------------------------------------------


def split_dialogue(dialogue: str) -> tuple[str, str]:
    """Split an HH dialogue after its last "\\n\\nAssistant:": (prompt with that marker, last response).

    Raises ValueError where there is no such turn.
    """
    at = dialogue.rindex(ASSISTANT) + len(ASSISTANT)
    return dialogue[:at], dialogue[at:]


def parse_dialogue(prompt: str) -> tuple[Turn, ...] | None:
    """The turns of an HH prompt, which ends with the assistant's marker; None for any other text.

    Text before the first turn is the system turn. The space after a marker is not part of a turn.
    """
    text = prompt.rstrip()
    if not text.endswith(ASSISTANT) or HUMAN not in text:
        return None
    system, *parts = re.split("(\n\nHuman:|\n\nAssistant:)", text.removesuffix(ASSISTANT))
    roles = ["user" if marker == HUMAN else "assistant" for marker in parts[::2]]
    turns = [Turn(role, content.removeprefix(" ")) for role, content in zip(roles, parts[1::2], strict=True)]
    return (*[Turn("system", system.strip())] * bool(system.strip()), *turns)


def turns_of(prompt: Prompt) -> tuple[Turn, ...]:
    """The turns of any prompt: a conversation, an HH dialogue, or a text, which is a user turn."""
    if not isinstance(prompt, str):
        return tuple(Turn(*turn) for turn in prompt)
    turns = parse_dialogue(prompt)
    return ((Turn("user", prompt),) if prompt else ()) if turns is None else turns


# ---- templates ----------------------------------------------------------------------------------------------------------


def build_template(name: str | None, system_prompt: str | None, tokenizer) -> Template:
    """The template of a name; None keeps texts unchanged and renders conversations as HH dialogues.

    system_prompt: added to conversations without a system turn, but not to texts that stay unchanged: with None and raw, texts
    without a prompt, and texts whose prompt is rendered already. Raises UserError for `chat` if the tokenizer has no usable
    chat template.
    """
    render = ChatTemplate(tokenizer) if name == "chat" else BUILT_IN[name].of(tokenizer)
    is_rendered = rendered_prompts(tokenizer)

    def template(prompt: Prompt, responses: Sequence[Response], tools: str = "") -> tuple[str, list[str | Spanned]]:
        if isinstance(prompt, str) and all(isinstance(response, str) for response in responses):
            if is_rendered(prompt):
                return prompt, [without_end(response, tokenizer.eos_token) for response in responses]
            if name in (None, "raw") or not prompt:
                return prompt, list(responses)
        turns, responses = _conversation(prompt, responses)
        if system_prompt and not (turns and turns[0].role in ("system", "developer")):
            turns = (Turn("system", system_prompt), *turns)
        text, texts = render(turns, responses, tools)
        continues = bool(turns) and turns[-1].role == "assistant" and text.endswith(" ")
        # Tokenizers merge a space with the next word.
        return (text[:-1], [_after_space(some) for some in texts]) if continues else (text, texts)

    return template


def _after_space(response: str | Spanned) -> str | Spanned:
    if isinstance(response, str):
        return f" {response}"
    (start, end), *more = response.spans
    spans = [(start + bool(start), end + 1), *((start + 1, end + 1) for start, end in more)]
    return response._replace(text=f" {response.text}", spans=spans)


def _conversation(prompt: Prompt, responses: Sequence[Response]) -> tuple[tuple[Turn, ...], list[Response]]:
    """The turns of any prompt: a conversation, an HH dialogue, or a single user turn; and the responses to them."""
    turns = turns_of(prompt)
    if not isinstance(prompt, str):
        return tuple(turn for turn in turns if turn.content or turn.role != "system"), list(responses)
    if not turns or turns[0].content == prompt:
        return turns, list(responses)
    return turns, [response.removeprefix(" ") if isinstance(response, str) else response for response in responses]


# ---- prompts that are rendered already --------------------------------------------------------------------------------------


def rendered_prompts(tokenizer) -> Callable[[Prompt], bool]:
    """A test of whether a prompt is a text that is rendered in the tokenizer's chat template already."""
    header = ""
    if tokenizer.chat_template:
        question = [{"role": "user", "content": "a question"}]
        with suppress(ConversationError):
            asked = rendered(tokenizer, question, add_generation_prompt=True) + response_opening(tokenizer)
            # What stands between a question and the response to it: text of users' has no special tokens.
            header = asked.rpartition("a question")[2].strip()
    specials = {tokenizer.eos_token, *tokenizer.get_added_vocab()} if header else ()
    if not any(token in header for token in specials):
        return lambda prompt: False
    return lambda prompt: isinstance(prompt, str) and header in prompt


def without_end(response: str, eos_token: str) -> str:
    """A response without the end-of-sequence token at its end, which is added later."""
    stripped = response.rstrip()
    return stripped.removesuffix(eos_token) if stripped.endswith(eos_token) else response


# ---- what templates have in common ------------------------------------------------------------------------------------------


def before_last_turn(prompt: Prompt, responses: Sequence[Response]) -> tuple[Prompt, list[Response]]:
    """A prompt and its only response, with all turns before the assistant's last ones moved to the prompt."""
    [response] = responses
    if isinstance(response, str):
        return prompt, [response]
    at = len(response)
    while at and response[at - 1][0] == "assistant":
        at -= 1
    return (*_conversation(prompt, [])[0], *response[:at]) or "", [response_of(response[at:])]


def user_markers(tokenizer) -> list[str]:
    """The texts that mark a user turn in all templates, including the tokenizer's own chat template."""
    markers = [HUMAN, "<|im_start|>user"]
    if tokenizer.chat_template:
        texts = "first question", "a response", "second question"
        roles = "user", "assistant", "user"
        with suppress(ConversationError):
            whole = rendered(tokenizer, [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)])
            before, between = whole.split(texts[0])[0], whole.split(texts[2])[0]
            alike = takewhile(lambda letters: letters[0] == letters[1], zip(reversed(before), reversed(between), strict=False))
            marker = "".join(letter for letter, _ in alike)[::-1].strip()
            markers += [marker] * bool(marker)
    return markers


# ---- the built-in templates ---------------------------------------------------------------------------------------------


class BuiltIn(NamedTuple):
    """A template that puts a fixed text before each turn of a role, and the same texts after each.

    lead: begins the text of an assistant turn and is scored with it, as is `end`; `gap` follows and is not.
    """

    before: dict[str, str]
    lead: str = ""
    end: str = ""
    gap: str = ""

    def of(self, tokenizer) -> Template:
        """The template for a tokenizer. If its end-of-sequence token is the end of a turn, that of the last is added later."""
        last = "" if tokenizer.eos_token == self.end else self.end

        return lambda turns, responses, tools: self._render(turns, responses, last)

    def _render(self, turns: Sequence[Turn], responses: Sequence[Response], last: str) -> tuple[str, list[str | Spanned]]:
        lead, prompt = self.lead, "".join(map(self._turn, turns))
        if turns and turns[-1].role == "assistant":
            # Responses continue it.
            lead, prompt = "", prompt.removesuffix(self.end + self.gap)
        else:
            prompt += self.before["assistant"]
        texts = [
            lead + some + last if isinstance(some, str) else self._spanned([Turn(*turn) for turn in some], lead, last)
            for some in responses
        ]
        return prompt, texts

    def _spanned(self, turns: Sequence[Turn], lead: str, last: str) -> Spanned:
        """A response of several turns behind the beginning of its first."""
        text = lead + _content(turns[0]) + self.end
        spans = [(0, len(text))]
        for turn in turns[1:]:
            start = len(text) + len(self.gap) + len(self.before[turn.role])
            text += self.gap + self._turn(turn).removesuffix(self.gap)
            spans += [(start, len(text))] * (turn.role == "assistant")
        end = len(text) - len(self.end) + len(last)
        return Spanned(text[:end], [*spans[:-1], (spans[-1][0], end)])

    def _turn(self, turn: Turn) -> str:
        lead = self.lead if turn.role == "assistant" else ""
        return f"{self.before[turn.role]}{lead}{_content(turn)}{self.end}{self.gap}"


def _content(turn: Turn) -> str:
    """The text of a turn, with its reasoning and its calls of tools, as most chat models read them."""
    if not turn.rest:
        return turn.content
    message = message_of(turn)
    reasoning = reasoning_of(message)
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls", ())]
    parts = [f"<think>\n{reasoning}\n</think>\n"] * bool(reasoning) + [turn.content] * bool(turn.content)
    return "\n".join([*parts, *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)])


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_HH = BuiltIn({"system": "", "developer": "", "user": f"{HUMAN} ", "assistant": ASSISTANT, "tool": f"{TOOL} "}, lead=" ")
BUILT_IN = {
    None: _HH,
    "hh": _HH,
    "raw": BuiltIn(dict.fromkeys(_ROLES, ""), gap="\n\n"),
    "chatml": BuiltIn({role: f"<|im_start|>{name}\n" for role, name in _ROLES.items()}, end="<|im_end|>", gap="\n"),
}
