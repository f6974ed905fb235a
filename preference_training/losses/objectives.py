"""The losses as the trainer calls them: each binds a formula to its settings and registers it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from preference_training.core.metric_names import BETA_USED, GAP_MEAN, GAP_STD, KEPT_FRACTION, LOSS_AT_BETA_USED
from preference_training.losses.base import (
    BatchStatistics,
    Examples,
    Loss,
    LossOutput,
    ReferenceUpdate,
    Reward,
    SharedStatistics,
)
from preference_training.losses.beta_dpo import (
    GapStatistics,
    adapted_beta,
    draw_without_replacement,
    log_sampling_weights,
    number_kept,
    running_mean,
)
from preference_training.losses.formulas import (
    bco_loss,
    dpo_loss,
    dpop_loss,
    gap,
    hinge_loss,
    ipo_loss,
    orpo_loss,
    robust_dpo_loss,
    rpo_loss,
    sides,
    simpo_loss,
)
from preference_training.losses.registry import register_loss

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@register_loss("sft", "supervised fine-tuning (SFT)")
@dataclass
class SFTLoss(Loss):
    """The negative log-prob of each response: the sum over its tokens, or with `average` "tokens" their mean over the batch."""

    average: str = "responses"

    examples = "targets"
    needs_reference = False

    def __call__(
        self, policy: Tensor, reference: Tensor | None, examples: Examples, batch_statistics: Any = None
    ) -> LossOutput:
        losses = -policy[examples.first]
        return LossOutput(losses / examples.mean_length if self.average == "tokens" else losses)


@dataclass
class LogRatioLoss(Loss):
    """A loss of pairs whose rewards are beta times the log-ratios of policy and reference."""

    beta: float

    reward: ClassVar[Reward] = "log-ratio"

    def __call__(
        self, policy: Tensor, reference: Tensor | None, examples: Examples, batch_statistics: Any = None
    ) -> LossOutput:
        assert reference is not None
        losses = self.losses(policy, reference, examples)
        return LossOutput(losses, *sides(self.beta * (policy - reference).detach(), examples.pairs))

    @abstractmethod
    def losses(self, policy: Tensor, reference: Tensor, examples: Examples) -> Tensor:
        """The loss of each pair, [P]."""


def build_dpo(
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reference_free: bool = False,
    mode_loss: str = "DPO",
    mode_weight: float = 0.0,
    a: float = 0.0,
    threshold: str = "running_mean",
    seed: int = 0,
) -> Loss:
    """DPO or beta-DPO, from the keys of `config/loss/dpo.yaml`; `seed` seeds beta-DPO's sampling. Raises ValueError."""
    import torch

    if mode_loss == "DPO":
        return DPOLoss(beta, label_smoothing, reference_free)
    if mode_loss == "beta_DPO":
        statistics = GapStatistics(follows_trend=threshold == "trend")
        return BetaDPOLoss(beta, mode_weight, a, torch.Generator().manual_seed(seed), label_smoothing, statistics)
    raise ValueError(f"no mode_loss {mode_loss!r}")


@register_loss("dpo", "direct preference optimization (DPO)", "2305.18290", build_dpo)
@dataclass
class DPOLoss(LogRatioLoss):
    """`dpo_loss` of every pair."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    reference_free: bool = False

    def losses(self, policy: Tensor, reference: Tensor, examples: Examples) -> Tensor:
        """The DPO loss of each pair."""
        return dpo_loss(
            gap(policy, examples.pairs), gap(reference, examples.pairs), self.beta, self.label_smoothing, self.reference_free
        )


@dataclass(frozen=True)
class PairSelection(BatchStatistics):
    """The weight of each pair of a micro-batch, and the beta of all.

    weights: [P], 0 for a pair that is filtered out; their mean is 1, so that the mean of the weighted losses over the
    micro-batch is the mean over the kept pairs, also when it is computed in packs. beta: scalar.
    """

    weights: Tensor
    beta: Tensor
    statistics: dict[str, float | Tensor]

    def at(self, places: Tensor) -> PairSelection:
        """The part for the micro-batch's pairs at the indices `places` [E]."""
        return PairSelection(self.weights[places], self.beta, self.statistics)


