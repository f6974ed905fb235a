"""Kernels for rows of several lengths: forward with the log-sum-exp of each query's scores, and backward from any of them.

The backward pass takes the output and the log-sum-exp of *all* keys of a query, of which a part has some: the probability of a
score s is exp(s - log-sum-exp) in either case, and a kernel reads nothing else of the other keys (Liu et al., Ring Attention,
arXiv 2310.01889, compute blocks in this way).

Shapes: Q queries and K keys of a part, H query heads, G key heads (G divides H), D head size.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from preference_training.batching.attention_parts import AttentionPart

# The oldest NVIDIA GPUs that flash attention has kernels for, and its largest heads.
MIN_CAPABILITY, MAX_HEAD_SIZE = (8, 0), 256


class Scores(NamedTuple):
    """How scores are computed from products: times `scale`, then cap * tanh(score / cap) where there is a cap."""

    scale: float
    cap: float | None = None


class VarlenKernel(Protocol):
    """A kernel. Queries, output and gradient are [Q, H, D], keys and values [K, G, D], the log-sum-exp is [H, Q]."""

    name: str

    def refusal(self, query: Tensor, scores: Scores) -> str | None:
        """Why it cannot compute this, as part of a sentence; None where it can."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, part: AttentionPart, scores: Scores) -> tuple[Tensor, Tensor]:
        """Output in the dtype of the query, and log-sum-exp in float32."""

    def backward(
        self, gradient: Tensor, tensors: tuple[Tensor, ...], part: AttentionPart, scores: Scores
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value. tensors: query, key, value, output and log-sum-exp of all keys of each query."""


class TorchFlash:
    """Torch's own kernels, or those that `torch.nn.attention.activate_flash_attention_impl` has put in their place."""

    name = "torch"

    def refusal(self, query: Tensor, scores: Scores) -> str | None:
        """See VarlenKernel."""
        return flash_refusal(query) or ("torch's flash attention has no soft-cap" if scores.cap else None)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, part: AttentionPart, scores: Scores) -> tuple[Tensor, Tensor]:
        """See VarlenKernel."""
        attend = torch.ops.aten._flash_attention_forward
        output, lse, *_ = attend(query, key, value, *_lengths(part), 0.0, part.is_causal, False, scale=scores.scale)
        return output, lse

    def backward(
        self, gradient: Tensor, tensors: tuple[Tensor, ...], part: AttentionPart, scores: Scores
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See VarlenKernel."""
        # Of dropout, which there is none of.
        state = torch.zeros(2, dtype=torch.uint64, device=gradient.device)
        unused = torch.empty(0, device=gradient.device)
        back = torch.ops.aten._flash_attention_backward
        with same_bits():
            return back(gradient, *tensors, *_lengths(part), 0.0, part.is_causal, state, unused, scale=scores.scale)


class FlashAttentionPackage:
    """The package flash-attn, which has a soft-cap."""

    name = "flash-attn"

    def refusal(self, query: Tensor, scores: Scores) -> str | None:
        """See VarlenKernel."""
        return flash_refusal(query)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, part: AttentionPart, scores: Scores) -> tuple[Tensor, Tensor]:
        """See VarlenKernel."""
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward as attend

        options = {"dropout_p": 0.0, "softmax_scale": scores.scale, "causal": part.is_causal, "softcap": scores.cap or 0.0}
        output, lse, *_ = attend(query, key, value, *_lengths(part), **options)
        return output, lse

    def backward(
        self, gradient: Tensor, tensors: tuple[Tensor, ...], part: AttentionPart, scores: Scores
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See VarlenKernel."""
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward as back

        options = {"dropout_p": 0.0, "softmax_scale": scores.scale, "causal": part.is_causal, "softcap": scores.cap or 0.0}
        options |= {"window_size_left": -1, "window_size_right": -1, "alibi_slopes": None, "deterministic": True}
        found = tuple(torch.empty_like(tensor) for tensor in tensors[:3])
        back(gradient, *tensors, *found, *_lengths(part), **options)
        return found


class PlainKernel:
    """The same in plain torch, row by row, on any device and in any dtype: what the others are compared with."""

    name = "plain"

    def refusal(self, query: Tensor, scores: Scores) -> str | None:
        """See VarlenKernel."""
        return None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, part: AttentionPart, scores: Scores) -> tuple[Tensor, Tensor]:
        """See VarlenKernel."""
        output, lse = torch.empty_like(query), query.new_empty(query.shape[1], query.shape[0], dtype=_exact(query.dtype))
        for rows, columns in _rows(part):
            found = _row_scores(query[rows], key[columns], part, scores)
            lse[:, rows] = found.logsumexp(-1)
            weights = (found - lse[:, rows, None]).exp()
            output[rows] = (weights @ _by_head(value[columns], query)).transpose(0, 1).to(query.dtype)
        return output, lse

    def backward(
        self, gradient: Tensor, tensors: tuple[Tensor, ...], part: AttentionPart, scores: Scores
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See VarlenKernel."""
        query, key, value, output, lse = tensors
        found = tuple(torch.zeros_like(tensor, dtype=lse.dtype) for tensor in (query, key, value))
        # Of each query: what the softmax takes off the gradient of its weights.
        taken = (gradient.to(lse.dtype) * output.to(lse.dtype)).sum(-1).T
        for rows, columns in _rows(part):
            queries, keys = _by_head(query[rows], query), _by_head(key[columns], query)
            capped = _row_scores(query[rows], key[columns], part, scores)
            weights = (capped - lse[:, rows, None]).exp()
            into = _by_head(gradient[rows], query)
            slope = weights * (into @ _by_head(value[columns], query).transpose(1, 2) - taken[:, rows, None])
            if scores.cap is not None:
                slope = slope * (1 - (capped.where(weights > 0, 0) / scores.cap) ** 2)
            found[0][rows] += scores.scale * (slope @ keys).transpose(0, 1)
            found[1][columns] += scores.scale * _by_group(slope.transpose(1, 2) @ queries, key)
            found[2][columns] += _by_group(weights.transpose(1, 2) @ into, key)
        return tuple(each.to(tensor.dtype) for each, tensor in zip(found, tensors, strict=False))


def flash_refusal(query: Tensor) -> str | None:
    """Why flash attention cannot take queries [Q, H, D], as part of a sentence; None where it can."""
    size = query.shape[-1]
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"flash attention has no {str(query.dtype).removeprefix('torch.')}"
    if size % 8 or size > MAX_HEAD_SIZE:
        return f"flash attention has no heads of size {size}"
    return device_refusal(query.device)


@cache
def device_refusal(device: torch.device) -> str | None:
    """Why a device has no flash attention, as part of a sentence; None where it has it."""
    if device.type != "cuda":
        return f"flash attention has no kernels for {device.type}"
    if torch.version.hip is not None:
        return "flash attention has not been tried on AMD GPUs"
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return f"flash attention has no kernels for {torch.cuda.get_device_name(device)}"
    return None


@cache
def kernels() -> tuple[VarlenKernel, ...]:
    """The kernels of this machine, in the order of preference."""
    return (TorchFlash(), *([FlashAttentionPackage()] if importlib.util.find_spec("flash_attn") else []))


@contextmanager
def same_bits() -> Iterator[None]:
    """Context in which torch's flash attention adds up gradients in one order, so that a run can be repeated bit for bit."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # `torch.use_deterministic_algorithms` would change what torch.compile generates too.
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])


