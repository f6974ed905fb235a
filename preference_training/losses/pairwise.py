"""Losses of single pairs by their log-ratios: each binds a formula to its settings."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from preference_training.losses.formulas import (
    apo_down_loss,
    apo_zero_loss,
    discopop_loss,
    divergence_score,
    exo_loss,
    gap,
    log_sigmoid,
    nca_loss,
    odpo_loss,
    sides,
    sppo_loss,
)
from preference_training.losses.objectives import LogRatioLoss
from preference_training.losses.registry import register_loss

if TYPE_CHECKING:
    from torch import Tensor

    from preference_training.losses.base import Examples

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
# Of a margin whose logarithm is an offset.
SMALLEST_MARGIN = 1e-6


@register_loss("f_dpo", "DPO with another divergence (f-DPO)", "2309.16240")
@dataclass
class FDivergenceDPOLoss(LogRatioLoss):
    """DPO of `divergence_score`: the divergence from the reference need not be the reverse KL. Rewards are DPO's."""

    f_divergence: str
    f_alpha: float

    def __post_init__(self) -> None:
        if self.f_divergence not in DIVERGENCES:
            raise ValueError(f"f_divergence: found {self.f_divergence!r}, expected {', '.join(DIVERGENCES)}")

    def losses(self, policy: Tensor, reference: Tensor, examples: Examples) -> Tensor:
        """The f-DPO loss of each pair."""
        scores = divergence_score(policy - reference, self.f_divergence, self.f_alpha)
        return -log_sigmoid(self.beta * gap(scores, examples.pairs))


@register_loss("odpo", "DPO with an offset (ODPO)", "2402.10571")
@dataclass
class ODPOLoss(LogRatioLoss):
    """`odpo_loss` of every pair; its offset is `alpha` times the pair's margin in the data, or the logarithm of that margin."""

    alpha: float
    scale: str

    needs_margins = True

    def __post_init__(self) -> None:
        if self.scale not in ("log", "linear"):
            raise ValueError(f"scale: found {self.scale!r}, expected log or linear")
        # A logarithm needs a margin above 0.
        self.needs_positive_margins = self.scale == "log"

    def losses(self, policy: Tensor, reference: Tensor, examples: Examples) -> Tensor:
        """The ODPO loss of each pair."""
        assert examples.margins is not None
        margins = examples.margins.to(policy.dtype)
        scaled = margins.clamp(min=SMALLEST_MARGIN).log() if self.scale == "log" else margins
        return odpo_loss(self.beta * gap(policy - reference, examples.pairs), self.alpha * scaled)


@register_loss("exo_pair", "efficient exact optimization (EXO)", "2402.00856")
@dataclass
class EXOLoss(LogRatioLoss):
    """`exo_loss` of every pair."""

    label_smoothing: float

    def __post_init__(self) -> None:
        if self.label_smoothing <= 0:
            raise ValueError("label_smoothing: found 0, expected above 0: the divergence from certain labels is infinite")

    def losses(self, policy: Tensor, reference: Tensor, examples: Examples) -> Tensor:
        """The EXO loss of each pair."""
        return exo_loss(self.beta * gap(policy - reference, examples.pairs), self.label_smoothing)


@register_loss("sppo_hard", "self-play preference optimization (SPPO)", "2405.00675")
@dataclass
class SPPOLoss(LogRatioLoss):
    """`sppo_loss` of every pair."""

    def losses(self, policy: Tensor, reference: Tensor, examples: Examples) -> Tensor:
        """The SPPO loss of each pair."""
        return sppo_loss(*sides(policy - reference, examples.pairs), self.beta)


@register_loss("discopop", "discovered preference optimization (DiscoPOP)", "2406.08414")
@dataclass
class DiscoPOPLoss(LogRatioLoss):
    """`discopop_loss` of every pair."""

    temperature: float

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature: found {self.temperature}, expected above 0")

    def losses(self, policy: Tensor, reference: Tensor, examples: Examples) -> Tensor:
        """The DiscoPOP loss of each pair."""
        return discopop_loss(self.beta * gap(policy - reference, examples.pairs), self.temperature)


@dataclass
class RewardsLoss(LogRatioLoss):
    """A loss of the rewards of both responses, each measured on its own."""

    def losses(self, policy: Tensor, reference: Tensor, examples: Examples) -> Tensor:
        """The loss of each pair, from its rewards."""
        return self.of_rewards(*sides(self.beta * (policy - reference), examples.pairs))

    @abstractmethod
    def of_rewards(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The loss of each pair, [P]."""


@register_loss("nca_pair", "noise contrastive alignment (NCA)", "2402.05369")
@dataclass
class NCALoss(RewardsLoss):
    """`nca_loss` of every pair."""

    def of_rewards(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The NCA loss of each pair."""
        return nca_loss(chosen, rejected)


@register_loss("apo_zero", "anchored preference optimization (APO-zero)", "2408.06266")
@dataclass
class APOZeroLoss(RewardsLoss):
    """`apo_zero_loss` of every pair."""

    def of_rewards(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The APO-zero loss of each pair."""
        return apo_zero_loss(chosen, rejected)


@register_loss("apo_down", "anchored preference optimization (APO-down)", "2408.06266")
@dataclass
class APODownLoss(RewardsLoss):
    """`apo_down_loss` of every pair."""

    def of_rewards(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The APO-down loss of each pair."""
        return apo_down_loss(chosen, rejected)
