"""Attention over tries: what sequences share is computed once; a token attends to its own sequence only.

A packed batch is one row of T tokens, the branches of a trie. `register_tree_attention` registers the attention below with
transformers as TREE_ATTENTION. A model that uses it takes the layout of a batch as the keyword `trie=` of its forward and
passes it to every layer. Without a layout (generation, padded rows) this is transformers' ordinary attention.

Shapes: B batch, T packed tokens, H query heads, G key heads (G divides H), D head size.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from preference_training.batching.parts import SlicedLayout
from preference_training.batching.tries import TrieLayout
from preference_training.modeling.prefix_sharing.attention_choice import varlen_kernel
from preference_training.modeling.prefix_sharing.block_attention import (
    attention_by_blocks,
    block_attention_fault,
    compile_error,
    give_up_block_attention,
)
from preference_training.modeling.prefix_sharing.context import gather_keys
from preference_training.modeling.prefix_sharing.merged_attention import attention_by_parts
from preference_training.modeling.prefix_sharing.rules import Rules

TREE_ATTENTION = "tree_attention"
# Of longer sequences that do not begin with the first query, masks are made for so many rows at a time.
LONG_SEQUENCE, MASKED_ROWS = 4096, 1024


class UnsupportedAttentionError(Exception):
    """A layer needs a kind of attention that is not implemented over tries; the message says which."""


# Arguments of transformers' attention interface that change its result and are not implemented here.
UNSUPPORTED_ARGUMENTS = {
    "position_bias": "position biases",
    "indices": "attention to selected tokens only",
    "block_indices": "attention to selected blocks only",
    "cache": "a paged cache",
}
# Arguments that do not change the result: they are for other kernels, or redundant.
IGNORED_ARGUMENTS = {
    "position_ids", "position_embeddings", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "use_cache", "deterministic",
    "num_items_in_batch", "seq_idx", "logits_to_keep",
}  # fmt: skip


def check_supported(module: torch.nn.Module, attention_mask: Tensor | None, arguments: dict) -> None:
    """Raise UnsupportedAttentionError where a layer's arguments, mask or direction ask for what is not implemented."""
    for name, value in arguments.items():
        if value is None or name in IGNORED_ARGUMENTS:
            continue
        if name == "dropout":
            if value:
                raise UnsupportedAttentionError("attention dropout is not supported")
        elif name == "is_causal":
            if not value:
                raise UnsupportedAttentionError("bidirectional attention is not supported")
        elif name in UNSUPPORTED_ARGUMENTS:
            raise UnsupportedAttentionError(f"{UNSUPPORTED_ARGUMENTS[name]} ({name}) are not supported")
        else:
            raise UnsupportedAttentionError(f"its attention takes an unknown argument, {name}")
    if not getattr(module, "is_causal", True) and arguments.get("is_causal") is None:
        raise UnsupportedAttentionError("bidirectional attention is not supported")
    if attention_mask is not None and attention_mask.shape != (1, 1, 1, 1):
        raise UnsupportedAttentionError("an attention mask of its own is not supported")


def register_tree_attention() -> None:
    """Register TREE_ATTENTION with transformers; idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(TREE_ATTENTION, tree_attention_forward)
    AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)


def tree_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    trie: TrieLayout | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, H, T, D], key and value [B, G, T, D] to output [B, T, H, D], and None.

    With a layout B is 1 and the layout replaces `attention_mask`. s_aux: attention sinks, see `Rules`. Raises
    UnsupportedAttentionError for arguments that are not implemented over tries.
    """
    # Some models hand on their mask, but no other keyword.
    trie = trie or getattr(attention_mask, "trie", None)
    if trie is None:
        return _plain_attention(
            module, query, key, value, attention_mask, Rules(scaling, softcap=softcap, sinks=s_aux), **kwargs
        )
    trie.seen = True
    check_supported(module, attention_mask, kwargs)
    layout = trie.on(query.device)
    query = _scaled_by_position(module, query, layout)
    rules = Rules(scaling, sliding_window, _chunk_size(module), softcap, s_aux)
    return _attention_over_trie(query, key, value, layout, rules).transpose(1, 2).contiguous(), None


