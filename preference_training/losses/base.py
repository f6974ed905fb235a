"""The interface of all losses: tensors and floats in, a `LossOutput` out; independent of configuration, ranks and model.

Shapes: R responses, P pairs, E examples (P for preference losses, R for SFT). Every log-prob is the natural logarithm of
a response's probability given its prompt, summed over the response's tokens; unit: nats. A loss is called as

    loss(policy, reference, pairs, lengths, batch_statistics) -> LossOutput

with `policy` and `reference` of shape [R], `pairs` of shape [P, 2] (indices of the preferred and the dispreferred
response) and `lengths` of shape [R] (tokens of each response). The mean of `LossOutput.losses` is the loss of these
examples, so that the trainer accumulates the packs of a batch in the same way for every loss.

No module here imports torch before a loss is computed, so that reading the properties of a loss is fast.
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
    """The losses of E examples, and what is logged of them.

    losses: [E], with gradient; their mean is the loss. chosen_rewards, rejected_rewards: [E] without gradient, or None
    where there are no pairs. statistics: numbers to log under their own names.
    """

    losses: Tensor
    chosen_rewards: Tensor | None = None
    rejected_rewards: Tensor | None = None
    statistics: dict[str, float | Tensor] = field(default_factory=dict)


class BatchStatistics(ABC):
    """What a loss needs to know about all pairs of a micro-batch before it is computed for any of them."""

    @abstractmethod
    def at(self, places: Tensor) -> BatchStatistics:
        """The part for the micro-batch's pairs at the indices `places` [E]."""


@dataclass(frozen=True)
class ReferenceUpdate:
    """A reference that follows the policy: every `every` optimizer steps it moves by `share` (0 < share <= 1) toward it."""

    every: int
    share: float


class Loss(ABC):
    """The base class of all losses, as the trainer uses them."""

    # Whether its examples are pairs of responses, rather than single responses.
    paired: ClassVar[bool] = True
    # Whether it reads the reference's log-probs.
    needs_reference: ClassVar[bool] = True
    # Whether `batch_statistics` must be called with a whole micro-batch before any of its losses is computed.
    needs_batch_statistics: ClassVar[bool] = False
    # What its rewards are beta times of; None if it has no rewards, or does not declare them.
    reward: ClassVar[Reward | None] = None
    # What the held-out loss depends on besides the policy, so that it cannot be compared between runs or between evaluations of
    # one run; None if it can.
    evaluation_depends_on: ClassVar[str | None] = None
    # Keys of its file in config/loss/ that change training but not the definition of the held-out loss.
    training_keys: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __call__(
        self, policy: Tensor, reference: Tensor | None, pairs: Tensor, lengths: Tensor, batch_statistics: Any = None
    ) -> LossOutput:
        """The loss of each example; shapes: see the module. Without `batch_statistics` (in an evaluation) no state changes."""

    @property
    def reference_update(self) -> ReferenceUpdate | None:
        """How the reference follows the policy; None for a frozen reference."""
        return None

    def batch_statistics(self, log_ratios: Tensor) -> BatchStatistics | None:
        """Compute the statistics of a training micro-batch from all its pairs, on all ranks.

        log_ratios: [P, 2], the policy's log-prob minus the reference's, for each pair's chosen and rejected response.
        """
        return None

    @classmethod
    def state_shape(cls) -> dict[str, Any] | None:
        """The shape of `state_dict`, as `find_mismatch` checks it; None for a loss without state."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """The state that the loss keeps between batches: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from `state_dict`."""
        assert not state, f"{type(self).__name__} has no state"


def example_metrics(output: LossOutput, policy: Tensor, pairs: Tensor, split: str) -> dict[str, Tensor]:
    """The metrics of each example for a split ("train" or "eval"): name → [E], without gradient.

    A pair with equal rewards counts as half accurate.
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
