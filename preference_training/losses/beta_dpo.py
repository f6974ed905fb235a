"""beta-DPO's statistics and selection of pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    """Running mean and standard deviation of the gap, in nats; None until the first training micro-batch.

    kept, kept_twice: with `follows_trend` the running mean of the kept pairs' mean gap, and the running mean of that.
    """

    mean: float | None = None
    deviation: float | None = None
    follows_trend: bool = False
    kept: float | None = None
    kept_twice: float | None = None

    @property
    def threshold(self) -> float | None:
        """What the kept pairs' mean gap is compared with: the running mean of all pairs (Wu et al. 2024), or the trend.

        A running mean with momentum m lags a gap that grows by g a step by g m / (1 - m), 9 g, and where the filter takes
        mislabeled pairs the kept ones are above the mean of all. Twice the running mean of the kept pairs' mean, minus the
        running mean of that running mean, which lags twice as much, has neither error.
        """
        if not self.follows_trend:
            return self.mean
        return None if self.kept is None or self.kept_twice is None else 2 * self.kept - self.kept_twice

    def follow(self, kept_gap: Tensor) -> None:
        """Update the trend, if it is followed, with the mean gap of a training micro-batch's kept pairs, a scalar."""
        if self.follows_trend:
            self.kept = running_mean(self.kept, kept_gap.detach().double().item())
            self.kept_twice = running_mean(self.kept_twice, self.kept)

    def state_dict(self) -> dict[str, float | None]:
        """The running numbers; those of the trend only where it is followed."""
        trend = {"kept": self.kept, "kept_twice": self.kept_twice} if self.follows_trend else {}
        return {"mean": self.mean, "deviation": self.deviation} | trend

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; what it lacks starts anew."""
        self.mean, self.deviation = state["mean"], state["deviation"]
        self.kept, self.kept_twice = state.get("kept"), state.get("kept_twice")

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


def adapted_beta(beta: float, scaling_factor: float, mean_gap: Tensor, threshold: float) -> Tensor:
    """The micro-batch's beta, a scalar (equation 6), with a floor of 1e-3."""
    return (beta * (1 + scaling_factor * (mean_gap - threshold))).clamp(min=MIN_BETA)


def draw_without_replacement(log_weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices [count] of a weighted draw without replacement, ascending.

    The top k of log-weight plus Gumbel noise are such a draw (Yellott 1977), which can still take weights that underflow to 0
    when nothing else remains.
    """
    import torch

    uniform = torch.rand(log_weights.shape, generator=generator, dtype=torch.float64).clamp(min=1e-300)
    noise = -(-uniform.log()).log().to(log_weights.device)
    return (log_weights.double() + noise).topk(count).indices.sort().values
