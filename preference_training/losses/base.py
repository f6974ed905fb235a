"""What every loss is: tensors and floats in, a `LossOutput` out. Knows no configuration, rank or model.

Shapes: R responses, P pairs, E examples (P for preference losses, R for SFT). Every log-prob is the natural logarithm of
a response's probability given its prompt, summed over the response's tokens; unit: nats. A loss is called as

    loss(policy, reference, pairs, lengths, batch_statistics) -> LossOutput

with `policy` and `reference` of shape [R], `pairs` of shape [P, 2] (indices of the preferred and the dispreferred
response) and `lengths` of shape [R] (tokens of each response). The mean of `LossOutput.losses` is the loss of the examples
it was given, so that the trainer adds up the packs of a batch without asking which loss it serves.

No module here imports torch before a loss is computed: what a loss says of itself can be read in no time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from preference_training.core.metric_names import CHOSEN, REJECTED, logps, loss, reward

if TYPE_CHECKING:
    from torch import Tensor

# What a reward is beta times of: the policy's log-prob minus the reference's, or the policy's alone; summed or per token.
Reward = Literal["log-ratio", "log-ratio per token", "log-prob per token"]


@dataclass(frozen=True)
class LossOutput:
    """What a loss says of E examples.

    losses: [E], with gradient; their mean is the loss. chosen_rewards, rejected_rewards: [E] without gradient, or None
    where there are no pairs. statistics: numbers to log under their own names.
    """

    losses: Tensor
    chosen_rewards: Tensor | None = None
    rejected_rewards: Tensor | None = None
    statistics: dict[str, float | Tensor] = field(default_factory=dict)


class BatchStatistics(ABC):
    """What a loss needs to know of all pairs of a micro-batch before it is computed for any of them."""

    @abstractmethod
    def at(self, places: Tensor) -> BatchStatistics:
        """What of it concerns the micro-batch's pairs at `places` [E]."""


@dataclass(frozen=True)
class ReferenceUpdate:
    """A reference that follows the policy: after every `every` optimizer steps by `share` of the way, above 0 to 1."""

    every: int
    share: float


class Loss(ABC):
    """What the trainer knows of a loss; the base of all of them."""

    # Whether its examples are pairs of responses; else each response is an example.
    paired: ClassVar[bool] = True
    # Whether it reads the reference's log-probs.
    needs_reference: ClassVar[bool] = True
    # Whether `batch_statistics` has to see a whole micro-batch before any of its losses.
    needs_batch_statistics: ClassVar[bool] = False
    # What its rewards are beta times of; None where it has none, or where it does not say.
    reward: ClassVar[Reward | None] = None
    # What of a run, beside its policy, the loss of an evaluation depends on, so that losses of different runs, and of different
    # evaluations of one, are not of the same thing; None where they are.
    evaluation_depends_on: ClassVar[str | None] = None
    # Keys of its file in config/loss/ that change what is trained, and not what a held-out loss is of.
    training_keys: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __call__(
        self,
        policy: Tensor,
        reference: Tensor | None,
        pairs: Tensor,
        lengths: Tensor,
        batch_statistics: Any = None,
    ) -> LossOutput:
        """The loss of each example; shapes: see the module. Without `batch_statistics`, at an evaluation, no state changes."""

    @property
    def reference_update(self) -> ReferenceUpdate | None:
        """How the reference follows the policy; None is a reference that stays what it was."""
        return None

    def batch_statistics(self, log_ratios: Tensor) -> BatchStatistics | None:
        """Before a training micro-batch: look at all its pairs, on all ranks.

        log_ratios: [P, 2], of each pair's chosen and rejected response the policy's log-prob minus the reference's.
        """
        return None

    @classmethod
    def state_shape(cls) -> dict[str, Any] | None:
        """What `state_dict` gives, as a shape of `find_mismatch`; None for a loss without a state."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What the loss remembers between batches: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember what `state_dict` gave."""
        assert not state, f"{type(self).__name__} remembers nothing"


def example_metrics(output: LossOutput, policy: Tensor, pairs: Tensor, split: str) -> dict[str, Tensor]:
    """What each example contributes to the metrics of a split ("train" or "eval"): name → [E], without gradient.

    A pair whose rewards are equal is half accurate.
    """
    policy = policy.detach()
    if output.chosen_rewards is None or output.rejected_rewards is None:
        return {logps(split, CHOSEN): policy, loss(split): output.losses.detach()}
    margins = output.chosen_rewards - output.rejected_rewards
    return {
        reward(split, CHOSEN): output.chosen_rewards,
        reward(split, REJECTED): output.rejected_rewards,
        reward(split, "accuracies"): (margins > 0).float() + 0.5 * (margins == 0).float(),
        reward(split, "margins"): margins,
        logps(split, REJECTED): policy[pairs[:, 1]],
        logps(split, CHOSEN): policy[pairs[:, 0]],
        loss(split): output.losses.detach(),
    }
