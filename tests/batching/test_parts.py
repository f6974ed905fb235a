"""How the tokens of a pack are divided among the processes that compute it together."""

import random

import numpy
import pytest
import torch

from preference_training.batching.packing import iterate_examples, pack_examples
from preference_training.batching.parts import Cut, SlicedLayout, part_of_pack
from preference_training.batching.tries import Trie, build_trie
from preference_training.data.tokenization import TokenizedPrompt
from tests.support.random_tries import random_prompts


def packs(number: int):
    """Random packs of tries."""
    for seed in range(number):
        yield pack_examples(list(iterate_examples(random_prompts(random.Random(seed), longest=40, most=6))))


def pairs_of_responses(lengths: list[int]) -> list[TokenizedPrompt]:
    """A prompt of one token with two responses for each length of a tree, which is at least 3."""
    return [TokenizedPrompt([90 + k], [[1] * (n // 2), [2] * (n - 1 - n // 2)], [(0, 1)]) for k, n in enumerate(lengths)]


def cut_of(lengths: list[int], parts: int, unit: int = 1) -> Cut:
    """The cut of a pack of trees of these lengths."""
    return Cut.of(pack_examples(list(iterate_examples(pairs_of_responses(lengths)))).trie, parts, unit)


@pytest.mark.parametrize("parts", [2, 3, 8])
@pytest.mark.parametrize("unit", [1, 16])
def test_every_token_is_computed_once_and_by_processes_of_equal_length(parts, unit):
    for pack in packs(10):
        cut = Cut.of(pack.trie, parts, unit)
        tokens = cut.index[cut.index < pack.trie.num_tokens]
        assert sorted(tokens) == list(range(pack.trie.num_tokens))
        assert len(set(cut.index.ravel())) == cut.index.size and cut.index.shape[1] % unit == 0


def test_trees_that_balance_stay_whole_and_others_are_cut():
    # 40 + 20 and 30 + 30 tokens for two processes.
    cut = cut_of([40, 30, 20, 30], 2)
    assert cut.slice_length is None and cut.index.shape == (2, 60)
    # The longest alone has 40 of 60 tokens.
    assert cut_of([40, 10, 10], 2).slice_length == 15
    assert cut_of([40], 2).slice_length == 10


def test_a_process_with_whole_trees_attends_as_if_they_were_all_there_is():
    prompts = pairs_of_responses([40, 30, 20, 30])
    pack = pack_examples(list(iterate_examples(prompts)))
    for part, own in enumerate(([0, 2], [1, 3])):
        found = part_of_pack(pack, part, 2, 1)
        alone = pack_examples(list(iterate_examples(prompts[k] for k in own)))
        assert found.layout.trie.branches == alone.trie.branches
        assert torch.equal(found.input_ids, alone.input_ids) and torch.equal(found.position_ids, alone.position_ids)


def test_of_one_long_row_all_processes_compute_as_many_scores():
    trie, _ = build_trie([list(range(640))], [0])
    cut = Cut.of(trie, 4, 1)
    # A token at position p attends to p + 1 keys. Slices r and 7 - r: the same sum for each r.
    assert set((cut.index + 1).sum(1)) == {640 * 641 // 2 // 4}


@pytest.mark.parametrize("parts", [2, 5])
def test_scored_tokens_are_found_where_they_are_computed(parts):
    for pack in packs(10):
        found = [part_of_pack(pack, part, parts, 1) for part in range(parts)]
        everywhere = torch.cat([part.input_ids[part.predicted_at] for part in found])
        first = found[0]
        assert all(torch.equal(part.scored_places, first.scored_places) for part in found)
        assert torch.equal(everywhere[first.scored_places], pack.input_ids[pack.predicted_at])
        assert torch.equal(torch.cat([part.scored_ids for part in found])[first.scored_places], pack.scored_ids)
        last = torch.cat([part.position_ids[part.last_tokens] for part in found])[first.last_places]
        assert torch.equal(last, pack.position_ids[pack.last_tokens])


def test_padding_for_a_gpu_is_not_divided():
    pack = next(packs(1))
    padded = pack.for_gpu()
    for part in range(2):
        found, expected = part_of_pack(padded, part, 2, 1), part_of_pack(pack, part, 2, 1)
        assert all(torch.equal(found.tensors[name], values) for name, values in expected.tensors.items())


def test_the_pieces_of_a_cut_pack_continue_each_other_as_its_branches_do():
    for pack in packs(10):
        total = pack.trie.num_tokens
        cut = Cut(pack.trie.padded(-(-total // 12) * 12), numpy.arange(-(-total // 12) * 12).reshape(2, -1), 6)
        layout = SlicedLayout(cut, 0, torch.device("cpu"))
        assert all(piece.start // 6 == (piece.start + piece.own - 1) // 6 for piece in layout.pieces)
        seen = {}
        for number, piece in enumerate(layout.pieces):
            packed = [
                numpy.arange(layout.pieces[k].start, layout.pieces[k].start + count) for k, count in layout.sequence(number)
            ]
            seen |= {piece.start + k: numpy.concatenate(packed)[: piece.shared + k + 1] for k in range(piece.own)}
        for path in pack.trie.paths:
            for length, token in enumerate(path, start=1):
                assert numpy.array_equal(seen[int(token)], path[:length])


def test_a_pack_shorter_than_the_number_of_processes_is_padded():
    trie = Trie(build_trie([[1, 2, 3]], [0])[0].branches, ())
    cut = Cut.of(trie, 4, 1)
    assert cut.index.shape == (4, 2)
