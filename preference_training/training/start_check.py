"""Checks that policy and reference give bit-identical log-probs before the first update, while their weights are the same.

Where they do not, every margin of the run would be measured from a wrong start, so the run ends with the reason.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from preference_training.batching.packing import PackedBatch
from preference_training.core.errors import UserError
from preference_training.core.process_group import Ranks
from preference_training.modeling.logprobs import CachedReference, response_scores


@dataclass(frozen=True)
class _Distance:
    """How far policy and reference differ: in how many of the responses, by how much at most, and where."""

    differing: int
    responses: int
    largest: float
    source: str


class StartCheck:
    """Compares policy and reference while a run computes its first log-probs: `compare` records, `check` raises."""

    def __init__(self, policy: nn.Module, reference):
        self.policy, self.reference = policy, reference
        # From an adapter that training starts from; all other dropout is off.
        self.has_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in policy.modules())
        self.compared: list[tuple[PackedBatch, Tensor]] = []

    @property
    def recomputes(self) -> bool:
        """Whether `compare` computes the policy's log-probs again, without dropout."""
        return self.has_dropout and self.policy.training

    @torch.no_grad()
    def compare(self, batch: PackedBatch, policy: Tensor, reference: Tensor) -> None:
        """Compare the log-probs [R] of both for a batch, without waiting for the device."""
        if self.recomputes:
            policy = self._without_dropout(batch)
        if batch.is_filler:
            return
        # Log-probs of the policy that are not finite are left to the skipping of steps.
        apart = torch.where(policy.isfinite(), (policy.detach() - reference).abs().nan_to_num(torch.inf), 0.0)
        self.compared.append((batch, apart))

    def _without_dropout(self, batch: PackedBatch) -> Tensor:
        self.policy.eval()
        try:
            return response_scores(self.policy, batch)
        finally:
            self.policy.train()

    def check(self, ranks: Ranks) -> None:
        """Raise UserError, on all ranks, where any rank has seen a difference."""
        found = [_distance(batch, apart) for batch, apart in self.compared]
        self.compared = []
        found = [distance for rank in ranks.all_gather_object(found) for distance in rank]
        apart = sum(distance.differing for distance in found)
        if not apart:
            return
        worst = max(found, key=lambda distance: distance.largest)
        raise UserError(
            "reference: before the first update policy and reference have the same weights, and still the log-probs of "
            f"{apart} of {sum(distance.responses for distance in found)} responses differ, by up to {worst.largest:.3g} nats, "
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
    """Summarize a batch's differences [R]."""
    apart = apart.cpu()
    response = int(apart.argmax())
    owners = [place for place, pair in enumerate(batch.members.tolist()) if response in pair] or [response]
    return _Distance(int((apart > 0).sum()), len(apart), float(apart[response]), batch.sources[owners[0]])
