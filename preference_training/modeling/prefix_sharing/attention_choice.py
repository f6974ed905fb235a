"""Which kernels compute attention over tries on a GPU: FlexAttention's, or flash attention's in parts.

`prefix_attention` says which. auto takes the faster one at the measured shape that is nearest to that of a batch. Whatever may
be used is proved on each model when it is loaded, and given up where it computes something else.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from preference_training.batching.tries import Trie, TrieLayout
from preference_training.modeling.prefix_sharing.block_attention import block_attention_fault, give_up_block_attention
from preference_training.modeling.prefix_sharing.merged_attention import computed_in, scores_of
from preference_training.modeling.prefix_sharing.rules import Rules
from preference_training.modeling.prefix_sharing.varlen_kernels import VarlenKernel, device_refusal, kernels

FLEX, VARLEN, AUTO = "flex", "varlen", "auto"


class Shape(NamedTuple):
    """What decides which attention is faster: the size of heads, branches a tree, levels of branches on each other."""

    head_size: int
    branches: float
    levels: int

    @classmethod
    def of(cls, head_size: int, trie: Trie) -> "Shape":
        """The shape of a trie."""
        return cls(head_size, len(trie.depths) / trie.depths.count(0), max(trie.depths))


class Measured(NamedTuple):
    """The attention that was faster at a shape, in bfloat16, forward and backward: FLEX or VARLEN."""

    shape: Shape
    faster: str


# benchmarks/gpu_check.py prints its lines. While there are none, auto is FlexAttention.
MEASURED: tuple[Measured, ...] = ()
# What the run asks for, why flash attention is not used any more, and what was said of layers that it cannot compute.
_asked = AUTO
_fault: str | None = None
_said: set[str] = set()


def choose(shape: Shape, measured: tuple[Measured, ...] = MEASURED) -> str:
    """The attention that was faster at the nearest measured shape of the same head size; FLEX where there is none."""

    def distance(each: Measured) -> tuple[float, float]:
        return abs(each.shape.levels - shape.levels), abs(log(each.shape.branches / shape.branches))

    return min((each for each in measured if each.shape.head_size == shape.head_size), key=distance, default=_FLEX).faster


_FLEX = Measured(Shape(0, 1.0, 0), FLEX)


def ask_for(name: str) -> None:
    """Compute attention over tries as `prefix_attention` says: auto, flex or varlen."""
    global _asked
    _asked = name


def asked_for() -> str:
    """What attention over tries is computed with: auto, flex or varlen; flex where varlen was given up."""
    return FLEX if _fault else _asked


@contextmanager
def only(name: str) -> Iterator[None]:
    """Context in which attention over tries is computed with FLEX or VARLEN."""
    before = _asked
    ask_for(name)
    try:
        yield
    finally:
        ask_for(before)


def in_use(device: torch.device) -> list[str]:
    """What a run on a device may compute attention over tries with; nothing where it goes branch by branch."""
    names = [] if block_attention_fault(device) else [FLEX]
    may_be_varlen = asked_for() == VARLEN or (asked_for() == AUTO and any(each.faster == VARLEN for each in MEASURED))
    if may_be_varlen and device_refusal(device) is None:
        return [VARLEN] if asked_for() == VARLEN else [VARLEN, *names]
    return names


def give_up(name: str, device: torch.device, reason: str) -> None:
    """Do without FLEX or VARLEN from now on, and say why, once."""
    global _fault
    if name == FLEX:
        give_up_block_attention(device, reason)
    elif _fault is None:
        _fault = reason
        print(f"attention over tries: FlexAttention, not flash attention, which failed: {reason}", flush=True)


def varlen_kernel(query: Tensor, value: Tensor, layout: TrieLayout, rules: Rules) -> VarlenKernel | None:
    """The kernel for a layer's query [1, H, T, D] and value [1, G, T, D], where it is to go by parts and can; else None.

    A line says, once for each reason, where a run that asks for varlen cannot have it.
    """
    name = asked_for()
    if name == AUTO:
        # Without measurements there is nothing to look up, in every layer.
        name = choose(Shape.of(query.shape[-1], layout.trie)) if MEASURED else FLEX
    if name == FLEX:
        return None
    reason = _hidden(layout.trie, rules)
    if value.shape[-1] != query.shape[-1]:
        reason = "flash attention needs values of the size of keys"
    if reason is None:
        # Without tokens: its dtype, its heads and its device.
        like, scores = query[0, :, :0].transpose(0, 1).to(computed_in(query)), scores_of(query, rules)
        for kernel in kernels():
            if (reason := kernel.refusal(like, scores)) is None:
                return kernel
    if asked_for() == VARLEN and reason not in _said:
        _said.add(reason)
        print(f"attention over tries: not by flash attention (prefix_attention=varlen) in some layers: {reason}", flush=True)
    return None


def _hidden(trie: Trie, rules: Rules) -> str | None:
    """Why parts cannot be computed: a window or chunk hides tokens of some sequence. None where all are seen."""
    if (rules.window or trie.longest) < trie.longest:
        return f"their window of {rules.window} tokens hides tokens of longer sequences"
    if (rules.chunk or trie.longest) < trie.longest:
        return f"their chunks of {rules.chunk} tokens hide tokens of longer sequences"
    return None