@register_loss("beta_DPO", "beta-DPO", "2407.08639", build_dpo)
@dataclass
class BetaDPOLoss(Loss):
    """DPO on a random subset of each training micro-batch, with a beta that adapts to the subset's mean gap.

    The gap is policy minus reference, chosen minus rejected, in nats. Only training updates `statistics`: evaluation filters
    and changes nothing. Its losses and all rewards use the base beta, so that runs and evaluations can be compared;
    `LOSS_AT_BETA_USED` is the mean loss at the beta that training would use for the held-out pairs.

    The training loss is the mean over the kept pairs, which is what is minimized. The authors' code minimizes the same, but
    logs the mean over all pairs, including those that it filters out.
    """

    beta: float
    filtering_ratio: float
    scaling_factor: float
    generator: torch.Generator
    label_smoothing: float = 0.0
    statistics: GapStatistics = field(default_factory=GapStatistics)

    needs_batch_statistics = True
    reward = "log-ratio"
    training_keys = ("mode_loss", "mode_weight", "a", "threshold")

    def batch_statistics(self, policy: Tensor, reference: Tensor | None, examples: Examples) -> PairSelection:
        """Update the running statistics with a training micro-batch's gaps, then sample its pairs and set its beta."""
        assert reference is not None
        ratios = policy - reference
        gaps = ratios[:, 0] - ratios[:, 1]
        mean = self.statistics.update(gaps)
        log_weights = log_sampling_weights(gaps, mean, self.statistics.deviation or 0.0)
        drawn = draw_without_replacement(log_weights, number_kept(len(gaps), self.filtering_ratio), self.generator)
        weights = gaps.new_zeros(len(gaps)).index_fill(0, drawn, len(gaps) / len(drawn))
        kept_gap = gaps[drawn].mean()
        self.statistics.follow(kept_gap)
        beta = adapted_beta(self.beta, self.scaling_factor, kept_gap, self.statistics.threshold or 0.0)
        return PairSelection(weights, beta, self._logged(beta, len(drawn) / len(gaps)))

    def __call__(
        self,
        policy: Tensor,
        reference: Tensor | None,
        examples: Examples,
        batch_statistics: PairSelection | None = None,
    ) -> LossOutput:
        assert reference is not None
        gaps = gap(policy, examples.pairs), gap(reference, examples.pairs)
        rewards = sides(self.beta * (policy - reference).detach(), examples.pairs)
        if batch_statistics is None:
            losses = dpo_loss(*gaps, self.beta, self.label_smoothing)
            return LossOutput(losses, *rewards, statistics=self._evaluation_statistics(gaps[0].detach(), gaps[1].detach()))
        losses = batch_statistics.weights * dpo_loss(*gaps, batch_statistics.beta, self.label_smoothing)
        return LossOutput(losses, *rewards, statistics=batch_statistics.statistics)

    @classmethod
    def state_shape(cls) -> dict[Any, Any]:
        """The running statistics and the state of the random generator."""
        from torch import Tensor

        # The rest is of a trend.
        return {"mean": (_is_number, None), "deviation": (_is_number, None), "draws": Tensor, ...: (_is_number, None)}

    def state_dict(self) -> dict[str, Any]:
        """The running statistics and the state of the random generator."""
        return self.statistics.state_dict() | {"draws": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the statistics and the random generator."""
        self.statistics.load_state_dict(state)
        self.generator.set_state(state["draws"])

    def _evaluation_statistics(self, policy_gap: Tensor, reference_gap: Tensor) -> dict[str, float | Tensor]:
        """What an evaluation logs: the beta for its mean gap relative to training's threshold, and the loss at it."""
        mean = (policy_gap - reference_gap).mean()
        threshold = mean.item() if self.statistics.threshold is None else self.statistics.threshold
        beta = adapted_beta(self.beta, self.scaling_factor, mean, threshold)
        adapted = dpo_loss(policy_gap, reference_gap, beta, self.label_smoothing).mean()
        return self._logged(beta, 1.0) | {LOSS_AT_BETA_USED: adapted}

    def _logged(self, beta: Tensor, kept_fraction: float) -> dict[str, float | Tensor]:
        return {
            BETA_USED: beta,
            GAP_MEAN: self.statistics.mean or 0.0,
            GAP_STD: self.statistics.deviation or 0.0,
            KEPT_FRACTION: kept_fraction,
        }


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


@register_loss("ipo", "identity preference optimization (IPO)", "2310.12036")
@dataclass
class IPOLoss(LogRatioLoss):
    """`ipo_loss` of every pair, of summed log-probs or of log-probs per token.

    Rewards are of summed log-probs in both cases, as in TRL, so that with `length_normalised` their accuracy can contradict the
    loss: of two responses of different lengths another one may be ahead per token.
    """

    beta: float = 0.1
    length_normalised: bool = False

    def losses(self, policy: Tensor, reference: Tensor, examples: Examples) -> Tensor:
        """The IPO loss of each pair."""
        if self.length_normalised:
            scale = 1 / examples.lengths.to(policy.dtype)
            policy, reference = policy * scale, reference * scale
        return ipo_loss(gap(policy, examples.pairs), gap(reference, examples.pairs), self.beta)


@register_loss("hinge", "hinge loss (SLiC)", "2305.10425")
@dataclass
class HingeLoss(LogRatioLoss):
    """`hinge_loss` of every pair."""

    def losses(self, policy: Tensor, reference: Tensor, examples: Examples) -> Tensor:
        """The hinge loss of each pair."""
        return hinge_loss(gap(policy, examples.pairs), gap(reference, examples.pairs), self.beta)


@register_loss("robust", "robust DPO", "2403.00409")
@dataclass
class RobustDPOLoss(LogRatioLoss):
    """`robust_dpo_loss` of every pair."""

    label_smoothing: float
    can_be_negative = True

    def losses(self, policy: Tensor, reference: Tensor, examples: Examples) -> Tensor:
        """The robust DPO loss of each pair."""
        return robust_dpo_loss(gap(policy, examples.pairs), gap(reference, examples.pairs), self.beta, self.label_smoothing)


@register_loss("rpo", "DPO with a likelihood term (RPO)", "2404.19733")
@dataclass
class RPOLoss(LogRatioLoss):
    """`rpo_loss` of every pair. Rewards are those of its DPO part."""

    alpha: float
    average: str = "responses"

    def losses(self, policy: Tensor, reference: Tensor, examples: Examples) -> Tensor:
        """The RPO loss of each pair."""
        chosen_per_token = policy[examples.first] / examples.token_divisor(self.average)
        return rpo_loss(gap(policy, examples.pairs), gap(reference, examples.pairs), chosen_per_token, self.beta, self.alpha)


@register_loss("dpop", "DPO-positive (DPOP)", "2402.13228")
@dataclass
class DPOPLoss(LogRatioLoss):
    """`dpop_loss` of every pair. Rewards are DPO's, without the penalty."""

    penalty: float

    def losses(self, policy: Tensor, reference: Tensor, examples: Examples) -> Tensor:
        """The DPOP loss of each pair."""
        return dpop_loss(*sides(policy - reference, examples.pairs), self.beta, self.penalty)


@register_loss("dpo_norm", "length-normalized DPO", "2411.15124")
@dataclass
class LengthNormalizedDPOLoss(LogRatioLoss):
    """`dpo_loss` of log-probs per token (Lambert et al. 2024, Tülu 3, section 5).

    Rewards are per token too, so that their accuracy matches the loss; TRL logs summed rewards.
    """

    reward = "log-ratio per token"

    def __call__(
        self, policy: Tensor, reference: Tensor | None, examples: Examples, batch_statistics: Any = None
    ) -> LossOutput:
        assert reference is not None
        return super().__call__(policy / examples.lengths, reference / examples.lengths, examples)

    def losses(self, policy: Tensor, reference: Tensor, examples: Examples) -> Tensor:
        """The DPO loss of each pair, from log-probs per token."""
        return dpo_loss(gap(policy, examples.pairs), gap(reference, examples.pairs), self.beta)


@dataclass(frozen=True)
class RewardShift(SharedStatistics):
    """The threshold for the rewards of all pairs of a micro-batch. Unit: nats."""

    value: float


@register_loss("bco", "binary classifier optimization (BCO)", "2404.04656")
@dataclass
class BCOLoss(Loss):
    """`bco_loss` of every pair. The shift is a running mean of all rewards, chosen and rejected alike, over micro-batches.

    Only training updates it; an evaluation before the first micro-batch uses the mean of its own rewards.
    """

    beta: float
    shift: float | None = field(default=None, init=False)

    needs_batch_statistics = True
    reward = "log-ratio"
    evaluation_depends_on = "a running mean of training's rewards"

    def batch_statistics(self, policy: Tensor, reference: Tensor | None, examples: Examples) -> RewardShift:
        """Update the running mean with a training micro-batch's rewards, and use it as the shift."""
        assert reference is not None
        self.shift = running_mean(self.shift, self.beta * (policy - reference).double().mean().item())
        return RewardShift(self.shift)

    def __call__(
        self,
        policy: Tensor,
        reference: Tensor | None,
        examples: Examples,
        batch_statistics: RewardShift | None = None,
    ) -> LossOutput:
        assert reference is not None
        chosen, rejected = sides(self.beta * (policy - reference), examples.pairs)
        shift = batch_statistics.value if batch_statistics else self.shift
        if shift is None:
            shift = ((chosen + rejected) / 2).mean().item()
        return LossOutput(
            bco_loss(chosen, rejected, shift), chosen.detach(), rejected.detach(), statistics={"bco/reward_shift": shift}
        )

    @classmethod
    def state_shape(cls) -> dict[str, Any]:
        """The running mean."""
        return {"shift": (_is_number, None)}

    def state_dict(self) -> dict[str, Any]:
        """The running mean."""
        return {"shift": self.shift}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the running mean."""
        self.shift = state["shift"]


@dataclass
class PerTokenLoss(Loss):
    """A loss of pairs without a reference. A reward is beta times a response's log-prob per token, as in TRL."""

    beta: float

    needs_reference = False
    reward = "log-prob per token"

    def __call__(
        self, policy: Tensor, reference: Tensor | None, examples: Examples, batch_statistics: Any = None
    ) -> LossOutput:
        chosen, rejected = sides(policy / examples.lengths, examples.pairs)
        return LossOutput(
            self.losses(chosen, rejected, policy, examples), self.beta * chosen.detach(), self.beta * rejected.detach()
        )

    @abstractmethod
    def losses(self, chosen: Tensor, rejected: Tensor, policy: Tensor, examples: Examples) -> Tensor:
        """The loss of each pair, [P], from log-probs per token."""


@register_loss("simpo", "SimPO", "2405.14734")
@dataclass
class SimPOLoss(PerTokenLoss):
    """`simpo_loss` of every pair."""

    gamma: float

    def losses(self, chosen: Tensor, rejected: Tensor, policy: Tensor, examples: Examples) -> Tensor:
        """The SimPO loss of each pair."""
        return simpo_loss(chosen, rejected, self.beta, self.gamma)


@register_loss("orpo", "odds ratio preference optimization (ORPO)", "2403.07691")
@dataclass
class ORPOLoss(PerTokenLoss):
    """`orpo_loss` of every pair."""

    average: str = "responses"

    has_likelihood = True

    def losses(self, chosen: Tensor, rejected: Tensor, policy: Tensor, examples: Examples) -> Tensor:
        """The ORPO loss of each pair."""
        return orpo_loss(chosen, rejected, self.beta, policy[examples.first] / examples.token_divisor(self.average))


@register_loss("tr_dpo", "DPO with a reference that follows the policy (TR-DPO)", "2404.09656")
@dataclass
class TRDPOLoss(DPOLoss):
    """DPO whose reference follows the policy (TR-DPO, Gorbatovski et al. 2024, section 3); a share of 1 is a hard update."""

    reference_update_every: int = field(kw_only=True)
    reference_update_share: float = field(kw_only=True)

    evaluation_depends_on = "a reference that follows the policy"
    training_keys = ("reference_update_every", "reference_update_share")

    @property
    def reference_update(self) -> ReferenceUpdate:
        """When and how far the trainer moves the reference."""
        return ReferenceUpdate(self.reference_update_every, self.reference_update_share)
