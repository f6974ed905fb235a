"""Prompt templates: raw, HH dialogues, ChatML, or the tokenizer's own chat template.

A template renders a prompt and its responses as texts that are tokenized separately and concatenated. `tokenization.py` adds
the special tokens: exactly one beginning-of-sequence token where the tokenizer adds one, exactly one end-of-sequence token
after each response.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import takewhile

from preference_training.core.errors import UserError, first_line
from preference_training.data.rows.records import Prompt, Turn

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"

# A template: prompt and responses → text of the prompt, texts of the responses.
Template = Callable[[Prompt, list[str]], tuple[str, list[str]]]


class ConversationError(UserError):
    """The tokenizer's chat template rejects a conversation; it may accept others."""


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


# ---- templates ----------------------------------------------------------------------------------------------------------


def build_template(name: str | None, system_prompt: str | None, tokenizer) -> Template:
    """The template of a name; None keeps texts unchanged and renders conversations as HH dialogues.

    system_prompt: added to conversations without a system turn, but not to texts that stay unchanged. Raises UserError for
    `chat` if the tokenizer has no usable chat template.
    """
    if name == "chat":
        _check_chat_template(tokenizer)
    render = {"raw": _raw, "hh": _hh, "chatml": _chatml, "chat": _chat, None: _hh}[name]
    if name == "chat":
        render = partial(_chat, opening=response_opening(tokenizer))

    def template(prompt: Prompt, responses: list[str]) -> tuple[str, list[str]]:
        if isinstance(prompt, str) and name in (None, "raw"):
            return prompt, responses
        turns, responses = _conversation(prompt, responses)
        if system_prompt and turns[0].role != "system":
            turns = (Turn("system", system_prompt), *turns)
        return render(turns, responses, tokenizer)

    return template


def _check_chat_template(tokenizer) -> None:
    """Raise UserError where a tokenizer has no chat template, several without a default, or an invalid one."""
    templates = tokenizer.chat_template
    if not templates:
        raise UserError(
            "template: found chat, but this tokenizer has no chat template of its own. Use chatml, hh or raw, or the "
            "tokenizer of a chat model (model.tokenizer_name_or_path)."
        )
    if isinstance(templates, dict) and "default" not in templates:
        raise UserError(
            f"template: found chat, but of this tokenizer's chat templates ({', '.join(sorted(templates))}) none is called "
            "default. Write the one you mean as chat_template into the tokenizer_config.json of a copy, and name that with "
            "model.tokenizer_name_or_path; or use template=chatml, hh or raw."
        )
    _check_syntax(tokenizer)


def response_opening(tokenizer) -> str:
    """The text that a tokenizer's chat template puts before a response but not into its generation prompt.

    Empty for most templates, which render it with add_generation_prompt.
    """
    question, response = {"role": "user", "content": "a question"}, {"role": "assistant", "content": "a response"}
    try:
        asked, opened = (_rendered(tokenizer, [question], add_generation_prompt=add) for add in (False, True))
        whole = _rendered(tokenizer, [question, response])
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


def user_markers(tokenizer) -> list[str]:
    """The texts that mark a user turn in all templates, including the tokenizer's own chat template."""
    markers = [HUMAN, "<|im_start|>user"]
    if tokenizer.chat_template:
        texts = "first question", "a response", "second question"
        roles = "user", "assistant", "user"
        with suppress(ConversationError):
            whole = _rendered(tokenizer, [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)])
            before, between = whole.split(texts[0])[0], whole.split(texts[2])[0]
            alike = takewhile(lambda letters: letters[0] == letters[1], zip(reversed(before), reversed(between), strict=False))
            marker = "".join(letter for letter, _ in alike)[::-1].strip()
            markers += [marker] * bool(marker)
    return markers


def _conversation(prompt: Prompt, responses: list[str]) -> tuple[tuple[Turn, ...], list[str]]:
    """The turns of any prompt: a conversation, an HH dialogue, or a single user turn; and the responses to them."""
    if not isinstance(prompt, str):
        return tuple(Turn(*turn) for turn in prompt), responses
    turns = parse_dialogue(prompt)
    if turns is None:
        return (Turn("user", prompt),), responses
    return turns, [response.removeprefix(" ") for response in responses]


def _raw(turns: tuple[Turn, ...], responses: list[str], _tokenizer) -> tuple[str, list[str]]:
    return "\n\n".join(turn.content for turn in turns) + "\n\n", responses


def _hh(turns: tuple[Turn, ...], responses: list[str], _tokenizer) -> tuple[str, list[str]]:
    markers = {"system": "", "user": f"{HUMAN} ", "assistant": f"{ASSISTANT} "}
    text = "".join(markers[turn.role] + turn.content for turn in turns)
    return text + ASSISTANT, [f" {response}" for response in responses]


def _chatml(turns: tuple[Turn, ...], responses: list[str], tokenizer) -> tuple[str, list[str]]:
    text = "".join(f"<|im_start|>{turn.role}\n{turn.content}<|im_end|>\n" for turn in turns)
    # If <|im_end|> is the end-of-sequence token, it is added later.
    end = "" if tokenizer.eos_token == "<|im_end|>" else "<|im_end|>"
    return f"{text}<|im_start|>assistant\n", [response + end for response in responses]


def _chat(turns: tuple[Turn, ...], responses: list[str], tokenizer, opening: str) -> tuple[str, list[str]]:
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    prompt = _rendered(tokenizer, messages, add_generation_prompt=True) + opening
    for number, turn in enumerate(turns, start=1):
        # Templates drop the reasoning of earlier assistant turns by design.
        if turn.role != "assistant" and not _holds(prompt, turn.content):
            raise ConversationError(
                f"template: the tokenizer's chat template drops turn {number}, the {turn.role}'s. Use "
                "template=chatml or hh, or rows without such a turn."
            )
    whole = [_rendered(tokenizer, [*messages, {"role": "assistant", "content": response}]) for response in responses]
    for text, response in zip(whole, responses, strict=True):
        if not _holds(text, response):
            raise ConversationError(
                "template: the tokenizer's chat template drops a part of the response (usually the reasoning). Use "
                "template=chatml or hh, or responses without that part."
            )
        if not text.startswith(prompt):
            raise UserError(
                "template: the tokenizer's chat template renders a prompt differently with a response "
                f"({_first_difference(prompt, text)}), so that prompt and response cannot be separated. "
                "Use template=chatml or hh."
            )
    # Remove the template's end-of-sequence token and what follows: one is added later.
    return prompt, [text[len(prompt) :].split(tokenizer.eos_token)[0] for text in whole]


def _rendered(tokenizer, messages: list[dict], **options) -> str:
    """Render with the tokenizer's chat template. Raises ConversationError for any error in the template."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program, and may raise any error
        roles = ", ".join(message["role"] for message in messages)
        raise ConversationError(
            f"template: the tokenizer's chat template refuses a conversation of {roles}: {first_line(error).rstrip('.')}."
        ) from error


def _holds(text: str, content: str) -> bool:
    """Whether a text holds another one, white space aside."""
    return content.strip() in text or "".join(content.split()) in "".join(text.split())


def _first_difference(one: str, other: str) -> str:
    at = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"at character {at}: {one[at : at + 20]!r} and {other[at : at + 20]!r}"
