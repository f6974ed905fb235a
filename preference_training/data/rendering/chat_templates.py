"""The prompt format of training as a chat template for serving: Jinja, as transformers, vLLM and others read it.

A run's template (`data/rows/templates.py`) becomes a `ConversationFormat`: the text before and after each turn of each role. A
chat template is made from it here, and Ollama's template in `modelfile.py`; both render what training rendered.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from preference_training.core.errors import UserError
from preference_training.data.records.record import Turn
from preference_training.data.registry import DATASETS, dataset_entries
from preference_training.data.rendering.chat_rendering import ConversationError
from preference_training.data.rows.templates import ASSISTANT, HUMAN, build_template, rendered_prompts
from preference_training.data.tokenization import bos_ids

# For a model that continues plain text.
PLAIN_PROMPT = "Once upon a time"


# ---- the format of a run ----------------------------------------------------------------------------------------------------


def run_format(config: dict, requested: str | None = None) -> tuple[str, str | None]:
    """The prompt format of a run, from its configuration: (raw, hh, chatml or chat; the system prompt or None).

    requested: the format that the user chose, if any. Raises UserError where the configuration is ambiguous.
    """
    found = {_entry_format(entry, config) for entry in dataset_entries(config)}
    if requested is not None:
        systems = {system for _, system in found if system} if requested != "raw" else set()
        found = {(requested, system) for system in systems or {None}}
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


def _entry_format(entry: dict, config: dict) -> tuple[str | None, str | None]:
    name = entry.get("template") or config["template"]
    own = entry.get("system_prompt")
    # An empty one of an entry is none, whatever the run's is.
    system = (config["system_prompt"] if own is None else own) or None
    if name is not None:
        return name, None if name == "raw" else system
    # template=null leaves dialogues unchanged, and renders conversations as dialogues.
    dataset = DATASETS.get(entry.get("name"))
    prompts = dataset.prompts if dataset else None
    return ("hh" if prompts else None), (None if prompts == "dialogues" else system)


# Prompts that are inspected to detect their format.
MAX_INSPECTED = 200


def detect_format(config: dict, table: Sequence, tokenizer) -> str | None:
    """The prompt format of a run (`run_format`), from its configuration or else from its tokenized prompts in `table`.

    None unless all prompts are in one format.
    """
    try:
        return run_format(config)[0]
    except UserError:
        # Beside conversations there may be plain text.
        if {_entry_format(entry, config)[0] for entry in dataset_entries(config)} - {None} == {"chat"}:
            return "chat"
    step = max(1, len(table) // MAX_INSPECTED)
    texts = tokenizer.batch_decode([table[place].prompt_ids for place in range(0, len(table), step)])
    if texts and all(HUMAN in text and text.endswith(ASSISTANT) for text in texts):
        return "hh"
    # Without a template conversations are dialogues, so that these are texts, unchanged.
    is_rendered = rendered_prompts(tokenizer)
    if texts and all(is_rendered(text) for text in texts):
        return "chat"
    return "raw" if texts and not any(HUMAN in text or is_rendered(text) for text in texts) else None


QUESTION = "What is the capital of France?"


def serve_as_trained(name: str | None, tokenizer, config: dict) -> tuple[str, list[str]]:
    """Make the tokenizer's chat template render prompts as training did; returns an example prompt, and notes.

    name: the run's format; None leaves the tokenizer as it is. config: the run's configuration, whose system prompt precedes
    conversations without one. The example of a model that continues plain texts is PLAIN_PROMPT.
    """
    if name is None:
        return PLAIN_PROMPT, [f"the chat template is the tokenizer's own, not that of training: {_unknown_format(config)}"]
    own, system, adds_bos = tokenizer.chat_template, _system_prompt(config), bool(bos_ids(tokenizer))
    question = (Turn("user", QUESTION),)
    if name == "chat":
        if system:
            tokenizer.chat_template = _with_system(own, system)
        text, _ = build_template("chat", system, tokenizer)(question, [])
        return text.removeprefix(tokenizer.bos_token if adds_bos else ""), []
    if name == "raw":
        tokenizer.chat_template, text = "{{ bos_token }}" * adds_bos + RAW, PLAIN_PROMPT
    else:
        turns = conversation_format(name, tokenizer)
        if system and turns.system:
            turns = replace(turns, opening=f"{turns.system[0]}{system}{turns.system[1]}")
        tokenizer.chat_template, text = chat_template(turns, adds_bos), turns.text(question)
    replaced = own not in (None, tokenizer.chat_template)
    return text, [f"the tokenizer's own chat template is replaced by {name}, as in training"] if replaced else []


def _unknown_format(config: dict) -> str:
    """Why the format of a run's prompts is unknown."""
    try:
        run_format(config)
    except UserError as error:
        return str(error).removeprefix("--template: ")
    return "its prompts are of several kinds."


