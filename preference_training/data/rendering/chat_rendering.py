"""Render conversations with the tokenizer's own chat template, and find the assistant's turns in the text.

What is scored are the parts that a template marks with {% generation %}. A template without marks has to render the beginning
of a conversation, with the generation prompt, as the beginning of the whole: there the assistant's turn starts. It ends with
the token that the template writes after it.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple
from weakref import WeakKeyDictionary

from preference_training.core.errors import UserError, first_line
from preference_training.data.records.record import Response, Turn, message_of
from preference_training.data.rendering.turn_texts import TurnTexts

Messages = list[dict]
# A text that no row contains, in place of a turn's.
STAND_IN = "Qstandsinq"
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
THINK = "<think>"


class ConversationError(UserError):
    """The tokenizer's chat template rejects a conversation; it may accept others."""


class Spanned(NamedTuple):
    """The text of a response of several turns, and the [start, end) spans of it that are scored.

    ends: whether the end-of-sequence token, which is added later, is scored as well.
    """

    text: str
    spans: list[tuple[int, int]]
    ends: bool = True


class Probes(NamedTuple):
    """What renderings of stand-ins show of a chat template. opening: see `response_opening`. turn_texts: see `TurnTexts`."""

    opening: str
    turn_texts: TurnTexts | None


# Tokenizer -> its chat template and special tokens, and what probes of that showed: they run once.
_PROBED: WeakKeyDictionary = WeakKeyDictionary()


def probes_of(tokenizer) -> Probes:
    """What probes of a tokenizer's chat template show."""
    template = (repr(tokenizer.chat_template), repr(tokenizer.special_tokens_map))
    known, found = _PROBED.get(tokenizer, (None, None))
    if known != template:
        opening = _response_opening(tokenizer)
        found = Probes(opening, _turn_texts(tokenizer, opening))
        _PROBED[tokenizer] = template, found
    return found


def _turn_texts(tokenizer, opening: str) -> TurnTexts | None:
    """What the template writes around turns; None where that is not always the same, or where it marks what is scored."""
    try:
        if GENERATION.search(tokenizer.get_chat_template()):
            return None
        ask = partial(rendered, tokenizer, add_generation_prompt=True)
        return TurnTexts.of(partial(rendered, tokenizer), lambda messages: ask(messages) + opening)
    except (ConversationError, ValueError):
        return None


class ChatTemplate:
    """The tokenizer's chat template, as `templates.Template`. Raises UserError if the tokenizer has no usable one."""

    def __init__(self, tokenizer):
        check_chat_template(tokenizer)
        # Cached: a tokenizer looks up its special tokens on each access.
        self.tokenizer, self.eos_token = tokenizer, tokenizer.eos_token
        self.opening, self.turn_texts = probes_of(tokenizer)
        self.special_tokens = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True)

    def __call__(
        self, turns: Sequence[Turn], responses: Sequence[Response], tools: str = ""
    ) -> tuple[str, list[str | Spanned]]:
        """The text of a prompt, and those of its responses. Raises ConversationError."""
        several = [(Turn("assistant", some),) if isinstance(some, str) else some for some in responses]
        refused = None
        for message in _spellings([*turns, *(turn for some in several for turn in some)]):
            try:
                rendering = _Rendering(self, [message(turn) for turn in turns], json.loads(tools) if tools else None)
                found = [rendering.response([message(turn) for turn in some]) for some in several]
                return rendering.joined(found, [isinstance(some, str) for some in responses])
            except ConversationError as error:
                refused = refused or error
        raise refused

    def last_tokens(self, text: str) -> Iterator[str]:
        """The special tokens at the end of a text, white space aside, from the last one on."""
        while token := next((token for token in self.special_tokens if text.rstrip().endswith(token)), ""):
            text = text.rstrip().removesuffix(token)
            yield token

    def first_token(self, text: str) -> str:
        """The special token at the beginning of a text, with the white space before it; "" without one."""
        space = len(text) - len(text.lstrip())
        return next((text[: space + len(token)] for token in self.special_tokens if text.startswith(token, space)), "")


def _spellings(turns: Sequence[Turn]) -> Iterator[Callable[[Turn], dict]]:
    """How turns become messages: as they are, and, for templates that refuse them, as other templates expect them."""
    developers = any(turn[0] == "developer" for turn in turns)
    calls = any(len(turn) > 2 and turn[2] for turn in turns)
    for as_system in (False, True)[: 1 + developers]:
        for as_text in (False, True)[: 1 + calls]:
            yield lambda turn, as_system=as_system, as_text=as_text: _spelled(message_of(turn), as_system, as_text)


