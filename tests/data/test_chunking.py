"""Plain text in chunks: every token is trained on once, behind the one before it."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from preference_training.data.chunking import CHUNKS, text_chunks
from preference_training.data.columns import Columns
from preference_training.data.records.held_out import split_by_hash
from preference_training.data.records.record import PreferenceRecord
from preference_training.data.records.report import DataReport
from preference_training.data.rendering.settings import TokenSettings
from preference_training.data.tokenization import TokenizedPrompt, tokenize_records
from preference_training.modeling.tokenizer import byte_level_tokenizer

BOS = 99


def scored(chunk) -> list[tuple[int, int]]:
    """Each scored token of a chunk, and the one before it."""
    whole = [*chunk.prompt_ids, *chunk.ids]
    [spans] = chunk.spans or [[(0, len(chunk.ids))]]
    first = len(chunk.prompt_ids)
    return [(whole[first + k - 1], whole[first + k]) for start, end in spans for k in range(start, end)]


@given(length=st.integers(1, 60), max_length=st.integers(2, 20), has_bos=st.booleans())
def test_every_token_but_the_first_is_scored_once_behind_the_one_before_it(length, max_length, has_bos):
    text = [BOS, *range(length)] if has_bos else list(range(length + 1))
    chunks = list(text_chunks(text, max_length, BOS))
    assert [pair for chunk in chunks for pair in scored(chunk)] == list(pairwise(text))
    assert all(len(chunk.prompt_ids) + len(chunk.ids) <= max_length for chunk in chunks)
    assert all(len(chunk.prompt_ids) + len(chunk.ids) == max_length for chunk in chunks[:-1])
    if has_bos and max_length > 2:
        assert all(chunk.prompt_ids == [BOS] for chunk in chunks)


def test_the_chunks_of_a_text_are_these():
    assert [tuple(chunk) for chunk in text_chunks([BOS, 1, 2, 3, 4, 5, 6, 7], 4, BOS)] == [
        ([BOS], [1, 2, 3], None),
        ([BOS], [3, 4, 5], [[(1, 3)]]),
        ([BOS], [5, 6, 7], [[(1, 3)]]),
    ]
    assert [tuple(chunk) for chunk in text_chunks([1, 2, 3, 4, 5, 6, 7], 4, BOS)] == [
        ([1], [2, 3, 4], None),
        ([4], [5, 6, 7], None),
    ]


def test_a_text_without_a_prompt_is_tokenized_whole_and_ends_with_the_end_of_sequence():
    tokenizer, report = byte_level_tokenizer(), DataReport()
    settings = TokenSettings("targets", max_length=10, max_prompt_length=5)
    text = "a text of 26 letters, see?"
    record = PreferenceRecord("", [text], [], text, 1, "texts, train prompt 1")
    chunks = list(tokenize_records([record], tokenizer, settings, report))
    first, *others = chunks
    learned = [token for prompt in chunks for token in prompt.responses[0][prompt.spans[0][0][0] if prompt.spans else 0 :]]
    assert learned[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(first.prompt_ids + learned[:-1], skip_special_tokens=True) == text
    assert report.changed == {CHUNKS: len(others)} and len(others) >= 2
    assert {prompt.number for prompt in chunks} == {1}


def test_texts_without_a_prompt_are_held_out_by_themselves():
    items = [("", {"responses": [f"text {n}"], "pairs": [], "sft_target": f"text {n}"}) for n in range(200)]
    train, test = ([record["sft_target"] for _, record in split_by_hash(items, split, 0.2)] for split in ("train", "test"))
    assert sorted(train + test) == sorted(record["sft_target"] for _, record in items)
    # Binomial(200, 0.2): 40 with a standard deviation of 5.7; the hash is fixed.
    assert 20 < len(test) < 60


def test_the_hash_of_a_text_without_a_prompt_is_that_of_the_text():
    texts = [TokenizedPrompt([BOS], [[n, n + 1]], []) for n in (1, 1, 2)]
    first, same, other = Columns.of(texts).prompt_hashes
    assert first == same != other
    prompts = [TokenizedPrompt([BOS, 5], [[n]], []) for n in (1, 2)]
    assert len(set(Columns.of(prompts).prompt_hashes)) == 1
