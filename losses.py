"""The objectives, as pure mathematics: tensors and floats in, `LossOutput` out. Knows no configuration, rank or model.

Shapes: R responses, P pairs, E examples (P for preference losses, R for SFT). Every log-prob is the natural logarithm of
a response's probability given its prompt, summed over the response's tokens; unit: nats.

`build_loss` decides once which objective a run has. What it returns is called as

    loss(policy, reference, pairs, lengths, selection) -> LossOutput

with `policy` and `reference` of shape [R], `pairs` of shape [P, 2] (indices of the preferred and the dispreferred
response) and `lengths` of shape [R] (tokens of each response). The mean of `LossOutput.losses` is the loss of the examples
it was given, so that the trainer may add up pieces of a batch without asking which objective it serves.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LossOutput:
    """What an objective says of E examples.

    losses: [E], with gradient; their mean is the loss. chosen_rewards, rejected_rewards: [E] without gradient, or None
    where there are no pairs. statistics: numbers to log under their own names.
    """

    losses: Tensor
    chosen_rewards: Tensor | None = None
    rejected_rewards: Tensor | None = None
    statistics: dict[str, float | Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PairSelection:
    """How much each pair of a micro-batch counts, and with which beta.

    weights: [P], 0 for a pair that is left out; their mean is 1, so that the mean of weighted losses over the micro-batch is
    the mean over the kept pairs, also where the micro-batch is computed in pieces. beta: scalar.
    """

    weights: Tensor
    beta: Tensor
    statistics: dict[str, float | Tensor]

    def at(self, places: Tensor) -> "PairSelection":
        """The selection of the micro-batch's pairs at `places` [E]."""
        return PairSelection(self.weights[places], self.beta, self.statistics)


class Loss(ABC):
    """What the trainer knows of an objective; the base of all of them."""

    # Whether its examples are pairs of responses; else each response is an example.
    paired = True
    # Whether it reads the reference's log-probs.
    needs_reference = True
    # Whether `select` has to see a whole micro-batch before any of its losses.
    selects_pairs = False

    @abstractmethod
    def __call__(
        self, policy: Tensor, reference: Tensor | None, pairs: Tensor, lengths: Tensor, selection: PairSelection | None = None
    ) -> LossOutput:
        """The loss of each example; shapes in the module's docstring. Without a selection every pair counts equally."""

    def select(self, gaps: Tensor) -> PairSelection | None:
        """Before a training micro-batch: look at the gaps [P] of all its pairs, on all ranks. None keeps every pair."""
        return None

    def state_dict(self) -> dict:
        """What the objective remembers between batches: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Remember what `state_dict` gave."""
        assert not state, f"{type(self).__name__} remembers nothing"


# ---- the formulas -------------------------------------------------------------------------------------------------------


def dpo_loss(
    policy_gap: Tensor, reference_gap: Tensor, beta: float | Tensor, label_smoothing: float = 0.0, reference_free: bool = False
) -> Tensor:
    """DPO per pair, [P]: equation 7 of Rafailov et al. 2023; with `label_smoothing` conservative DPO (Mitchell 2023).

    A gap [P] is the chosen response's log-prob minus the rejected one's. `label_smoothing` is the assumed probability that
    a label is wrong; `reference_free` takes the reference gap as 0.
    """
    logits = policy_gap if reference_free else policy_gap - reference_gap
    return -F.logsigmoid(beta * logits) * (1 - label_smoothing) - F.logsigmoid(-beta * logits) * label_smoothing


def ipo_loss(policy_gap: Tensor, reference_gap: Tensor, beta: float) -> Tensor:
    """IPO per pair, [P]: equation 17 of Azar et al. 2023, whose tau is `beta`. Gaps as in `dpo_loss`."""
    return (policy_gap - reference_gap - 1 / (2 * beta)) ** 2


# ---- beta-DPO (Wu et al. 2024) ------------------------------------------------------------------------------------------

MOMENTUM = 0.9
LOWEST_BETA = 1e-3
LOWEST_DEVIATION = 1e-6


