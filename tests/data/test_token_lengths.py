"""Texts become token ids with exact ends, whatever the tokenizer, and fit into the lengths that a run allows."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_training.core.errors import UserError
from preference_training.data.records.record import PreferenceRecord
from preference_training.data.records.report import DataReport
from preference_training.data.rendering.settings import TokenSettings
from preference_training.data.rows.grouping import BOTH_LABELS
from preference_training.data.tokenization import (
    NOT_SCORED,
    PROMPT_CUT,
    RESPONSE_CUT,
    SAME_IDS_RANKED,
    TokenizedPrompt,
    tokenize_records,
    trainable_part,
    truncate,
)
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


def test_a_prompt_of_which_the_tokenizer_makes_no_token_is_refused_with_its_place():
    from tokenizers.normalizers import Strip

    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.normalizer = Strip()
    with pytest.raises(UserError, match="set, row 1.*empty"):
        tokenized([record(prompt=" ")], tokenizer)


def test_responses_without_a_prompt_follow_the_token_that_begins_a_sequence_or_the_one_that_ends_the_last():
    for tokenizer in (with_bos(adds=True), with_bos(adds=False)):
        [found] = tokenized([record(prompt="")], tokenizer)
        assert found.prompt_ids == [tokenizer.bos_token_id]
    tokenizer = byte_level_tokenizer()
    [found] = tokenized([record(prompt="")], tokenizer)
    assert tokenizer.bos_token_id is None and found.prompt_ids == [tokenizer.eos_token_id]
    assert [tokenizer.decode(response[:-1]) for response in found.responses] == [" yes", " no"]


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


@st.composite
def prompts_with_spans(draw) -> TokenizedPrompt:
    """A prompt whose responses have spans and whose examples, of any kind, have weights."""
    sizes = draw(st.lists(st.integers(1, 12), min_size=2, max_size=4))
    # The k-th response has tokens of its own, so that none are identical.
    responses = [[100 * k + n for n in range(size)] for k, size in enumerate(sizes)]
    cuts = [sorted(draw(st.sets(st.integers(0, size), max_size=4))) for size in sizes]
    index = st.integers(0, len(sizes) - 1)
    examples = draw(st.lists(st.lists(index, min_size=1, max_size=4, unique=True).map(tuple), max_size=4))
    count = len(examples) or len(sizes)
    weights = draw(st.none() | st.just([float(k) for k in range(count)]))
    spans = [list(zip(cut[::2], cut[1::2], strict=False)) for cut in cuts]
    return TokenizedPrompt(list(range(1000, 1000 + draw(lengths))), responses, examples, spans=spans, weights=weights)


def scored_tokens(prompt: TokenizedPrompt) -> list[list[int]]:
    """The scored tokens of each response."""
    return [
        [token for start, end in spans for token in response[start:end]]
        for response, spans in zip(prompt.responses, prompt.spans, strict=True)
    ]


@settings(deadline=None)
@given(
    prompt=prompts_with_spans(),
    mode=st.sampled_from(["keep_start", "keep_end", "drop"]),
    room=st.integers(1, 15),
    max_prompt_length=st.integers(1, 15),
)
def test_spans_and_weights_stay_with_their_responses_and_examples(prompt, mode, room, max_prompt_length):
    report, max_length = DataReport(), max_prompt_length + room
    left = trainable_part(prompt, TokenSettings("pairs", max_length, max_prompt_length, mode), 0, report)
    skipped = sum(report.left_out.get(reason, 0) for reason in (NOT_SCORED, f"longer than max_length, {max_length} tokens"))
    if left is None:
        assert skipped == prompt.num_examples
        return
    assert left.num_examples + skipped == prompt.num_examples
    before = {response[0]: tokens for response, tokens in zip(prompt.responses, scored_tokens(prompt), strict=True)}
    for response, tokens in zip(left.responses, scored_tokens(left), strict=True):
        # Scored as before, as far as the response is still there.
        assert tokens == [token for token in before[response[0]] if token in response]
    assert all(scored_tokens(left)[index] for k in range(left.num_examples) for index in left.members(k))
    for k, weight in enumerate(left.weights or ()):
        # A weight is the number of its example, whose members are in the same order.
        members = [left.responses[index][0] for index in left.members(k)]
        before = [prompt.responses[index][0] for index in prompt.members(int(weight))]
        assert members == [first for first in before if first in members]


def test_an_example_of_which_a_response_has_no_scored_token_is_skipped_and_counted():
    report, of = DataReport(), TokenSettings("pairs", 6, 3)
    prompt = TokenizedPrompt([1, 2, 3, 4], [[5] * 5, [6] * 5, [7] * 5], [(0, 1), (0, 2)], margins=[1.0, 2.0])
    # Three tokens of each response fit behind three of the prompt.
    left = trainable_part(replace(prompt, spans=[[(0, 2)], [(4, 5)], [(1, 5)]]), of, 0, report)
    assert (left.responses, left.examples, left.margins) == ([[5] * 3, [7] * 3], [(0, 1)], [2.0])
    assert (left.spans, report.left_out) == ([[(0, 2)], [(1, 3)]], {NOT_SCORED: 1})
    assert report.changed == {PROMPT_CUT: 1, RESPONSE_CUT: 2}
    targets = TokenizedPrompt([1], [[5, 0]], [], spans=[[]])
    assert trainable_part(targets, TokenSettings("targets", 6, 3), 0, report) is None and report.left_out == {NOT_SCORED: 2}


def test_a_ranking_loses_what_is_too_long_or_identical_and_stays_while_two_are_left():
    report, of = DataReport(), TokenSettings("rankings", 6, 3, "drop")
    prompt = TokenizedPrompt([1, 2], [[5, 0], [6] * 9, [7, 0], [5, 0]], [(2, 1, 0, 3)])
    left = trainable_part(prompt, of, 0, report)
    assert (left.responses, left.examples) == ([[5, 0], [7, 0]], [(1, 0)])
    assert report.left_out == {"a response of a ranking is longer than max_length, 6 tokens": 1, SAME_IDS_RANKED: 1}
    assert trainable_part(replace(prompt, examples=[(0, 1, 3)]), of, 0, DataReport()) is None


def test_labeled_responses_of_the_same_ids_stay_unless_their_labels_differ():
    report, of = DataReport(), TokenSettings("labels", 64, 32)
    prompt = TokenizedPrompt([1], [[5, 0], [6, 0], [5, 0], [6, 0]], [(0,), (1,), (2,), (3,)], labels=[1.0, 0.0, 1.0, 1.0])
    left = trainable_part(prompt, of, 0, report)
    assert (left.responses, left.examples, left.labels) == ([[5, 0]], [(0,), (0,)], [1.0, 1.0])
    assert report.left_out == {BOTH_LABELS: 2}


def test_identical_ids_with_other_scored_spans_are_other_responses():
    prompt = TokenizedPrompt([1], [[5, 6], [5, 6]], [(0, 1)], spans=[[(0, 1)], [(1, 2)]])
    assert trainable_part(prompt, TokenSettings("pairs", 64, 32), 0, DataReport()) == prompt
    same = replace(prompt, spans=[[(0, 1)], [(0, 1)]])
    assert trainable_part(same, TokenSettings("pairs", 64, 32), 0, DataReport()) is None


def test_drop_skips_long_responses_and_only_their_pairs():
    prompt = TokenizedPrompt([1, 2], [[5, 0], [6] * 9 + [0], [7, 0]], [(0, 1), (0, 2)])
    report = DataReport()
    fitted = truncate(prompt, TokenSettings("pairs", 8, 4, "drop"), report)
    assert (fitted.responses, fitted.pairs) == ([[5, 0], [7, 0]], [(0, 1)])
    assert report.lines() == ["1 skipped: longer than max_length, 8 tokens"]
