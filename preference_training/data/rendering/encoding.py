"""Texts as token ids without special tokens, and spans of characters as spans of tokens."""

import json
from collections.abc import Sequence
from typing import NamedTuple

from preference_training.core.processes import usable_cores
from preference_training.data.rendering.chat_rendering import Spanned
from preference_training.data.rendering.words import Words

# With as many cores, the tokenizer's own threads are faster than looking words up in a single one.
MANY_CORES = 4


class ScoredIds(NamedTuple):
    """The token ids of a response of several turns, and the [start, end) spans of it that are scored.

    ends: whether the end-of-sequence token, which is added later, is scored as well. prompt_ids: those of the prompt, if both
    were encoded as one text.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    ends: bool
    prompt_ids: list[int] | None = None


class Texts(NamedTuple):
    """The texts of a chunk: prompts, responses that continue prompts, and responses of several turns.

    These come with the prompt with which they are encoded as one text, as chat templates are, or None.
    """

    prompts: list[str]
    responses: list[str]
    scored: list[tuple[str | None, Spanned]]


class Ids(NamedTuple):
    """The ids of `Texts`."""

    prompts: list
    responses: list
    scored: list


class Encoder:
    """A tokenizer as functions from texts to token ids.

    SentencePiece tokenizers put a space before a text; a response, which continues its prompt, must not get one.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.of_prompts = self.of_responses = None
        self.words: list[Words | None] = [None, None]
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
        if usable_cores() < MANY_CORES:
            words = Words.of(backend)
            self.words = [words, words if same else Words.of(self.of_responses)]

    def look_up(self, texts: Texts) -> Ids:
        """The ids of the texts that consist of known words; None for the others."""
        of_prompts, of_responses = (words.ids if words else _unknown for words in self.words)
        found = [self._looked_up(prompt, response) for prompt, response in texts.scored]
        return Ids([*map(of_prompts, texts.prompts)], [*map(of_responses, texts.responses)], found)

    def _looked_up(self, prompt: str | None, response: Spanned) -> ScoredIds | None:
        words = self.words[prompt is None]
        text, spans, ends = response
        before = len(prompt) if prompt else 0
        places = [before, *(before + place for span in spans for place in span)]
        found = words.ids_at((prompt or "") + text, places) if words else None
        if found is None:
            return None
        ids, [start, *cuts] = found
        tokens = [(first - start, last - start) for first, last in zip(cuts[::2], cuts[1::2], strict=True) if first < last]
        return ScoredIds(ids[start:], tokens, ends, None if prompt is None else ids[:start])

    def encode(self, texts: Texts) -> Ids:
        """The ids of texts, in the tokenizer's own threads."""
        scored = self._scored(texts.scored)
        if self.of_prompts is self.of_responses:
            ids = self._batch(self.of_prompts, texts.prompts + texts.responses)
            return Ids(ids[: len(texts.prompts)], ids[len(texts.prompts) :], scored)
        return Ids(self._batch(self.of_prompts, texts.prompts), self._batch(self.of_responses, texts.responses), scored)

    def _batch(self, backend, texts: list[str]) -> list[list[int]]:
        if backend is None:
            return self.tokenizer(texts, add_special_tokens=False).input_ids if texts else []
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _scored(self, scored: Sequence[tuple[str | None, Spanned]]) -> list[ScoredIds]:
        """The ids of responses of several turns; with a prompt, of both as one text."""
        if self.of_prompts is None:
            return [self._in_parts(response) for _, response in scored]
        found: dict[int, ScoredIds] = {}
        for backend, alone in ((self.of_prompts, False), (self.of_responses, True)):
            places = [place for place, (prompt, _) in enumerate(scored) if (prompt is None) is alone]
            whole = [(scored[place][0] or "") + scored[place][1].text for place in places]
            encoded = backend.encode_batch(whole, add_special_tokens=False) if places else ()
            found |= {place: _scored_ids(encoding, *scored[place]) for place, encoding in zip(places, encoded, strict=True)}
        return [found[place] for place in range(len(scored))]

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


def _unknown(_text: str) -> None:
    """Without known words."""


def _scored_ids(encoding, prompt: str | None, response: Spanned) -> ScoredIds:
    """The ids of a response in the encoding of it alone, or behind a prompt."""
    ids, offsets = encoding.ids, encoding.offsets
    before = len(prompt) if prompt else 0
    starts, ends = zip(*offsets, strict=True) if offsets else ((), ())
    start = _token_at(encoding, ends, before) if before else 0
    tokens = []
    for begin, end in response.spans:
        first = last = _token_at(encoding, ends, begin + before)
        while last < len(starts) and starts[last] < end + before:
            last += 1
        if max(first, start) < last:
            tokens.append((max(first, start) - start, last - start))
    return ScoredIds(ids[start:], tokens, response.ends, None if prompt is None else ids[:start])


def _token_at(encoding, ends: Sequence[int], character: int) -> int:
    """The first token that holds a character, or one behind it: some characters are in no token."""
    guess = encoding.char_to_token(character) or 0
    return next((k for k in range(guess, len(ends)) if ends[k] > character), len(ends))


# The settings of a tokenizer's file that put a prefix before a text, with the values that disable it.
NO_PREFIX = {"prepend_scheme": "never", "add_prefix_space": False, "prepend": ""}


def _without_prefix_space(part):
    """A part of a tokenizer's file, without any prefix before a text."""
    if isinstance(part, list):
        return [_without_prefix_space(item) for item in part]
    if not isinstance(part, dict):
        return part
    return {key: NO_PREFIX[key] if key in NO_PREFIX else _without_prefix_space(part[key]) for key in part}
