"""The optimizers by name: which library has each, and what of it the rest of the configuration depends on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OptimizerFacts:
    """What is known of an optimizer before it is built.

    package: that has it. states: numbers kept for each weight, of the dtype that is updated, or of `state_bytes` each. shards:
    whether it updates sharded weights. averages: whether the weights that count are a running average of its own (schedule-free
    optimizers), so that the learning rate stays constant.
    """

    package: str = "torch"
    states: float = 2.0
    state_bytes: int | None = None
    shards: bool = True
    averages: bool = False


_EIGHT_BITS: dict[str, Any] = {"package": "bitsandbytes", "state_bytes": 1, "shards": False}
OPTIMIZERS: dict[str, OptimizerFacts] = {
    "RMSprop": OptimizerFacts(states=1),
    "AdamW": OptimizerFacts(),
    "Adam": OptimizerFacts(),
    "SGD": OptimizerFacts(states=0),
    # One number for each weight of a hidden matrix; AdamW's two for those of embeddings, head and vectors.
    "Muon": OptimizerFacts(states=1.25),
    # One for each row and column of a matrix, of which torch computes the norms of no sharded one.
    "Adafactor": OptimizerFacts(states=0, shards=False),
    "AdamWScheduleFree": OptimizerFacts(package="schedulefree", averages=True),
    "SGDScheduleFree": OptimizerFacts(package="schedulefree", states=1, averages=True),
    # AdamW's two, of a matrix's projection to a few directions; whole ones for embeddings and head.
    "GaLore": OptimizerFacts(package="pytorch_optimizer", states=0.75, shards=False),
    "AdamW8bit": OptimizerFacts(**_EIGHT_BITS),
    "RMSprop8bit": OptimizerFacts(**_EIGHT_BITS, states=1),
    "Lion8bit": OptimizerFacts(**_EIGHT_BITS, states=1),
    "PagedAdamW": OptimizerFacts(package="bitsandbytes", shards=False),
    "PagedAdamW8bit": OptimizerFacts(**_EIGHT_BITS),
}

# Those whose updates are not of about lr: they depend on the gradient's size, or on the weights'.
UNKNOWN_UPDATES = ("SGD", "Adafactor")


def states_kept(optimizer: str, arguments: Mapping[str, Any]) -> float:
    """How many numbers an optimizer with these arguments keeps for each weight."""
    more = [arguments.get("amsgrad")] if optimizer in ("Adam", "AdamW") else []
    more += [arguments.get(name) for name in ("momentum", "centered")] if optimizer in ("RMSprop", "SGD") else []
    return OPTIMIZERS[optimizer].states + sum(map(bool, more))
