"""Attention over tries as a few calls of flash attention, whose results are merged by their log-sum-exps.

A query's keys are in several parts (see `attention_parts`). With o and l the output and log-sum-exp of each part, those of all
keys are L = log sum exp(l) and sum of o * exp(l - L). The backward pass gives every part the merged output and L, so that no
gradient has to pass through a log-sum-exp.

Shapes: T packed tokens, H query heads, G key heads (G divides H), D head size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from preference_training.batching.attention_parts import AttentionPart
from preference_training.batching.tries import TrieLayout
from preference_training.modeling.prefix_sharing.rules import Rules
from preference_training.modeling.prefix_sharing.varlen_kernels import Scores, VarlenKernel


def attention_by_parts(
    query: Tensor, key: Tensor, value: Tensor, layout: TrieLayout, rules: Rules, kernel: VarlenKernel
) -> Tensor:
    """Attention of query [1, H, T, D] to key and value [1, G, T, D] over a trie: [1, H, T, D], in the dtype of the query.

    rules: without windows and chunks that hide anything from the trie's sequences.
    """
    tensors = [tensor[0].transpose(0, 1).to(computed_in(query)) for tensor in (query, key, value)]
    output = _MergedAttention.apply(*tensors, rules.sinks, layout.parts, kernel, scores_of(query, rules))
    return output.transpose(0, 1)[None].to(query.dtype)


def computed_in(query: Tensor) -> torch.dtype:
    """The dtype that attention is computed in: that of the query, or of autocast."""
    device = query.device.type
    is_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_autocast else query.dtype


def scores_of(query: Tensor, rules: Rules) -> Scores:
    """How the scores of queries [..., D] are computed."""
    return Scores(query.shape[-1] ** -0.5 if rules.scaling is None else rules.scaling, rules.softcap)


class _MergedAttention(torch.autograd.Function):
    """Query [T, H, D], key and value [T, G, D], sinks [H] or None, to output [T, H, D]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, parts: list[AttentionPart],
        kernel: VarlenKernel, scores: Scores,
    ) -> Tensor:  # fmt: skip
        """The merged output."""
        own, *others = parts
        output, lse = kernel.forward(query, key, value, own, scores)
        found = [(part.queries, *kernel.forward(*_of(part, query, key, value), part, scores)) for part in others]
        total = lse
        for queries, _, each in found:
            total = total.index_copy(1, queries.long(), torch.logaddexp(total.index_select(1, queries), each))
        if sinks is not None:
            # One more key of every query, whose value is zero.
            total = torch.logaddexp(total, sinks.to(total)[:, None].expand_as(total))
        if total is not lse:
            merged = output.to(total.dtype) * _share(lse, total)
            for queries, each, its_lse in found:
                merged.index_add_(0, queries, each.to(total.dtype) * _share(its_lse, total.index_select(1, queries)))
            output = merged.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, total, sinks)
        ctx.how = parts, kernel, scores
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of query, key, value and sinks."""
        query, key, value, output, total, sinks = ctx.saved_tensors
        (own, *others), kernel, scores = ctx.how
        gradient = gradient.contiguous()
        found = list(kernel.backward(gradient, (query, key, value, output, total), own, scores))
        if others:
            # Sums of many parts, in more digits than each has.
            found = [each.to(total.dtype) for each in found]
        for part in others:
            into, its_output = gradient.index_select(0, part.queries), output.index_select(0, part.queries)
            tensors = *_of(part, query, key, value), its_output, total.index_select(1, part.queries).contiguous()
            for whole, each, repeats, index in zip(
                found, kernel.backward(into, tensors, part, scores), (False, part.repeats_keys, part.repeats_keys),
                (part.queries, part.keys, part.keys), strict=True,
            ):  # fmt: skip
                _add(whole, index, each.to(whole.dtype), repeats)
        of_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            taken = (gradient.to(total.dtype) * output.to(total.dtype)).sum(-1).T
            of_sinks = -((sinks.to(total)[:, None] - total).exp() * taken).sum(1).to(sinks.dtype)
        return (*(each.to(query.dtype) for each in found), of_sinks, None, None, None)


def _of(part: AttentionPart, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The queries, keys and values of a part."""
    return query.index_select(0, part.queries), key.index_select(0, part.keys), value.index_select(0, part.keys)


def _share(lse: Tensor, total: Tensor) -> Tensor:
    """The share of the softmax that some keys have: [T, H, 1] of two [H, T]."""
    return (lse - total).exp().T[..., None]


def _add(whole: Tensor, index: Tensor, each: Tensor, repeats: bool) -> None:
    """Add at some places: in an order that does not change from run to run, also where a place comes several times."""
    if repeats:
        whole.index_put_((index.long(),), each, accumulate=True)
    else:
        whole.index_add_(0, index, each)
