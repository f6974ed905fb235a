"""The optimizers by name: the library of each, its memory, and the size of its updates."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OptimizerFacts:
    """What is known of an optimizer before it is built.

    package: that has it. states: numbers kept for each weight, of the dtype that is updated, or of `state_bytes` each. shards:
    whether it updates sharded weights. averages: whether the weights that count are a running average of its own (schedule-free
    optimizers), so that the learning rate stays constant. lr_factor: the usual learning rate in multiples of AdamW's; None
    where none is usual, since updates are as large as the gradient.
    """

    package: str = "torch"
    states: float = 2.0
    state_bytes: int | None = None
    shards: bool = True
    averages: bool = False
    lr_factor: float | None = 1.0

    @property
    def updates_by_lr(self) -> bool:
        """Whether its updates are of about lr: not of the size of the gradient, or of the weights."""
        return self.lr_factor == 1.0


_EIGHT_BITS: dict[str, Any] = {"package": "bitsandbytes", "state_bytes": 1, "shards": False}
OPTIMIZERS: dict[str, OptimizerFacts] = {
    "RMSprop": OptimizerFacts(states=1),
    "AdamW": OptimizerFacts(),
    "Adam": OptimizerFacts(),
    "SGD": OptimizerFacts(states=0, lr_factor=None),
    # One number for each weight of a hidden matrix; AdamW's two for those of embeddings, head and vectors.
    "Muon": OptimizerFacts(states=1.25),
    # One for each row and column of a matrix, of which torch computes the norms of no sharded one. Its updates are lr times the
    # root mean square of a weight's values, 0.02 to 0.05 in matrices of language models.
    "Adafactor": OptimizerFacts(states=0, shards=False, lr_factor=30.0),
    "AdamWScheduleFree": OptimizerFacts(package="schedulefree", averages=True),
    "SGDScheduleFree": OptimizerFacts(package="schedulefree", states=1, averages=True, lr_factor=None),
    # AdamW's two, of a matrix's projection to a few directions; whole ones for embeddings and head.
    "GaLore": OptimizerFacts(package="pytorch_optimizer", states=0.75, shards=False),
    "AdamW8bit": OptimizerFacts(**_EIGHT_BITS),
    "RMSprop8bit": OptimizerFacts(**_EIGHT_BITS, states=1),
    "Lion8bit": OptimizerFacts(**_EIGHT_BITS, states=1),
    "PagedAdamW": OptimizerFacts(package="bitsandbytes", shards=False),
    "PagedAdamW8bit": OptimizerFacts(**_EIGHT_BITS),
}


def states_kept(optimizer: str, arguments: Mapping[str, Any]) -> float:
    """How many numbers an optimizer with these arguments keeps for each weight."""
    more = [arguments.get("amsgrad")] if optimizer in ("Adam", "AdamW") else []
    more += [arguments.get(name) for name in ("momentum", "centered")] if optimizer in ("RMSprop", "SGD") else []
    return OPTIMIZERS[optimizer].states + sum(map(bool, more))
