"""Tries: every sequence can be read back, what is shared is stored once, and a token sees its own sequence only."""

import numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_training.batching import tries
from preference_training.batching.tries import (
    BLOCK,
    MIN_SHARED,
    Branch,
    PrefixCounter,
    Trie,
    TrieLayout,
    block_visibility,
    build_trie,
    common_prefix,
)


@st.composite
def families(draw, longest: int = 30, most: int = 8):
    """Sequences that begin alike at random depths, each with its owner: a list of token ids, and a list of owners."""
    sequences: list[list[int]] = [draw(st.lists(st.integers(0, 2), min_size=1, max_size=longest))]
    owners = [0]
    for number in range(draw(st.integers(0, most - 1))):
        other = draw(st.integers(0, number))
        kept = draw(st.integers(0, len(sequences[other])))
        fresh = draw(st.lists(st.integers(0, 2), min_size=int(kept == 0), max_size=longest))
        sequences.append(sequences[other][:kept] + fresh)
        # A prompt has a token at least, so that the sequences of an owner begin alike.
        owners.append(owners[other] if kept else number + 1)
    return sequences, owners


def shared_prefix_tokens(sequences: list[list[int]]) -> int:
    """How many tokens an ideal trie of the sequences has: their distinct non-empty prefixes."""
    return len({tuple(sequence[:length]) for sequence in sequences for length in range(1, len(sequence) + 1)})


@given(families())
def test_every_sequence_is_read_along_its_path_at_the_positions_of_a_plain_sequence(family):
    sequences, owners = family
    trie, ids = build_trie(sequences, owners)
    assert trie.num_tokens == len(ids)
    for number, sequence in enumerate(sequences):
        path = trie.path(number)
        assert [ids[index] for index in path] == sequence
        assert trie.positions[path].tolist() == list(range(len(sequence)))
        assert trie.predecessors[path].tolist() == [-1, *path[:-1].tolist()]


@given(families())
def test_each_tree_stores_each_of_its_prefixes_once(family):
    sequences, owners = family
    _, ids = build_trie(sequences, owners)
    assert len(ids) == sum(shared_prefix_tokens([sequences[n] for n in tree]) for tree in tries.trees(sequences, owners))
    assert sorted(n for tree in tries.trees(sequences, owners) for n in tree) == list(range(len(sequences)))


@given(families())
def test_a_query_sees_a_key_exactly_if_the_key_is_on_its_path(family):
    trie, ids = build_trie(*family)
    index = torch.arange(len(ids))
    layout = TrieLayout(trie, torch.device("cpu"))
    found = layout.may_attend(index[:, None], index[None, :])
    expected = torch.zeros_like(found)
    for path in trie.paths:
        for depth, query in enumerate(path):
            expected[query, path[: depth + 1]] = True
    assert torch.equal(found, expected)


@given(families(), st.integers(1, 9), st.integers(1, 9))
def test_windows_and_chunks_count_positions_not_packed_tokens(family, window, chunk):
    trie, ids = build_trie(*family)
    index, positions = torch.arange(len(ids)), torch.from_numpy(trie.positions)
    layout = TrieLayout(trie, torch.device("cpu"))
    seen = layout.may_attend(index[:, None], index[None, :])
    back = positions[:, None] - positions[None, :]
    assert torch.equal(layout.may_attend(index[:, None], index[None, :], window=window), seen & (back < window))
    same = positions[:, None] // chunk == positions[None, :] // chunk
    assert torch.equal(layout.may_attend(index[:, None], index[None, :], chunk=chunk), seen & same)


@given(families(most=12))
def test_a_count_is_never_below_the_tokens_of_the_trie(family):
    sequences, owners = family
    counter = PrefixCounter()
    for sequence, owner in zip(sequences, owners, strict=True):
        # All that an owner's sequences are sure to share.
        own = [other for other, its in zip(sequences, owners, strict=True) if its == owner]
        counter.add(sequence, owner, min(common_prefix(sequence, other) for other in own))
    assert build_trie(sequences, owners)[0].num_tokens <= counter.num_tokens <= sum(map(len, sequences))


