"""The parts of a run: models, batches, observers, state, and its pace."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor, nn

from preference_training.batching.iterator import BatchIterator
from preference_training.batching.packing import PackedBatch
from preference_training.checkpointing.state import NEWER_STATE_SHAPE
from preference_training.checkpointing.writer import CheckpointWriter
from preference_training.core.metric_names import (
    EXAMPLES,
    EXAMPLES_PER_SECOND,
    MFU,
    TIME,
    TOKENS,
    TOKENS_PER_SECOND,
    UPDATES,
)
from preference_training.core.process_group import Ranks
from preference_training.core.signals import StopRequests
from preference_training.distributed.utilization import Utilization
from preference_training.evaluation.pruning import Pruning
from preference_training.losses.base import Loss
from preference_training.tracking.callbacks import Callbacks
from preference_training.tracking.ledger import Ledger
from preference_training.tracking.tracker import Metrics, Tracker, as_numbers
from preference_training.training.start_check import StartCheck

# The kind of the finding that says which checkpoint is a run's result.
BEST = "best checkpoint"


@dataclass
class Models:
    """The policy, placed where it trains, and what it is compared with.

    reference gives the log-probs [R] of a batch; None where the loss needs none. start_check checks until the first update that
    both agree; None where they need not, or have been checked.
    """

    policy: nn.Module
    reference: Callable[[PackedBatch], Tensor] | None
    loss: Loss
    start_check: StartCheck | None = None


@dataclass
class Batches:
    """What a run reads: training steps, this rank's held-out batches, and the token ids of the held-out prompts to sample."""

    train: BatchIterator
    held_out: Sequence[PackedBatch] = ()
    sample_prompts: Sequence[list[int]] = ()


@dataclass
class Observers:
    """The observers of a run: tracker, checkpoint writer, margin ledger, a user's callbacks; and what may end it early.

    None for no checkpoints, no ledger, no pruning. stop says why a run is to stop before its end.
    """

    tracker: Tracker
    writer: CheckpointWriter | None = None
    ledger: Ledger | None = None
    pruning: Pruning | None = None
    stop: StopRequests = field(default_factory=StopRequests)
    callbacks: Callbacks = field(default_factory=Callbacks)

    def log_step(self, metrics: Metrics) -> None:
        """Log a step that was taken, and tell callbacks."""
        self.tracker.log_step(metrics)
        if self.callbacks.read("on_step"):
            self._tell("on_step", as_numbers(metrics))
        self.tell_checkpoints()

    def log_evaluation(self, metrics: Metrics) -> None:
        """Log an evaluation, and tell callbacks."""
        self.tracker.log_evaluation(metrics)
        if self.callbacks.read("on_evaluation"):
            self._tell("on_evaluation", as_numbers(metrics))

    def load_best(self, config, ranks: Ranks) -> None:
        """Where `load_best` is set, make LATEST the best checkpoint of a run that has ended, and log which it is."""
        if config.load_best and self.writer is not None and not self.writer.failed and ranks.is_rank_zero:
            self.tracker.log_finding(BEST, self.writer.point_at_best(config.save_policy_pt))

    def tell_checkpoints(self) -> None:
        """Tell callbacks of the checkpoints that are complete now."""
        while self.writer is not None and self.writer.completed:
            self._tell("on_checkpoint", self.writer.completed.pop(0))

    def _tell(self, method: str, argument: dict | Path) -> None:
        """Call a method of the callbacks; log it when one of them ends the run."""
        ends = self.callbacks.reason is not None
        self.callbacks.call(method, argument)
        if self.callbacks.reason is not None and not ends:
            self.tracker.log_message(f"callback: {self.callbacks.reason}")

    def callbacks_end_run(self, ranks: Ranks) -> bool:
        """Whether a callback wants the run to end; the same on all ranks."""
        return bool(self.callbacks) and ranks.broadcast(self.callbacks.reason) is not None


@dataclass
class RunState:
    """The counters of a run, and what its evaluations have found.

    examples, updates, tokens, seconds: trained on, and for, so far. bad_steps: steps in a row that were skipped.
    evaluated_at: the number of examples at the newest evaluation, and held_out its mean metrics. evaluation_due: whether an
    evaluation was stopped on the way, which a resumed run makes first. held_out_before: loss and
    accuracy of each held-out example before the first step, as far as later evaluations are compared with them. best: the best
    value of `objective` so far. reference_answers: the reference's responses to the sample prompts, while they are known.
    findings: kinds of what its evaluations have found, each of which is said once.
    """

    examples: int = 0
    updates: int = 0
    tokens: int = 0
    seconds: float = 0.0
    bad_steps: int = 0
    evaluated_at: int | None = None
    held_out: dict[str, float] | None = None
    held_out_before: dict[str, list[float]] = field(default_factory=dict)
    best: float | None = None
    evaluations_since_best: int = 0
    evaluation_due: bool = False
    reference_answers: list[str] | None = None
    findings: list[str] = field(default_factory=list)

    def counters(self) -> Metrics:
        """The counters as metrics."""
        return {EXAMPLES: self.examples, UPDATES: self.updates, TOKENS: self.tokens}

    def state_dict(self) -> dict:
        """All of it, as plain values."""
        return asdict(self)

    def load_state_dict(self, saved: dict) -> None:
        """Load what `state_dict` returned; checkpoints of earlier versions lack some of it."""
        for name, value in asdict(self).items():
            setattr(self, name, saved.get(name, value) if name in NEWER_STATE_SHAPE else saved[name])


class Pace:
    """Measures steps by the clock, and adds to the seconds of `state`, which resume with the run."""

    def __init__(self, state: RunState, utilization: Utilization | None = None):
        self.state, self.utilization = state, utilization
        self.start()

    def start(self) -> None:
        """Count from now on; from where `state` has resumed."""
        self.now, self.tokens = time.perf_counter(), self.state.tokens

    def idle(self) -> None:
        """Count the time since the last call as the run's, but not as a step's: it went into evaluations and checkpoints."""
        self._tick()

    def step(self, examples: int) -> Metrics:
        """The metrics of a step, which ends now, on so many examples."""
        tokens = self.state.tokens - self.tokens
        seconds = self._tick()
        measured = {
            TIME: self.state.seconds,
            EXAMPLES_PER_SECOND: examples / seconds,
            TOKENS_PER_SECOND: tokens / seconds,
        }
        if self.utilization is not None:
            measured[MFU] = tokens / seconds * self.utilization.flops_per_token / self.utilization.peak
        return measured

    def _tick(self) -> float:
        """Seconds since the last tick, which are added to the run's."""
        seconds = max(time.perf_counter() - self.now, 1e-9)
        self.state.seconds += seconds
        self.start()
        return seconds
