"""How a conversation becomes the text that a model reads: raw, HH dialogues, ChatML, or the tokenizer's own chat template.

A template turns a prompt and its responses into texts that are tokenized apart and joined. Which special tokens a text begins
and ends with is not decided here but in `tokenization.py`: exactly one beginning-of-sequence token where the tokenizer adds
one, exactly one end-of-sequence token behind each response.
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
    """The tokenizer's chat template does not take a conversation; it may take others."""


# ---- HH dialogues -------------------------------------------------------------------------------------------------------


def split_dialogue(dialogue: str) -> tuple[str, str]:
    """Cut an HH dialogue behind its last "\\n\\nAssistant:": (prompt with that marker, last answer).

    Raises ValueError where there is no such turn.
    """
    at = dialogue.rindex(ASSISTANT) + len(ASSISTANT)
    return dialogue[:at], dialogue[at:]


def parse_dialogue(prompt: str) -> tuple[Turn, ...] | None:
    """The turns of an HH prompt, which ends where the assistant is to answer; None for a text that is no such prompt.

    What stands before the first turn is the system's. The blank behind a marker is not part of a turn.
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
    """The template of a name; None leaves texts as they are and writes conversations as HH dialogues.

    system_prompt stands before conversations that have none of their own; texts that are left as they are get none.
    Raises UserError for `chat` where the tokenizer has no chat template, or none that can be used.
    """
    if name == "chat":
        _check_chat_template(tokenizer)
    render = {"raw": _raw, "hh": _hh, "chatml": _chatml, "chat": _chat, None: _hh}[name]
    if name == "chat":
        render = partial(_chat, opening=opening_of_answers(tokenizer))

    def template(prompt: Prompt, responses: list[str]) -> tuple[str, list[str]]:
        if isinstance(prompt, str) and name in (None, "raw"):
            return prompt, responses
        turns, responses = _conversation(prompt, responses)
        if system_prompt and turns[0].role != "system":
            turns = (Turn("system", system_prompt), *turns)
        return render(turns, responses, tokenizer)

    return template


def _check_chat_template(tokenizer) -> None:
    """Raise UserError where a tokenizer has no chat template, several and none by default, or one that is no template."""
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


def opening_of_answers(tokenizer) -> str:
    """What a tokenizer's chat template writes before an answer, where it does not write that when it is asked to begin one.

    Empty for most: their prompts end with it when add_generation_prompt asks for it.
    """
    question, answer = {"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}
    try:
        asked, to_be_answered = (_rendered(tokenizer, [question], add_generation_prompt=wanted) for wanted in (False, True))
        whole = _rendered(tokenizer, [question, answer])
    except ConversationError:
        return ""  # It may take other conversations: the data's own say so, with their rows.
    before, found, _ = whole.removeprefix(asked).partition(answer["content"])
    knows = asked != to_be_answered or not found or not whole.startswith(asked)
    return "" if knows or not before.strip() else before


def _check_syntax(tokenizer) -> None:
    """Raise UserError for a chat template that is no Jinja template."""
    from jinja2.exceptions import TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a question"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise UserError(
            f"template: the tokenizer's chat template is broken, line {error.lineno}: {first_line(error)}. Correct it, or use "
            "template=chatml, hh or raw."
        ) from error
    except Exception:  # what it refuses is told with the data's own conversations
        return


def user_markers(tokenizer) -> list[str]:
    """What stands before each turn of the user's in texts of the templates, the tokenizer's own chat template among them."""
    markers = [HUMAN, "<|im_start|>user"]
    if tokenizer.chat_template:
        texts = "first question", "an answer", "second question"
        roles = "user", "assistant", "user"
        with suppress(ConversationError):
            whole = _rendered(tokenizer, [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)])
            before, between = whole.split(texts[0])[0], whole.split(texts[2])[0]
            alike = takewhile(lambda letters: letters[0] == letters[1], zip(reversed(before), reversed(between), strict=False))
            marker = "".join(letter for letter, _ in alike)[::-1].strip()
            markers += [marker] * bool(marker)
    return markers


def _conversation(prompt: Prompt, responses: list[str]) -> tuple[tuple[Turn, ...], list[str]]:
    """Turns of any prompt: an HH dialogue's, a conversation's, or one turn of the user's."""
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
    # Where <|im_end|> is the end-of-sequence token itself, it is put behind the response later, once.
    end = "" if tokenizer.eos_token == "<|im_end|>" else "<|im_end|>"
    return f"{text}<|im_start|>assistant\n", [response + end for response in responses]


def _chat(turns: tuple[Turn, ...], responses: list[str], tokenizer, opening: str) -> tuple[str, list[str]]:
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    prompt = _rendered(tokenizer, messages, add_generation_prompt=True) + opening
    for number, turn in enumerate(turns, start=1):
        # What an assistant thought in earlier turns is left out by design.
        if turn.role != "assistant" and not _holds(prompt, turn.content):
            raise ConversationError(
                f"template: the tokenizer's chat template leaves out what turn {number} says, the {turn.role}'s. Use "
                "template=chatml or hh, or rows without such a turn."
            )
    whole = [_rendered(tokenizer, [*messages, {"role": "assistant", "content": response}]) for response in responses]
    for text, response in zip(whole, responses, strict=True):
        if not _holds(text, response):
            raise ConversationError(
                "template: the tokenizer's chat template leaves out a part of the answer (what was thought, as a rule). Use "
                "template=chatml or hh, or answers without that part."
            )
        if not text.startswith(prompt):
            raise UserError(
                "template: the tokenizer's chat template writes a prompt differently once it is answered "
                f"({_first_difference(prompt, text)}), so that prompt and response cannot be told apart. "
                "Use template=chatml or hh."
            )
    # The template's own end-of-sequence token goes, with what follows it: one is put behind the response later.
    return prompt, [text[len(prompt) :].split(tokenizer.eos_token)[0] for text in whole]


def _rendered(tokenizer, messages: list[dict], **options) -> str:
    """The text of the tokenizer's chat template. Raises ConversationError, whatever the template stumbles over."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program: beside Jinja's own errors it raises Python's
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
