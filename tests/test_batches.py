"""Text to token ids, token ids to packed batches, and the order in which a run sees them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batches import BatchIterator, LengthReport, TokenizedPrompt, evaluation_batches, examples_of, fit, pack, tokenize_records
from models import byte_level_tokenizer
from preference_datasets import PreferenceRecord
from utils import UserError


def record(prompt="ask", responses=(" yes", " no"), pairs=((0, 1),), target=" yes", mode="keep_start") -> PreferenceRecord:
    return PreferenceRecord(prompt, list(responses), list(pairs), target, mode, "set, row 1")


def tokenized(records, tokenizer, paired=True, max_length=64, max_prompt_length=32, **options):
    return list(tokenize_records(records, tokenizer, paired, max_length, max_prompt_length, **options))


# ---- tokenisation -------------------------------------------------------------------------------------------------------


def test_tokenisation_and_truncation_equal_the_golden_ones(golden, tokenizer):
    for case in golden("tokenization.json"):
        row = record(case["prompt"], (case["chosen"], case["rejected"]), mode=case["truncation_mode"])
        [found] = tokenized([row], tokenizer, True, case["max_length"], case["max_prompt_length"])
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
def test_the_prompt_begins_with_exactly_one_bos_where_the_tokenizer_adds_one(prompt):
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
    [found] = tokenized([record(target=" no")], tokenizer, paired=False)
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
    given_prompt = TokenizedPrompt(list(range(prompt)), [[7] * (n - 1) + [0] for n in responses], pairs, "", "")
    report = LengthReport()
    fitted = fit(given_prompt, max_length, max_prompt_length, mode, report)
    if fitted is None:
        assert mode == "drop" and report.examples_dropped == len(pairs)
        return
    assert all(len(response) > 0 and len(fitted.prompt_ids) + len(response) <= max_length for response in fitted.responses)
    lost_end = sum(response[-1] != 0 for response in fitted.responses)
    assert lost_end == report.responses_cut
    assert len(fitted.pairs) + report.examples_dropped == len(pairs)
    if mode == "drop":
        assert lost_end == 0 and fitted.prompt_ids == given_prompt.prompt_ids


def test_drop_leaves_out_long_responses_and_only_their_pairs():
    prompt = TokenizedPrompt([1, 2], [[5, 0], [6] * 9 + [0], [7, 0]], [(0, 1), (0, 2)], "", "")
    report = LengthReport()
    fitted = fit(prompt, 8, 4, "drop", report)
    assert (fitted.responses, fitted.pairs, report.examples_dropped) == ([[5, 0], [7, 0]], [(0, 1)], 1)
    assert str(report) == "1 examples left out"


# ---- packing ------------------------------------------------------------------------------------------------------------


def some_prompts(count: int, pairs: int = 1) -> list[TokenizedPrompt]:
    """Prompts that differ in every token, with `pairs` + 1 responses, the first of which wins every pair."""
    return [
        TokenizedPrompt(
            [100 * n, 100 * n + 1],
            [[100 * n + 10 + k, 0] for k in range(pairs + 1)],
            [(0, k + 1) for k in range(pairs)],
            f"row {n}",
            "",
        )
        for n in range(count)
    ]


def test_a_pack_holds_prompts_and_shared_responses_once_at_their_positions():
    [prompt] = some_prompts(1, pairs=2)
    batch = pack(list(examples_of([prompt])))
    assert batch.input_ids.tolist() == [0, 1, 10, 0, 11, 0, 12, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 2, 3, 2, 3]
    assert batch.pairs.tolist() == [[0, 1], [0, 2]]
    assert batch.response_lengths.tolist() == [2, 2, 2]
    assert batch.trees[0].response_starts == [2, 4, 6] and batch.trees[0].end == 8


def test_responses_are_numbered_through_the_batch():
    batch = pack(list(examples_of(some_prompts(3))))
    assert batch.pairs.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert [tree.start for tree in batch.trees] == [0, 6, 12]
    assert batch.num_examples == 3


@given(st.data())
def test_any_examples_can_be_read_back_from_their_pack(data):
    prompts = [
        TokenizedPrompt(
            data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=4)),
            data.draw(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=4), min_size=2, max_size=4)),
            [(0, 1), (1, 0)],
            "",
            "",
        )
        for _ in range(data.draw(st.integers(1, 4)))
    ]
    examples = data.draw(st.permutations(list(examples_of(prompts))))
    batch = pack(examples)
    spans = [
        (
            batch.input_ids[tree.start : tree.start + tree.prompt_length].tolist(),
            batch.input_ids[start : start + length].tolist(),
        )
        for tree in batch.trees
        for start, length in zip(tree.response_starts, tree.response_lengths, strict=True)
    ]
    for (prompt, pair), numbers in zip(examples, batch.pairs.tolist(), strict=True):
        assert [spans[number] for number in numbers] == [(prompt.prompt_ids, prompt.responses[index]) for index in pair]


# ---- the order of a run ---------------------------------------------------------------------------------------------------


def sources(batches) -> list[list[str]]:
    return [[source for part in batch for piece in part for source in piece.sources] for batch in batches]


def test_an_epoch_sees_every_example_once_and_the_last_batch_is_what_is_left():
    seen = sources(BatchIterator(some_prompts(10, pairs=3), 8, 2))
    assert [len(batch) for batch in seen] == [8, 8, 8, 6]
    assert sorted(source for batch in seen for source in batch) == sorted(f"row {n}" for n in range(10) for _ in range(3))


def test_the_pairs_of_a_prompt_share_its_tokens_within_a_micro_batch():
    [[[batch]]] = BatchIterator(some_prompts(2, pairs=3), 6)
    assert [len(tree.response_lengths) for tree in batch.trees] == [4, 4]


def test_epochs_differ_in_order_and_seeds_too_but_not_runs():
    order = lambda **options: sources(BatchIterator(some_prompts(20), 20, n_epochs=2, **options))  # noqa: E731
    first, second = order(seed=1)
    assert first != second
    assert order(seed=1) == [first, second] != order(seed=2)


def test_n_examples_ends_the_run_exactly_there_also_across_epochs():
    iterator = BatchIterator(some_prompts(5), 4, n_epochs=None, n_examples=13)
    assert [len(batch) for batch in sources(iterator)] == [4, 1, 4, 1, 3]
    assert iterator.total_examples == 13


@given(prompts=st.integers(1, 9), pairs=st.integers(1, 3), size=st.integers(1, 5), stop=st.integers(1, 30))
def test_an_iterator_continues_from_any_saved_position(prompts, pairs, size, stop):
    make = lambda: BatchIterator(some_prompts(prompts, pairs), size, n_epochs=3)  # noqa: E731
    whole = sources(make())
    interrupted, seen = make(), []
    for batch in interrupted:
        seen.append(batch)
        if len(seen) == stop:
            break
    continued = make()
    continued.load_state_dict(interrupted.state_dict())
    assert sources(seen) + sources(continued) == whole


def test_evaluation_takes_the_same_examples_every_time_and_keeps_the_partial_batch():
    batches = evaluation_batches(some_prompts(30), 4, 10, seed=0)
    assert [batch.num_examples for batch in batches] == [4, 4, 2]
    again = evaluation_batches(some_prompts(30), 4, 10, seed=0)
    assert [batch.sources for batch in again] == [batch.sources for batch in batches]
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(batches, again, strict=True))


def test_sft_batches_have_no_pairs():
    [[[batch]]] = BatchIterator([replace(prompt, responses=prompt.responses[:1], pairs=[]) for prompt in some_prompts(3)], 3)
    assert batch.pairs.shape == (0, 2) and batch.num_examples == 3
