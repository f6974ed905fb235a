"""The attention of a trie in parts: every token that a query sees is in one of them, and nothing else is."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preference_training.batching.attention_parts import AttentionPart, attention_parts
from preference_training.batching.packing import iterate_examples, pack_examples
from preference_training.batching.tries import Branch, Trie, TrieLayout, build_trie
from tests.support.random_tries import random_prompts

CPU = torch.device("cpu")


def chain(depth: int) -> Trie:
    """Sequences each of which continues the one before after all but its last token, and two siblings at the end."""
    sequences = [[1, 2, 3]]
    for token in range(depth):
        sequences.append([*sequences[-1][:-1], 10 + token, 3, 3])
    sequences.append([*sequences[-1][:-1], 90, 91])
    return build_trie(sequences, [0] * len(sequences))[0]


def seen(part: AttentionPart, tokens: int) -> torch.Tensor:
    """How often each query [T] sees each key [T] in a part, from its definition."""
    counts = torch.zeros(tokens, tokens, dtype=torch.int64)
    everything = torch.arange(tokens)
    queries, keys = (everything if each is None else torch.from_numpy(each).long() for each in (part.queries, part.keys))
    for row in range(len(part.query_starts) - 1):
        mine = queries[part.query_starts[row] : part.query_starts[row + 1]]
        theirs = keys[part.key_starts[row] : part.key_starts[row + 1]]
        assert 0 < len(mine) <= part.longest_query and 0 < len(theirs) <= part.longest_key
        counts[mine[:, None], theirs[None, :]] += (mine[:, None] >= theirs[None, :]) if part.is_causal else 1
    return counts


def check(trie: Trie) -> list[AttentionPart]:
    """The parts of a trie, which see together what the mask shows, each pair once."""
    index = torch.arange(trie.num_tokens)
    expected = TrieLayout(trie, CPU).may_attend(index[:, None], index[None, :])
    parts = attention_parts(trie.branches)
    assert torch.equal(sum(seen(part, trie.num_tokens) for part in parts), expected.long())
    for part in parts[1:]:
        assert len(set(part.queries.tolist())) == len(part.queries), "a query is in one row of a part at most"
        assert part.repeats_keys == (len(set(part.keys.tolist())) < len(part.keys))
    return parts


@given(st.randoms(use_true_random=False))
def test_the_parts_of_any_trie_see_every_visible_pair_once(rng):
    check(pack_examples(list(iterate_examples(random_prompts(rng)))).trie)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_there_is_a_part_for_each_level_of_branches(depth):
    trie = chain(depth)
    levels = 0
    for number in range(len(trie.branches)):
        above, count = trie.branches[number].parent, 0
        while above >= 0:
            above, count = trie.branches[above].parent, count + 1
        levels = max(levels, count)
    assert len(check(trie)) == 1 + levels and levels >= 1


def test_branches_that_share_the_same_tokens_are_one_row():
    # A prompt of 4 tokens with three responses, which share no token.
    trie, _ = build_trie([[1, 2, 3, 4, answer, answer] for answer in (5, 6, 7)], [0] * 3)
    own, level = check(trie)
    assert own.query_starts.tolist() == [0, 6, 8, 10] and own.longest_query == 6
    assert level.query_starts.tolist() == [0, 4] and level.keys.tolist() == [0, 1, 2, 3] and not level.repeats_keys


def test_branches_that_share_more_and_less_of_one_sequence_repeat_its_keys():
    trie = Trie((Branch(-1, 0, 0, 5), Branch(0, 4, 5, 2), Branch(0, 2, 7, 3)), ((0, 5), (1, 6), (2, 5)))
    _, level = check(trie)
    assert level.keys.tolist() == [0, 1, 2, 3, 0, 1] and level.key_starts.tolist() == [0, 4, 6] and level.repeats_keys


def test_padding_is_a_row_of_its_own():
    trie = build_trie([[1, 2, 3], [1, 2, 4]], [0, 0])[0].padded(8)
    own, _ = check(trie)
    assert own.query_starts.tolist() == [0, 3, 4, 8]


def test_parts_reach_another_device_in_the_copy_of_their_batch_once_a_layer_has_asked_for_them(monkeypatch):
    monkeypatch.setattr(TrieLayout, "wants_parts", False)
    draw = random.Random(2)
    first, second = (pack_examples(list(iterate_examples(random_prompts(draw)))) for _ in range(2))
    staged = lambda batch: {name for name, *_ in batch.for_gpu().staged.places}  # noqa: E731
    assert not any(name.startswith("part ") for name in staged(first))
    asked = first.layout.parts
    assert asked[0].query_starts.dtype == torch.int32
    names = staged(second)
    assert {"part 0 query_starts", "part 1 queries", "part 1 keys", "part 1 query_starts", "part 1 key_starts"} <= names
    moved = second.for_gpu().to(torch.device("meta"))
    assert set(moved.layout.tensors) >= {name for name in names if name.startswith("part ")}
    assert moved.layout.parts[1].keys is moved.layout.tensors["part 1 keys"]