def _attention_over_trie(query: Tensor, key: Tensor, value: Tensor, layout: TrieLayout, rules: Rules) -> Tensor:
    """All branches at once where the device has kernels for it, else one after the other: [1, H, T, D]."""
    by_branches = _attention_by_branches
    if isinstance(layout, SlicedLayout):
        key, value = gather_keys(key, value, layout)
        by_branches = _attention_of_slices
    elif not layout.by_branches and (kernel := varlen_kernel(query, value, layout, rules)):
        return attention_by_parts(query, key, value, layout, rules, kernel)
    if layout.by_branches or block_attention_fault(query.device):
        return by_branches(query, key, value, layout, rules)
    try:
        return attention_by_blocks(query, key, value, layout, rules)
    except Exception as error:
        if (reason := compile_error(error)) is None:
            raise
        give_up_block_attention(query.device, reason)
        return by_branches(query, key, value, layout, rules)


def _chunk_size(module: nn.Module) -> int | None:
    """The size of the chunks that a layer attends within; None for other layers. transformers passes them in masks only."""
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    return config.attention_chunk_size if kinds and layer is not None and kinds[layer] == "chunked_attention" else None


def _scaled_by_position(module: nn.Module, query: Tensor, layout: TrieLayout) -> Tensor:
    """Queries with the scale of their positions, where a layer (Llama 4) has scaled them by their index in the row."""
    if not getattr(module, "attn_temperature_tuning", False) or getattr(module, "use_rope", True):
        return query
    scale = lambda positions: 1 + module.attn_scale * ((positions + 1.0) / module.floor_scale).floor().log1p()  # noqa: E731
    index = torch.arange(query.shape[2], device=query.device)
    return (query * (scale(layout.query_positions) / scale(index))[:, None]).to(query.dtype)


def _plain_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, rules: Rules, **kwargs
) -> tuple[Tensor, None]:
    """Ordinary attention: transformers' sdpa, which has neither soft-cap nor sinks, or the attention below."""
    if rules.softcap is None and rules.sinks is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=rules.scaling, **kwargs)
    if attention_mask is None:
        attention_mask = causal_mask(key.shape[2], None, None, query.dtype, query.device)[-query.shape[2] :]
    elif attention_mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, lowest)
    return _attend(query, key, value, attention_mask, rules).transpose(1, 2).contiguous(), None


def _attention_by_branches(query: Tensor, key: Tensor, value: Tensor, layout: TrieLayout, rules: Rules) -> Tensor:
    """One attention call for each branch, without a T x T mask.

    The first branch of a tree is an ordinary causal sequence. Any other is the last rows of one: its keys are those of its
    parent's sequence that it shares, and its own.
    """
    # Split, not sliced: the gradient of each slice would be as long as the batch, those of all splits together are.
    lengths = [branch.own for branch in layout.trie.branches]
    parts = zip(layout.trie.branches, *(part.split(lengths, dim=2) for part in (query, key, value)), strict=True)
    outputs: list[Tensor] = []
    sequences: list[tuple[Tensor, Tensor]] = []
    # Branches that continue the same tokens share one slice, and so one gradient of its length.
    shared: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for branch, queries, keys, values in parts:
        if branch.shared:
            place = branch.parent, branch.shared
            if place not in shared:
                before = sequences[branch.parent]
                shared[place] = before[0][:, :, : branch.shared], before[1][:, :, : branch.shared]
            keys, values = torch.cat([shared[place][0], keys], dim=2), torch.cat([shared[place][1], values], dim=2)
        sequences.append((keys, values))
        first = rules.first_visible(branch.shared)
        outputs.append(_causal_rows(queries, keys[:, :, first:], values[:, :, first:], rules))
    return torch.cat(outputs, dim=2)


def _attention_of_slices(query: Tensor, key: Tensor, value: Tensor, layout: SlicedLayout, rules: Rules) -> Tensor:
    """The same of a process's slices [1, H, C, D], to the gathered keys and values [1, G, T, D] of all: [1, H, C, D]."""
    own, lengths = layout.own_pieces, [layout.pieces[number].own for number in layout.gathered_pieces]
    keys, values = (dict(zip(layout.gathered_pieces, each.split(lengths, dim=2), strict=True)) for each in (key, value))
    outputs: list[Tensor] = []
    for number, queries in zip(own, query.split([layout.pieces[number].own for number in own], dim=2), strict=True):
        first = rules.first_visible(layout.pieces[number].shared)
        sequence = layout.sequence(number)
        seen = [torch.cat([each[part][:, :, :count] for part, count in sequence], dim=2) for each in (keys, values)]
        outputs.append(_rows_after(queries, seen[0][:, :, first:], seen[1][:, :, first:], rules))
    return torch.cat(outputs, dim=2)


