"""How often FlexAttention is compiled over many batches of other lengths, and whether it is given up on the way."""

import time
from functools import cache

import torch
from torch import nn
from torch._dynamo.utils import counters

from gpu_parts.found import Found, Settings
from gpu_parts.making import FAMILIES, build_config, make_model, packed, random_prompts, wait
from preference_training.batching.packing import PackedBatch
from preference_training.modeling.kernels import compile_between_attentions
from preference_training.modeling.logprobs import response_scores, trie_scores
from preference_training.modeling.prefix_sharing import block_attention, tree_attention
from preference_training.modeling.prefix_sharing.proof import random_tries
from preference_training.modeling.prefix_sharing.sharing import attend_over_tries

CASES = [
    ("llama", "plain"), ("gemma3", "plain"), ("llama", "lora"), ("llama", "checkpointing"), ("llama", "selective"),
    ("llama", "autocast"), ("llama", "compile"), ("llama", "compile, selective"), ("gemma2", "plain"),
]  # fmt: skip
SETTINGS = {
    "plain": [],
    "lora": ["+adapter=lora"],
    "checkpointing": ["activation_checkpointing=true"],
    "selective": ["activation_checkpointing=selective"],
    "compile, selective": ["compile=true", "activation_checkpointing=selective"],
    "autocast": ["model.autocast_dtype=bfloat16"],
    "compile": ["compile=true"],
}
# Two kinds of mask, each with and without gradients, twice: the most that the attention of any of these models may take.
MOST_GRAPHS = 8


def graphs() -> int:
    """How many graphs this process has compiled."""
    return counters["stats"].get("unique_graphs", 0)


def compiling(found: Found, settings: Settings) -> None:
    """Forty batches, each with and without gradients, in every case."""
    if settings.is_cpu:
        pretend_to_be_a_gpu()
    for family, kind in settings.choose(CASES, CASES[:1]):
        found.attempt(f"{family} {kind}", count, family, kind, settings, must=is_right)


def pretend_to_be_a_gpu() -> None:
    """Capture and differentiate FlexAttention whole on a CPU, but execute it operation by operation."""
    import torch.nn.attention.flex_attention as flex

    flex._validate_device = lambda *_: None
    block_attention.compiled_attention = cache(lambda _: block_attention.compiled(flex.flex_attention, "aot_eager"))
    tree_attention.block_attention_fault = lambda _: None


def count(family: str, kind: str, settings: Settings) -> dict:
    """The graphs after the first batches and after the last, graph breaks, and slow steps."""
    torch._dynamo.reset()
    counters.clear()
    block_attention._faults.clear()
    block_attention.compiled_attention.cache_clear()
    dtype = "float32" if kind == "autocast" or settings.is_cpu else "bfloat16"
    model = make_model(build_config(FAMILIES[family], dtype, *SETTINGS[kind]), settings)
    attend_over_tries(model)
    if "compile" in kind:
        compile_between_attentions(model)
    # What a run does first: the proof, on a short batch that is not padded.
    take(model, by_blocks(random_tries(model.config.vocab_size).to(model.compute_device)), trie_scores)
    after, seconds = [], []
    for step in range(settings.choose(40, 3)):
        began = time.perf_counter()
        take(model, by_blocks(some_batch(step, settings)), response_scores)
        wait(settings)
        after.append(graphs())
        seconds.append(round(time.perf_counter() - began, 2))
    return {
        "graphs": {"first": after[0], "fifth": after[:5][-1], "last": after[-1]},
        "graph_breaks": dict(counters["graph_break"]),
        "given_up": dict(block_attention._faults),
        "slow_steps": {step: each for step, each in enumerate(seconds) if each > 1},
        "last_step_seconds": seconds[-1],
        # Of a compiled model also the graphs of its blocks.
        "most_graphs": None if "compile" in kind else MOST_GRAPHS,
    }


def some_batch(step: int, settings: Settings) -> PackedBatch:
    """A batch of a few prompts or of many, with two responses or more."""
    lengths = settings.choose({}, {"prompt": (5, 60), "response": (2, 40)})
    number = settings.choose([1, 2, 4, 8, 16], [1, 2, 3])[step % settings.choose(5, 3)]
    batch = packed(random_prompts(step, number, responses=[2, 3, 3, 8][step % 4], **lengths), settings)
    return batch.for_gpu() if settings.is_cpu else batch


def by_blocks(batch: PackedBatch) -> PackedBatch:
    """The batch with its attention by blocks, also on a CPU."""
    batch.layout.by_branches = False
    return batch


def take(model: nn.Module, batch: PackedBatch, scores) -> None:
    """As in a step: without gradients, then with them."""
    with torch.no_grad():
        scores(model, batch)
    scores(model, batch).sum().backward()
    model.zero_grad(set_to_none=True)


def is_right(result: dict) -> bool:
    """Whether nothing was compiled after the fifth batch, nothing broke, and FlexAttention was not given up."""
    if result["given_up"] or (result["graph_breaks"] and result["most_graphs"]):
        return False
    settled = result["graphs"]["last"] == result["graphs"]["fifth"]
    return settled and (result["most_graphs"] is None or result["graphs"]["last"] <= result["most_graphs"])
