"""Encode texts by looking words up: they are cut as a byte-level tokenizer cuts them, and each word is encoded once.

The tokenizer itself normalizes and aligns each word anew, which takes four times as long on one core. This holds for texts of
common characters, whose classes no version of Unicode changes, and for the regular expressions of PATTERNS; other texts and
tokenizers are left to the tokenizer.
"""

import json
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate, chain

# Letters of Western and Central European languages, digits and white space, as parts of a character class.
_L, _N, _S = "A-Za-zÀ-ÖØ-öø-ž", "0-9", " \\t\\n\\r"
# ... and punctuation: of these characters, normalization in form C changes none.
COMMON = re.compile(f"[\\t\\n\\r -~{_L}\\u2010-\\u2027]*").fullmatch
_SPACE = f"[{_S}]+(?![^{_S}])|[{_S}]+"
_CALLED = "'(?:[sStTmMdD]|[rRvV][eE]|[lL][lL])"
_NEWER = f"{_CALLED}|[^\\r\\n{_L}{_N}]?[{_L}]+|[{_N}]%s| ?[^{_S}{_L}{_N}]+[\\r\\n]*|[{_S}]*[\\r\\n]+|{_SPACE}"
_NEWER_ORIGINAL = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How tokenizers cut words, and the same for common characters: GPT-2's, built into the step, then Llama 3's and Qwen's.
PATTERNS = {
    "": f"'(?:[stmd]|[rv]e|ll)| ?[{_L}]+| ?[{_N}]+| ?[^{_S}{_L}{_N}]+|{_SPACE}",
    _NEWER_ORIGINAL % "{1,3}": _NEWER % "{1,3}",
    _NEWER_ORIGINAL % "": _NEWER % "",
}
# Words that are kept, at most, and their length.
MOST_WORDS, LONGEST_WORD = 100_000, 40
PROBE = "I'll  say: it's 12345 O'NEIL'S\n\n \tnaïve “words”…  \r\n x=y+1; ÀÉ 'tis\t\n'"


class Words:
    """The words of a tokenizer with their ids; for tokenizers for which `of` finds them."""

    def __init__(self, backend, description: dict, pattern: str):
        self.cut = re.compile(pattern).findall
        added = description["added_tokens"] or []
        found_as_they_are = [token for token in added if not any(token[key] for key in ADDED_OPTIONS)]
        simple, others = ([token["content"] for token in added if (token in found_as_they_are) is are] for are in (True, False))
        others += [unicodedata.normalize("NFC", text) for text in others]
        self.at_added = re.compile(f"({_any_of(simple)})").split if simple else None
        self.other = re.compile(_any_of(others)).search if others else None
        self.ids_of = _Known(backend, {token["content"]: [token["id"]] for token in found_as_they_are}).__getitem__
        self.trims_offsets = '"trim_offsets": true' in json.dumps(description["post_processor"])

    @classmethod
    def of(cls, backend) -> "Words | None":
        """The words of a tokenizer; None where it does more than cut texts into words."""
        description = json.loads(backend.to_str())
        pattern = PATTERNS.get(_pattern_of(description["pre_tokenizer"] or {}))
        model, normalizer = description["model"], description["normalizer"]
        if pattern is None or model["type"] != "BPE" or model["dropout"] or normalizer not in (None, {"type": "NFC"}):
            return None
        words = cls(backend, description, pattern)
        same = all(words.ids(text) == backend.encode(text, add_special_tokens=False).ids for text in (PROBE, PROBE[::-1]))
        return words if same else None

    def ids(self, text: str) -> list[int] | None:
        """The ids of a text; None if it has other characters than common ones."""
        words = self._words(text)
        return None if words is None else [*chain.from_iterable(map(self.ids_of, words))]

    def ids_at(self, text: str, places: list[int]) -> tuple[list[int], list[int]] | None:
        """The ids of a text, and how many are before each place; None also where a place is inside a word."""
        words = None if self.trims_offsets else self._words(text)
        if words is None:
            return None
        found = [*map(self.ids_of, words)]
        starts, counts = ([*accumulate(map(len, parts), initial=0)] for parts in (words, found))
        numbers = [bisect_left(starts, place) for place in places]
        if [starts[number] for number in numbers] != places:
            return None
        return [*chain.from_iterable(found)], [counts[number] for number in numbers]

    def _words(self, text: str) -> list[str] | None:
        """The words and added tokens of a text."""
        if not COMMON(text) or (self.other and self.other(text)):
            return None
        if self.at_added is None:
            return self.cut(text)
        words: list[str] = []
        for place, part in enumerate(self.at_added(text)):
            words += (part,) if place % 2 else self.cut(part)
        return words


class _Known(dict[str, list[int]]):
    """The ids of words that have occurred."""

    def __init__(self, backend, added: dict[str, list[int]]):
        from tokenizers import pre_tokenizers

        super().__init__(added)
        self.model = backend.model
        self.spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str

    def __missing__(self, word: str) -> list[int]:
        [(spelled, _)] = self.spelled(word)
        ids = [token.id for token in self.model.tokenize(spelled)]
        if len(self) < MOST_WORDS and len(word) < LONGEST_WORD:
            self[word] = ids
        return ids


# Of added tokens: those without any are found as they are written, the longest first, before texts are cut.
ADDED_OPTIONS = ("single_word", "lstrip", "rstrip", "normalized")


def _any_of(texts: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))


def _pattern_of(step: dict) -> str | None:
    """The regular expression by which a tokenizer cuts words, "" for GPT-2's; None where it does more."""
    if step.get("type") == "ByteLevel":
        return "" if step["use_regex"] and not step["add_prefix_space"] else None
    kinds = [part["type"] for part in step.get("pretokenizers", ())]
    if kinds != ["Split", "ByteLevel"]:
        return None
    split, spelled = step["pretokenizers"]
    only_spells = not spelled["use_regex"] and not spelled["add_prefix_space"]
    only_splits = split["behavior"] == "Isolated" and not split["invert"]
    return split["pattern"].get("Regex") if only_spells and only_splits else None
