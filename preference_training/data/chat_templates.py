"""The prompts of training as a chat template for serving: Jinja, which transformers, vLLM and others read.

A run's template (`data/rows/templates.py`) is brought into one form, `Turns`: what stands before and behind each role's text.
From it come a chat template here, and Ollama's in `modelfile.py`; both write what training wrote.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from preference_training.core.errors import UserError
from preference_training.data.registry import DATASETS, dataset_entries
from preference_training.data.rows.records import Turn
from preference_training.data.rows.templates import ASSISTANT, HUMAN, ConversationError, build_template
from preference_training.data.tokenization import bos_of

# Of a model that continues texts.
PLAIN_PROMPT = "Once upon a time"


# ---- which template a run has -----------------------------------------------------------------------------------------------


def format_of_run(config: dict, wanted: str | None = None) -> tuple[str, str | None]:
    """How a run has written its prompts: (raw, hh, chatml or chat; the system prompt or None), from its configuration.

    wanted is the user's word for the first. Raises UserError where the configuration does not say, or says several things.
    """
    found = {_format_of_entry(entry, config) for entry in dataset_entries(config)}
    if wanted is not None:
        systems = {system for _, system in found if system} if wanted != "raw" else set()
        found = {(wanted, system) for system in systems or {None}}
    names = sorted({str(name) for name, _ in found})
    if len(found) > 1:
        raise UserError(
            f"--template: the data sets of this run are written in several ways ({', '.join(names)}, or with several system "
            "prompts), and a served model has one. Choose it with --template."
        )
    [(name, system)] = found
    if name is None:
        raise UserError(
            "--template: this run has template=null, which leaves texts as they are, and its data set is no named one. "
            "Say how its prompts are written: --template hh (dialogues, and conversations), or raw (texts as they are)."
        )
    return name, system


def _format_of_entry(entry: dict, config: dict) -> tuple[str | None, str | None]:
    name = entry.get("template") or config["template"]
    system = entry.get("system_prompt") or config["system_prompt"] or None
    if name is not None:
        return name, None if name == "raw" else system
    # template=null leaves dialogues as they are, and writes conversations as such.
    dataset = DATASETS.get(entry.get("name"))
    prompts = dataset.prompts if dataset else None
    return ("hh" if prompts else None), (None if prompts == "dialogues" else system)


# Prompts that are looked at to see how they are written.
LOOKED_AT = 200


def format_of_prompts(config: dict, table: Sequence, tokenizer) -> str | None:
    """How a run has written its prompts (`format_of_run`), from its configuration or else from the prompts themselves.

    table: tokenized prompts. None where they are no conversations of one form.
    """
    try:
        return format_of_run(config)[0]
    except UserError:
        pass
    step = max(1, len(table) // LOOKED_AT)
    texts = tokenizer.batch_decode([table[place].prompt_ids for place in range(0, len(table), step)])
    return "hh" if texts and all(HUMAN in text and text.endswith(ASSISTANT) for text in texts) else None


QUESTION = "What is the capital of France?"


def serve_as_trained(name: str | None, tokenizer) -> tuple[str, list[str]]:
    """Let the tokenizer's chat template write prompts as training did; returns an example of one, and notes.

    name is a run's format. Where its prompts are no conversations, or nobody knows, the tokenizer stays as it is, and the
    example is PLAIN_PROMPT.
    """
    if name in ("hh", "chatml"):
        turns = turns_of(name, tokenizer)
        template = chat_template(turns, bool(bos_of(tokenizer)))
        replaced = tokenizer.chat_template not in (None, template)
        tokenizer.chat_template = template
        notes = [f"the tokenizer's own chat template is replaced by {name}, as in training"] if replaced else []
        return turns.text([Turn("user", QUESTION)]), notes
    if name == "chat":
        text, _ = build_template("chat", None, tokenizer)((Turn("user", QUESTION),), [])
        return text.removeprefix(tokenizer.bos_token if bos_of(tokenizer) else ""), []
    return PLAIN_PROMPT, []


def end_tokens(name: str | None, tokenizer) -> list[int]:
    """The tokens that a format puts behind answers, before the end-of-sequence token, where they are one token each."""
    if name not in ("chatml", "chat"):
        return []
    try:
        _, [ended] = build_template(name, None, tokenizer)((Turn("user", "Why?"),), ["Yes"])
    except (ConversationError, UserError):
        return []
    known = tokenizer.get_vocab().get(ended.split("Yes")[-1].strip())
    return [] if known is None else [known]


# ---- turns ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turns:
    """How a conversation is written: what stands before and behind the text of each role, and where the next answer begins.

    opening stands first where there is no system; system is None where systems are not written at all. A blank at the end of
    `assistant[0]` is the answer's own first character, and is not written twice. stops end an answer beside the
    end-of-sequence token. notes are for the user: what could not be carried over.
    """

    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str
    system: tuple[str, str] | None = ("", "")
    opening: str = ""
    stops: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def text(self, turns: Sequence[Turn]) -> str:
        """The prompt that asks for an answer to a conversation."""
        around = {"user": self.user, "assistant": self.assistant} | ({"system": self.system} if self.system else {})
        parts = [self.opening if turns[0].role != "system" else ""]
        for role, content in turns:
            if role in around:
                before, behind = around[role]
                blank = role == "assistant" and before.endswith(" ") and content.startswith(" ")
                parts += [before[: len(before) - blank], content, behind]
        return "".join(parts) + self.answer


def turns_of(name: str, tokenizer) -> Turns:
    """The form of a template of training, by its name: hh, chatml or chat, the tokenizer's own.

    Raises UserError where a chat template does more than to write something before and behind each turn.
    """
    _, [ended] = build_template(name, None, tokenizer)((Turn("user", "Why?"),), ["Yes"])
    end = ended.split("Yes")[-1].strip()
    stops = (end,) if end else ()
    if name == "hh":
        return Turns((f"{HUMAN} ", ""), (f"{ASSISTANT} ", ""), ASSISTANT, stops=(HUMAN,))
    if name == "chatml":
        user, assistant, system = ((f"<|im_start|>{role}\n", "<|im_end|>\n") for role in ("user", "assistant", "system"))
        return Turns(user, assistant, "<|im_start|>assistant\n", system, stops=stops)
    return _turns_of_chat_template(tokenizer, stops)


# Texts that no template has.
SYSTEM, FIRST, ANSWERED, SECOND = "Qsystemq", "Qfirstq", "Qanswerq", "Qsecondq"
PROBES = [
    [("user", "Why is it so?")],
    [("user", "A {{ b }}\n\nc"), ("assistant", "D\n- e"), ("user", "É 你好"), ("assistant", "f"), ("user", "g")],
    [("system", "Be brief."), ("user", "Why?")],
    [("system", "Say\n\nno."), ("user", "h"), ("assistant", "i"), ("user", "j"), ("assistant", "k"), ("user", "l")],
]
EDGES = [("user", " m \n"), ("assistant", "n \n"), ("user", "\no ")]


def _turns_of_chat_template(tokenizer, stops: tuple[str, ...]) -> Turns:
    """The form of the tokenizer's chat template, found by looking at what it writes, and proved on other conversations."""
    template = build_template("chat", None, tokenizer)
    bos = tokenizer.bos_token if bos_of(tokenizer) else ""

    def text_of(turns: Sequence[tuple[str, str]]) -> str:
        # Where the tokenizer puts the beginning of the sequence before a text, the template's own is not a second one.
        return template(tuple(Turn(*turn) for turn in turns), [])[0].removeprefix(bos)

    faithful = None
    try:
        found = _turns_seen(text_of)
        probes = [probe for probe in PROBES if found.system or probe[0][0] != "system"]
        faithful = all(found.text([Turn(*turn) for turn in probe]) == text_of(probe) for probe in probes)
    except (ValueError, ConversationError):
        pass
    if not faithful:
        raise UserError(
            "--template: the tokenizer's chat template does more than to write something before and behind each turn, which is "
            "all that can be carried over. Write the TEMPLATE of the Modelfile by hand, and leave --ollama out."
        )
    notes = []
    if found.system is None:
        notes.append("the chat template has no place for a system: what the system says is left out")
    if found.text([Turn(*turn) for turn in EDGES]) != text_of(EDGES):
        notes.append("the chat template strips blanks around each turn's text; Ollama leaves them where they are")
    if "strftime_now" in tokenizer.chat_template:
        notes.append("the chat template writes the day's date; here it is the day of the export")
    return Turns(found.user, found.assistant, found.answer, found.system, found.opening, stops, tuple(notes))


