"""The objectives, as pure mathematics: tensors and floats in, `LossOutput` out. Knows no configuration, rank or model.

Shapes: R responses, P pairs, E examples (P for preference losses, R for SFT). Every log-prob is the natural logarithm of
a response's probability given its prompt, summed over the response's tokens; unit: nats.

`build_loss` decides once which objective a run has. What it returns is called as

    loss(policy, reference, pairs, lengths, survey) -> LossOutput

with `policy` and `reference` of shape [R], `pairs` of shape [P, 2] (indices of the preferred and the dispreferred
response) and `lengths` of shape [R] (tokens of each response). The mean of `LossOutput.losses` is the loss of the examples
it was given, so that the trainer may add up packs of a batch without asking which objective it serves.
"""

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from preference_training.core import metric_names
from preference_training.core.errors import UserError, nearest
from preference_training.core.files import run_file
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


class Survey(ABC):
    """What an objective has found by looking at all pairs of a micro-batch, before any of their losses."""

    @abstractmethod
    def at(self, places: Tensor) -> "Survey":
        """What of it concerns the micro-batch's pairs at `places` [E]."""


@dataclass(frozen=True)
class PairSelection(Survey):
    """How much each pair of a micro-batch counts, and with which beta.

    weights: [P], 0 for a pair that is left out; their mean is 1, so that the mean of weighted losses over the micro-batch is
    the mean over the kept pairs, also where the micro-batch is computed in packs. beta: scalar.
    """

    weights: Tensor
    beta: Tensor
    statistics: dict[str, float | Tensor]

    def at(self, places: Tensor) -> "PairSelection":
        """The selection of the micro-batch's pairs at `places` [E]."""
        return PairSelection(self.weights[places], self.beta, self.statistics)


@dataclass(frozen=True)
class RewardShift(Survey):
    """The reward that a micro-batch's rewards are compared with, the same for all its pairs. Unit: nats."""

    value: float

    def at(self, places: Tensor) -> "RewardShift":
        """The same."""
        return self


@dataclass(frozen=True)
class ReferenceUpdate:
    """A reference that follows the policy: after every `every` optimizer steps by `share` of the way, above 0 to 1."""

    every: int
    share: float


class Loss(ABC):
    """What the trainer knows of an objective; the base of all of them."""

    # Whether its examples are pairs of responses; else each response is an example.
    paired = True
    # Whether it reads the reference's log-probs.
    needs_reference = True
    # Whether `survey` has to see a whole micro-batch before any of its losses.
    surveys = False
    # What of a run, beside its policy, the loss of an evaluation depends on, so that losses of different runs, and of different
    # evaluations of one, are not of the same thing; None where they are.
    evaluation_depends_on: str | None = None
    # How the reference follows the policy; None is a reference that stays what it was.
    reference_update: ReferenceUpdate | None = None

    @abstractmethod
    def __call__(
        self, policy: Tensor, reference: Tensor | None, pairs: Tensor, lengths: Tensor, survey: Survey | None = None
    ) -> LossOutput:
        """The loss of each example; shapes in the module's docstring. Without a survey, at an evaluation, no state changes."""

    def survey(self, log_ratios: Tensor) -> Survey | None:
        """Before a training micro-batch: look at all its pairs, on all ranks.

        log_ratios: [P, 2], of each pair's chosen and rejected response the policy's log-prob minus the reference's.
        """
        return None

    def state_dict(self) -> dict:
        """What the objective remembers between batches: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Remember what `state_dict` gave."""
        assert not state, f"{type(self).__name__} remembers nothing"


@dataclass
class SFTLoss(Loss):
    """Minus the log-prob of each response."""

    paired = False
    needs_reference = False

    def __call__(self, policy, reference, pairs, lengths, survey=None) -> LossOutput:
        return LossOutput(-policy)


