"""Examples and numbers for tests of losses."""

import math

import torch
from omegaconf import OmegaConf

from preference_training.losses.base import Examples, Loss
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