def _turns_seen(text_of: Callable[[Sequence[tuple[str, str]]], str]) -> Turns:
    """What is written around texts that are known. Raises ValueError where they are not in their places."""
    head, asked = text_of([("user", FIRST)]).split(FIRST)
    long = text_of([("user", FIRST), ("assistant", ANSWERED), ("user", SECOND)])
    _, rest = long.split(FIRST)
    between, rest = rest.split(ANSWERED)
    behind_answer, _ = rest.split(SECOND)
    try:
        whole = text_of([("system", SYSTEM), ("user", FIRST)])
    except ConversationError:
        whole = ""
    before_system, behind_system = None, behind_answer
    if SYSTEM in whole:
        before_system, rest = whole.split(SYSTEM)
        behind_system, _ = rest.split(FIRST)
    before = _shared_end(head, behind_answer, behind_system)
    behind = _shared_end(between[::-1], asked[::-1])[::-1]
    cut = len(before)
    return Turns(
        user=(before, behind),
        assistant=(between[len(behind) :], behind_answer[: len(behind_answer) - cut]),
        answer=asked[len(behind) :],
        system=None if before_system is None else (before_system, behind_system[: len(behind_system) - cut]),
        opening=head[: len(head) - cut],
    )


def _shared_end(*texts: str) -> str:
    """The longest text that all of them end with."""
    first = texts[0]
    return next(first[at:] for at in range(len(first) + 1) if all(text.endswith(first[at:]) for text in texts))


# ---- Jinja ------------------------------------------------------------------------------------------------------------------


def chat_template(turns: Turns, begins: bool) -> str:
    """A chat template, in Jinja, that writes conversations so. begins: with the tokenizer's beginning-of-sequence token."""
    text = "{{ bos_token }}" if begins else ""
    if turns.opening:
        text += f"{{% if messages[0]['role'] != 'system' %}}{_jinja(turns.opening)}{{% endif %}}"
    text += "{% for message in messages %}"
    around = {"system": turns.system, "user": turns.user, "assistant": turns.assistant}
    branches = [(role, parts) for role, parts in around.items() if parts is not None]
    for number, (role, (before, behind)) in enumerate(branches):
        blank = role == "assistant" and before.endswith(" ")
        text += f"{{% {'elif' if number else 'if'} message['role'] == '{role}' %}}{_jinja(before[: len(before) - blank])}"
        if blank:
            text += "{% if not message['content'].startswith(' ') %}{{ ' ' }}{% endif %}"
        text += "{{ message['content'] }}" + _jinja(behind)
    return f"{text}{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{_jinja(turns.answer)}{{% endif %}}"


def _jinja(text: str) -> str:
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