def _system_prompt(config: dict) -> str | None:
    """The system prompt that precedes a run's conversations; None where data sets have several."""
    systems = {system for _, system in (_entry_format(entry, config) for entry in dataset_entries(config))}
    return systems.pop() if len(systems) == 1 else None


def _with_system(template: str, system: str) -> str:
    """A chat template that puts a system turn before conversations without one."""
    turn = f"[{{'role': 'system', 'content': {json.dumps(system, ensure_ascii=False)}}}]"
    before = (
        f"{{% if messages[0]['role'] not in ['system', 'developer'] %}}{{% set messages = {turn} + messages %}}{{% endif %}}"
    )
    return template if template.startswith(before) else before + template


def end_tokens(name: str | None, tokenizer) -> list[int]:
    """The token that a format puts after responses, before the end-of-sequence token, if it is a single one; else empty."""
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
class ConversationFormat:
    """How a conversation is rendered: the text before and after each turn of each role, and the generation prompt.

    opening: precedes a conversation without a system turn. system: None if system turns are not rendered. A space at the end of
    `assistant[0]` is the first character of the response, and is not repeated. stops: strings that end a response, besides the
    end-of-sequence token. notes: for the user, on what could not be carried over.
    """

    user: tuple[str, str]
    assistant: tuple[str, str]
    generation_prompt: str
    system: tuple[str, str] | None = ("", "")
    opening: str = ""
    stops: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def text(self, turns: Sequence[Turn]) -> str:
        """The prompt that asks for a response to a conversation."""
        around = {"user": self.user, "assistant": self.assistant} | ({"system": self.system} if self.system else {})
        parts = [self.opening if turns[0].role != "system" else ""]
        for role, content, *_ in turns:
            if role in around:
                before, after = around[role]
                space = role == "assistant" and before.endswith(" ") and content.startswith(" ")
                parts += [before[: len(before) - space], content, after]
        return "".join(parts) + self.generation_prompt


def conversation_format(name: str, tokenizer) -> ConversationFormat:
    """The format of a training template: hh, chatml, or chat (the tokenizer's own).

    Raises UserError where a chat template does more than surround each turn with fixed text.
    """
    _, [ended] = build_template(name, None, tokenizer)((Turn("user", "Why?"),), ["Yes"])
    end = ended.split("Yes")[-1].strip()
    stops = (end,) if end else ()
    if name == "hh":
        return ConversationFormat((f"{HUMAN} ", ""), (f"{ASSISTANT} ", ""), ASSISTANT, stops=(HUMAN,))
    if name == "chatml":
        user, assistant, system = ((f"<|im_start|>{role}\n", "<|im_end|>\n") for role in ("user", "assistant", "system"))
        return ConversationFormat(user, assistant, "<|im_start|>assistant\n", system, stops=stops)
    return _chat_template_format(tokenizer, stops)


# Texts that no template contains.
SYSTEM, FIRST, ANSWERED, SECOND = "Qsystemq", "Qfirstq", "Qanswerq", "Qsecondq"
PROBES = [
    [("user", "Why is it so?")],
    [("user", "A {{ b }}\n\nc"), ("assistant", "D\n- e"), ("user", "É 你好"), ("assistant", "f"), ("user", "g")],
    [("system", "Be brief."), ("user", "Why?")],
    [("system", "Say\n\nno."), ("user", "h"), ("assistant", "i"), ("user", "j"), ("assistant", "k"), ("user", "l")],
]
EDGES = [("user", " m \n"), ("assistant", "n \n"), ("user", "\no ")]


