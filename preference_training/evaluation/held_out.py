"""Held-out metrics. Reads policy, reference and loss; changes none of them, nor any random stream.

Shapes: R responses and P pairs over the whole held-out set; E examples (P, or R for SFT); G groups of examples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from preference_training.batching.batches import PackedBatch
from preference_training.core.ranks import ALONE, Ranks
from preference_training.losses.objectives import Loss, example_metrics
from preference_training.modeling.logprobs import response_logps
from preference_training.modeling.state import compute_device


@dataclass(frozen=True)
class HeldOut:
    """Every example's metrics, name → [E] float64 on the CPU, and the loss's own statistics.

    sources: [E], the names of the prompts that the examples are of.
    """

    examples: dict[str, Tensor]
    statistics: dict[str, float | Tensor]
    sources: Sequence[str]

    def means(self) -> dict[str, float]:
        """Name → mean over all examples, and the statistics under their own names."""
        means = {name: values.mean().item() for name, values in self.examples.items()}
        return means | {name: float(value) for name, value in self.statistics.items()}


@dataclass(frozen=True)
class Scores:
    """Log-probs of all responses of some batches over all ranks, float64 on the CPU, and which examples they belong to.

    policy, reference: [R]; the latter None where there is none. pairs: [P, 2]; empty for SFT. lengths: [R], tokens. order: [E],
    where the example of each place is among pairs (SFT: responses). sources: [E], the names of the prompts, by place.
    """

    policy: Tensor
    reference: Tensor | None
    pairs: Tensor
    lengths: Tensor
    order: Tensor
    sources: Sequence[str]


def evaluate(
    policy: nn.Module,
    reference: Callable[[PackedBatch], Tensor] | None,
    loss: Loss,
    batches: Sequence[PackedBatch],
    ranks: Ranks = ALONE,
    see: Callable[[PackedBatch, Tensor, Tensor], None] | None = None,
) -> HeldOut:
    """Score every held-out example once. The loss sees all of them together, so that nothing depends on how they are cut.

    `reference` gives the log-probs [R] of a batch; None where the loss needs none. `batches` are this rank's; every rank gets
    the result for all. `see` is shown each batch with the log-probs of both. Raises ValueError where there is no example.
    """
    scores = score(policy, reference, batches, ranks, see)
    pick = slice(None) if loss.paired else scores.order
    pairs = scores.pairs[scores.order] if loss.paired else scores.pairs
    known = scores.policy[pick]
    output = loss(known, scores.reference, pairs, scores.lengths[pick])
    return HeldOut(example_metrics(output, known, pairs, "eval"), output.statistics, scores.sources)


@torch.no_grad()
def score(
    policy: nn.Module,
    reference: Callable[[PackedBatch], Tensor] | None,
    batches: Sequence[PackedBatch],
    ranks: Ranks = ALONE,
    see: Callable[[PackedBatch, Tensor, Tensor], None] | None = None,
) -> Scores:
    """Log-probs of every response of this rank's batches; every rank gets those of all. As `evaluate`."""
    if not batches:
        raise ValueError("no held-out example to evaluate")
    device = compute_device(policy)
    scored = []
    for batch in batches:
        on_device = batch.to(device)
        logps = response_logps(policy, on_device).double().cpu()
        known = None if reference is None else reference(on_device).double().cpu()
        if see is not None and known is not None:
            see(batch, logps, known)
        if not batch.is_filler:
            facts = batch.pairs.cpu(), batch.response_lengths.cpu(), batch.places.cpu(), batch.sources
            scored.append((logps, known, *facts))
    logps, knowns, pairs, lengths, places, sources = zip(*(part for rank in ranks.gather(scored) for part in rank), strict=True)
    starts = accumulate(map(len, lengths), initial=0)
    order = torch.cat(places).argsort()
    names = [name for batch in sources for name in batch]
    return Scores(
        policy=torch.cat(logps),
        reference=None if reference is None else torch.cat(knowns),
        pairs=torch.cat([numbers + start for numbers, start in zip(pairs, starts, strict=False)]),
        lengths=torch.cat(lengths),
        order=order,
        sources=[names[place] for place in order.tolist()],
    )