def _spelled(message: dict, developer_as_system: bool, arguments_as_text: bool) -> dict:
    if developer_as_system and message["role"] == "developer":
        message["role"] = "system"
    for call in message.get("tool_calls", ()) if arguments_as_text else ():
        function = call.get("function", call)
        function["arguments"] = json.dumps(function.get("arguments", {}), ensure_ascii=False)
    return message


class _Found(NamedTuple):
    """A rendered conversation, the bounds [start, end) of its response, and the scored spans; see `Spanned`."""

    text: str
    start: int
    end: int
    spans: list[tuple[int, int]]
    ends: bool = True


class _Rendering:
    """A prompt in a chat template, and the responses to it."""

    def __init__(self, template: ChatTemplate, prompt: Messages, tools: list | None):
        self.template, self.tokenizer, self.tools = template, template.tokenizer, tools
        self.prefill = prompt[-1]["content"] if prompt and prompt[-1]["role"] == "assistant" else ""
        if prompt and prompt[-1]["role"] == "assistant" and "tool_calls" in prompt[-1]:
            raise ConversationError("the prompt ends with calls of tools. Expected what they return, or a user's turn.")
        # Responses continue an assistant turn at the end of the prompt.
        self.prompt = prompt[:-1] if self.prefill else prompt
        self.asked = self._asked(self.prompt) + self.prefill if self.prompt else None
        self._check_kept(self.asked, self.prompt)

    def _render(self, messages: Messages, **options) -> str:
        return rendered(self.tokenizer, messages, tools=self.tools, **options)

    def _asked(self, messages: Messages) -> str:
        return self._render(messages, add_generation_prompt=True) + self.template.opening

    def joined(self, found: Sequence[_Found], as_text: Sequence[bool]) -> tuple[str, list[str | Spanned]]:
        """The text of the prompt, and those of the responses behind it; those of several turns with their spans."""
        if not found:
            return self.asked or "", []
        start = min(one.start for one in found)
        prompt = found[0].text[:start]
        if other := next((one.text for one in found if not one.text.startswith(prompt)), None):
            raise ConversationError(_differs(prompt, other))
        texts = []
        for one, is_text in zip(found, as_text, strict=True):
            text, spans = one.text[start : one.end], [(begin - start, end - start) for begin, end in one.spans]
            if spans and one.spans[0][0] == one.start:
                # What the template writes between prompt and response is scored with it.
                spans[0] = (0, spans[0][1])
            texts.append(text if is_text else Spanned(text, spans, one.ends))
        return prompt, texts

    def response(self, messages: Messages) -> _Found:
        """A response of one or several turns behind the prompt. Raises ConversationError."""
        first = messages[0] | {"content": self.prefill + messages[0]["content"]}
        whole = [*self.prompt, first, *messages[1:]]
        text, several = self._render(whole), len(messages) > 1 or len(first) > 2
        if several and (found := self._of_known_texts(text, whole)):
            return found
        if several:
            self._check_kept(text, whole)
        if not holds(text, messages[-1]["content"]):
            raise ConversationError(
                "template: the tokenizer's chat template drops a part of the response (usually the reasoning). Use "
                "template=chatml or hh, or responses without that part."
            )
        marks = self._marks(whole) if several else None
        return self._of_turns(text, whole) if marks is None else self._of_marks(text, whole, marks)

    def _of_known_texts(self, text: str, messages: Messages) -> _Found | None:
        """A response between the texts that the template always writes around turns; None where it has others.

        Without tools and reasoning, what precedes a turn does not depend on those behind it.
        """
        known, turns = self.template.turn_texts, messages[len(self.prompt) :]
        roles = ("assistant", "user")
        if known is None or self.tools or self.prefill or self.asked is None or "think>" in text:
            return None
        if any(len(turn) > 2 for turn in messages) or any(
            t["role"] != roles[k % 2] or not t["content"] for k, t in enumerate(turns)
        ):
            return None
        parts = known.parts(self.asked, [turn["content"] for turn in turns])
        if "".join(parts) != text:
            return None
        cuts = list(accumulate(map(len, parts)))
        starts, untils = cuts[::3], cuts[2::3]
        end = self._end_of_text(text, starts[-1])
        ends = [self._end_before(text, *bounds) for bounds in zip(starts[:-1], untils[:-1], strict=True)]
        return _Found(text, starts[0], end, list(zip(starts, [*ends, end], strict=True)))

    def _of_turns(self, text: str, messages: Messages) -> _Found:
        """A response whose assistant turns are found between the rendered turns before and after them."""
        places = [k for k in range(len(self.prompt), len(messages)) if messages[k]["role"] == "assistant"]
        starts = [self._start(text, messages, place) for place in places]
        end = self._end_of_text(text, starts[-1])
        turns = zip(places[:-1], starts[:-1], starts[1:], strict=True)
        ends = [self._end(text, messages, *turn) for turn in turns]
        return _Found(text, starts[0], end, list(zip(starts, [*ends, end], strict=True)))

    def _of_marks(self, text: str, messages: Messages, marks: list[tuple[int, int]]) -> _Found:
        """A response of which the template's marks say what is scored."""
        start = self._start(text, messages, len(self.prompt))
        marks = [(max(first, start), last) for first, last in marks if last > start]
        end = self._end_of_text(text, marks[-1][0] if marks else start)
        spans = [(first, min(last, end)) for first, last in marks if first < end]
        return _Found(text, start, end, spans, ends=bool(marks) and (marks[-1][1] > end or end == len(text)))

    def _end_of_text(self, text: str, start: int) -> int:
        """Where the last turn ends: before the end-of-sequence token, which is added later, and what follows it."""
        end = text.find(self.template.eos_token, start)
        return len(text) if end < 0 else end

    def _check_kept(self, text: str | None, messages: Messages) -> None:
        """Raise ConversationError where a text lacks a turn, or the calls of one. Earlier reasoning is dropped by design."""
        if text is None:
            return
        for number, message in enumerate(messages, start=1):
            if message["role"] != "assistant" and not holds(text, message["content"]):
                raise _dropped(f"turn {number}, the {message['role']}'s")
        calls = [number for number, message in enumerate(messages, start=1) for _ in message.get("tool_calls", ())]
        # Names of tools may be as short as parts of words.
        if calls and self._render([_with_stand_in(message) for message in messages]).count(STAND_IN) < len(calls):
            raise _dropped(f"calls of tools, in turn {calls[0]} or later ones")

    def _start(self, text: str, messages: Messages, place: int) -> int:
        """Where the text of a turn starts: behind the rendered turns before it. Raises ConversationError if it is elsewhere."""
        is_first = place == len(self.prompt)
        before = self.asked if is_first else self._asked(messages[:place])
        prefill = self.prefill if is_first else ""
        if before is None or (prefill and not text.startswith(before)):
            before = self._before(messages, place, prefill)
        elif not text.startswith(before) and THINK in before:
            asked = self._render(messages[:place])
            if before.startswith(asked) and THINK in before[len(asked) :]:
                # It opens the reasoning of responses that have none.
                before = before[: before.rindex(THINK)]
            else:
                # Later turns take the reasoning from earlier ones.
                before = self._before(messages, place, prefill)
        if text.startswith(before):
            return len(before)
        raise (ConversationError if len(messages) > len(self.prompt) + 1 else UserError)(_differs(before, text))

    def _before(self, messages: Messages, place: int, prefill: str) -> str:
        """The text before a turn, found by another content of it."""
        other = messages[place] | {"content": prefill + STAND_IN}
        before = self._render([*messages[:place], other, *messages[place + 1 :]]).partition(STAND_IN)[0]
        question = [{"role": "user", "content": STAND_IN}]
        header = self._asked(question).removeprefix(self._render(question))
        return before if prefill or not header or header not in before else before[: before.rindex(header) + len(header)]

    def _end(self, text: str, messages: Messages, place: int, start: int, limit: int) -> int:
        """Where an earlier turn of the assistant's ends: with the token that ends it. Raises ConversationError without any."""
        until = self._render(messages[: place + 1])
        if text.startswith(until) and start < len(until) <= limit:
            return self._end_before(text, start, len(until))
        tokens = list(self.template.last_tokens(until))
        for token in tokens:
            if token not in messages[place]["content"] and (at := text.find(token, start, limit)) >= 0:
                return at + len(token)
        # Without calls, all that is written of a turn is its text.
        other = messages[place] | {"content": STAND_IN}
        after = (
            ""
            if "tool_calls" in other
            else self._render([*messages[:place], other, *messages[place + 1 :]]).partition(STAND_IN)[2]
        )
        if after and text.endswith(after) and start < (at := len(text) - len(after)) <= limit:
            return at + len(self.template.first_token(after) if tokens else "")
        raise ConversationError(
            f"template: the tokenizer's chat template renders turn {place + 1}, the assistant's, differently where others "
            f"follow ({_first_difference(until, text)}), so that its end is not known. Use template=chatml or hh, "
            "train_on=last_turn, or a chat template with {% generation %} around what is learned."
        )

    def _end_before(self, text: str, start: int, until: int) -> int:
        """Where a turn ends that is written up to `until`: behind its end-of-sequence token, or before white space."""
        ended = text.find(self.template.eos_token, start, until)
        return start + len(text[start:until].rstrip()) if ended < 0 else ended + len(self.template.eos_token)

    def _marks(self, messages: Messages) -> list[tuple[int, int]] | None:
        """The spans that the template marks; None for a template without marks."""
        source = self.tokenizer.get_chat_template(None, self.tools)
        if not GENERATION.search(source):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        options = {"tools": self.tools, "chat_template": source, "return_assistant_tokens_mask": True}
        _, [marks] = render_jinja_template([messages], **options, **self.tokenizer.special_tokens_map)
        return [(start, end) for start, end in marks if start < end]


