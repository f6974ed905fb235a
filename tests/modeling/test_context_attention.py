"""Attention of one process's slices of a pack to the keys of all: the rows of attention to the whole pack."""

import itertools
import random

import pytest
import torch

from preference_training.batching.parts import Cut, SlicedLayout
from preference_training.batching.tries import TrieLayout
from preference_training.modeling.prefix_sharing import tree_attention
from preference_training.modeling.prefix_sharing.block_attention import attention_by_blocks
from preference_training.modeling.prefix_sharing.rules import Rules
from preference_training.modeling.prefix_sharing.tree_attention import _attention_by_branches, _attention_of_slices
from tests.modeling.test_block_attention import CPU, blocks, mostly_long, random_inputs, some_trie

__all__ = ["blocks"]

RULES = list(itertools.product([None, 20.0], [None, 40], [None, 64]))


def results(attend, inputs, layout, rules: Rules, weights: torch.Tensor) -> list[torch.Tensor]:
    """The rows of attention, and the gradients of their weighted sum."""
    output = attend(*(each.transpose(1, 2) for each in inputs), layout, rules)
    return [output.transpose(1, 2)[0], *torch.autograd.grad((output.transpose(1, 2)[0] * weights).sum(), inputs)]


def compare_with_the_whole(attend, cut: Cut, rules: Rules) -> None:
    """Rows and gradients of all slices, and of the whole pack: gradients of keys are sums over the processes."""
    parts, total = cut.index.shape[0], cut.index.size
    inputs, weights = random_inputs(total), torch.randn(total, 4, 8)
    expected = results(_attention_by_branches, inputs, TrieLayout(cut.trie, CPU), rules, weights)
    found = [torch.zeros_like(each) for each in expected]
    everything = torch.from_numpy(cut.index.ravel())
    for part in range(parts):
        own = torch.from_numpy(cut.index[part])
        gathered = [inputs[0][:, own], *(each[:, everything] for each in inputs[1:])]
        gathered = [each.detach().requires_grad_() for each in gathered]
        rows, *gradients = results(attend, gathered, SlicedLayout(cut, part, CPU), rules, weights[own])
        found[0][own] = rows
        found[1][:, own] += gradients[0]
        found[2][:, everything] += gradients[1]
        found[3][:, everything] += gradients[2]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def a_cut(parts: int, unit: int, seed: int = 1) -> Cut:
    """A cut of a random trie into slices."""
    for draw in map(random.Random, itertools.count(seed)):
        trie = some_trie(draw).trie
        cut = Cut.of(type(trie)(trie.branches, ()), parts, unit)
        if cut.slice_length is not None:
            return cut
    raise AssertionError


@pytest.mark.parametrize(("softcap", "window", "chunk"), RULES)
@pytest.mark.parametrize("parts", [2, 3])
def test_branches_of_slices_attend_as_in_the_whole_pack(softcap, window, chunk, parts):
    for seed in (1, 50, 100):
        compare_with_the_whole(_attention_of_slices, a_cut(parts, 1, seed), Rules(0.5, window, chunk, softcap, torch.randn(4)))
    compare_with_the_whole(_attention_of_slices, a_cut(parts, 1), Rules(0.5, window, chunk, softcap))


@pytest.mark.parametrize(("window", "chunk"), [(None, None), (40, None), (None, 64)])
def test_long_slices_are_masked_some_rows_at_a_time(monkeypatch, window, chunk):
    monkeypatch.setattr(tree_attention, "LONG_SEQUENCE", 30)
    monkeypatch.setattr(tree_attention, "MASKED_ROWS", 7)
    compare_with_the_whole(_attention_of_slices, a_cut(2, 1), Rules(0.5, window, chunk))


@pytest.mark.parametrize(("softcap", "window", "chunk"), mostly_long(RULES, [(20.0, 40, None)]))
def test_compiled_blocks_of_slices_attend_as_in_the_whole_pack(blocks, softcap, window, chunk):
    compare_with_the_whole(attention_by_blocks, a_cut(2, 128), Rules(0.5, window, chunk, softcap, torch.randn(4)))
