"""The training loop, and the trainers by the names that `trainer=` takes: each is the loop with another placement of weights.

The loop is handed everything ready: placement, models, batches, observers. It reads numbers from the configuration and never
asks which loss, data set or trainer it serves.
"""

import math
from collections.abc import Sequence
from contextlib import suppress

from preference_training.batching.micro_batches import MicroBatch
from preference_training.checkpointing.checkpoint import Checkpoint
from preference_training.checkpointing.saved_models import checkpoint_check
from preference_training.checkpointing.snapshot import Snapshot, scalar_state
from preference_training.core import metric_names as names
from preference_training.core.errors import UserError
from preference_training.core.machine import memory_held
from preference_training.core.process_group import progress
from preference_training.core.random_streams import random_streams, restore_random_streams
from preference_training.core.signals import StoppedError
from preference_training.distributed.placement import OneProcess, Placement, Sharded, TensorParallel
from preference_training.distributed.utilization import Utilization
from preference_training.tracking.tracker import Metrics
from preference_training.training.evaluator import EvaluationStoppedError, Evaluator
from preference_training.training.monitors import TrainingMonitor
from preference_training.training.parts import Batches, Models, Observers, Pace, RunState
from preference_training.training.step import PackResult, Shortage, TrainingStep


class Trainer:
    """Trains from the first batch to the last: steps, evaluations, checkpoints."""

    placement_class: type[Placement]

    def __init__(self, placement: Placement, models: Models, batches: Batches, observers: Observers):
        self.config, self.placement, self.models = placement.config, placement, models
        self.batches, self.observers, self.tracker = batches, observers, observers.tracker
        self.state = RunState()
        self.step = TrainingStep(placement, models, self.state, batches.train.schedule.total_steps)
        self.evaluator = Evaluator(placement, models, batches, self.state, observers)
        utilization = Utilization.of(self.config, models.policy, models.reference, self.step.device)
        self.pace = Pace(self.state, utilization)
        self.monitor = TrainingMonitor(self.tracker, self.config.loss_spike)
        self.stopping = False
        self.saved_at: int | None = None

    # ---- the loop -------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train to the end of the batches: evaluate and write checkpoints on the way, and both at the end.

        Raises StoppedError, a checkpoint written, where the run is asked to stop, and UserError where too many steps in a row
        were skipped, or where policy and reference are not the same at the beginning.
        """
        self.pace.start()
        self.monitor.check_warmup(self.config, self.batches.train.schedule.total_steps)
        if self.state.examples == 0:
            self.before_first_step()
        else:
            self.models.start_check = None
            if self.state.evaluation_due:
                self.between_steps(0)
        self.pace.idle()
        for batch in self.batches.train:
            lr = self.step.updater.lr
            metrics = self.train_step(batch)
            size = sum(micro_batch.num_examples for micro_batch in batch)
            measured = self.pace.step(size)
            if metrics:
                metrics |= {names.LEARNING_RATE: lr, names.EPOCH: self.batches.train.epochs_done} | measured
                metrics |= {names.MEMORY: memory_held(self.step.device)} | self.state.counters()
                self.monitor.observe(metrics)
                self.observers.log_step(metrics)
            if not self.batches.train.finished and self.between_steps(size):
                self.pace.idle()
            if self.finished:
                break
        self.monitor.report_sharing()
        with self.step.updater.averages_in_place():
            self.evaluator.evaluate(may_stop=False)
        self.save(finished=True)

    @property
    def finished(self) -> bool:
        """Whether no step is left to take, or the evaluations or a callback end the run."""
        ended = self.batches.train.finished or self.evaluator.ends_run
        return ended or self.observers.callbacks_end_run(self.placement.ranks)

    def before_first_step(self) -> None:
        """Sample the reference's responses, and evaluate. Raises StoppedError where it is to stop."""
        if self.models.reference is not None:
            with suppress(EvaluationStoppedError):
                self.state.reference_answers = self.evaluator.reference_responses()
        if self.config.do_first_eval and not self.evaluator.stopped:
            with self.step.updater.averages_in_place():
                self.evaluator.evaluate()
        if self.evaluator.stopped:
            reason = self.observers.stop.reason or "another process of the run is to stop"
            raise StoppedError(f"stopped before the first step: {reason}; nothing was trained", resumable=False)

    def between_steps(self, size: int) -> bool:
        """Evaluate, write a checkpoint, or stop, where it is time to; `size` examples were just seen. Whether it was."""
        # Of a resumed run that was stopped during an evaluation: its checkpoint lacks the results.
        was_due = self.state.evaluation_due
        evaluate = was_due or self.passed(self.config.eval_every, size)
        strategy = self.config.save_strategy
        save = (strategy == "steps" and self.passed(self.config.save_every or self.config.eval_every, size)) or (
            strategy == "epoch" and self.batches.train.at_end_of_epoch
        )
        if evaluate:
            with self.step.updater.averages_in_place():
                self.evaluator.evaluate()
            self.stopping |= self.evaluator.stopped
        if was_due and not self.stopping:
            save, self.saved_at = True, None
        if save:
            self.save()
        if self.stopping:
            self.save()
            reason = self.observers.stop.reason or "another process of the run is to stop"
            raise StoppedError(f"stopped after {self.state.examples} examples: {reason}")
        return evaluate or save

    def passed(self, interval: int, size: int) -> bool:
        """Whether the last `size` examples have gone past a multiple of an interval, rounded down to whole batches."""
        interval -= interval % self.config.batch_size
        return self.state.examples // interval > (self.state.examples - size) // interval

    # ---- one step -------------------------------------------------------------------------------------------------------

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> Metrics:
        """Take one optimizer step on one batch. Returns the batch's metrics, none where the step was skipped."""
        result = self.step.take(micro_batches, self.halve, lambda: self.observers.stop.reason is not None)
        self.stopping = result.stops
        if not result.metrics:
            self.log_skipped(result.packs)
            return {}
        if result.overflowed_at is not None:
            said = f"a float16 gradient overflowed at a loss scale of {result.overflowed_at:,g}: no update in this step; "
            self.tracker.log_message(f"{said}the scale is halved")
        self.monitor.observe_share_changed(result.share_changed, self.config.lr, self.step.updater.dtype)
        if self.observers.ledger is not None:
            margins = [(pack.pairs, pack.margins) for pack in result.packs if not pack.is_filler]
            self.observers.ledger.record(self.state.examples, margins)
        return result.metrics

    def halve(self, micro_batches: Sequence[MicroBatch], shortage: Shortage) -> list[MicroBatch]:
        """Cut a batch, and all later ones, into packs half as large as what has met the shortage."""
        halves = self.batches.train.halve_packs(micro_batches, shortage.largest)
        self.tracker.log_message(
            f"warning: {shortage}; packs are limited to {self.batches.train.budget.limit} tokens from now on"
        )
        return halves

    def log_skipped(self, packs: Sequence[PackResult]) -> None:
        """Name the examples of a skipped step in `bad_batches.jsonl`. Raises UserError after too many in a row."""
        pairs = [pair for pack in packs for pair in zip(pack.sources, pack.losses.tolist(), strict=True)]
        pairs = [pair for rank in self.placement.ranks.all_gather_object(pairs) for pair in rank]
        bad = sorted({source for source, loss in pairs if not math.isfinite(loss)})
        what = "loss" if bad else "gradient"
        named = bad or sorted({source for source, _ in pairs})
        self.tracker.log_bad_step(self.state.counters() | {"not_finite": what, "pairs": named})
        if self.state.bad_steps >= self.config.max_bad_steps:
            raise UserError(
                f"max_bad_steps: {self.state.bad_steps} steps in a row had a loss or gradient that is not finite. The newest "
                "checkpoint is as it was. bad_batches.jsonl names the examples: inspect them, lower lr, or compute in float32 "
                "or bfloat16."
            )

    # ---- checkpoints ----------------------------------------------------------------------------------------------------

    def save(self, finished: bool = False) -> None:
        """Write a checkpoint, if there is a writer. At the end of a run it may hold the weights as one file too."""
        if self.observers.ledger is not None:
            self.observers.ledger.write()
        writer = self.observers.writer
        if writer is None or (self.saved_at == self.state.examples and not finished):
            return
        self.tracker.flush()
        progress.at("a checkpoint")
        with self.step.updater.averages_in_place():
            if not self.placement.ranks.broadcast(writer.checked):
                writer.check = checkpoint_check(self.models.policy, self.config, self.step.device)
            with_policy_pt = finished and self.config.save_policy_pt and not self.config.load_best
            writer.write(self.snapshot(), with_policy_pt)
        self.saved_at = self.state.examples
        if finished or self.stopping:
            writer.wait()
            if finished:
                self.observers.load_best(self.config, self.placement.ranks)
            self.observers.tell_checkpoints()
            # The launcher would end rank 0, which may still be writing, when another process ends.
            self.placement.ranks.barrier()
        progress.at(None)

    def snapshot(self) -> Snapshot:
        """The run as it is now."""
        # An optimizer that has not made a step has no state to keep.
        optimizer = self.step.updater.optimizer_state() if self.state.updates else {"state": {}, "param_groups": []}
        numbers = scalar_state(optimizer["state"])
        state = self.state_dict() | {"optimizer_groups": optimizer["param_groups"], "optimizer_numbers": numbers}
        weights = self.placement.weights(self.models.policy)
        return Snapshot.of(self.state.examples, weights, optimizer["state"], state, self.moving_reference_weights())

    def moving_reference_weights(self) -> dict:
        """The weights of a reference that follows the policy; none of one that stays."""
        follows = self.models.loss.reference_update is not None
        return self.placement.weights(self.models.reference.model) if follows else {}

    def state_dict(self) -> dict:
        """What resumes this run besides weights and optimizer state: plain values and uint8 tensors."""
        parts = {name: part.state_dict() for name, part in self.stateful().items()}
        streams = self.placement.ranks.all_gather_object(random_streams())
        return self.state.state_dict() | parts | {"master_weights": self.step.updater.has_masters, "random": streams}

    def stateful(self) -> dict:
        """The parts of a run that remember something, by their names in a checkpoint."""
        updater = self.step.updater
        return {
            "scheduler": updater.scheduler,
            "scaler": updater.scaler,
            "loss": self.models.loss,
            "train_batches": self.batches.train,
            "watch": self.monitor,
        }

    def continue_from(self, checkpoint: Checkpoint) -> None:
        """Resume from a checkpoint as if the run had never stopped; with as many ranks as then, bit for bit."""
        weights = self.placement.weights(self.models.policy)
        checkpoint.read_weights(weights)
        self.placement.set_weights(self.models.policy, weights)
        if reference := self.moving_reference_weights():
            checkpoint.read_reference(reference)
            self.placement.set_weights(self.models.reference.model, reference)
        saved, log_message = checkpoint.state, self.tracker.log_message
        self.state.load_state_dict(saved)
        self.saved_at = self.state.examples
        self.evaluator.resume()
        if self.state.updates:
            self.step.updater.load(checkpoint, log_message)
        for name, part in self.stateful().items():
            part.load_state_dict(saved[name])
        if config_then := checkpoint.run.get("config"):
            self.step.updater.continue_schedule(self.batches.train.schedule, config_then, log_message)
        ranks = self.placement.ranks
        restore_random_streams(checkpoint.random_streams_for(ranks.rank, ranks.size))


class BasicTrainer(Trainer):
    """One process: all weights on one device, or layer by layer over its GPUs."""

    placement_class = OneProcess


class FSDPTrainer(Trainer):
    """Several processes, each with a shard of every weight; `trainer.sharding` decides how they are laid out."""

    placement_class = Sharded


class TensorParallelTrainer(Trainer):
    """Every layer split over `trainer.tensor_parallel_size` processes, or over the devices of one for some models."""

    placement_class = TensorParallel


# By name; `trainer.name` accepts those with a file in config/trainer/.
TRAINERS = {trainer.__name__: trainer for trainer in (BasicTrainer, FSDPTrainer, TensorParallelTrainer)}


def placement_for(config) -> type[Placement]:
    """Where the weights of a configuration's run live. Raises UserError where its trainer cannot train its model."""
    return TRAINERS[config.trainer.name].placement_class.for_model(config)
