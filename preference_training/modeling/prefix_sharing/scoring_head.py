"""A language-model head that returns log-probs of tokens, so that logits exist a chunk at a time.

Shapes: S scored tokens, H hidden size, V vocabulary, K 1 or 2 values a token.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The most memory of logits and what is made of them. Unit: bytes.
MAX_LOGITS_BYTES = 2**29
# What one logit takes while a chunk is computed: in the weights' dtype, in float32, and its gradient. Unit: bytes.
CHUNK_BYTES_PER_LOGIT = 8
# What one takes where autograd keeps all of them: also its log-softmax, and the gradients of each. Unit: bytes.
KEPT_BYTES_PER_LOGIT = 16
# On a CPU only float32 logits are counted: memory is large, and computing them again takes long.
KEPT_BYTES_PER_LOGIT_ON_CPU = 4


def score_tokens(logits: Tensor, ids: Tensor, collision: bool = False) -> Tensor:
    """Log-prob of each token under its logits [S, V], in float32: [S, 1]; with `collision` also log sum_v p_v^2: [S, 2]."""
    logits = logits.float()
    logps = -F.cross_entropy(logits, ids, reduction="none")
    if not collision:
        return logps[:, None]
    return torch.stack([logps, (2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1)], dim=1)


def heads_of(model: nn.Module) -> list[nn.Module]:
    """The modules of which one computes a model's logits: its head; of one that is trained beside an adapter each copy."""
    head = model.get_output_embeddings()
    copies = getattr(head, "modules_to_save", None)
    return [head] if copies is None else [head.original_module, *copies.values()]


class ScoringHead(nn.Linear):
    """A language-model head that, given the tokens to score, returns `score_tokens` of them instead of logits.

    A model's head becomes one by a change of class (`head.__class__ = ScoringHead`), which leaves weights, names and ties as
    they are. Memory does not grow with the batch: where the logits of all tokens take more than MAX_LOGITS_BYTES, they are
    computed in chunks, as in `ChunkedScores`.
    """

    scored_ids: Tensor | None = None
    collision: bool = False

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [1, S, H] to `score_tokens` [1, S, K] of `scored_ids` [S]; to logits where there are none."""
        if self.scored_ids is None:
            return super().forward(hidden)
        # In a model that spans devices, the head is not on the device of the inputs.
        ids, states = self.scored_ids.to(hidden.device), hidden[0]
        kept = KEPT_BYTES_PER_LOGIT_ON_CPU if hidden.device.type == "cpu" else KEPT_BYTES_PER_LOGIT
        if kept * len(ids) * self.out_features <= MAX_LOGITS_BYTES:
            values = score_tokens(F.linear(states, self.weight, self.bias), ids, self.collision)
        else:
            values = ChunkedScores.apply(states, self.weight, self.bias, ids, self.collision, torch.is_grad_enabled())
        # A copy: FSDP registers a hook on the model's output, which a view modified in place would lose.
        return values[None].clone()


class ChunkedScores(torch.autograd.Function):
    """`score_tokens` of a linear head, in chunks of tokens, whose gradient keeps no logits.

    The backward pass computes the logits of each chunk again. A frozen head needs that not: the gradient of each token's
    log-prob with respect to its hidden state is known in the forward pass, up to a factor, and kept instead, [S, H].
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, collision: bool, has_gradient: bool
    ) -> Tensor:
        """states [S, H], weight [V, H], bias [V] or None, ids [S]: [S, K]."""
        ctx.collision = collision
        ctx.autocast = {"device_type": states.device.type, "enabled": torch.is_autocast_enabled(states.device.type)}
        ctx.autocast["dtype"] = torch.get_autocast_dtype(states.device.type)
        ctx.is_frozen = has_gradient and not collision and not any(ctx.needs_input_grad[1:3])
        values, slopes = [], []
        for part, some in chunks(states, ids, len(weight)):
            logits = F.linear(part, weight, bias)
            values.append(score_tokens(logits, some, collision))
            if ctx.is_frozen:
                slopes.append(_slope(logits, some) @ weight.to(logits.dtype))
        ctx.save_for_backward(torch.cat(slopes) if ctx.is_frozen else states, weight, bias, ids)
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of states, weight and bias."""
        kept, weight, bias, ids = ctx.saved_tensors
        if ctx.is_frozen:
            return (gradient * kept).to(kept.dtype), None, None, None, None, None
        of_states = torch.empty_like(kept) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        of_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        start = 0
        for part, some in chunks(kept, ids, len(weight)):
            with torch.autocast(**ctx.autocast):
                logits = F.linear(part, weight, bias)
            places = slice(start, start := start + len(part))
            of_logits = _gradient(logits, some, gradient[places], ctx.collision)
            if of_states is not None:
                of_states[places] = of_logits @ weight.to(of_logits.dtype)
            if of_weight is not None:
                of_weight += (of_logits.T @ part.to(of_logits.dtype)).to(weight.dtype)
            if of_bias is not None:
                of_bias += of_logits.sum(0).to(bias.dtype)
        return of_states, of_weight, of_bias, None, None, None


def chunks(states: Tensor, ids: Tensor, vocabulary: int):
    """Hidden states and token ids in chunks whose logits take at most MAX_LOGITS_BYTES."""
    size = max(1, MAX_LOGITS_BYTES // (CHUNK_BYTES_PER_LOGIT * vocabulary))
    return zip(states.split(size), ids.split(size), strict=True)


def _slope(logits: Tensor, ids: Tensor) -> Tensor:
    """The gradient of each token's log-prob with respect to its logits: [S, V] in their dtype."""
    slope = logits.float().softmax(-1).neg_()
    slope[torch.arange(len(ids), device=ids.device), ids] += 1
    return slope.to(logits.dtype)


def _gradient(logits: Tensor, ids: Tensor, gradient: Tensor, collision: bool) -> Tensor:
    """The gradient of logits [S, V], in their dtype, given that of `score_tokens` [S, K]."""
    exact = logits.float()
    shares = exact.softmax(-1)
    found = shares * -gradient[:, :1]
    found[torch.arange(len(ids), device=ids.device), ids] += gradient[:, 0]
    if collision:
        # d log sum_v p_v^2 / d z = 2 softmax(2 z) - 2 softmax(z)
        found += 2 * gradient[:, 1:] * ((2 * exact).softmax(-1) - shares)
    return found.to(logits.dtype)
