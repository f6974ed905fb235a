"""Examples and numbers for tests of losses."""

import math

import torch
from omegaconf import OmegaConf

from preference_training.losses.base import Examples, Loss, TokenLogps
from preference_training.losses.registry import build_loss, losses
from tests.support.files import CONFIG_DIR

# Losses by what their examples are; those that can be built from their files alone.
BY_KIND = {
    kind: sorted(name for name, found in losses().items() if name != "own" and found.objective.examples == kind)
    for kind in ("targets", "pairs", "rankings", "labels")
}


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def softplus(x: float) -> float:
    """-log sigmoid(-x)."""
    return math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def of_pairs(pairs: torch.Tensor, margins: torch.Tensor | None = None) -> Examples:
    """Pairs of responses of one token each."""
    lengths = torch.ones(int(pairs.max()) + 1)
    return Examples(pairs, lengths, mean_length=1.0, margins=torch.ones(len(pairs)) if margins is None else margins)


def one_pair(*lengths: int) -> Examples:
    """Responses 0 and 1 as a pair with a margin of 1."""
    return Examples(torch.tensor([[0, 1]]), torch.tensor(lengths), mean_length=float(lengths[0]), margins=torch.ones(1))


def default(name: str) -> Loss:
    """A loss with the defaults of its file."""
    keys = OmegaConf.load(CONFIG_DIR / "loss" / f"{name}.yaml")
    beneath = [OmegaConf.load(CONFIG_DIR / "loss" / f"{each}.yaml") for each in keys.pop("defaults", [])]
    return build_loss(**OmegaConf.to_container(OmegaConf.merge(*beneath, keys)))


def statistics_of(loss: Loss, log_ratios: torch.Tensor):
    """A loss's statistics of a micro-batch of pairs with these log-ratios [E, 2]."""
    pairs = torch.arange(log_ratios.numel()).view_as(log_ratios)
    return loss.batch_statistics(log_ratios, torch.zeros_like(log_ratios), of_pairs(pairs))


def tokens_of_pairs(pairs: list[dict], labeled: bool = False) -> tuple[torch.Tensor, torch.Tensor, Examples]:
    """The policy's token log-probs [C], with gradient, the reference's log-probs [R], and the examples of golden pairs.

    labeled: every response is an example, the first of each pair desirable; the response before is its mismatched one.
    """
    policy, reference, collision = (
        [f64(*side) for pair in pairs for side in pair[name]] for name in ("policy", "reference", "collision")
    )
    lengths = torch.tensor([len(side) for side in policy])
    responses = torch.arange(len(lengths)).repeat_interleave(lengths)
    members, labels = torch.arange(len(lengths)).view(-1, 2), None
    if labeled:
        members = torch.stack([torch.arange(len(lengths)), torch.arange(len(lengths)).roll(1)], dim=1)
        labels = torch.tensor([True, False] * len(pairs))
    tokens = torch.cat(policy).requires_grad_()
    examples = Examples(
        members,
        lengths,
        mean_length=lengths[members[:, 0]].double().mean().item(),
        labels=labels,
        policy_tokens=TokenLogps(tokens, responses, torch.cat(collision)),
        reference_tokens=TokenLogps(torch.cat(reference), responses),
    )
    return tokens, torch.stack([side.sum() for side in reference]), examples


def sum_by_response(tokens: torch.Tensor, examples: Examples) -> torch.Tensor:
    """Log-probs [R] of responses from those of their tokens."""
    return tokens.new_zeros(len(examples.lengths)).index_add(0, examples.policy_tokens.responses, tokens)
