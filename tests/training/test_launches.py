"""How many operations a step of short rows takes besides the model's own: on a GPU each is a kernel to launch.

The path of a GPU, counted on a CPU: a pack that is padded as there, attention in one operation, views not counted.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from preference_training.batching.micro_batches import MicroBatch
from preference_training.batching.packing import TokenBudget, iterate_examples
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.losses.registry import build_loss
from preference_training.modeling.logprobs import LiveReference, response_scores
from preference_training.modeling.prefix_sharing import tree_attention
from preference_training.modeling.prefix_sharing.sharing import attend_over_tries
from tests.support.building import build_trainer

# What launches no kernel: views, empty memory, notes of the profiler.
FREE = frozenset({
    "view", "_unsafe_view", "t", "transpose", "expand", "unsqueeze", "squeeze", "slice", "select", "detach", "alias", "split",
    "split_with_sizes", "permute", "unbind", "as_strided", "empty", "empty_like", "empty_strided", "new_empty", "is_same_size",
    "_local_scalar_dense", "_record_function_enter_new", "_record_function_exit", "lift_fresh", "scalar_tensor",
})  # fmt: skip
LAYERS = 24


class Launches(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (name := func.overloadpacket.__name__) not in FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def one_kernel(monkeypatch):
    """Attention of a whole pack in one operation, as FlexAttention is; what it attends to does not matter here."""

    def attend(query, key, value, layout, rules):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=rules.scaling, enable_gqa=True)

    monkeypatch.setattr(tree_attention, "attention_by_blocks", attend)
    monkeypatch.setattr(tree_attention, "block_attention_fault", lambda _: None)


def small(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, **sizes)).to(dtype)
    attend_over_tries(model)
    return model


def short_pairs() -> MicroBatch:
    prompts = [TokenizedPrompt([5, 6, 7 + number], [[8, 9, 1], [3, 1]], [(0, 1)]) for number in range(8)]
    found = MicroBatch.of(list(iterate_examples(prompts)), TokenBudget(10**6, 10**6))
    packs = [pack.for_gpu() for pack in found.packs]
    for pack in packs:
        pack.layout.by_branches = False
    return replace(found, packs=packs)


def launches_of_step(compose, dtype: str, *overrides: str) -> tuple[Counter, int]:
    """The operations of a step of DPO, by name, besides those of the models' passes; and the number of trained tensors."""
    config = compose("wandb.enabled=false", "prefix_sharing=on", "optimizer=AdamW", f"model.policy_dtype={dtype}", *overrides)
    policy, reference = small(getattr(torch, dtype)), small(getattr(torch, dtype)).eval().requires_grad_(False)
    step = build_trainer(config, policy, build_loss("dpo", beta=0.1), LiveReference(reference)).step
    batch = short_pairs()
    [pack] = batch.packs
    # The optimizer's state, and caches.
    step.state.updates = 4
    step.take([batch], halve=None)
    with Launches() as whole:
        step.take([batch], halve=None)
    with Launches() as model:
        with torch.no_grad():
            response_scores(reference, pack)
        response_scores(policy, pack).sum().backward()
    return whole.counts - model.counts, sum(1 for _ in policy.parameters())


def test_a_step_takes_few_operations_besides_those_of_its_models(compose, one_kernel):
    counts, weights = launches_of_step(compose, "float32")
    assert weights > 200
    # One for all weights: the norm, the clipped gradient, the count of steps, the update.
    assert [counts[name] for name in ("_foreach_norm", "_foreach_mul_", "_foreach_add_", "_fused_adamw_")] == [1] * 4
    # The loss and its gradient, seven metrics, clipping, and the numbers that are read at the end.
    assert sum(counts.values()) <= 90


def test_master_weights_are_copied_to_the_weights_at_once(compose, one_kernel):
    counts, weights = launches_of_step(compose, "bfloat16", "master_weights=true")
    assert counts["_foreach_copy_"] == 1 and counts["copy_"] == 0
    # Gradients are copied to float32 one by one, so that only one is in memory twice.
    assert sum(counts.values()) <= 90 + weights
