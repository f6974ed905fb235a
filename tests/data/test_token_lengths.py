"""Texts become token ids with exact ends, whatever the tokenizer, and fit into the lengths that a run allows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preference_training.core.errors import UserError
from preference_training.data.rows.records import DataReport, PreferenceRecord
from preference_training.data.tokenization import RESPONSE_CUT, TokenizedPrompt, TokenSettings, tokenize_records, truncate
from preference_training.modeling.tokenizer import byte_level_tokenizer


def record(prompt="ask", responses=(" yes", " no"), pairs=((0, 1),), target=" yes") -> PreferenceRecord:
    return PreferenceRecord(prompt, list(responses), list(pairs), target, 1, "set, row 1")


def tokenized(records, tokenizer, examples="pairs", max_length=64, max_prompt_length=32, mode="keep_start"):
    return list(tokenize_records(records, tokenizer, TokenSettings(examples, max_length, max_prompt_length, mode)))


# ---- tokenization -------------------------------------------------------------------------------------------------------


def test_tokenization_and_truncation_equal_the_golden_ones(golden, tokenizer):
    for case in golden("tokenization.json"):
        row = record(case["prompt"], (case["chosen"], case["rejected"]))
        [found] = tokenized([row], tokenizer, True, case["max_length"], case["max_prompt_length"], case["truncation_mode"])
        assert found.prompt_ids == case["expect"]["prompt_input_ids"]
        for response, name in zip(found.responses, ("chosen", "rejected"), strict=True):
            assert found.prompt_ids + response == case["expect"][f"{name}_input_ids"]
            assert [-100] * len(found.prompt_ids) + response == case["expect"][f"{name}_labels"]


def test_each_response_ends_with_exactly_one_end_of_sequence_token(tokenizer):
    [found] = tokenized([record()], tokenizer)
    for response in found.responses:
        assert response.count(tokenizer.eos_token_id) == 1 and response[-1] == tokenizer.eos_token_id


def with_bos(adds: bool):
    """A byte-level tokenizer with a beginning-of-sequence token, which it adds by itself or not."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    if adds:
        template = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


@pytest.mark.parametrize("prompt", ["ask", "<s>ask"])
def test_the_prompt_starts_with_exactly_one_bos_where_the_tokenizer_adds_one(prompt):
    tokenizer = with_bos(adds=True)
    [found] = tokenized([record(prompt)], tokenizer)
    assert found.prompt_ids[0] == tokenizer.bos_token_id
    assert [found.prompt_ids, *found.responses] == [
        [tokenizer.bos_token_id, *tokenizer("ask", add_special_tokens=False).input_ids],
        *([*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for text in (" yes", " no")),
    ]


def test_no_bos_is_added_where_the_tokenizer_adds_none():
    tokenizer = with_bos(adds=False)
    assert tokenizer.bos_token_id not in tokenized([record()], tokenizer)[0].prompt_ids


def test_sft_keeps_the_target_alone(tokenizer):
    [found] = tokenized([record(target=" no")], tokenizer, examples="targets")
    assert found.pairs == [] and found.num_examples == 1
    assert tokenizer.decode(found.responses[0][:-1]) == " no"


def test_responses_in_no_pair_are_not_computed(tokenizer):
    [found] = tokenized([record(responses=(" a", " unused", " b"), pairs=((2, 0),))], tokenizer)
    assert [tokenizer.decode(response[:-1]) for response in found.responses] == [" a", " b"]
    assert found.pairs == [(1, 0)]


def test_a_text_with_the_end_of_sequence_token_is_refused_with_its_place(tokenizer):
    with pytest.raises(UserError, match="set, row 1.*endoftext"):
        tokenized([record(responses=(" yes<|endoftext|>", " no"))], tokenizer)


def test_an_empty_prompt_is_refused_with_its_place(tokenizer):
    with pytest.raises(UserError, match="set, row 1.*empty"):
        tokenized([record(prompt="")], tokenizer)


# ---- lengths ------------------------------------------------------------------------------------------------------------

lengths = st.integers(1, 20)


@given(
    prompt=lengths,
    responses=st.lists(lengths, min_size=2, max_size=5),
    mode=st.sampled_from(["keep_start", "keep_end", "drop"]),
    room=st.integers(1, 15),
    max_prompt_length=st.integers(1, 15),
)
def test_what_is_left_fits_and_no_response_is_emptied(prompt, responses, mode, room, max_prompt_length):
    max_length = max_prompt_length + room
    pairs = [(i, j) for i in range(len(responses)) for j in range(i)]
    given_prompt = TokenizedPrompt(list(range(prompt)), [[7] * (n - 1) + [0] for n in responses], pairs)
    report = DataReport()
    fitted = truncate(given_prompt, TokenSettings("pairs", max_length, max_prompt_length, mode), report)
    dropped = sum(report.left_out.values())
    if fitted is None:
        assert mode == "drop" and dropped == len(pairs)
        return
    assert all(len(response) > 0 and len(fitted.prompt_ids) + len(response) <= max_length for response in fitted.responses)
    lost_end = sum(response[-1] != 0 for response in fitted.responses)
    assert lost_end == report.changed.get(RESPONSE_CUT, 0)
    assert len(fitted.pairs) + dropped == len(pairs)
    if mode == "drop":
        assert lost_end == 0 and fitted.prompt_ids == given_prompt.prompt_ids


def test_drop_skips_long_responses_and_only_their_pairs():
    prompt = TokenizedPrompt([1, 2], [[5, 0], [6] * 9 + [0], [7, 0]], [(0, 1), (0, 2)])
    report = DataReport()
    fitted = truncate(prompt, TokenSettings("pairs", 8, 4, "drop"), report)
    assert (fitted.responses, fitted.pairs) == ([[5, 0], [7, 0]], [(0, 1)])
    assert report.lines() == ["1 skipped: longer than max_length, 8 tokens"]