def _lengths(part: AttentionPart) -> tuple[Tensor, Tensor, int, int]:
    # Of single queries the kernels make rows of heads, with a log-sum-exp of another shape.
    return part.query_starts, part.key_starts, max(2, part.longest_query), part.longest_key


def _rows(part: AttentionPart) -> Iterator[tuple[slice, slice]]:
    """The queries and the keys of each row."""
    queries, keys = part.query_starts.tolist(), part.key_starts.tolist()
    for row in range(len(queries) - 1):
        yield slice(queries[row], queries[row + 1]), slice(keys[row], keys[row + 1])


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _by_head(tensor: Tensor, query: Tensor) -> Tensor:
    """[K, G, D] to [H, K, D] in the dtype of sums, each key head for all of its query heads."""
    return tensor.to(_exact(query.dtype)).transpose(0, 1).repeat_interleave(query.shape[1] // tensor.shape[1], 0)


def _by_group(gradient: Tensor, key: Tensor) -> Tensor:
    """The gradient of [H, K, D] as that of [K, G, D]."""
    return gradient.unflatten(0, (key.shape[1], -1)).sum(1).transpose(0, 1)


def _row_scores(query: Tensor, key: Tensor, part: AttentionPart, scores: Scores) -> Tensor:
    """The scores of a row [H, Q, K]; minus infinity for what a query does not see."""
    found = scores.scale * _by_head(query, query) @ _by_head(key, query).transpose(1, 2)
    if scores.cap is not None:
        found = scores.cap * torch.tanh(found / scores.cap)
    if not part.is_causal:
        return found
    return found.masked_fill(found.new_ones(found.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
