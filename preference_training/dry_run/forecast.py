"""What many ranks compute in a step, and how long a run takes, from tokens and FLOPs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from preference_training.batching.micro_batches import MicroBatch
from preference_training.batching.packing import TokenBudget, count_tokens, divide
from preference_training.configuration.schema import RunConfig
from preference_training.distributed.utilization import peak_flops, step_flops
from preference_training.modeling.loading import build_on_meta

# Steps whose packs are built for all ranks: hundreds of ranks take a second each.
STEPS_OF_ALL_RANKS = 5


@dataclass(frozen=True)
class RankTokens:
    """The tokens of every rank in some steps: [steps][ranks]. fillers: the share of packs that are computed as padding only."""

    of_steps: Sequence[Sequence[int]]
    fillers: float

    @classmethod
    def of(cls, steps: Sequence[Sequence[MicroBatch]], budget: TokenBudget, ranks: int) -> "RankTokens":
        """Divide the micro-batches of steps over the ranks, as each rank does."""
        of_steps, packs, computed = [], 0, 0
        for step in steps:
            divided = [divide(part.examples, budget, ranks) for part in step]
            counted = [
                [sum(count_tokens(part.examples, places) for places in cuts) for cuts in shares]
                for part, shares in zip(step, divided, strict=True)
            ]
            of_steps.append([sum(parts) for parts in zip(*counted, strict=True)])
            packs += sum(len(cuts) for shares in divided for cuts in shares)
            computed += sum(ranks * max(map(len, shares)) for shares in divided)
        return cls(of_steps, 1 - packs / computed)

    @property
    def per_step(self) -> float:
        """The tokens of all ranks in a step, on average."""
        return sum(map(sum, self.of_steps)) / len(self.of_steps)

    def line(self, processes_per_rank: int = 1) -> str:
        """The fewest, the mean and the most tokens of a rank in a step, which so many processes compute together."""
        means = [sum(step) / len(step) for step in self.of_steps]
        mean, waited = sum(means) / len(means), sum(max(step) for step in self.of_steps) / sum(means)
        who = "rank" if processes_per_rank == 1 else f"group of {processes_per_rank} processes"
        which = "the first step" if len(self.of_steps) == 1 else f"the first {len(self.of_steps)} steps"
        return (
            f"tokens per {who} in {which}: least {min(map(min, self.of_steps)):,}, mean {mean:,.0f}, most "
            f"{max(map(max, self.of_steps)):,}; the largest of a step has {waited:.2f} times the mean; "
            f"packs that are padding: {self.fillers:.0%}"
        )


def describe_duration(
    config: RunConfig, tokenizer, tokens: float, live_reference: bool, devices: int, device: torch.device
) -> str:
    """The line on how long a run of so many tokens takes on so many devices like `device`.

    The time of the products with weights at `assumed_mfu` of the devices' peak; unknown where the peak is.
    """
    peak = peak_flops(config, device)
    if peak is None:
        return "duration: not known, since the peak of the device is not; peak_tflops=989 would be that of an H100 in bfloat16"
    model = build_on_meta(config.model, tokenizer, config.cache_dir)
    flops = tokens * step_flops(model, live_reference)
    seconds = flops / (devices * peak * config.assumed_mfu)
    counted = "device" if devices == 1 else "devices"
    return (
        f"duration: about {_words(seconds)} of training: {flops:.3g} FLOPs on {devices:,} {counted} of {peak / 1e12:,.4g} "
        f"TFLOP/s, of which {config.assumed_mfu:.0%} are assumed to be used (assumed_mfu); evaluations come on top"
    )


def _words(seconds: float) -> str:
    """A duration in its largest unit."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"
