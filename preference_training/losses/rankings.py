"""Losses of rankings and of labeled responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from preference_training.losses.base import Examples, Loss, LossOutput, Reward, SharedStatistics
from preference_training.losses.formulas import kto_loss, plackett_luce_loss
from preference_training.losses.registry import register_loss

if TYPE_CHECKING:
    from torch import Tensor


@register_loss("plackett_luce", "DPO of rankings (Plackett-Luce)", "2305.18290")
@dataclass
class PlackettLuceLoss(Loss):
    """`plackett_luce_loss` of every ranking. The rewards that are logged are those of its best and its worst response."""

    beta: float

    examples = "rankings"
    reward: ClassVar[Reward] = "log-ratio"

    def __call__(
        self, policy: Tensor, reference: Tensor | None, examples: Examples, batch_statistics: Any = None
    ) -> LossOutput:
        assert reference is not None
        rewards = self.beta * (policy - reference)
        losses = plackett_luce_loss(rewards[examples.members], examples.members >= 0)
        rewards = rewards.detach()
        return LossOutput(losses, rewards[examples.first], rewards[examples.last])


@dataclass(frozen=True)
class KLEstimate(SharedStatistics):
    """z_0 of a micro-batch, a scalar: how far the policy is from the reference on mismatched responses. Unit: nats."""

    value: Tensor

    @classmethod
    def of(cls, ratios: Tensor) -> KLEstimate:
        """From the log-ratios [E] of the mismatched responses."""
        return cls(ratios.detach().mean().clamp(min=0))


@register_loss("kto", "Kahneman-Tversky optimization (KTO)", "2402.01306")
@dataclass
class KTOLoss(Loss):
    """`kto_loss` of every labeled response, weighted by its label.

    z_0 is estimated from the mismatched responses of a micro-batch over all ranks, without a gradient: larger micro-batches
    estimate it better. An evaluation uses those of all held-out examples. An example is accurate where its reward lies on its
    label's side of beta times z_0.
    """

    beta: float
    desirable_weight: float
    undesirable_weight: float

    examples = "labels"
    needs_batch_statistics = True
    reward: ClassVar[Reward] = "log-ratio"

    def __post_init__(self) -> None:
        for key in ("desirable_weight", "undesirable_weight"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}: found {getattr(self, key)}, expected 0 or more")

    def batch_statistics(self, policy: Tensor, reference: Tensor | None, examples: Examples) -> KLEstimate:
        """z_0, from the mismatched responses of a training micro-batch."""
        assert reference is not None
        return KLEstimate.of((policy - reference)[:, 1])

    def __call__(
        self,
        policy: Tensor,
        reference: Tensor | None,
        examples: Examples,
        batch_statistics: KLEstimate | None = None,
    ) -> LossOutput:
        assert reference is not None and examples.labels is not None
        ratios, labels = policy - reference, examples.labels.bool()
        estimate = batch_statistics or KLEstimate.of(ratios[examples.members[:, 1]])
        rewards, threshold = self.beta * ratios[examples.first], self.beta * estimate.value
        losses = kto_loss(rewards, labels, threshold)
        losses = (self.desirable_weight * losses).where(labels, self.undesirable_weight * losses)
        rewards = rewards.detach()
        distance = (rewards - threshold).where(labels, threshold - rewards)
        return LossOutput(
            losses,
            rewards.where(labels, float("nan")),
            rewards.where(~labels, float("nan")),
            {"kto/kl": estimate.value},
            (distance > 0).float() + 0.5 * (distance == 0).float(),
        )