def _rewards(policy: Tensor, reference: Tensor, pairs: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Implicit rewards of the chosen and of the rejected responses, each [P]: beta times policy minus reference."""
    return sides(beta * (policy - reference).detach(), pairs)


@dataclass
class DPOLoss(Loss):
    """`dpo_loss` of every pair."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    reference_free: bool = False

    def __call__(self, policy, reference, pairs, lengths, survey=None) -> LossOutput:
        losses = dpo_loss(gap(policy, pairs), gap(reference, pairs), self.beta, self.label_smoothing, self.reference_free)
        return LossOutput(losses, *_rewards(policy, reference, pairs, self.beta))


@dataclass
class IPOLoss(Loss):
    """`ipo_loss` of every pair, of summed log-probs or of log-probs per token."""

    beta: float = 0.1
    length_normalised: bool = False

    def __call__(self, policy, reference, pairs, lengths, survey=None) -> LossOutput:
        scale = 1 / lengths.to(policy.dtype) if self.length_normalised else torch.ones_like(policy)
        losses = ipo_loss(gap(policy * scale, pairs), gap(reference * scale, pairs), self.beta)
        return LossOutput(losses, *_rewards(policy, reference, pairs, self.beta))


@dataclass
class BetaDPOLoss(Loss):
    """DPO on a drawn part of each training micro-batch, with a beta that follows the part's mean gap.

    The gap is policy minus reference, chosen minus rejected, in nats. `statistics` belongs to training: evaluation filters
    nothing and changes nothing. Its losses and all rewards are those of the base beta, so that runs and evaluations compare;
    the mean loss at the beta that training would take for the held-out pairs, `LOSS_AT_BETA_USED`, stands beside.

    A training loss is the mean over the kept pairs, which is what is minimised. The authors' code minimises the same and logs
    the mean over all pairs at the beta in force, those that it leaves out included.
    """

    beta: float
    filtering_ratio: float
    scaling_factor: float
    generator: torch.Generator
    label_smoothing: float = 0.0
    statistics: GapStatistics = field(default_factory=GapStatistics)

    surveys = True

    def survey(self, log_ratios: Tensor) -> PairSelection:
        """Update the running statistics with a training micro-batch's gaps, then draw its pairs and set its beta."""
        gaps = log_ratios[:, 0] - log_ratios[:, 1]
        self.statistics.update(gaps)
        log_weights = log_sampling_weights(gaps, self.statistics.mean, self.statistics.deviation or 0.0)
        drawn = draw_without_replacement(log_weights, number_kept(len(gaps), self.filtering_ratio), self.generator)
        weights = torch.zeros_like(gaps).index_fill(0, drawn, len(gaps) / len(drawn))
        beta = adapted_beta(self.beta, self.scaling_factor, gaps[drawn].mean(), self.statistics.mean)
        return PairSelection(weights, beta, self._logged(beta, len(drawn) / len(gaps)))

    def __call__(self, policy, reference, pairs, lengths, survey=None) -> LossOutput:
        gaps, rewards = (gap(policy, pairs), gap(reference, pairs)), _rewards(policy, reference, pairs, self.beta)
        if survey is None:
            losses = dpo_loss(*gaps, self.beta, self.label_smoothing)
            return LossOutput(losses, *rewards, self._of_evaluation(*(each.detach() for each in gaps)))
        losses = survey.weights * dpo_loss(*gaps, survey.beta, self.label_smoothing)
        return LossOutput(losses, *rewards, survey.statistics)

    def state_dict(self) -> dict:
        """The running statistics and the position of the draws."""
        return {"mean": self.statistics.mean, "deviation": self.statistics.deviation, "draws": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        """Continue the statistics and the draws."""
        self.statistics = GapStatistics(state["mean"], state["deviation"])
        self.generator.set_state(state["draws"])

    def _of_evaluation(self, policy_gap: Tensor, reference_gap: Tensor) -> dict[str, float | Tensor]:
        """What is logged of an evaluation: beta from its mean gap against training's running mean, and the loss at it."""
        mean = (policy_gap - reference_gap).mean()
        running_mean = mean.item() if self.statistics.mean is None else self.statistics.mean
        beta = adapted_beta(self.beta, self.scaling_factor, mean, running_mean)
        adapted = dpo_loss(policy_gap, reference_gap, beta, self.label_smoothing).mean()
        return self._logged(beta, 1.0) | {metric_names.LOSS_AT_BETA_USED: adapted}

    def _logged(self, beta: Tensor, kept_fraction: float) -> dict[str, float | Tensor]:
        return {
            metric_names.BETA_USED: beta,
            metric_names.GAP_MEAN: self.statistics.mean or 0.0,
            metric_names.GAP_STD: self.statistics.deviation or 0.0,
            metric_names.KEPT_FRACTION: kept_fraction,
        }


@dataclass
class TRDPOLoss(DPOLoss):
    """DPO whose reference follows the policy (TR-DPO, Gorbatovski et al. 2024, section 3); a share of 1 is the hard update."""

    evaluation_depends_on = "a reference that follows the policy"

    reference_update_every: int = field(kw_only=True)
    reference_update_share: float = field(kw_only=True)

    @property
    def reference_update(self) -> ReferenceUpdate:
        """When the trainer moves the reference, and how far."""
        return ReferenceUpdate(self.reference_update_every, self.reference_update_share)


@dataclass
class LengthNormalisedDPOLoss(Loss):
    """`dpo_loss` of log-probs per token (Lambert et al. 2024, Tülu 3, section 5).

    Rewards are per token too, so that their accuracy is that of the loss; TRL logs summed ones.
    """

    beta: float

    def __call__(self, policy, reference, pairs, lengths, survey=None) -> LossOutput:
        policy, reference = policy / lengths, reference / lengths
        losses = dpo_loss(gap(policy, pairs), gap(reference, pairs), self.beta)
        return LossOutput(losses, *_rewards(policy, reference, pairs, self.beta))


@dataclass
class HingeLoss(Loss):
    """`hinge_loss` of every pair."""

    beta: float

    def __call__(self, policy, reference, pairs, lengths, survey=None) -> LossOutput:
        losses = hinge_loss(gap(policy, pairs), gap(reference, pairs), self.beta)
        return LossOutput(losses, *_rewards(policy, reference, pairs, self.beta))


@dataclass
class RobustDPOLoss(Loss):
    """`robust_dpo_loss` of every pair."""

    beta: float
    label_smoothing: float

    def __call__(self, policy, reference, pairs, lengths, survey=None) -> LossOutput:
        losses = robust_dpo_loss(gap(policy, pairs), gap(reference, pairs), self.beta, self.label_smoothing)
        return LossOutput(losses, *_rewards(policy, reference, pairs, self.beta))


@dataclass
class RPOLoss(Loss):
    """`rpo_loss` of every pair. Rewards are those of its DPO part."""

    beta: float
    alpha: float

    def __call__(self, policy, reference, pairs, lengths, survey=None) -> LossOutput:
        chosen_per_token = (policy / lengths)[pairs[:, 0]]
        losses = rpo_loss(gap(policy, pairs), gap(reference, pairs), chosen_per_token, self.beta, self.alpha)
        return LossOutput(losses, *_rewards(policy, reference, pairs, self.beta))


@dataclass
class DPOPLoss(Loss):
    """`dpop_loss` of every pair. Rewards are DPO's, without the penalty."""

    beta: float
    penalty: float

    def __call__(self, policy, reference, pairs, lengths, survey=None) -> LossOutput:
        losses = dpop_loss(*sides(policy - reference, pairs), self.beta, self.penalty)
        return LossOutput(losses, *_rewards(policy, reference, pairs, self.beta))


@dataclass
class SimPOLoss(Loss):
    """`simpo_loss` of every pair. A reward is beta times a response's log-prob per token, as in TRL."""

    beta: float
    gamma: float

    needs_reference = False

    def __call__(self, policy, reference, pairs, lengths, survey=None) -> LossOutput:
        chosen, rejected = sides(policy / lengths, pairs)
        losses = simpo_loss(chosen, rejected, self.beta, self.gamma)
        return LossOutput(losses, self.beta * chosen.detach(), self.beta * rejected.detach())


@dataclass
class ORPOLoss(Loss):
    """`orpo_loss` of every pair. A reward is beta times a response's log-prob per token, as in TRL."""

    beta: float

    needs_reference = False

    def __call__(self, policy, reference, pairs, lengths, survey=None) -> LossOutput:
        chosen, rejected = sides(policy / lengths, pairs)
        losses = orpo_loss(chosen, rejected, self.beta)
        return LossOutput(losses, self.beta * chosen.detach(), self.beta * rejected.detach())


@dataclass
class BCOLoss(Loss):
    """`bco_loss` of every pair. The shift is a running mean of all rewards, chosen and rejected alike, over micro-batches.

    It belongs to training: evaluation reads it, and changes nothing; before the first micro-batch it takes its own mean.
    """

    beta: float
    shift: float | None = field(default=None, init=False)

    surveys = True
    evaluation_depends_on = "a running mean of training's rewards"

    def survey(self, log_ratios: Tensor) -> RewardShift:
        """Take a training micro-batch's rewards into the running mean, and compare them with it."""
        self.shift = running_mean(self.shift, self.beta * log_ratios.double().mean().item())
        return RewardShift(self.shift)

    def __call__(self, policy, reference, pairs, lengths, survey=None) -> LossOutput:
        chosen, rejected = sides(self.beta * (policy - reference), pairs)
        shift = survey.value if survey else self.shift
        if shift is None:
            shift = ((chosen + rejected) / 2).mean().item()
        return LossOutput(bco_loss(chosen, rejected, shift), chosen.detach(), rejected.detach(), {"bco/reward_shift": shift})

    def state_dict(self) -> dict:
        """The running mean."""
        return {"shift": self.shift}

    def load_state_dict(self, state: dict) -> None:
        """Continue the running mean."""
        self.shift = state["shift"]


def own_loss(function: str, options: dict, seed: int = 0) -> Loss:
    """What NAME of `function`, which is FILE.py:NAME, makes of `options`: a `Loss`. `seed` is given to it if it asks for one.

    It is tried on numbers of no meaning. Raises UserError for a file, name or options that are not there, and for what is no
    loss; what the file itself raises is raised on.
    """
    file, _, name = function.rpartition(":")
    made = vars(run_file(Path(file).absolute(), "loss"))
    if name not in made:
        raise UserError(f"loss.function: {file} has no {name!r}; {nearest(name, _makers(made))}")
    if not callable(made[name]):
        raise UserError(f"loss.function: {file}: {name!r} cannot be called. Expected a class or a function that makes a Loss.")
    parameters = inspect.signature(made[name]).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    for key in options:
        if key not in parameters and not takes_any:
            raise UserError(f"loss.options.{key}: {name} has no such option; {nearest(str(key), parameters)}")
    drawn = {"seed": seed} if "seed" in parameters and "seed" not in options else {}
    for key, each in parameters.items():
        needed = each.default is each.empty and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
        if needed and key not in options and key not in drawn:
            raise UserError(f"loss.options.{key}: not given, and {name} has no default for it.")
    try:
        loss = made[name](**options, **drawn)
    except ValueError as error:
        raise UserError(f"loss.options: {name} refuses them: {error}") from error
    fault = _fault_of(loss)
    if fault:
        raise UserError(f"loss.function: {function} {fault}. Expected a Loss, as the classes in losses.py are.")
    return loss


def _makers(made: dict) -> list[str]:
    """Of a module's names those that may make a loss: classes and functions of its own."""
    return [name for name, value in made.items() if getattr(value, "__module__", None) == made["__name__"]]


def _fault_of(loss) -> str | None:
    """What a loss of the user's does that the trainer cannot use, seen on three responses with two pairs; None if nothing."""
    if not isinstance(loss, Loss):
        return f"makes {type(loss).__name__}"
    if loss.reference_update is not None:
        return "moves the reference, which only loss=tr_dpo can"
    policy = torch.tensor([-3.0, -4.0, -5.0], requires_grad=True)
    reference = torch.tensor([-3.5, -4.0, -4.5]) if loss.needs_reference else None
    pairs = torch.tensor([[0, 1], [0, 2]] if loss.paired else []).reshape(-1, 2)
    # A copy: what it remembers is to come from the data.
    output = copy.deepcopy(loss)(policy, reference, pairs, torch.tensor([2, 3, 4]))
    if not isinstance(output, LossOutput):
        return f"gives {type(output).__name__} when it is called, not a LossOutput"
    wanted = (2,) if loss.paired else (3,)
    if tuple(output.losses.shape) != wanted or not output.losses.requires_grad:
        what = "pairs" if loss.paired else "responses"
        return f"gives losses of shape {list(output.losses.shape)} for {wanted[0]} {what}, expected one with gradient for each"
    rewards = output.chosen_rewards, output.rejected_rewards
    for each in rewards if loss.paired else ():
        if each is None or tuple(each.shape) != wanted or each.requires_grad:
            return "gives no chosen_rewards and rejected_rewards with one value a pair, without gradient"
    return None


def dpo_of_mode(
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reference_free: bool = False,
    mode_loss: str = "DPO",
    mode_weight: float = 0.0,
    a: float = 0.0,
    seed: int = 0,
) -> Loss:
    """DPO or beta-DPO, from the keys of `config/loss/dpo.yaml`; `seed` starts beta-DPO's draws. Raises ValueError."""
    if mode_loss == "DPO":
        return DPOLoss(beta, label_smoothing, reference_free)
    if mode_loss == "beta_DPO":
        return BetaDPOLoss(beta, mode_weight, a, torch.Generator().manual_seed(seed), label_smoothing)
    raise ValueError(f"no mode_loss {mode_loss!r}")


# What `loss.name` may say, and what makes an objective of the other keys of its file in config/loss/.
LOSSES: dict[str, Callable[..., Loss]] = {
    "sft": SFTLoss,
    "dpo": dpo_of_mode,
    "ipo": IPOLoss,
    "hinge": HingeLoss,
    "robust": RobustDPOLoss,
    "rpo": RPOLoss,
    "dpop": DPOPLoss,
    "dpo_norm": LengthNormalisedDPOLoss,
    "bco": BCOLoss,
    "simpo": SimPOLoss,
    "orpo": ORPOLoss,
    "tr_dpo": TRDPOLoss,
    "own": own_loss,
}


def build_loss(name: str, seed: int = 0, **keys) -> Loss:
    """The objective of a `config/loss/` file, from that file's keys. `seed` starts what it draws.

    Raises ValueError for a name or mode that does not exist, and for a loss of the user's own what `own_loss` raises.
    """
    if name not in LOSSES:
        raise ValueError(f"no loss {name!r}; known are {', '.join(LOSSES)}")
    make = LOSSES[name]
    drawn = {"seed": seed} if "seed" in inspect.signature(make).parameters else {}
    return make(**keys, **drawn)


def example_metrics(output: LossOutput, policy: Tensor, pairs: Tensor, split: str) -> dict[str, Tensor]:
    """What each example contributes to the metrics of a split ("train" or "eval"): name → [E], without gradient.

    A pair whose rewards are equal is half accurate.
    """
    policy = policy.detach()
    if output.chosen_rewards is None:
        return {metric_names.logps(split, "chosen"): policy, metric_names.loss(split): output.losses.detach()}
    margins = output.chosen_rewards - output.rejected_rewards
    return {
        metric_names.reward(split, "chosen"): output.chosen_rewards,
        metric_names.reward(split, "rejected"): output.rejected_rewards,
        metric_names.reward(split, "accuracies"): (margins > 0).float() + 0.5 * (margins == 0).float(),
        metric_names.reward(split, "margins"): margins,
        metric_names.logps(split, "rejected"): policy[pairs[:, 1]],
        metric_names.logps(split, "chosen"): policy[pairs[:, 0]],
        metric_names.loss(split): output.losses.detach(),
    }
