"""What a run is assembled from, by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from preference_training.batching.iterator import BatchIterator
from preference_training.batching.packing import PackedBatch
from preference_training.checkpointing.writer import CheckpointWriter
from preference_training.core.signals import StopRequests
from preference_training.losses.base import Loss
from preference_training.tracking.ledger import Ledger
from preference_training.tracking.tracker import Tracker
from preference_training.training.pruning import Pruning
from preference_training.training.same_start import SameStart


@dataclass
class Models:
    """The policy, placed where it trains, and what it is compared with.

    reference gives the log-probs [R] of a batch; None where the loss needs none. same_start checks that both are the same until
    the first update; None where they need not be, or have been.
    """

    policy: nn.Module
    reference: Callable[[PackedBatch], Tensor] | None
    loss: Loss
    same_start: SameStart | None = None


@dataclass
class Batches:
    """What a run reads: training steps, this rank's held-out batches, and the token ids of the held-out prompts to sample."""

    train: BatchIterator
    held_out: Sequence[PackedBatch] = ()
    sample_prompts: Sequence[list[int]] = ()


@dataclass
class Observers:
    """Who follows a run: the tracker, the writer of checkpoints, the ledger of margins; and who may end it.

    None for no checkpoints, no ledger, no pruning. stop says why a run is to stop before its end.
    """

    tracker: Tracker
    writer: CheckpointWriter | None = None
    ledger: Ledger | None = None
    pruning: Pruning | None = None
    stop: StopRequests = field(default_factory=StopRequests)