@dataclass
class GapStatistics:
    """Running mean and standard deviation of the gap, in nats; None until the first training micro-batch."""

    mean: float | None = None
    deviation: float | None = None

    def update(self, gaps: Tensor) -> None:
        """Take in a training micro-batch's gaps [P], P > 0, with momentum 0.9; the first one is taken as it is.

        The deviation is the sample's (divided by P - 1). One pair has none: it leaves the deviation as it was.
        """
        gaps = gaps.detach().double()
        mean = gaps.mean().item()
        self.mean = mean if self.mean is None else MOMENTUM * self.mean + (1 - MOMENTUM) * mean
        if len(gaps) > 1:
            deviation = gaps.std().item()
            self.deviation = deviation if self.deviation is None else MOMENTUM * self.deviation + (1 - MOMENTUM) * deviation


def log_sampling_weights(gaps: Tensor, mean: float, deviation: float) -> Tensor:
    """Logarithm of each pair's weight in the filter's draw, [P]: a normal density without its factor (section 4.2)."""
    return -0.5 * ((gaps - mean) / max(deviation, LOWEST_DEVIATION)) ** 2


def number_kept(num_pairs: int, filtering_ratio: float) -> int:
    """How many of `num_pairs` pairs the filter keeps; at least 1."""
    return max(1, int(num_pairs * (1 - filtering_ratio)))


def adapted_beta(beta: float, scaling_factor: float, mean_gap: Tensor, running_mean: float) -> Tensor:
    """The micro-batch's beta, a scalar (equation 6), with a floor of 1e-3."""
    return (beta * (1 + scaling_factor * (mean_gap - running_mean))).clamp(min=LOWEST_BETA)


