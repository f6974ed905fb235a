"""The losses as pure functions of log-probs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def log_sigmoid(values: Tensor) -> Tensor:
    """log(1 / (1 + exp(-x))), exact where the sigmoid rounds to 0."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(values)


def cap_exponents(exponents: Tensor) -> Tensor:
    """Exponents, capped where their exponential would overflow, since 0 times infinity is not a number.

    The room above the cap is for what the exponential is multiplied by.
    """
    import math

    import torch

    return exponents.clamp(max=math.log(torch.finfo(exponents.dtype).max) - 8)


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

    chosen_per_token: [P], the policy's log-prob of the chosen response over its number of tokens, the paper's normalization, or
    over the mean number of a batch, which is TRL's. Gaps as in `dpo_loss`.
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


def orpo_loss(chosen_per_token: Tensor, rejected_per_token: Tensor, beta: float, likelihood: Tensor | None = None) -> Tensor:
    """ORPO per pair, [P]: equations 6 and 7 of Hong et al. 2024, whose lambda is `beta`.

    Log-probs [P] are means over a response's tokens. likelihood: [P], of the chosen responses, by another average. It covers
    only the response; TRL's the prompt too.
    """
    return -(chosen_per_token if likelihood is None else likelihood) - beta * log_sigmoid(
        log_odds(chosen_per_token) - log_odds(rejected_per_token)
    )


def log_odds(logps: Tensor) -> Tensor:
    """log p - log(1 - p) of probabilities given as logarithms; one that rounds to 1 is replaced by the next smaller number."""
    import torch

    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    return logps - (-logps.expm1()).log()


def bco_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, shift: float) -> Tensor:
    """BCO per pair, [P] (Jung et al. 2024, section 4): classifies good and bad responses by their rewards [P] minus `shift`."""
    return -log_sigmoid(chosen_rewards - shift) - log_sigmoid(shift - rejected_rewards)


def exo_loss(logits: Tensor, label_smoothing: float) -> Tensor:
    """EXO on pairs, [P]: equation 16 of Ji et al. 2024, the reverse KL divergence of the policy's preference from the label's.

    logits: [P], beta times the margin in nats. `label_smoothing`, above 0, is the probability that a label is wrong.
    """
    import math

    right, wrong = log_sigmoid(logits), log_sigmoid(-logits)
    return right.exp() * (right - math.log1p(-label_smoothing)) + wrong.exp() * (wrong - math.log(label_smoothing))


def nca_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """NCA on pairs, [P] (Chen et al. 2024), with two responses, of which one is preferred. Rewards as in `bco_loss`."""
    return -log_sigmoid(chosen_rewards) - 0.5 * log_sigmoid(-chosen_rewards) - 0.5 * log_sigmoid(-rejected_rewards)


def sppo_loss(chosen_ratio: Tensor, rejected_ratio: Tensor, beta: float) -> Tensor:
    """SPPO on pairs, [P]: equation 4.7 of Wu et al. 2024, whose eta is 1 / `beta`, with a winner that always wins.

    Ratios as in `dpop_loss`; their targets are plus and minus 1 / (2 beta) nats.
    """
    return (chosen_ratio - 0.5 / beta) ** 2 + (rejected_ratio + 0.5 / beta) ** 2


def apo_zero_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """APO-zero per pair, [P]: equation 7 of D'Oosterlinck et al. 2024. Raises the chosen response, lowers the rejected one."""
    return 1 - chosen_rewards.sigmoid() + rejected_rewards.sigmoid()


def apo_down_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """APO-down per pair, [P]: equation 8 of D'Oosterlinck et al. 2024. Lowers both responses, the rejected one more."""
    return chosen_rewards.sigmoid() + 1 - (chosen_rewards - rejected_rewards).sigmoid()


def discopop_loss(logits: Tensor, temperature: float) -> Tensor:
    """DiscoPOP per pair, [P]: the log-ratio modulated loss of Lu et al. 2024, equation 5, whose tau is `temperature`.

    A mixture of DPO's loss and an exponential one. logits as in `exo_loss`. It is not convex: near 0 it rises with the margin.
    """
    exponential = (logits / temperature).sigmoid()
    # The product of exp(-logits) and the sigmoid, whose factors overflow and vanish where it is finite.
    product = cap_exponents(log_sigmoid(logits / temperature) - logits).exp()
    return -log_sigmoid(logits) * (1 - exponential) + product


def odpo_loss(logits: Tensor, offset: Tensor) -> Tensor:
    """DPO with an offset per pair, [P] (Amini et al. 2024). offset: [P], what the logits of `exo_loss` should exceed."""
    return -log_sigmoid(logits - offset)


def divergence_score(ratios: Tensor, divergence: str, alpha: float) -> Tensor:
    """f'(t) at log t = `ratios`, up to a constant (Wang et al. 2023, table 1); of the reverse KL it is `ratios` itself.

    divergence: "reverse_kl", f'(t) = log t + 1; "forward_kl", -1 / t; "js" (Jensen-Shannon), log(2t / (1 + t)); or "alpha",
    (t^(alpha - 1) - 1) / (alpha - 1). This is TRL's alpha: 1 is the reverse and 0 the forward KL; the paper's is one minus it.
    """
    import math

    if divergence == "forward_kl":
        return 1 - cap_exponents(-ratios).exp()
    if divergence == "js":
        return math.log(2) + log_sigmoid(ratios)
    if divergence == "alpha" and alpha != 1:
        return cap_exponents((alpha - 1) * ratios).expm1() / (alpha - 1)
    return ratios


def kto_loss(rewards: Tensor, labels: Tensor, threshold: float | Tensor) -> Tensor:
    """KTO per example, [E], unweighted: 1 minus the value of equation 7 of Ethayarajh et al. 2024.

    rewards: [E], beta times a response's log-ratio; labels: [E] bool, whether it is desirable; threshold: beta times z_0.
    """
    distance = rewards - threshold
    return 1 - distance.where(labels, -distance).sigmoid()


def plackett_luce_loss(rewards: Tensor, present: Tensor) -> Tensor:
    """DPO of rankings, [E]: equation 20 of Rafailov et al. 2023, appendix A.3.

    rewards: [E, M], from best to worst; present: [E, M] bool, False behind the end of shorter rankings. Each place is a choice
    among the responses that are left. Of two responses it is DPO.
    """
    import torch

    width = rewards.shape[1]
    rewards = rewards.where(present, 0.0)
    diagonal = torch.eye(width, dtype=torch.bool, device=rewards.device)
    left = torch.ones_like(diagonal).triu() & present[:, None, :] | diagonal
    choices = rewards[:, None, :].masked_fill(~left, -torch.inf)
    return (choices.logsumexp(2) - rewards).sum(1)


def gap(logps: Tensor, pairs: Tensor) -> Tensor:
    """Chosen minus rejected, [P], of log-probs [R]."""
    chosen, rejected = sides(logps, pairs)
    return chosen - rejected


def sides(values: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The values of the chosen and of the rejected responses, each [P], from values [R]."""
    return values[pairs[:, 0]], values[pairs[:, 1]]