def _with_stand_in(message: dict) -> dict:
    """A message whose calls are of a tool that no row names."""
    if "tool_calls" not in message:
        return message
    functions = (call.get("function", call) | {"name": STAND_IN} for call in message["tool_calls"])
    return message | {"tool_calls": [{"type": "function", "function": function} for function in functions]}


def _dropped(what: str) -> ConversationError:
    return ConversationError(
        f"template: the tokenizer's chat template drops {what}. Use one that renders it (model.chat_template=FILE), "
        "template=chatml or hh, or rows without such a turn."
    )


def _differs(before: str, text: str) -> str:
    return (
        "template: the tokenizer's chat template renders a prompt differently with a response "
        f"({_first_difference(before, text)}), so that prompt and response cannot be separated. "
        "Use template=chatml or hh."
    )


# ---- what a template does ---------------------------------------------------------------------------------------------------


def check_chat_template(tokenizer) -> None:
    """Raise UserError where a tokenizer has no chat template, several without a default, or an invalid one."""
    templates = tokenizer.chat_template
    if not templates:
        raise UserError(
            "template: found chat, but this tokenizer has no chat template of its own. Use chatml, hh or raw, the "
            "tokenizer of a chat model (model.tokenizer_name_or_path), or a chat template in a file (model.chat_template)."
        )
    if isinstance(templates, dict) and "default" not in templates:
        raise UserError(
            f"template: found chat, but of this tokenizer's chat templates ({', '.join(sorted(templates))}) none is called "
            "default. Save the one you mean to a file, with model.chat_template=FILE; or use template=chatml, hh or raw."
        )
    _check_syntax(tokenizer)