def draw_without_replacement(log_weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices [count] of a weighted draw without replacement, ascending.

    The largest of log-weight plus Gumbel noise are such a draw (Yellott 1977), and one in which weights that are 0 in
    floating point can still be taken when nothing else is left.
    """
    uniform = torch.rand(log_weights.shape, generator=generator, dtype=torch.float64).clamp(min=1e-300)
    noise = -torch.log(-torch.log(uniform)).to(log_weights.device)
    return (log_weights.double() + noise).topk(count).indices.sort().values


# ---- the objectives as the trainer calls them ----------------------------------------------------------------------------


@dataclass
class SFTLoss(Loss):
    """Minus the log-prob of each response."""

    paired = False
    needs_reference = False

    def __call__(self, policy, reference, pairs, lengths, selection=None) -> LossOutput:
        return LossOutput(-policy)


def gap(logps: Tensor, pairs: Tensor) -> Tensor:
    """Chosen minus rejected, [P], of log-probs [R]."""
    return logps[pairs[:, 0]] - logps[pairs[:, 1]]


def _rewards(policy: Tensor, reference: Tensor, pairs: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Implicit rewards of the chosen and of the rejected responses, each [P]: beta times policy minus reference."""
    rewards = beta * (policy - reference).detach()
    return rewards[pairs[:, 0]], rewards[pairs[:, 1]]


@dataclass
class DPOLoss(Loss):
    """`dpo_loss` of every pair."""

    beta: float
    label_smoothing: float = 0.0
    reference_free: bool = False

    def __call__(self, policy, reference, pairs, lengths, selection=None) -> LossOutput:
        losses = dpo_loss(gap(policy, pairs), gap(reference, pairs), self.beta, self.label_smoothing, self.reference_free)
        return LossOutput(losses, *_rewards(policy, reference, pairs, self.beta))


@dataclass
class IPOLoss(Loss):
    """`ipo_loss` of every pair, of summed log-probs or of log-probs per token."""

    beta: float
    length_normalised: bool = False

    def __call__(self, policy, reference, pairs, lengths, selection=None) -> LossOutput:
        scale = 1 / lengths if self.length_normalised else torch.ones_like(policy)
        losses = ipo_loss(gap(policy * scale, pairs), gap(reference * scale, pairs), self.beta)
        return LossOutput(losses, *_rewards(policy, reference, pairs, self.beta))


@dataclass
class BetaDPOLoss(Loss):
    """DPO on a drawn part of each training micro-batch, with a beta that follows the part's mean gap.

    The gap is policy minus reference, chosen minus rejected, in nats. `statistics` belongs to training: evaluation reads
    the running mean to set beta from its own mean gap, filters nothing, and changes nothing. Rewards are those of the base
    beta, so that runs compare.
    """

    beta: float
    filtering_ratio: float
    scaling_factor: float
    generator: torch.Generator
    label_smoothing: float = 0.0
    statistics: GapStatistics = field(default_factory=GapStatistics)

    selects_pairs = True

    def select(self, gaps: Tensor) -> PairSelection:
        """Update the running statistics with a training micro-batch's gaps [P], then draw its pairs and set its beta."""
        self.statistics.update(gaps)
        log_weights = log_sampling_weights(gaps, self.statistics.mean, self.statistics.deviation or 0.0)
        drawn = draw_without_replacement(log_weights, number_kept(len(gaps), self.filtering_ratio), self.generator)
        weights = torch.zeros_like(gaps).index_fill(0, drawn, len(gaps) / len(drawn))
        beta = adapted_beta(self.beta, self.scaling_factor, gaps[drawn].mean(), self.statistics.mean)
        return PairSelection(weights, beta, self._logged(beta, len(drawn) / len(gaps)))

    def __call__(self, policy, reference, pairs, lengths, selection=None) -> LossOutput:
        policy_gap, reference_gap = gap(policy, pairs), gap(reference, pairs)
        selection = selection or self._select_all((policy_gap - reference_gap).detach())
        losses = selection.weights * dpo_loss(policy_gap, reference_gap, selection.beta, self.label_smoothing)
        return LossOutput(losses, *_rewards(policy, reference, pairs, self.beta), selection.statistics)

    def state_dict(self) -> dict:
        """The running statistics and the position of the draws."""
        return {"mean": self.statistics.mean, "deviation": self.statistics.deviation, "draws": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        """Continue the statistics and the draws."""
        self.statistics = GapStatistics(state["mean"], state["deviation"])
        self.generator.set_state(state["draws"])

    def _select_all(self, gaps: Tensor) -> PairSelection:
        """Evaluation's selection: every pair, beta from their mean gap against the running mean of training."""
        mean = gaps.mean()
        running_mean = mean.item() if self.statistics.mean is None else self.statistics.mean
        beta = adapted_beta(self.beta, self.scaling_factor, mean, running_mean)
        return PairSelection(torch.ones_like(gaps), beta, self._logged(beta, 1.0))

    def _logged(self, beta: Tensor, kept_fraction: float) -> dict[str, float | Tensor]:
        return {
            "beta_DPO/beta_used": beta,
            "beta_DPO/gap_mean": self.statistics.mean or 0.0,
            "beta_DPO/gap_std": self.statistics.deviation or 0.0,
            "beta_DPO/kept_fraction": kept_fraction,
        }


def build_loss(
    name: str,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reference_free: bool = False,
    mode_loss: str = "DPO",
    mode_weight: float = 0.0,
    a: float = 0.0,
    length_normalised: bool = False,
    seed: int = 0,
) -> Loss:
    """The objective of a `config/loss/` file; the arguments are that file's keys. `seed` starts beta-DPO's draws.

    Raises ValueError for a name or mode that does not exist.
    """
    if name == "sft":
        return SFTLoss()
    if name == "ipo":
        return IPOLoss(beta, length_normalised)
    if name == "dpo" and mode_loss == "DPO":
        return DPOLoss(beta, label_smoothing, reference_free)
    if name == "dpo" and mode_loss == "beta_DPO":
        return BetaDPOLoss(beta, mode_weight, a, torch.Generator().manual_seed(seed), label_smoothing)
    raise ValueError(f"no loss {name!r} with mode_loss {mode_loss!r}")


# ---- numbers to log -----------------------------------------------------------------------------------------------------


def example_metrics(output: LossOutput, policy: Tensor, pairs: Tensor, split: str) -> dict[str, Tensor]:
    """What each example contributes to the metrics of a split ("train" or "eval"): name → [E], without gradient.

    A pair whose rewards are equal is half accurate.
    """
    policy = policy.detach()
    if output.chosen_rewards is None:
        return {f"logps_{split}/chosen": policy, f"loss/{split}": output.losses.detach()}
    margins = output.chosen_rewards - output.rejected_rewards
    return {
        f"rewards_{split}/chosen": output.chosen_rewards,
        f"rewards_{split}/rejected": output.rejected_rewards,
        f"rewards_{split}/accuracies": (margins > 0).float() + 0.5 * (margins == 0).float(),
        f"rewards_{split}/margins": margins,
        f"logps_{split}/rejected": policy[pairs[:, 1]],
        f"logps_{split}/chosen": policy[pairs[:, 0]],
        f"loss/{split}": output.losses.detach(),
    }
