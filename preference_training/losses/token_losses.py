"""Losses that read the log-probs of single tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from preference_training.losses.base import Examples, Loss, LossOutput, Reward, TokenLogps
from preference_training.losses.formulas import dpo_loss, gap, sides
from preference_training.losses.objectives import LogRatioLoss
from preference_training.losses.registry import register_loss

if TYPE_CHECKING:
    from torch import Tensor


def shared_lengths(examples: Examples) -> Tensor:
    """[P], the number of tokens of the shorter response of each pair."""
    import torch

    return torch.minimum(*sides(examples.lengths, examples.pairs))


def desensitized(tokens: TokenLogps, lengths: Tensor, responses: Tensor, shared: Tensor, alpha: float) -> Tensor:
    """Log-probs of responses [P], in which tokens behind the first `shared` [P] count only `alpha` (Liu et al. 2024).

    tokens: of all responses, whose lengths are `lengths` [R]. responses: [P], numbers among them.
    """
    from torch.nn.functional import pad

    values = tokens.values if tokens.values.device.type == "mps" else tokens.values.double()
    # A difference of running sums is not a number behind a token that is not finite: such a token counts for its response only.
    totals = values.new_zeros(len(lengths)).index_add(0, tokens.responses, values)[responses]
    before = pad(values.where(values.isfinite(), 0.0).cumsum(0), (1, 0))
    start = (lengths.cumsum(0) - lengths)[responses]
    end, middle = start + lengths[responses], start + shared
    first, rest = before[middle] - before[start], before[end] - before[middle]
    return (first + alpha * rest).where(totals.isfinite(), totals).to(tokens.values.dtype)


@register_loss("ld_dpo", "length-desensitized DPO (LD-DPO)", "2409.06411")
@dataclass
class LengthDesensitizedDPOLoss(Loss):
    """DPO of `desensitized` log-probs: the excess of a pair's longer response counts only `alpha`. Rewards are of them too."""

    beta: float
    alpha: float

    reads_tokens = True
    reward: ClassVar[Reward] = "log-ratio"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: found {self.alpha}, expected from 0 to 1")

    def __call__(
        self, policy: Tensor, reference: Tensor | None, examples: Examples, batch_statistics: Any = None
    ) -> LossOutput:
        assert examples.policy_tokens is not None and examples.reference_tokens is not None
        both = examples.policy_tokens, examples.reference_tokens
        shared = shared_lengths(examples)
        ratios = []
        for responses in examples.pairs.unbind(1):
            own, other = (desensitized(each, examples.lengths, responses, shared, self.alpha) for each in both)
            ratios.append(own - other)
        chosen, rejected = ratios
        losses = dpo_loss(chosen, rejected, self.beta).to(policy.dtype)
        return LossOutput(losses, self.beta * chosen.detach(), self.beta * rejected.detach())


def typicality(tokens: TokenLogps, lengths: Tensor) -> Tensor:
    """How typical each response is of the policy, [R], without gradient: the weight w(x, y) of Zhou et al. 2024, equation 2.

    Exponential of the mean log-prob of its tokens, each over the expected probability of a token that the policy draws there.
    """
    assert tokens.collision is not None
    typical = (tokens.values - tokens.collision).detach()
    sums = typical.new_zeros(len(lengths)).index_add(0, tokens.responses, typical)
    return (sums / lengths).exp()


@register_loss("wpo", "weighted preference optimization (WPO)", "2406.11827")
@dataclass
class WPOLoss(LogRatioLoss):
    """DPO whose pairs are weighted by how typical both responses are of the policy, as if it had sampled them itself."""

    reads_collision = True

    def losses(self, policy: Tensor, reference: Tensor, examples: Examples) -> Tensor:
        """The DPO loss of each pair, weighted."""
        assert examples.policy_tokens is not None
        chosen, rejected = sides(typicality(examples.policy_tokens, examples.lengths), examples.pairs)
        losses = dpo_loss(gap(policy, examples.pairs), gap(reference, examples.pairs), self.beta)
        return losses * (chosen * rejected).to(losses.dtype)
