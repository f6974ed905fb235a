"""AOT: alignment by optimal transport, which compares sorted values of a whole micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from preference_training.losses.base import BatchStatistics, Examples, Loss, LossOutput, Reward
from preference_training.losses.formulas import dpo_loss, gap, sides
from preference_training.losses.registry import register_loss

if TYPE_CHECKING:
    from torch import Tensor


def partners(values: Tensor, others: Tensor) -> Tensor:
    """For each of `values` [E], the one of `others` [E] that has the same rank."""
    return others.sort().values[values.argsort().argsort()]


@dataclass(frozen=True)
class Partners(BatchStatistics):
    """Per pair the values that its own two are compared with, [E] each, without gradient.

    Small changes leave an order as it is, so that the gradient with these held fixed is that of the sorted loss, also where a
    micro-batch is computed in packs.
    """

    of_first: Tensor
    of_second: Tensor

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> Partners:
        """Of two lists of values [E] that are compared in sorted order."""
        first, second = first.detach(), second.detach()
        return cls(partners(first, second), partners(second, first))

    def at(self, places: Tensor) -> Partners:
        """The part for the micro-batch's pairs at the indices `places`."""
        return Partners(self.of_first[places], self.of_second[places])


@dataclass
class SortedLoss(Loss):
    """DPO's loss of the differences of two sorted lists of values of all pairs of a micro-batch (Melnyk et al. 2024).

    It asks that one distribution dominates another, quantile by quantile; what it compares depends on the micro-batch, over all
    ranks. An evaluation sorts all held-out pairs.
    """

    beta: float
    label_smoothing: float

    needs_batch_statistics = True
    reward: ClassVar[Reward] = "log-ratio"

    def of_differences(self, differences: Tensor) -> Tensor:
        """DPO's loss of differences in nats."""
        return dpo_loss(differences, differences, self.beta, self.label_smoothing, reference_free=True)

    def rewards(self, policy: Tensor, reference: Tensor, examples: Examples) -> tuple[Tensor, Tensor]:
        """DPO's rewards."""
        return sides(self.beta * (policy - reference).detach(), examples.pairs)


@register_loss("aot", "alignment by optimal transport (AOT)", "2406.05882")
@dataclass
class AOTLoss(SortedLoss):
    """AOT of pairs: the policy's gaps between chosen and rejected responses are to dominate the reference's."""

    def batch_statistics(self, policy: Tensor, reference: Tensor | None, examples: Examples) -> Partners:
        """The gap of the reference that each pair's gap is compared with."""
        assert reference is not None
        return Partners.of(policy[:, 0] - policy[:, 1], reference[:, 0] - reference[:, 1])

    def __call__(
        self, policy: Tensor, reference: Tensor | None, examples: Examples, batch_statistics: Partners | None = None
    ) -> LossOutput:
        assert reference is not None
        gaps = gap(policy, examples.pairs)
        found = batch_statistics or Partners.of(gaps, gap(reference, examples.pairs))
        return LossOutput(self.of_differences(gaps - found.of_first), *self.rewards(policy, reference, examples))


@register_loss("aot_unpaired", "alignment by optimal transport, unpaired (AOT)", "2406.05882")
@dataclass
class UnpairedAOTLoss(SortedLoss):
    """AOT without pairs: the log-ratios of chosen responses are to dominate those of rejected ones.

    A pair's loss is the mean of those of its two responses. A quantile has one of each, so that both have all of its gradient.
    """

    def batch_statistics(self, policy: Tensor, reference: Tensor | None, examples: Examples) -> Partners:
        """The log-ratio that each response's is compared with."""
        assert reference is not None
        return Partners.of(*(policy - reference).unbind(1))

    def __call__(
        self, policy: Tensor, reference: Tensor | None, examples: Examples, batch_statistics: Partners | None = None
    ) -> LossOutput:
        assert reference is not None
        chosen, rejected = sides(policy - reference, examples.pairs)
        found = batch_statistics or Partners.of(chosen, rejected)
        both = self.of_differences(chosen - found.of_first) + self.of_differences(found.of_second - rejected)
        return LossOutput(both - both.detach() / 2, *self.rewards(policy, reference, examples))
