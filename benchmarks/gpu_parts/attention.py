"""Attention alone: its block mask, forward and both passes, beside FlexAttention and SDPA on one plain causal row."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_parts.compiling import pretend_to_be_a_gpu
from gpu_parts.found import Found, Settings
from gpu_parts.making import milliseconds
from preference_training.batching.tries import BLOCK, TrieLayout, build_trie
from preference_training.core.machine import pick_device
from preference_training.modeling.prefix_sharing.block_attention import KERNEL_OPTIONS, attention_by_blocks, compiled_attention
from preference_training.modeling.prefix_sharing.rules import Rules

# Tokens of a row, and of each prompt and response in it.
LENGTHS, PART = (2400, 12000, 48000), 100


def attention(found: Found, settings: Settings) -> None:
    """Rows of several lengths, each in all ways."""
    if settings.is_cpu:
        pretend_to_be_a_gpu()
    for tokens in settings.choose(LENGTHS, (600,)):
        layout = some_layout(tokens)
        found.attempt(f"block mask {tokens}", mask, layout, settings)
        inputs = random_inputs(layout.trie.num_tokens, settings)
        ways = {
            "trie": lambda layout=layout, inputs=inputs: attention_by_blocks(*inputs, layout, Rules()),
            "flex causal": causal_flex(inputs),
            "sdpa causal": lambda inputs=inputs: F.scaled_dot_product_attention(*inputs, is_causal=True),
        }
        for name, attend in ways.items():
            found.attempt(f"{name} {tokens}", passes, attend, inputs, settings)


def some_layout(tokens: int) -> TrieLayout:
    """A trie of pairs with short prompts and responses, padded to whole blocks."""
    sequences, owners = [], []
    for owner in range(tokens // (3 * PART)):
        for answer in (0, 1):
            sequences.append([owner + 2] * PART + [answer] * PART)
            owners.append(owner)
    trie, _ = build_trie(sequences, owners)
    length = -(-trie.num_tokens // BLOCK) * BLOCK
    return TrieLayout(trie.padded(length), pick_device())


def random_inputs(length: int, settings: Settings) -> list[Tensor]:
    """Query, key and value [1, H, T, D]."""
    heads, size, dtype = settings.choose((16, 128, torch.bfloat16), (2, 16, torch.float32))
    return [torch.randn(1, heads, length, size, device=pick_device(), dtype=dtype, requires_grad=True) for _ in range(3)]


def mask(layout: TrieLayout, settings: Settings) -> dict:
    """The time to build the mask of a layout: on the host, as a thread does ahead, and on the device."""
    on_host = lambda: TrieLayout(layout.trie, torch.device("cpu")).complete()  # noqa: E731
    complete = layout.complete()
    # The trie keeps what it has computed once; a new one has computed nothing.
    fresh = lambda: layout.trie.__dict__.pop("subtree_ends", None)  # noqa: E731
    return {
        "host_ms": milliseconds(lambda: (fresh(), on_host()), 3, settings),
        "device_ms": milliseconds(lambda: complete._block_mask(None, None), settings.choose(10, 1), settings),
    }


def causal_flex(inputs: list[Tensor]) -> Callable[[], Tensor]:
    """FlexAttention on the same tokens as one causal row, whose blocks are those of a trie of one sequence."""
    from torch.nn.attention.flex_attention import BlockMask

    length, device = inputs[0].shape[2], inputs[0].device
    trie, _ = build_trie([[1] * length], [0])
    rule = lambda _batch, _head, query, key: query >= key  # noqa: E731
    found = TrieLayout(trie, device)._blocks(None, None)
    blocks = BlockMask.from_kv_blocks(*found, BLOCK, rule, seq_lengths=(length, length))
    return lambda: compiled_attention(device.type)(*inputs, block_mask=blocks, kernel_options=KERNEL_OPTIONS)


def passes(attend: Callable[[], Tensor], inputs: list[Tensor], settings: Settings) -> dict:
    """Milliseconds of the forward pass, and of both."""
    gradient = torch.randn_like(inputs[0])
    repeat = settings.choose(10, 1)
    return {
        "forward_ms": milliseconds(lambda: attend().detach(), repeat, settings),
        "both_ms": milliseconds(lambda: torch.autograd.grad(attend(), inputs, gradient), repeat, settings),
    }
