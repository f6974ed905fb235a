"""Selective activation checkpointing: what is kept, what is computed again, and that no bit changes."""

import random
from contextlib import contextmanager

import pytest
import torch
from torch._higher_order_ops import wrap
from torch.utils._python_dispatch import TorchDispatchMode

from preference_training.modeling.kernels import compile_between_attentions, enable_activation_checkpointing
from preference_training.modeling.loading import disable_dropout
from preference_training.modeling.logprobs import response_scores
from preference_training.modeling.prefix_sharing import block_attention, tree_attention
from preference_training.modeling.prefix_sharing.proof import find_recomputing_failure
from preference_training.modeling.prefix_sharing.sharing import attend_over_tries
from tests.architectures import tiny_models
from tests.modeling.test_block_attention import some_batch
from tests.modeling.test_tree_attention import make

KINDS = [False, "selective", True]
PRODUCTS = {"mm", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu"}


class Operations(TorchDispatchMode):
    """Counts the operations that run under it, by name."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def trained(kind, model_type: str = "llama", compiled: bool = False):
    """A model in training, whose attention goes branch by branch, with a batch."""
    model = make(model_type).train()
    attend_over_tries(model)
    if kind:
        enable_activation_checkpointing(model, kind)
    if compiled:
        compile_between_attentions(model)
    batch = some_batch(random.Random(4))
    batch.layout.by_branches = True
    return model, batch


def step(model, batch):
    """The log-probs of a batch, and the gradients of all weights."""
    logps = response_scores(model, batch)
    logps.sum().backward()
    return [logps.detach(), *(weight.grad for weight in model.parameters())]


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "gemma3_text", "gpt_oss"])
def test_no_bit_of_a_gradient_changes(model_type):
    expected, selective, full = (step(*trained(kind, model_type)) for kind in (False, "selective", True))
    for one, other, third in zip(expected, selective, full, strict=True):
        assert torch.equal(one, other) and torch.equal(one, third)


def test_products_and_attention_run_once_and_norms_and_activations_twice():
    counts = {}
    for kind in KINDS:
        model, batch = trained(kind)
        with Operations() as found:
            step(model, batch)
        counts[kind] = found.names
    products = {kind: sum(name in PRODUCTS for name in names) for kind, names in counts.items()}
    cheap = {kind: sum(name == "rsqrt" for name in names) for kind, names in counts.items()}
    # Two norms in each of two blocks, and one behind them.
    assert cheap == {False: 5, "selective": 9, True: 9}
    assert products[False] == products["selective"] < products[True]


def test_what_is_held_between_the_passes_lies_between_all_and_the_inputs_of_blocks():
    held = {}
    for kind in KINDS:
        model, batch = trained(kind)
        held[kind] = held_after_forward(model, batch)
    assert held[True] < 0.5 * held["selective"]
    assert held["selective"] < 0.75 * held[False]


def held_after_forward(model, batch) -> int:
    """Bytes of the tensors, weights aside, that are alive between forward and backward."""
    from preference_training.dry_run.memory_estimate import StorageCounter

    with StorageCounter(vocabulary=0) as counter:
        for weight in model.parameters():
            weight.view(-1)
        counter.kind = "activations"
        logps = response_scores(model, batch)
        counter.restart()
        held = counter.most()
    assert logps.requires_grad
    return held["activations"]


@contextmanager
def compiled_stand_in(monkeypatch):
    """Attention compiled by inductor, as FlexAttention on a GPU is: its code for CPUs has no gradient. Yields its runs."""
    ran = []
    usual = wrap.InductorCompiledCallable.__init__

    def counted(region, callable_, *args, **kwargs):
        usual(region, lambda inputs: (ran.append(1), callable_(inputs))[1], *args, **kwargs)

    def attend(query, key, value, scale):
        repeat = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(repeat, 1).transpose(2, 3) * scale
        return scores.softmax(-1) @ value.repeat_interleave(repeat, 1)

    torch._dynamo.reset()
    compiled = block_attention.compiled(attend, "inductor")
    monkeypatch.setattr(wrap.InductorCompiledCallable, "__init__", counted)
    attends = lambda query, key, value, scale=None, **_: compiled(query, key, value, scale)  # noqa: E731
    monkeypatch.setattr(block_attention, "compiled_attention", lambda _: attends)
    monkeypatch.setattr(tree_attention, "block_attention_fault", lambda _: None)
    yield ran
    torch._dynamo.reset()


@pytest.mark.long
@pytest.mark.parametrize("compiled", [False, True])
def test_regions_that_inductor_compiled_are_kept_whole(monkeypatch, compiled):
    with compiled_stand_in(monkeypatch) as ran:
        results = []
        for kind in (False, "selective"):
            model, batch = trained(kind, compiled=compiled)
            batch.layout.by_branches = False
            response_scores(model, batch)
            ran.clear()
            logps = response_scores(model, batch)
            forward = len(ran)
            logps.sum().backward()
            # A region is visible, and counted here, within a checkpoint only; backward it is not run again.
            assert len(ran) == forward == {False: 0, "selective": 2 * (4 if compiled else 1)}[kind]
            results.append([logps.detach(), *(weight.grad for weight in model.parameters())])
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


def test_a_model_that_changes_kept_results_in_place_is_refused():
    """Gemma 3n adds to a product in place, behind a view that hides it from torch."""
    model = tiny_models.build("gemma3n_text")
    disable_dropout(model)
    model.autocast_dtype = None
    failure = find_recomputing_failure(model.train(), lambda: enable_activation_checkpointing(model, "selective"))
    assert "gradient would be wrong" in failure


def test_a_model_that_does_not_passes():
    model = make("llama").train()
    model.autocast_dtype = None
    attend_over_tries(model)
    assert find_recomputing_failure(model, lambda: enable_activation_checkpointing(model, "selective")) is None
