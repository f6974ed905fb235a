"""Who is held out: by the text of a prompt, whatever the order of the items."""

import hashlib
from itertools import count, islice

from hypothesis import given, settings
from hypothesis import strategies as st

from preference_training.data.records.held_out import is_held_out, prompt_hash, split_by_hash
from preference_training.data.records.record import Turn
from preference_training.data.records.validation import (
    text_error,
)

# Few different values, so that equal ones meet often.
PROMPTS = st.sampled_from(["p", "q", (Turn("user", "p"),), (Turn("system", "s"), Turn("user", "p"))])
TEXTS = st.text(min_size=1).filter(lambda text: text_error(text) is None)


def test_the_hash_of_a_conversation_is_that_of_its_roles_and_contents():
    digest = hashlib.sha256(b"system\0s\0user\0p").digest()
    assert prompt_hash((Turn("system", "s"), Turn("user", "p"))) == int.from_bytes(digest[:8], "big") / 2**64
    # sha256("abc") begins with ba7816bf 8f01cfea.
    assert prompt_hash("abc") == 0xBA7816BF8F01CFEA / 2**64


@given(prompt=PROMPTS | TEXTS, share=st.floats(0, 1))
def test_a_hash_lies_between_0_and_1_and_a_larger_share_holds_out_all_of_a_smaller_one(prompt, share):
    assert 0 <= prompt_hash(prompt) < 1
    assert not is_held_out(prompt, 0)
    if is_held_out(prompt, share / 2):
        assert is_held_out(prompt, share)


def split_of(items: list, share: float) -> tuple[list, list]:
    return tuple(list(split_by_hash(iter(items), split, share)) for split in ("train", "test"))


def test_without_a_held_out_share_each_item_is_trained_on_once_whatever_it_comes_from():
    items = [("p", {"sft_target": "a"}), ("q", {"sft_target": "b"})]
    assert list(split_by_hash(items, "train", 0)) == items
    assert list(split_by_hash(items, "test", 0)) == []


MANY_PROMPTS = PROMPTS | st.integers(0, 100).map(str) | st.integers(0, 20).map(lambda number: (Turn("user", str(number)),))
SHARES = st.sampled_from([1e-12, 0.01, 0.05, 0.3, 0.9, 0.999])


@settings(max_examples=500)
@given(prompts=st.lists(MANY_PROMPTS, max_size=30), share=SHARES, shuffle=st.randoms(use_true_random=False))
def test_train_and_test_are_disjoint_and_complete_whatever_the_order_of_items(prompts, share, shuffle):
    items = [(prompt, {"number": number}) for number, prompt in enumerate(prompts)]
    train, test = split_of(items, share)
    assert sorted(record["number"] for _, record in train + test) == list(range(len(items)))
    assert all(prompts[record["number"]] == prompt for prompt, record in train + test)
    held_out = {prompt for prompt, _ in test}
    assert not held_out & {prompt for prompt, _ in train}
    # By the hash alone, or where that takes none, the prompt with the smallest one; a single prompt is trained on.
    by_hash = {prompt for prompt in prompts if prompt_hash(prompt) < share}
    smallest = {min(set(prompts), key=prompt_hash)} if len(set(prompts)) > 1 else set()
    assert held_out == (by_hash or smallest)

    shuffle.shuffle(items)
    again_train, again_test = split_of(items, share)
    assert {prompt for prompt, _ in again_test} == held_out
    assert {record["number"] for _, record in again_train} == {record["number"] for _, record in train}


@given(prompts=st.lists(MANY_PROMPTS, max_size=30))
def test_a_share_of_0_holds_out_nothing_and_changes_no_order(prompts):
    items = [(prompt, {}) for prompt in prompts]
    assert split_of(items, 0) == (items, [])


def test_of_two_prompts_one_is_held_out_with_all_its_items_and_a_single_one_is_trained_on():
    twice = [("p", {"number": 0}), ("q", {"number": 1}), ("p", {"number": 2}), ("q", {"number": 3})]
    smaller = min("pq", key=prompt_hash)
    train, test = split_of(twice, 1e-12)
    assert test == [item for item in twice if item[0] == smaller]
    assert train == [item for item in twice if item[0] != smaller]
    single = [("p", {}), ("p", {})]
    assert split_of(single, 1e-12) == (single, [])


def test_items_stream_through_a_split():
    endless = ((str(number), {}) for number in count())
    found = [prompt for prompt, _ in islice(split_by_hash(endless, "test", 0.1), 3)]
    assert found == list(islice((str(number) for number in count() if prompt_hash(str(number)) < 0.1), 3))
    # Before any prompt is held out, only those with the smallest hash so far wait.
    endless = ((str(number), {}) for number in count())
    numbers = [int(prompt) for prompt, _ in islice(split_by_hash(endless, "train", 1e-12), 50)]
    assert len(set(numbers)) == 50
    assert max(numbers) == 50


def test_about_the_share_of_the_prompts_is_held_out():
    items = [(str(number), {}) for number in range(2000)]
    # Binomial(2000, 0.05) has a standard deviation of 9.7; the hash is fixed, so that this cannot fail by chance.
    assert abs(len(split_of(items, 0.05)[1]) - 100) < 40