def response_opening(tokenizer) -> str:
    """The text that a tokenizer's chat template puts before a response but not into its generation prompt.

    Empty for most templates, which render it with add_generation_prompt.
    """
    return probes_of(tokenizer).opening


def _response_opening(tokenizer) -> str:
    question, response = {"role": "user", "content": "a question"}, {"role": "assistant", "content": "a response"}
    try:
        asked, opened = (rendered(tokenizer, [question], add_generation_prompt=add) for add in (False, True))
        whole = rendered(tokenizer, [question, response])
    except ConversationError:
        return ""  # It may accept other conversations: errors are reported with the rows of the data.
    before, found, _ = whole.removeprefix(asked).partition(response["content"])
    is_opened = asked != opened or not found or not whole.startswith(asked)
    return "" if is_opened or not before.strip() else before


def _check_syntax(tokenizer) -> None:
    """Raise UserError for a chat template that is not valid Jinja."""
    from jinja2.exceptions import TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a question"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise UserError(
            f"template: the tokenizer's chat template is broken, line {error.lineno}: {first_line(error)}. Correct it, or use "
            "template=chatml, hh or raw."
        ) from error
    except Exception:  # rejected conversations are reported with the rows of the data
        return


def rendered(tokenizer, messages: Messages, **options) -> str:
    """Render with the tokenizer's chat template. Raises ConversationError for any error in the template."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program, and may raise any error
        roles = ", ".join(message["role"] for message in messages)
        raise ConversationError(
            f"template: the tokenizer's chat template refuses a conversation of {roles}: {first_line(error).rstrip('.')}."
        ) from error


def holds(text: str, content: str) -> bool:
    """Whether a text holds another one, white space aside, perhaps as a JSON string."""
    if content.strip() in text:
        return True
    text = "".join(text.split())
    return any("".join(form.split()) in text for form in (content, json.dumps(content, ensure_ascii=False)[1:-1]))


def _first_difference(one: str, other: str) -> str:
    at = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"at character {at}: {one[at : at + 20]!r} and {other[at : at + 20]!r}"
