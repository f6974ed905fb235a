"""Whether policy and reference say the same while their weights are the same: before the first update, bit for bit.

Where they do not, every margin of the run would be measured from a wrong place, so that the run ends with the reason.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from preference_training.batching.packing import PackedBatch
from preference_training.core.errors import UserError
from preference_training.core.ranks import Ranks
from preference_training.modeling.logprobs import CachedReference, response_logps


@dataclass(frozen=True)
class _Distance:
    """How far policy and reference are apart over some responses: in how many of how many, by how much at most, and where."""

    apart: int
    responses: int
    most: float
    source: str


class SameStart:
    """Looks on while a run's first numbers are computed; `check` says what it saw. Of fillers nothing is kept."""

    def __init__(self, policy: nn.Module, reference):
        self.policy, self.reference = policy, reference
        # Of an adapter that training starts from; all others are off.
        self.draws = any(isinstance(module, nn.Dropout) and module.p > 0 for module in policy.modules())
        self.seen: list[tuple[PackedBatch, Tensor]] = []

    @torch.no_grad()
    def see(self, batch: PackedBatch, policy: Tensor, reference: Tensor) -> None:
        """Compare the log-probs [R] that both gave for a batch; nothing waits for the device."""
        if self.draws and self.policy.training:
            policy = self._without_dropout(batch)
        if batch.is_filler:
            return
        # A policy without finite numbers is the business of those that skip a step.
        apart = torch.where(policy.isfinite(), (policy.detach() - reference).abs().nan_to_num(torch.inf), 0.0)
        self.seen.append((batch, apart))

    def _without_dropout(self, batch: PackedBatch) -> Tensor:
        self.policy.eval()
        try:
            return response_logps(self.policy, batch)
        finally:
            self.policy.train()

    def check(self, ranks: Ranks) -> None:
        """Raise UserError, on all ranks, where any rank has seen a difference."""
        found = [_distance(batch, apart) for batch, apart in self.seen]
        self.seen = []
        found = [distance for rank in ranks.gather(found) for distance in rank]
        apart = sum(distance.apart for distance in found)
        if not apart:
            return
        worst = max(found, key=lambda distance: distance.most)
        raise UserError(
            "reference: before the first update policy and reference have the same weights, and still the log-probs of "
            f"{apart} of {sum(distance.responses for distance in found)} responses differ, by up to {worst.most:.3g} nats, "
            f"for {worst.source}. Every margin would be measured from a wrong start. {self._advice()}"
        )

    def _advice(self) -> str:
        if isinstance(self.reference, CachedReference):
            return (
                "What is kept of the reference is not this model's: another configuration or other buffers, or another way to "
                "compute. Remove the reference_logps folder, or set reference_logps=live."
            )
        return (
            f"A copy of {type(self.policy).__name__} does not compute what it computes: buffers or settings that are not in "
            "its configuration, noise in training mode, or a kernel whose sums come in another order each time. Set "
            "reference_logps=cached, prefix_sharing=off or compile=false to find which."
        )


def _distance(batch: PackedBatch, apart: Tensor) -> _Distance:
    """What a batch's differences [R] come to."""
    apart = apart.cpu()
    response = int(apart.argmax())
    owners = [place for place, pair in enumerate(batch.pairs.tolist()) if response in pair] or [response]
    return _Distance(int((apart > 0).sum()), len(apart), float(apart[response]), batch.sources[owners[0]])
