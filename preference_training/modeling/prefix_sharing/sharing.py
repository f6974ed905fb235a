"""Switch prefix sharing on: a model computes once what sequences share at their beginning, if it proves that it can."""

import time

from torch import nn

from preference_training.core.errors import UserError
from preference_training.core.machine import said_while_slow
from preference_training.modeling.prefix_sharing.attention_choice import AUTO, VARLEN, ask_for, in_use
from preference_training.modeling.prefix_sharing.block_attention import unsupported_device
from preference_training.modeling.prefix_sharing.proof import find_sharing_failure
from preference_training.modeling.prefix_sharing.scoring_head import ScoringHead, heads_of
from preference_training.modeling.prefix_sharing.tree_attention import TREE_ATTENTION, register_tree_attention
from preference_training.modeling.prefix_sharing.varlen_kernels import device_refusal
from preference_training.modeling.state import compute_device


def share_prefixes(model: nn.Module, mode: str, attention: str = AUTO) -> bool:
    """Let a model compute once what sequences share, if it passes the proof. Returns whether it does, and prints it.

    mode: auto (prints the reason and uses padded rows where the proof fails), on (raises UserError there), off. attention: what
    the process computes attention over tries with on a GPU (auto, flex, varlen).
    """
    if mode == "off":
        return False
    ask_for(attention)
    began = time.perf_counter()
    register_tree_attention()
    heads = heads_of(model)
    is_plain_head = all(type(head) is nn.Linear for head in heads)
    if is_plain_head:
        _become(heads, ScoringHead)
    with said_while_slow("prefix sharing: its proof on this model (prefix_sharing=off does without)"):
        failure = find_sharing_failure(model)
        if failure and is_plain_head:
            # Logits may be changed after the head, by a soft-cap for instance: then prefixes are shared without a scoring head.
            _become(heads, nn.Linear)
            failure = find_sharing_failure(model)
    if failure is None:
        model.set_attn_implementation(TREE_ATTENTION)
        seconds = time.perf_counter() - began
        print(f"prefix sharing: on, proved on this model in {seconds:.1f} s", flush=True)
        device = compute_device(model)
        if attention == VARLEN and (reason := device_refusal(device)):
            print(f"attention over tries: not by flash attention (prefix_attention=varlen): {reason}", flush=True)
        if device.type != "cpu" and (reason := unsupported_device(device)) and VARLEN not in in_use(device):
            print(f"attention over tries: branch by branch, not through FlexAttention: {reason}", flush=True)
        return True
    if mode == "on":
        raise UserError(f"prefix_sharing: found on, but {type(model).__name__} cannot: {failure}. Set it to auto or off.")
    print(f"prefix sharing: off, using padded rows: {type(model).__name__} cannot: {failure}", flush=True)
    return False


def scores_in_head(model: nn.Module) -> bool:
    """Whether a model's head returns log-probs of the scored tokens, so that logits exist in chunks only."""
    return all(isinstance(head, ScoringHead) for head in heads_of(model))


def _become(heads: list[nn.Module], kind: type[nn.Module]) -> None:
    for head in heads:
        head.__class__ = kind


def attend_over_tries(model: nn.Module, scoring_head: bool = True) -> None:
    """Switch prefix sharing on without the proof: for a model on meta or fake tensors, or a copy of one that has passed."""
    register_tree_attention()
    heads = heads_of(model)
    if scoring_head and all(type(head) is nn.Linear for head in heads):
        _become(heads, ScoringHead)
    model.set_attn_implementation(TREE_ATTENTION)
