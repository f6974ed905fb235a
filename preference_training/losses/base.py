"""The interface of all losses: tensors and floats in, a `LossOutput` out; independent of configuration, ranks and model.

Shapes: R responses, E examples of M members each, C contributions: a scored token counts for each of the responses that share
it. Every log-prob is the natural logarithm of a response's
probability given its prompt, summed over the response's scored tokens; unit: nats. A loss is called as

    loss(policy, reference, examples, batch_statistics) -> LossOutput

with `policy` and `reference` of shape [R] and the `Examples` that the responses belong to. The mean of `LossOutput.losses` is
the loss of these examples, so that the trainer accumulates the packs of a batch in the same way for every loss.

No module here imports torch before a loss is computed, so that reading the properties of a loss is fast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from preference_training.core.metric_names import CHOSEN, REJECTED, logps, loss, reward

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

# What a reward is beta times of: the policy's log-prob minus the reference's, or the policy's alone; summed or per token. A
# reward model's is the value that it gives.
Reward = Literal["log-ratio", "log-ratio per token", "log-prob per token", "value"]
# What a policy gives of each response: its log-prob, or a value.
ModelHead = Literal["lm", "value"]
# What the examples of a loss are: single responses (SFT); a preferred and a dispreferred response; responses, the best first;
# a response that is labeled desirable or undesirable, with a mismatched one, of another prompt.
ExampleKind = Literal["targets", "pairs", "rankings", "labels"]
# What a loss learns, as far as the usual learning rate depends on it: single responses; preferences measured against a
# reference, or without one; without one, but with the likelihood of chosen responses in the loss; labels; a reward model.
Learns = Literal["responses", "log-ratios", "margins", "odds", "labels", "rewards"]
# What a loss makes of the margins of pairs: nothing, or it reads those that the data has, or every pair must have one, or one
# above 0.
MarginUse = Literal["unread", "optional", "required", "positive"]

# The numbers that data may give of an example; and what those examples have that lack one which others have.
MISSING_NUMBERS = {"weights": 1.0, "margins": 0.0, "labels": 1.0}


@dataclass(frozen=True)
class TokenLogps:
    """A model's log-probs of single tokens: all scored tokens of a pack, ordered by response.

    values: [C]. responses: [C] int64, the response that each counts for. collision: [C], log of the sum of all squared
    probabilities of the vocabulary; None unless asked for.
    """

    values: Tensor
    responses: Tensor
    collision: Tensor | None = None

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> TokenLogps:
        """The same with each tensor changed."""
        collision = None if self.collision is None else change(self.collision)
        return TokenLogps(change(self.values), change(self.responses), collision)


@dataclass(frozen=True)
class Examples:
    """The examples of a pack: which responses each consists of, and what the data says about it.

    members: [E, M] int64, numbers of responses; shorter rankings end with -1. lengths: [R], scored tokens of each response.
    mean_length: the scored tokens of the examples' first members, averaged over the examples of the whole batch: all packs,
    micro-batches and ranks. weights, margins: [E]; labels: [E] bool, whether an example is desirable; None where the data
    has none. policy_tokens, reference_tokens: for losses that read them.
    """

    members: Tensor
    lengths: Tensor
    mean_length: float | Tensor = float("nan")
    weights: Tensor | None = None
    margins: Tensor | None = None
    labels: Tensor | None = None
    policy_tokens: TokenLogps | None = None
    reference_tokens: TokenLogps | None = None

    def __len__(self) -> int:
        return len(self.members)

    @property
    def pairs(self) -> Tensor:
        """[E, 2], the preferred and the dispreferred response of each example."""
        assert self.members.shape[1] == 2, "these examples are no pairs"
        return self.members

    @property
    def first(self) -> Tensor:
        """[E], each example's response, its preferred one, or the best."""
        return self.members[:, 0]

    @property
    def last(self) -> Tensor:
        """[E], each example's dispreferred response, or the worst."""
        return self.members.gather(1, (self.members >= 0).sum(1, keepdim=True) - 1)[:, 0]

    def token_divisor(self, average: str) -> Tensor | float:
        """What the log-prob of each example's first member is divided by: its own tokens, or with "tokens" the mean of all.

        By the mean length the mean over all examples of a batch is the mean over all their tokens.
        """
        return self.mean_length if average == "tokens" else self.lengths[self.first]

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> Examples:
        """The examples with each tensor changed, that of the mean length excepted."""
        names = ("members", "lengths", *MISSING_NUMBERS)
        changed: dict[str, Any] = {name: change(value) for name in names if (value := getattr(self, name)) is not None}
        for name in ("policy_tokens", "reference_tokens"):
            tokens = getattr(self, name)
            changed[name] = None if tokens is None else tokens.with_tensors(change)
        return replace(self, **changed)


@dataclass(frozen=True)
class LossOutput:
    """The losses of E examples, and what is logged of them.

    losses: [E], with gradient; their mean is the loss. chosen_rewards, rejected_rewards: [E] without gradient, NaN where an
    example has no such response, or None where examples are single responses. statistics: numbers to log under their own
    names; of a step those of its last micro-batch. accuracies: [E], of a loss for which they are not whether the chosen reward
    is above the rejected one. auxiliary: a scalar with gradient that is added to the batch's loss and is of no single example;
    no loss sets it.
    """

    losses: Tensor
    chosen_rewards: Tensor | None = None
    rejected_rewards: Tensor | None = None
    statistics: dict[str, float | Tensor] = field(default_factory=dict)
    accuracies: Tensor | None = None
    auxiliary: Tensor | None = None

    def weighted(self, weights: Tensor | None) -> LossOutput:
        """Each loss times the weight of its example, [E]; unchanged without weights."""
        return self if weights is None else replace(self, losses=self.losses * weights)


