"""Attention over response trees: a prompt is computed once; each of its responses attends to it and to itself only.

A packed batch is one row of T tokens, tree after tree, each tree a prompt followed by its responses.
`register_tree_attention` registers the attention below with transformers as RESPONSE_TREES. A model that uses it takes the
layout of a batch as the keyword `response_trees=` of its forward and passes it to every layer. Without a layout (generation,
padded rows) this is transformers' ordinary attention.

Shapes: B batch, T packed tokens, H query heads, G key heads (G divides H), D head size.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from preference_training.batching.trees import TreeLayout

RESPONSE_TREES = "response_trees"


class UnsupportedAttentionError(Exception):
    """A layer needs a kind of attention that is not implemented over trees; the message says which."""


# Arguments of transformers' attention interface that change its result and are not implemented here.
UNSUPPORTED_ARGUMENTS = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
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
    """Register RESPONSE_TREES with transformers; idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(RESPONSE_TREES, tree_attention_forward)
    AttentionMaskInterface.register(RESPONSE_TREES, sdpa_mask)


def tree_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    response_trees: TreeLayout | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, H, T, D], key and value [B, G, T, D] to output [B, T, H, D], and None.

    With a layout B is 1 and the layout replaces `attention_mask`. `scaling` None is 1 / sqrt(D); a `softcap` c replaces each
    score s by c * tanh(s / c). Raises UnsupportedAttentionError for arguments that are not implemented over trees.
    """
    if response_trees is None:
        return _plain_attention(module, query, key, value, attention_mask, scaling, softcap, **kwargs)
    response_trees.seen = True
    check_supported(module, attention_mask, kwargs)
    layout = response_trees.on(query.device)
    attend = _attention_by_branches if layout.by_branches else _flex_attention
    return attend(query, key, value, layout, scaling, sliding_window, softcap).transpose(1, 2).contiguous(), None


def _plain_attention(module, query, key, value, attention_mask, scaling, softcap, **kwargs) -> tuple[Tensor, None]:
    """Ordinary attention: transformers' sdpa, which has no soft-cap, or the attention below."""
    if softcap is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if attention_mask is None:
        attention_mask = causal_mask(key.shape[2], None, query.dtype, query.device)[-query.shape[2] :]
    elif attention_mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, lowest)
    return _attend(query, key, value, attention_mask, scaling, softcap).transpose(1, 2).contiguous(), None


def _attention_by_branches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TreeLayout,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One attention call for a prompt with its first response, and one for each further response, without a T x T mask.

    A prompt followed by one of its responses is an ordinary causal sequence; a further response is its last rows.
    """
    # Split, not sliced: the gradient of each slice would be as long as the batch, those of all splits together are.
    branches = zip(*(part.split(layout.branch_lengths, dim=2) for part in (query, key, value)), strict=True)
    outputs = []
    for tree in layout.trees:
        queries, keys, values = next(branches)
        outputs.append(_causal_rows(queries, keys, values, scaling, window, softcap))
        prompt_keys, prompt_values = keys[:, :, : tree.prompt_length], values[:, :, : tree.prompt_length]
        for _ in tree.response_lengths[1:]:
            queries, keys, values = next(branches)
            keys, values = torch.cat([prompt_keys, keys], dim=2), torch.cat([prompt_values, values], dim=2)
            outputs.append(_causal_rows(queries, keys, values, scaling, window, softcap))
    return torch.cat(outputs, dim=2)


def _causal_rows(queries: Tensor, keys: Tensor, values: Tensor, scaling, window, softcap) -> Tensor:
    """Causal attention of a sequence's last tokens [1, H, rows, D] to the whole sequence [1, G, length, D]: [1, H, rows, D]."""
    rows, length = queries.shape[2], keys.shape[2]
    if rows == length and softcap is None and (window is None or window >= length):
        keys, values = _repeat_heads(queries, keys), _repeat_heads(queries, values)
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scaling)
    mask = causal_mask(length, window, queries.dtype, queries.device)[length - rows :]
    return _attend(queries, keys, values, mask, scaling, softcap)


def _repeat_heads(query: Tensor, key: Tensor) -> Tensor:
    """Keys or values with each head repeated for the query heads that share it: [B, G, T, D] to [B, H, T, D]."""
    groups = query.shape[1] // key.shape[1]
    return key if groups == 1 else key.repeat_interleave(groups, dim=1)


def _attend(query, key, value, mask: Tensor, scaling: float | None, softcap: float | None) -> Tensor:
    """Attention under an additive mask, with an optional soft-cap: [B, H, rows, D]."""
    key, value = _repeat_heads(query, key), _repeat_heads(query, value)
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap) + mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value


def causal_mask(length: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive causal mask [length, length]: a token sees itself and `window` - 1 before it. A cached view: read only."""
    # The length is rounded up, so that all batches share a few masks.
    return _causal_mask(-(-length // 256) * 256, window, dtype, device)[:length, :length]


def clear_mask_cache() -> None:
    """Drop the cached causal masks."""
    _causal_mask.cache_clear()


@lru_cache(maxsize=16)
def _causal_mask(length: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    index = torch.arange(length, device=device)
    distance = index[:, None] - index[None, :]
    visible = (distance >= 0) & (distance < (window or length))
    return torch.zeros(length, length, dtype=dtype, device=device).masked_fill(~visible, torch.finfo(dtype).min)


def _flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TreeLayout,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """FlexAttention with the layout's block mask; on a GPU it is compiled once for all lengths."""
    from torch.nn.attention.flex_attention import flex_attention

    attend = _compiled_flex_attention() if query.is_cuda else flex_attention
    cap = None if softcap is None else lambda score, batch, head, query, key: softcap * torch.tanh(score / softcap)
    grouped = query.shape[1] != key.shape[1]
    mask = layout.block_mask(window)
    return attend(query, key, value, score_mod=cap, block_mask=mask, scale=scaling, enable_gqa=grouped)


@lru_cache(maxsize=1)
def _compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)
