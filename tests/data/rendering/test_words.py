"""Encoding by looking words up: the ids are the tokenizer's, or there are none."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_training.data.preparation import tokenize_records
from preference_training.data.records.record import PreferenceRecord, Turn
from preference_training.data.rendering import encoding
from preference_training.data.rendering.settings import TokenSettings
from preference_training.data.rendering.words import PATTERNS, Words
from preference_training.modeling.tokenizer import byte_level_tokenizer
from tests.support.chat_templates import tokenizer_of

BACKEND = byte_level_tokenizer().backend_tokenizer
GPT_2, *NEWER = PATTERNS
# What the expressions tell apart: contractions, runs of digits, spaces, line ends, punctuation, letters with accents.
PIECES = [
    "'s",
    "'LL",
    "'Re",
    "'",
    "it",
    "O'Neil",
    "1",
    "2345",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    ".",
    "...",
    "“",
    "\u2019",
    "\u2013",
    "é",
    "Ž",
    "ß",
]
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.sampled_from(["<|endoftext|>", "the", "Yes"])), max_size=30).map("".join)


def changed(**parts):
    """The tokenizer with other parts of its file."""
    return type(BACKEND).from_str(json.dumps(json.loads(BACKEND.to_str()) | parts))


def splitting(pattern: str) -> dict:
    """The step that cuts words by a regular expression, and spells their bytes."""
    spelled = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, spelled]}


BACKENDS = [BACKEND, *(changed(pre_tokenizer=splitting(pattern), normalizer={"type": "NFC"}) for pattern in NEWER)]


@pytest.mark.parametrize("backend", BACKENDS, ids=["GPT-2", "Llama 3", "Qwen"])
@settings(deadline=None, max_examples=150)
@given(text=TEXTS)
def test_the_ids_are_those_of_the_tokenizer(backend, text):
    assert Words.of(backend).ids(text) == backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("backend", BACKENDS, ids=["GPT-2", "Llama 3", "Qwen"])
@settings(deadline=None, max_examples=100)
@given(text=TEXTS, data=st.data())
def test_places_between_words_are_places_between_tokens(backend, text, data):
    place = data.draw(st.integers(0, len(text)))
    offsets = backend.encode(text, add_special_tokens=False).offsets
    found = Words.of(backend).ids_at(text, [0, place, len(text)])
    if found is not None:
        _, counts = found
        assert counts == [0, sum(end <= place for _, end in offsets), len(offsets)]
    else:
        # Places before and behind whole texts always are.
        assert 0 < place < len(text)


@pytest.mark.parametrize("text", ["漢字", "e\u0301", "\u00a0", "½", "\x0b", "\u017f", "🙂", "İ日"])
def test_texts_of_other_characters_are_left_to_the_tokenizer(text):
    assert all(Words.of(backend).ids(f"Yes {text}") is None for backend in BACKENDS)


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": splitting(r"\s+|\S+")},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "Lowercase"}},
        {"model": json.loads(BACKEND.to_str())["model"] | {"dropout": 0.1}},
    ],
    ids=["space before texts", "whole texts", "other words", "unknown expression", "no words", "lower case", "dropout"],
)
def test_tokenizers_that_do_more_than_cut_words_are_used_themselves(parts):
    assert Words.of(changed(**parts)) is None


def test_texts_with_an_added_token_that_takes_spaces_with_it_are_left_to_the_tokenizer():
    added = json.loads(BACKEND.to_str())["added_tokens"]
    more = added[0] | {"id": 640, "content": "<mask>", "lstrip": True}
    words = Words.of(changed(added_tokens=[*added, more]))
    assert words.ids("Yes <mask>") is None
    assert words.ids("Yes <|endoftext|>") == BACKEND.encode("Yes <|endoftext|>").ids


@pytest.mark.parametrize("kind", ["targets", "pairs"])
@pytest.mark.parametrize("template", ["chat", "hh"])
def test_records_have_the_same_ids_whatever_the_number_of_cores(kind, template, monkeypatch):
    tokenizer = tokenizer_of("Qwen 2.5")
    turns = (Turn("assistant", "Yes, it's 12."), Turn("user", "Why\n\n “so”?"), Turn("assistant", "漢 no"))
    several = PreferenceRecord((Turn("user", "Is it?"),), [turns, turns[:1]], [(0, 1)], turns, 1, "rows.jsonl, row 1")
    texts = PreferenceRecord("Is it?  ", [" Yes.", " 漢"], [(0, 1)], " Yes.", 2, "rows.jsonl, row 2")
    found = []
    for cores in (1, 64):
        monkeypatch.setattr(encoding, "usable_cores", lambda cores=cores: cores)
        found.append(list(tokenize_records([several, texts], tokenizer, TokenSettings(kind, 200, 100, template=template))))
    assert found[0] == found[1]
    assert len(found[0]) == 2