def _chat_template_format(tokenizer, stops: tuple[str, ...]) -> ConversationFormat:
    """The format of the tokenizer's chat template, inferred from its output and verified on other conversations."""
    template = build_template("chat", None, tokenizer)
    bos = tokenizer.bos_token if bos_ids(tokenizer) else ""

    def text_of(turns: Sequence[tuple[str, str]]) -> str:
        # The tokenizer adds the beginning-of-sequence token itself.
        return template(tuple(Turn(*turn) for turn in turns), [])[0].removeprefix(bos)

    faithful = None
    try:
        found = _infer_format(text_of)
        probes = [probe for probe in PROBES if found.system or probe[0][0] != "system"]
        faithful = all(found.text([Turn(*turn) for turn in probe]) == text_of(probe) for probe in probes)
    except (ValueError, ConversationError):
        pass
    if not faithful:
        raise UserError(
            "--template: the tokenizer's chat template does more than surround each turn with fixed text, which is all that "
            "can be carried over. Write the TEMPLATE of the Modelfile by hand, without --ollama."
        )
    notes = []
    if found.system is None:
        notes.append("the chat template does not support a system turn: system prompts are dropped")
    if found.text([Turn(*turn) for turn in EDGES]) != text_of(EDGES):
        notes.append("the chat template strips whitespace around each turn; Ollama keeps it")
    if "strftime_now" in tokenizer.chat_template:
        notes.append("the chat template writes the current date; here it is the date of the export")
    return ConversationFormat(
        found.user, found.assistant, found.generation_prompt, found.system, found.opening, stops, tuple(notes)
    )


def _infer_format(text_of: Callable[[Sequence[tuple[str, str]]], str]) -> ConversationFormat:
    """The text around known turns. Raises ValueError where the turns are not rendered in order."""
    head, asked = text_of([("user", FIRST)]).split(FIRST)
    long = text_of([("user", FIRST), ("assistant", ANSWERED), ("user", SECOND)])
    _, rest = long.split(FIRST)
    between, rest = rest.split(ANSWERED)
    after_response, _ = rest.split(SECOND)
    try:
        whole = text_of([("system", SYSTEM), ("user", FIRST)])
    except ConversationError:
        whole = ""
    before_system, after_system = None, after_response
    if SYSTEM in whole:
        before_system, rest = whole.split(SYSTEM)
        after_system, _ = rest.split(FIRST)
    before = _shared_end(head, after_response, after_system)
    after = _shared_end(between[::-1], asked[::-1])[::-1]
    cut = len(before)
    return ConversationFormat(
        user=(before, after),
        assistant=(between[len(after) :], after_response[: len(after_response) - cut]),
        generation_prompt=asked[len(after) :],
        system=None if before_system is None else (before_system, after_system[: len(after_system) - cut]),
        opening=head[: len(head) - cut],
    )


def _shared_end(*texts: str) -> str:
    """The longest common suffix."""
    first = texts[0]
    return next(first[at:] for at in range(len(first) + 1) if all(text.endswith(first[at:]) for text in texts))


# ---- Jinja ------------------------------------------------------------------------------------------------------------------


# The prompts of `raw`: a text as it is; several messages are a conversation, in which training puts an empty line after each.
RAW = (
    "{% for message in messages %}{{ message['content'] }}{% if messages | length > 1 %}"
    + '{{ "\\n\\n" }}{% endif %}{% endfor %}'
)


def chat_template(turns: ConversationFormat, adds_bos: bool) -> str:
    """A Jinja chat template for a format. adds_bos: it starts with the tokenizer's beginning-of-sequence token."""
    text = "{{ bos_token }}" if adds_bos else ""
    if turns.opening:
        text += f"{{% if messages[0]['role'] != 'system' %}}{_jinja(turns.opening)}{{% endif %}}"
    text += "{% for message in messages %}"
    around = {"system": turns.system, "user": turns.user, "assistant": turns.assistant}
    branches = [(role, parts) for role, parts in around.items() if parts is not None]
    for number, (role, (before, after)) in enumerate(branches):
        space = role == "assistant" and before.endswith(" ")
        text += f"{{% {'elif' if number else 'if'} message['role'] == '{role}' %}}{_jinja(before[: len(before) - space])}"
        if space:
            text += "{% if not message['content'].startswith(' ') %}{{ ' ' }}{% endif %}"
        text += "{{ message['content'] }}" + _jinja(after)
    return f"{text}{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{_jinja(turns.generation_prompt)}{{% endif %}}"


def _jinja(text: str) -> str:
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
