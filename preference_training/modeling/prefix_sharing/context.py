"""Context parallelism: the processes of a context group compute one pack together, each a part of its tokens.

What a model computes token by token needs only a process's own tokens. Attention gathers the keys and values of all, and the
scores of the tokens are gathered before they are summed by response, so that all processes of a group have the same loss.

Shapes: N processes, C tokens of each, T = N * C, G key heads, D head size.
"""

from typing import Any

import torch
from torch import Tensor

from preference_training.batching.parts import SlicedLayout
from preference_training.core.process_group import ContextGroup

# torch renamed these; the old names warn where both exist.
_all_gather = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor
_reduce_scatter = getattr(torch.distributed, "reduce_scatter_single", None) or torch.distributed.reduce_scatter_tensor


def _gather(rows: Tensor, context: ContextGroup) -> Tensor:
    found = rows.new_empty(context.size * len(rows), *rows.shape[1:])
    _all_gather(found, rows.contiguous(), group=context.group)
    return found


class _Gathered(torch.autograd.Function):
    """The rows of all processes, process by process: [C, F] to [N * C, F].

    The gradient is the sum of all processes' in float32: a process's rows are in the results of all.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, context: ContextGroup) -> Tensor:
        """rows [C, ...] to those of all processes [N * C, ...]."""
        ctx.context = context
        return _gather(rows, context)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient of this process's rows, from all processes."""
        whole = gradient.float().contiguous()
        own = whole.new_empty(len(whole) // ctx.context.size, *whole.shape[1:])
        _reduce_scatter(own, whole, group=ctx.context.group)
        return own.to(gradient.dtype), None


class _Assembled(torch.autograd.Function):
    """The same for what all processes go on to compute alike, each with the same gradient: their sum needs no communication."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, context: ContextGroup) -> Tensor:
        """rows [C, ...] to those of all processes [N * C, ...]."""
        ctx.context = context
        return _gather(rows, context)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient of this process's rows: N times what it is here."""
        return gradient.chunk(ctx.context.size)[ctx.context.rank] * ctx.context.size, None


def gather_keys(key: Tensor, value: Tensor, layout: SlicedLayout) -> tuple[Tensor, Tensor]:
    """Keys [1, G, C, D] and values of a process's tokens to those of all processes', process by process: [1, G, T, D]."""
    _, heads, length, size = key.shape
    rows = torch.cat([key[0], value[0]], dim=-1).transpose(0, 1).reshape(length, -1)
    gathered = _Gathered.apply(rows, layout.context).unflatten(1, (heads, -1)).transpose(0, 1)[None]
    return gathered[..., :size], gathered[..., size:]


def assemble(values: Tensor, places: Tensor, context: ContextGroup) -> Tensor:
    """What each process has computed [K, ...], of all processes, at some places among theirs [S]: [S, ...].

    Losses are computed from it by all alike. Its gradient is multiplied by N: FSDP averages gradients over the processes.
    """
    return _Assembled.apply(values, context)[places]
