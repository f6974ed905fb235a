"""The template of an entry of `datasets` that names none: the tokenizer's chat template, where its rows are for a chat model.

Decided once, before anything is tokenized, from the first rows. A run keeps what was decided.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from preference_training.core.errors import UserError
from preference_training.data.entries import Entry, load_records
from preference_training.data.records.record import PreferenceRecord
from preference_training.data.records.report import DataReport
from preference_training.data.rendering.chat_rendering import check_chat_template
from preference_training.data.rows.templates import parse_dialogue, rendered_prompts

FIRST_RECORDS = 64
# What rows are, in messages.
CONVERSATIONS, DIALOGUES = "conversations", "HH dialogues"
QUESTIONS, TEXTS, RENDERED = "prompts with responses", "plain text", "rendered in a template already"
TOKEN_IDS = "token ids"
# Of those that a chat template renders.
FOR_CHAT = (CONVERSATIONS, DIALOGUES, QUESTIONS)
# What only texts hold that some template has rendered, the tokenizer's own aside.
MARKS = (
    "<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|user|>", "<|assistant|>", "<|User|>", "<\uff5cUser\uff5c>",
    "<|START_OF_TURN_TOKEN|>", "[INST]", "### Instruction", "### Response", "\nASSISTANT:", "\nAssistant:",
)  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """The template of an entry, None for texts as they are and conversations as HH dialogues; and why, as a line."""

    template: str | None
    line: str


def choose_templates(entries: Sequence[Entry], tokenizer, cache_dir: str | None = None) -> dict[int, Choice]:
    """What is chosen for the entries without a template, by their numbers; nothing for those that need none."""
    if all(entry.template for entry in entries):
        return {}
    if not tokenizer.chat_template:
        return _without_chat_template(entries, tokenizer, cache_dir)
    try:
        check_chat_template(tokenizer)
    except UserError as error:
        reason = f"null, since the tokenizer's chat template cannot be used: {error}"
        return {number: Choice(None, f"template: {reason}") for number, entry in enumerate(entries) if not entry.template}
    chosen = {}
    for number, entry in enumerate(entries):
        if entry.template is None and (rows := rows_of(entry, tokenizer, cache_dir)):
            chosen[number] = _choice(entry, rows)
    return chosen


def _without_chat_template(entries: Sequence[Entry], tokenizer, cache_dir: str | None) -> dict[int, Choice]:
    """What becomes of conversations of the user's own; named sets say it themselves."""
    own = {n: entry for n, entry in enumerate(entries) if not entry.template and not entry.dataset.prompts}
    return {
        number: Choice(
            None,
            f"template: hh, since the tokenizer has no chat template ({entry.name}: rows are {CONVERSATIONS}); "
            "template=chatml, or model.chat_template=FILE, overrides",
        )
        for number, entry in own.items()
        if rows_of(entry, tokenizer, cache_dir) == CONVERSATIONS
    }


def _choice(entry: Entry, rows: str) -> Choice:
    if rows in FOR_CHAT:
        line = f"template: chat, the tokenizer's own ({entry.name}: rows are {rows}); template=raw|hh|chatml overrides"
        return Choice("chat", line)
    return Choice(None, f"template: none ({entry.name}: rows are {rows})")


def rows_of(entry: Entry, tokenizer, cache_dir: str | None = None) -> str | None:
    """What the rows of an entry are, by the first of them; None where there are none, or they cannot be read."""
    if entry.tokenized_file:
        return TOKEN_IDS
    if declared := entry.dataset.prompts:
        return DIALOGUES if declared == "dialogues" else CONVERSATIONS
    is_rendered = rendered_prompts(tokenizer)

    def kinds_in(split: str) -> Counter[str]:
        records = load_records(entry, split, DataReport(skip_bad_rows=True), cache_dir)
        return Counter(kind_of(record, is_rendered) for record in islice(records, FIRST_RECORDS))

    try:
        # Of a few rows all may be held out.
        kinds = kinds_in("train") or kinds_in("test")
    except UserError:
        # Preparing the data says it.
        return None
    return kinds.most_common(1)[0][0] if kinds else None


def kind_of(record: PreferenceRecord, is_rendered) -> str:
    """What a record is."""
    prompt, responses = record.prompt, [*record.responses, record.sft_target]
    if not isinstance(prompt, str) or any(not isinstance(response, str) for response in responses):
        return CONVERSATIONS
    if is_rendered(prompt):
        return RENDERED
    if parse_dialogue(prompt) is not None:
        return DIALOGUES
    if any(mark in text for mark in MARKS for text in (prompt, *responses) if isinstance(text, str)):
        return RENDERED
    return QUESTIONS if prompt else TEXTS
