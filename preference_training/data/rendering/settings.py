"""What token ids depend on besides text and tokenizer: settings, and the version of the rules."""

from dataclasses import dataclass

from preference_training.losses.base import ExampleKind, MarginUse

# The version of the rules by which rows become token ids, pairs and splits, that is, of all code between loader and
# `PromptTable`. Increment it, and describe the change in VERSIONS, whenever the same rows and settings give different ids,
# pairs, order or splits; never otherwise, since data of an earlier version is prepared again.
# tests/data/test_prepared_versions.py fails if this is forgotten, and says what to do.
VERSION = 2
VERSIONS = {
    1: "a prompt is held out by a hash of its own text, whatever the model reads; pairs of identical token ids are trained on; "
    "a beginning-of-sequence token that only a chat template writes is truncated with the start of a prompt; SFT learns one "
    "response to a prompt",
    2: "a prompt is held out by a hash of what the model reads; pairs of identical token ids are skipped; a truncated prompt "
    "keeps its beginning-of-sequence token; SFT learns the response of each row, and of two that are preferred to each other "
    "the majority's; turns of a prompt field precede conversations, serialized conversations are parsed, instruction includes "
    "input, responses lose a prompt that all repeat, and with implicit_prompt keep the space before them; prompts end with "
    "what a chat template writes before responses",
}


@dataclass(frozen=True)
class TokenSettings:
    """What token ids depend on besides text and tokenizer. Lengths are in tokens.

    examples: what the loss trains on. version: one of VERSIONS, the newest except in resumed runs that started with an earlier
    one. margins: what the loss makes of the margins of pairs. train_on: which of the assistant's turns in a conversation SFT
    learns, "all_turns" or "last_turn".
    """

    examples: ExampleKind
    max_length: int
    max_prompt_length: int
    truncation_mode: str = "keep_start"
    template: str | None = None
    system_prompt: str | None = None
    version: int = VERSION
    margins: MarginUse = "unread"
    train_on: str = "all_turns"
