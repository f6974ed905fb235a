"""Batches prepared for a GPU: padded to whole blocks, in one block of memory, and the same numbers as before."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from preference_training.batching.packing import PackedBatch, iterate_examples, pack_examples
from preference_training.batching.staging import StagedTensors
from preference_training.batching.tries import BLOCK
from preference_training.modeling.logprobs import response_scores
from preference_training.modeling.prefix_sharing.sharing import attend_over_tries
from tests.modeling.test_tree_attention import make
from tests.support.random_tries import random_prompts


class Copies(TorchDispatchMode):
    """Counts copies from one device to another."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += func == torch.ops.aten._to_copy.default and result.device != args[0].device
        return result


def some_batch(seed: int) -> PackedBatch:
    return pack_examples(list(iterate_examples(random_prompts(random.Random(seed)))))


SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
TENSORS = st.lists(st.tuples(SHAPES, st.sampled_from([torch.int64, torch.int32, torch.float32, torch.bool])), max_size=6)


@given(TENSORS, st.integers(0, 9))
def test_any_tensors_come_out_of_the_block_as_they_went_in(shapes, seed):
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        f"tensor {number}": torch.randint(0, 2, shape, generator=draw).to(dtype) for number, (shape, dtype) in enumerate(shapes)
    }
    found = StagedTensors.of(tensors).to(torch.device("cpu"))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_a_batch_and_its_layout_reach_another_device_in_one_copy():
    batch = some_batch(1).for_gpu()
    with Copies() as copies:
        moved = batch.to(torch.device("meta"))
        assert moved.layout.block_mask().kv_indices.device.type == "meta"
        assert moved.input_ids.device.type == moved.layout.subtree_ends.device.type == "meta"
    assert copies.count == 1


@pytest.mark.parametrize("seed", range(5))
def test_padding_is_whole_blocks_that_no_sequence_reads(seed):
    batch = some_batch(seed)
    prepared = batch.for_gpu()
    length = len(prepared.input_ids)
    assert length % BLOCK == 0 and length >= 2 * BLOCK and length == prepared.trie.num_tokens
    assert prepared.num_tokens == batch.num_tokens == len(batch.input_ids)
    assert prepared.num_row_tokens == batch.num_row_tokens
    own = torch.arange(batch.num_tokens)[:, None]
    padding = torch.arange(batch.num_tokens, length)[None, :]
    assert not prepared.layout.may_attend(own, padding).any() and not prepared.layout.may_attend(padding, own).any()


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_prepared_batch_gives_the_log_probs_of_the_batch(model_type):
    model = make(model_type)
    attend_over_tries(model)
    batch = some_batch(7)
    torch.testing.assert_close(response_scores(model, batch.for_gpu()), response_scores(model, batch), rtol=1e-5, atol=1e-5)


def test_a_layout_has_ready_what_layers_have_asked_for():
    first = some_batch(2).for_gpu()
    first.layout.block_mask(7, None)
    second = some_batch(3).for_gpu()
    names = {name for name, *_ in second.staged.places}
    assert {"subtree_ends", "positions", "partial counts 7 None", "full indices 7 None"} <= names
