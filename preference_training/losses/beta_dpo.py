"""beta-DPO's statistics and selection of pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MOMENTUM = 0.9
MIN_BETA, MIN_DEVIATION = 1e-3, 1e-6


def running_mean(before: float | None, newest: float) -> float:
    """The running mean after one more value, with momentum 0.9; the first value initializes it."""
    return newest if before is None else MOMENTUM * before + (1 - MOMENTUM) * newest


@dataclass
class GapStatistics:
    """Running mean and standard deviation of the gap, in nats; None until the first training micro-batch."""

    mean: float | None = None
    deviation: float | None = None

    def update(self, gaps: Tensor) -> float:
        """Update with a training micro-batch's gaps [P], P > 0. Returns the new mean.

        The deviation is the sample's (divided by P - 1); a single pair leaves it unchanged.
        """
        gaps = gaps.detach().double()
        self.mean = running_mean(self.mean, gaps.mean().item())
        if len(gaps) > 1:
            self.deviation = running_mean(self.deviation, gaps.std().item())
        return self.mean


def log_sampling_weights(gaps: Tensor, mean: float, deviation: float) -> Tensor:
    """Logarithm of each pair's sampling weight, [P]: an unnormalized normal density (section 4.2)."""
    return -0.5 * ((gaps - mean) / max(deviation, MIN_DEVIATION)) ** 2


def number_kept(num_pairs: int, filtering_ratio: float) -> int:
    """How many of `num_pairs` pairs the filter keeps; at least 1."""
    return max(1, int(num_pairs * (1 - filtering_ratio)))


def adapted_beta(beta: float, scaling_factor: float, mean_gap: Tensor, running_mean: float) -> Tensor:
    """The micro-batch's beta, a scalar (equation 6), with a floor of 1e-3."""
    return (beta * (1 + scaling_factor * (mean_gap - running_mean))).clamp(min=MIN_BETA)


def draw_without_replacement(log_weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices [count] of a weighted draw without replacement, ascending.

    The top k of log-weight plus Gumbel noise are such a draw (Yellott 1977), which can still take weights that underflow to 0
    when nothing else remains.
    """
    import torch

    uniform = torch.rand(log_weights.shape, generator=generator, dtype=torch.float64).clamp(min=1e-300)
    noise = -(-uniform.log()).log().to(log_weights.device)
    return (log_weights.double() + noise).topk(count).indices.sort().values