class BatchStatistics(ABC):
    """What a loss needs to know about all examples of a micro-batch before it is computed for any of them."""

    @abstractmethod
    def at(self, places: Tensor) -> BatchStatistics:
        """The part for the micro-batch's examples at the indices `places` [E]."""


class SharedStatistics(BatchStatistics):
    """Statistics that are the same for every example."""

    def at(self, places: Tensor) -> Self:
        """The same: they do not depend on the example."""
        return self


@dataclass(frozen=True)
class ReferenceUpdate:
    """A reference that follows the policy: every `every` optimizer steps it moves by `share` (0 < share <= 1) toward it."""

    every: int
    share: float


class Loss(ABC):
    """The base class of all losses, as the trainer uses them."""

    # What its examples are.
    examples: ClassVar[ExampleKind] = "pairs"
    # What the policy gives: summed log-probs of responses, or with "value" their values, as `policy` [R].
    model_head: ClassVar[ModelHead] = "lm"
    # Whether it reads the reference's log-probs.
    needs_reference: bool = True
    # Whether `batch_statistics` must be called with a whole micro-batch before any of its losses is computed.
    needs_batch_statistics: bool = False
    # Whether each of its examples needs a margin from the data.
    needs_margins: bool = False
    # Whether these must be above 0.
    needs_positive_margins: bool = False
    # Whether it reads margins where the data has them.
    reads_margins: bool = False
    # Whether it reads `policy_tokens` and `reference_tokens`; and whether it reads `policy_tokens` with `collision`.
    reads_tokens: bool = False
    reads_collision: bool = False
    # Whether the likelihood of chosen responses is a part of it, which keeps a model without a reference in place.
    has_likelihood: bool = False
    # What its rewards are beta times of; None if it has no rewards, or does not declare them.
    reward: ClassVar[Reward | None] = None
    # Whether an example's loss may be below 0; if not, neither is an interval of their mean.
    can_be_negative: bool = False
    # What the held-out loss depends on besides the policy, so that it cannot be compared between runs or between evaluations of
    # one run; None if it can.
    evaluation_depends_on: str | None = None
    # Keys of its file in config/loss/ that change training but not the definition of the held-out loss.
    training_keys: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __call__(
        self, policy: Tensor, reference: Tensor | None, examples: Examples, batch_statistics: Any = None
    ) -> LossOutput:
        """The loss of each example; shapes: see the module. Without `batch_statistics` (in an evaluation) no state changes."""

    @property
    def margin_use(self) -> MarginUse:
        """What it makes of the margins of pairs."""
        if self.needs_positive_margins:
            return "positive"
        return "required" if self.needs_margins else "optional" if self.reads_margins else "unread"

    @property
    def learns(self) -> Learns:
        """What it learns, as far as the usual learning rate depends on it."""
        if self.model_head == "value":
            return "rewards"
        if self.examples in ("targets", "labels"):
            return "responses" if self.examples == "targets" else "labels"
        return "log-ratios" if self.needs_reference else "odds" if self.has_likelihood else "margins"

    @property
    def reference_update(self) -> ReferenceUpdate | None:
        """How the reference follows the policy; None for a frozen reference."""
        return None

    def batch_statistics(self, policy: Tensor, reference: Tensor | None, examples: Examples) -> BatchStatistics | None:
        """Compute the statistics of a training micro-batch from all its examples, on all ranks.

        policy, reference: [E, M], the log-prob of each member, without gradient; flattened they are what the numbers in
        `examples` refer to.
        """
        return None

    @classmethod
    def state_shape(cls) -> dict[Any, Any] | None:
        """The shape of `state_dict`, as `find_mismatch` checks it; None for a loss without state."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """The state that the loss keeps between batches: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from `state_dict`."""
        assert not state, f"{type(self).__name__} has no state"


def example_metrics(objective: Loss, output: LossOutput, policy: Tensor, examples: Examples, split: str) -> dict[str, Tensor]:
    """What is logged of each example of a loss, on a split "train" or "eval": name → [E], without gradient; NaN for none.

    Equal rewards count as half accurate. Of a ranking the best response counts as chosen and the worst as rejected.
    """
    policy, losses = policy.detach(), output.losses.detach()
    chosen, rejected = output.chosen_rewards, output.rejected_rewards
    if chosen is None or rejected is None:
        return {logps(split, CHOSEN): policy[examples.first], loss(split): losses}
    rewards = {reward(split, CHOSEN): chosen, reward(split, REJECTED): rejected}
    if output.accuracies is not None:
        own = policy[examples.first]
        rewards |= {reward(split, "accuracies"): output.accuracies}
        known = {
            logps(split, REJECTED): own.where(~rejected.isnan(), float("nan")),
            logps(split, CHOSEN): own.where(~chosen.isnan(), float("nan")),
        }
    else:
        margins = chosen - rejected
        accuracies = (margins > 0).float() + 0.5 * (margins == 0).float()
        rewards |= {reward(split, "accuracies"): accuracies, reward(split, "margins"): margins}
        known = {logps(split, REJECTED): policy[examples.last], logps(split, CHOSEN): policy[examples.first]}
    return rewards | (known if objective.model_head == "lm" else {}) | {loss(split): losses}


def with_margins(means: Mapping[str, float], split: str) -> dict[str, float]:
    """Mean metrics, with the difference of the mean rewards where no single example has a margin."""
    means, margins = dict(means), reward(split, "margins")
    if margins not in means and {reward(split, CHOSEN), reward(split, REJECTED)} <= means.keys():
        means[margins] = means[reward(split, CHOSEN)] - means[reward(split, REJECTED)]
    return means