def _rows_after(queries: Tensor, keys: Tensor, values: Tensor, rules: Rules) -> Tensor:
    """`_causal_rows`, whose memory does not grow with the square of a long sequence's length."""
    rows, length = queries.shape[2], keys.shape[2]
    if rows == length or length <= LONG_SEQUENCE:
        return _causal_rows(queries, keys, values, rules)
    outputs, end = [], length - rows
    for part in queries.split(MASKED_ROWS, dim=2):
        end += part.shape[2]
        # Computed again in the backward pass, which would otherwise keep each layer's masks.
        arguments = part, keys[:, :, :end], values[:, :, :end], rules
        outputs.append(checkpoint(_last_rows, *arguments, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(outputs, dim=2)


def _last_rows(queries: Tensor, keys: Tensor, values: Tensor, rules: Rules) -> Tensor:
    """`_causal_rows` under a mask of these rows only."""
    index = torch.arange(keys.shape[2], device=queries.device)
    mask = _mask(index[-queries.shape[2] :], index, rules.window, rules.chunk, queries.dtype)
    return _attend(queries, keys, values, mask, rules)


def _causal_rows(queries: Tensor, keys: Tensor, values: Tensor, rules: Rules) -> Tensor:
    """Causal attention of a sequence's last tokens [1, H, rows, D] to the whole sequence [1, G, length, D]: [1, H, rows, D].

    The sequence may begin at any position that is a multiple of the chunk size.
    """
    rows, length = queries.shape[2], keys.shape[2]
    shared = length - rows
    # Of many rows after few others, causal attention of the whole sequence takes less time: it skips what a mask only hides.
    if rules.are_plain(length) and (not shared or (rows >= 512 and 3 * shared <= rows)):
        queries = F.pad(queries, (0, 0, shared, 0)) if shared else queries
        grouped = queries.shape[1] != keys.shape[1]
        output = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=rules.scaling, enable_gqa=grouped)
        return output[:, :, shared:]
    mask = causal_mask(length, rules.window, rules.chunk, queries.dtype, queries.device)[shared:]
    return _attend(queries, keys, values, mask, rules)


def _repeat_heads(query: Tensor, key: Tensor) -> Tensor:
    """Keys or values with each head repeated for the query heads that share it: [B, G, T, D] to [B, H, T, D]."""
    groups = query.shape[1] // key.shape[1]
    return key if groups == 1 else key.repeat_interleave(groups, dim=1)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, rules: Rules) -> Tensor:
    """Attention under an additive mask, with the rules' soft-cap and sinks: [B, H, rows, D]."""
    if rules.softcap is None and rules.sinks is None:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=rules.scaling, enable_gqa=grouped)
    key, value = _repeat_heads(query, key), _repeat_heads(query, value)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if rules.scaling is None else rules.scaling)
    if rules.softcap is not None:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    scores = (scores + mask).float()
    if rules.sinks is None:
        return scores.softmax(dim=-1).to(query.dtype) @ value
    sinks = rules.sinks.to(scores).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1].to(query.dtype) @ value


def causal_mask(length: int, window: int | None, chunk: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive causal mask [length, length]: a token sees itself, and of those before it what window and chunk leave.

    A cached view: read only.
    """
    # The length is rounded up, so that all batches share a few masks.
    return _causal_mask(-(-length // 256) * 256, window, chunk, dtype, device)[:length, :length]


def clear_mask_cache() -> None:
    """Drop the cached causal masks."""
    _causal_mask.cache_clear()


@lru_cache(maxsize=16)
def _causal_mask(length: int, window: int | None, chunk: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    index = torch.arange(length, device=device)
    return _mask(index, index, window, chunk, dtype)


def _mask(queries: Tensor, keys: Tensor, window: int | None, chunk: int | None, dtype: torch.dtype) -> Tensor:
    """Additive mask of tokens at some positions and keys at others: [queries, keys]."""
    distance = queries[:, None] - keys[None, :]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    if chunk is not None:
        visible &= queries[:, None] // chunk == keys[None, :] // chunk
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
