"""The loss of reward models: how likely people are to prefer what they preferred, by the difference of two values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from preference_training.losses.base import Examples, Loss, LossOutput, ModelHead, Reward
from preference_training.losses.formulas import log_sigmoid, sides
from preference_training.losses.registry import register_loss

if TYPE_CHECKING:
    from torch import Tensor


def reward_model_loss(chosen: Tensor, rejected: Tensor, margins: Tensor | float, center_coefficient: float) -> Tensor:
    """The negative log-likelihood of each pair, [P], under the model of Bradley and Terry, plus a penalty.

    -log sigmoid(chosen - rejected - margin): Ouyang et al. 2022, equation 1, with the margin of Touvron et al. 2023, equation
    2. The penalty center_coefficient * (chosen + rejected)^2 keeps rewards around 0, since their differences leave their level
    open (Eisenstein et al. 2023, section 2).
    """
    return -log_sigmoid(chosen - rejected - margins) + center_coefficient * (chosen + rejected).square()


@register_loss("reward", "Bradley-Terry reward modeling", "2203.02155")
@dataclass
class RewardModelLoss(Loss):
    """`reward_model_loss` of every pair. Its policy is a model with a value head, and rewards are the values themselves."""

    center_coefficient: float = 0.0

    needs_reference = False
    reads_margins = True
    model_head: ClassVar[ModelHead] = "value"
    reward: ClassVar[Reward] = "value"

    def __post_init__(self) -> None:
        if self.center_coefficient < 0:
            raise ValueError(f"center_coefficient: found {self.center_coefficient}, expected 0 or more")

    def __call__(
        self, policy: Tensor, reference: Tensor | None, examples: Examples, batch_statistics: Any = None
    ) -> LossOutput:
        chosen, rejected = sides(policy, examples.pairs)
        margins = 0.0 if examples.margins is None else examples.margins.to(policy)
        losses = reward_model_loss(chosen, rejected, margins, self.center_coefficient)
        return LossOutput(losses, chosen.detach(), rejected.detach())
