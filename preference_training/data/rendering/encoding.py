"""Texts as token ids without special tokens, and spans of characters as spans of tokens."""

import json
from collections.abc import Sequence
from typing import NamedTuple

from preference_training.data.rendering.chat_rendering import Spanned


class ScoredIds(NamedTuple):
    """The token ids of a response of several turns, and the [start, end) spans of it that are scored.

    ends: whether the end-of-sequence token, which is added later, is scored as well. prompt_ids: those of the prompt, if both
    were encoded as one text.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    ends: bool
    prompt_ids: list[int] | None = None


class Encoder:
    """A tokenizer as functions from texts to token ids.

    SentencePiece tokenizers put a space before a text; a response, which continues its prompt, must not get one.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.of_prompts = self.of_responses = None
        if not tokenizer.is_fast:
            return
        backend = tokenizer.backend_tokenizer
        description = json.loads(backend.to_str())
        continuing = description | {part: _without_prefix_space(description[part]) for part in ("normalizer", "pre_tokenizer")}
        same = continuing == description
        self.of_prompts, self.of_responses = backend, backend if same else type(backend).from_str(json.dumps(continuing))
        for each in (self.of_prompts, self.of_responses):
            # A tokenizer's file may enable both.
            each.no_padding()
            each.no_truncation()

    def encode(self, prompts: list[str], responses: list[str]) -> tuple[list[list[int]], list[list[int]]]:
        """The ids of prompts, and of responses that continue prompts."""
        if self.of_prompts is self.of_responses:
            ids = self._batch(self.of_prompts, prompts + responses)
            return ids[: len(prompts)], ids[len(prompts) :]
        return self._batch(self.of_prompts, prompts), self._batch(self.of_responses, responses)

    def _batch(self, backend, texts: list[str]) -> list[list[int]]:
        if backend is None:
            return self.tokenizer(texts, add_special_tokens=False).input_ids if texts else []
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def scored(self, prompt: str | None, responses: Sequence[Spanned]) -> list[ScoredIds]:
        """The ids of responses of several turns; with a prompt, of both as one text, as chat templates are tokenized."""
        if self.of_prompts is None:
            return [self._in_parts(response) for response in responses]
        before = len(prompt) if prompt else 0
        backend = self.of_responses if prompt is None else self.of_prompts
        encoded = backend.encode_batch([(prompt or "") + response.text for response in responses], add_special_tokens=False)
        found = []
        for encoding, (_, spans, ends) in zip(encoded, responses, strict=True):
            start = _token_at(encoding, before) if before else 0
            tokens = [
                (max(first, start) - start, last - start)
                for first, last in (_tokens_of(encoding, begin + before, end + before) for begin, end in spans)
                if max(first, start) < last
            ]
            found.append(ScoredIds(encoding.ids[start:], tokens, ends, None if prompt is None else encoding.ids[:start]))
        return found

    def _in_parts(self, response: Spanned) -> ScoredIds:
        """Encode scored and other parts separately: a tokenizer that is all Python does not tell which token is where."""
        ids: list[int] = []
        spans, at = [], 0
        for start, end in (*response.spans, (len(response.text),) * 2):
            between, scored = self._batch(None, [response.text[at:start], response.text[start:end]])
            ids += between
            spans += [(len(ids), len(ids) + len(scored))] * bool(scored)
            ids += scored
            at = end
        return ScoredIds(ids, spans, response.ends)


def _token_at(encoding, character: int) -> int:
    """The first token that holds a character, or one behind it: some characters are in no token."""
    offsets = encoding.offsets
    return next((k for k in range(_first_guess(encoding, character), len(offsets)) if offsets[k][1] > character), len(offsets))


def _first_guess(encoding, character: int) -> int:
    found = encoding.char_to_token(character)
    return 0 if found is None else found


def _tokens_of(encoding, start: int, end: int) -> tuple[int, int]:
    """The tokens that hold any of the characters [start, end)."""
    first = last = _token_at(encoding, start)
    offsets = encoding.offsets
    while last < len(offsets) and offsets[last][0] < end:
        last += 1
    return first, last


# The settings of a tokenizer's file that put a prefix before a text, with the values that disable it.
NO_PREFIX = {"prepend_scheme": "never", "add_prefix_space": False, "prepend": ""}


def _without_prefix_space(part):
    """A part of a tokenizer's file, without any prefix before a text."""
    if isinstance(part, list):
        return [_without_prefix_space(item) for item in part]
    if not isinstance(part, dict):
        return part
    return {key: NO_PREFIX[key] if key in NO_PREFIX else _without_prefix_space(part[key]) for key in part}