def test_sequences_of_different_owners_share_from_sixteen_tokens_on():
    assert MIN_SHARED == 16
    for length, expected in ((15, 2 * 20), (16, 16 + 2 * 4)):
        sequences = [[7] * length + [k] * (20 - length) for k in (1, 2)]
        assert build_trie(sequences, [0, 1])[0].num_tokens == expected
        assert build_trie(sequences, [0, 0])[0].num_tokens == length + 2 * (20 - length)


def test_conversations_that_part_twice_are_three_branches_at_two_depths():
    start, middle = [5] * 20, [6] * 3
    trie, ids = build_trie([start + middle + [1], start + middle + [2, 2], [*start, 9]], [0, 0, 1])
    assert trie.branches == (Branch(-1, 0, 0, 24), Branch(0, 23, 24, 2), Branch(0, 20, 26, 1))
    assert ids == start + middle + [1] + [2, 2] + [9]
    assert trie.subtree_ends[[0, 19, 20, 23, 24, 26]].tolist() == [27, 27, 26, 24, 26, 27]


def test_equal_sequences_and_beginnings_of_others_need_no_branch():
    trie, ids = build_trie([[1, 2, 3], [1, 2, 3], [1, 2]], [0, 0, 0])
    assert trie.branches == (Branch(-1, 0, 0, 2), Branch(0, 2, 2, 1)) and ids == [1, 2, 3]
    assert trie.ends == ((1, 3), (1, 3), (0, 2))


def test_trees_that_a_third_sequence_connects_are_one():
    long = [3] * 16
    # The second sequence belongs to the first one's owner, and begins like the third.
    assert tries.trees([[3, 1], [3] * 20, long], [0, 0, 1]) == [[0, 2, 1]]
    assert tries.trees([[3, 1], long, [3] * 20], [0, 1, 0]) == [[0, 1, 2]]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(
        st.tuples(st.integers(1, 300), st.lists(st.integers(1, 200), min_size=1, max_size=3)), max_size=4, min_size=1
    ),
    window=st.none() | st.integers(1, 300),
    chunk=st.none() | st.integers(1, 300),
)
def test_blocks_hide_nothing_that_may_be_seen_and_show_in_full_only_what_all_see(lengths, window, chunk):
    sequences, owners = [], []
    for owner, (prompt, responses) in enumerate(lengths):
        for number, length in enumerate(responses):
            sequences.append([owner] * prompt + [10 + number] * length)
            owners.append(owner)
    trie, ids = build_trie(sequences, owners)
    index = torch.arange(len(ids))
    dense = TrieLayout(trie, torch.device("cpu")).may_attend(index[:, None], index[None, :], window, chunk).numpy()
    some, full = block_visibility(trie, window, chunk)
    blocks = -(-len(ids) // BLOCK)
    padded = numpy.zeros((blocks * BLOCK, blocks * BLOCK), bool)
    padded[: len(ids), : len(ids)] = dense
    parts = padded.reshape(blocks, BLOCK, blocks, BLOCK).transpose(0, 2, 1, 3)
    assert not (parts.any((2, 3)) & ~some).any()
    assert not (full & ~parts.all((2, 3))).any()
    if window is None and chunk is None:
        assert (some == parts.any((2, 3))).all() and (full == parts.all((2, 3))).all()


def test_a_trie_without_branches_in_common_is_plain_sequences():
    trie = Trie((Branch(-1, 0, 0, 2), Branch(-1, 0, 2, 3)), ((0, 2), (1, 3)))
    assert trie.subtree_ends.tolist() == [2, 2, 5, 5, 5]
    assert trie.predecessors.tolist() == [-1, 0, -1, 2, 3]
