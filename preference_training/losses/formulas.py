"""The losses as pure functions of log-probs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def log_sigmoid(values: Tensor) -> Tensor:
    """log(1 / (1 + exp(-x))), exact where the sigmoid rounds to 0."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(values)


def dpo_loss(
    policy_gap: Tensor, reference_gap: Tensor, beta: float | Tensor, label_smoothing: float = 0.0, reference_free: bool = False
) -> Tensor:
    """DPO per pair, [P]: equation 7 of Rafailov et al. 2023; with `label_smoothing` conservative DPO (Mitchell 2023).

    A gap [P] is the chosen response's log-prob minus the rejected one's. `label_smoothing` is the assumed probability that
    a label is wrong; `reference_free` sets the reference gap to 0.
    """
    logits = policy_gap if reference_free else policy_gap - reference_gap
    return -log_sigmoid(beta * logits) * (1 - label_smoothing) - log_sigmoid(-beta * logits) * label_smoothing


def ipo_loss(policy_gap: Tensor, reference_gap: Tensor, beta: float) -> Tensor:
    """IPO per pair, [P]: equation 17 of Azar et al. 2023, whose tau is `beta`. Gaps as in `dpo_loss`."""
    return (policy_gap - reference_gap - 1 / (2 * beta)) ** 2


def hinge_loss(policy_gap: Tensor, reference_gap: Tensor, beta: float) -> Tensor:
    """The hinge of SLiC-HF (Zhao et al. 2023, section 2) per pair, [P], measured from the reference as in RSO.

    A pair with a margin of at least 1 / beta nats has no gradient. Gaps as in `dpo_loss`.
    """
    return (1 - beta * (policy_gap - reference_gap)).relu()


def robust_dpo_loss(policy_gap: Tensor, reference_gap: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO per pair, [P]: the unbiased loss of Chowdhury et al. 2024, section 3.1. Gaps as in `dpo_loss`.

    `label_smoothing`, below 0.5, is the probability that a label is wrong. Its expectation over such labels is the
    DPO loss of the correct ones; that of a single pair may be negative.
    """
    right, wrong = dpo_loss(policy_gap, reference_gap, beta), dpo_loss(-policy_gap, -reference_gap, beta)
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def rpo_loss(policy_gap: Tensor, reference_gap: Tensor, chosen_per_token: Tensor, beta: float, alpha: float) -> Tensor:
    """RPO per pair, [P]: DPO and `alpha` times the chosen response's negative log-likelihood (Pang et al. 2024, equation 1).

    chosen_per_token: [P], the policy's log-prob of the chosen response over its number of tokens, the paper's normalization.
    TRL's divides by the tokens of a whole batch instead; both agree on a batch of one pair. Gaps as in `dpo_loss`.
    """
    return dpo_loss(policy_gap, reference_gap, beta) - alpha * chosen_per_token


def dpop_loss(chosen_ratio: Tensor, rejected_ratio: Tensor, beta: float, penalty: float) -> Tensor:
    """DPO-positive per pair, [P] (Pal et al. 2024, L_DPOP), whose lambda is `penalty`.

    Ratios [P] are the policy's log-prob minus the reference's. A chosen response that is less likely than under the reference
    lowers the margin by `penalty` times the difference.
    """
    return -log_sigmoid(beta * (chosen_ratio - rejected_ratio - penalty * (-chosen_ratio).relu()))


def simpo_loss(chosen_per_token: Tensor, rejected_per_token: Tensor, beta: float, gamma: float) -> Tensor:
    """SimPO per pair, [P]: equation 6 of Meng et al. 2024. Log-probs [P] are means over a response's tokens."""
    return -log_sigmoid(beta * (chosen_per_token - rejected_per_token) - gamma)


def orpo_loss(chosen_per_token: Tensor, rejected_per_token: Tensor, beta: float) -> Tensor:
    """ORPO per pair, [P]: equations 6 and 7 of Hong et al. 2024, whose lambda is `beta`.

    Log-probs [P] are means over a response's tokens. The likelihood term covers only the response; TRL's the prompt too.
    """
    return -chosen_per_token - beta * log_sigmoid(log_odds(chosen_per_token) - log_odds(rejected_per_token))


def log_odds(logps: Tensor) -> Tensor:
    """log p - log(1 - p) of probabilities given as logarithms; one that rounds to 1 is replaced by the next smaller number."""
    import torch

    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    return logps - (-logps.expm1()).log()


def bco_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, shift: float) -> Tensor:
    """BCO per pair, [P] (Jung et al. 2024, section 4): classifies good and bad responses by their rewards [P] minus `shift`."""
    return -log_sigmoid(chosen_rewards - shift) - log_sigmoid(shift - rejected_rewards)


def gap(logps: Tensor, pairs: Tensor) -> Tensor:
    """Chosen minus rejected, [P], of log-probs [R]."""
    chosen, rejected = sides(logps, pairs)
    return chosen - rejected


def sides(values: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The values of the chosen and of the rejected responses, each [P], from values [R]."""
    return values[pairs[:, 0]], values[pairs[:, 1]]
