"""The training loop, once. Trainer classes differ only in where weights live.

A trainer is handed everything ready: models, loss, batches, tracker. It reads numbers from the configuration and never
asks which loss, data set or trainer it serves.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from preference_training.batching.iterator import BatchIterator
from preference_training.batching.micro_batches import MicroBatch
from preference_training.batching.packing import PackedBatch
from preference_training.batching.schedule import RunLength
from preference_training.checkpointing.checkpoint import Checkpoint
from preference_training.checkpointing.saved_models import checkpoint_check
from preference_training.checkpointing.snapshot import Snapshot, numbers_of
from preference_training.checkpointing.writer import CheckpointWriter
from preference_training.core import metric_names as names
from preference_training.core.errors import UserError
from preference_training.core.memory import memory_held
from preference_training.core.random_streams import random_streams, restore_random_streams
from preference_training.core.ranks import ALONE, Ranks, let_go_of_gathered, several
from preference_training.core.signals import StoppedError, StopRequests
from preference_training.distributed.layer_splitting import (
    joined_optimizer_state,
    joined_weights,
    set_joined_weights,
    split_optimizer_state,
)
from preference_training.distributed.placement import OneProcess, Sharded, SplitLayers, TensorParallel
from preference_training.distributed.sharding import clip_by_global_norm
from preference_training.evaluation.breakdown import interval_metrics
from preference_training.evaluation.held_out import HeldOut, evaluate_held_out
from preference_training.evaluation.phrasing import too_few
from preference_training.generation.sampling import Sampler
from preference_training.losses.base import BatchStatistics, Loss, LossOutput, example_metrics
from preference_training.modeling.adapters import weights_to_save
from preference_training.modeling.logprobs import LiveReference, response_logps
from preference_training.modeling.state import compute_device
from preference_training.tracking.ledger import Ledger
from preference_training.tracking.tracker import Metrics, Tracker
from preference_training.training.guards import CHANGED, StillWeights, Watch
from preference_training.training.optimization import (
    MASTER,
    MasterWeights,
    build_optimizer,
    flat_state,
    schedule,
    updated,
    warmup_steps,
)
from preference_training.training.pruning import Pruning
from preference_training.training.same_start import SameStart

# What is said where a run goes on with another choice of master weights than it had.
WITHOUT_MASTERS = (
    "the run had no float32 master weights, and goes on without them; master_weights=true starts them from its weights"
)
MASTERS_BEGIN = "the run had no float32 master weights; they start from its weights"
MASTERS_DROPPED = "the run's float32 master weights are dropped (master_weights=false); it goes on from its rounded weights"


class Scored(NamedTuple):
    """What a step found out about this rank's examples of one pack, E of them, without gradient.

    losses: [E]. pairs: [E, 2] int64, the places of their responses among all of the run's data, and margins: [E], of rewards;
    None for SFT. is_filler: they count for nothing.
    """

    losses: Tensor
    sources: tuple[str, ...]
    pairs: Tensor | None
    margins: Tensor | None
    is_filler: bool

    @classmethod
    def of(cls, pack: PackedBatch, output: LossOutput) -> "Scored":
        """From a pack and its losses."""
        paired = output.chosen_rewards is not None
        margins = output.chosen_rewards - output.rejected_rewards if paired else None
        pairs = pack.response_rows[pack.pairs] if paired else None
        return cls(output.losses.detach(), pack.sources, pairs, margins, pack.is_filler)


class BasicTrainer:
    """One process: all weights on one device, or layer by layer over its GPUs.

    policy has been placed where it trains. reference gives the log-probs [R] of a batch; None where the loss needs none.
    sample_prompts are the token ids of the held-out prompts that are answered at each evaluation. writer writes checkpoints;
    None for none. stop says why the run is to stop before its end. ledger keeps the margins of pairs; None for none. pruning
    says whether other jobs of the sweep do so much better that this one ends; None where there is no sweep, or none is to.
    same_start ends a run whose policy and reference are not the same at its beginning; None where they need not be.
    held_out is the newest evaluation's result, None before the first; held_out_means its means, those of the run so far where
    it goes on from a checkpoint.
    """

    placement = OneProcess

    def __init__(
        self,
        config,
        policy: nn.Module,
        reference: Callable[[PackedBatch], Tensor] | None,
        loss: Loss,
        tokenizer,
        train_batches: BatchIterator,
        eval_batches: Sequence[PackedBatch],
        sample_prompts: Sequence[list[int]],
        tracker: Tracker,
        writer: CheckpointWriter | None = None,
        ranks: Ranks = ALONE,
        stop: StopRequests | None = None,
        ledger: Ledger | None = None,
        pruning: Pruning | None = None,
        same_start: SameStart | None = None,
    ):
        self.config = config
        self.ranks = ranks
        self.policy = policy
        self.device = compute_device(policy)
        self.reference = reference
        self.loss = loss
        self.tokenizer = tokenizer
        self.train_batches = train_batches
        self.eval_batches = eval_batches
        self.sample_prompts = sample_prompts
        self.tracker = tracker
        self.writer = writer
        self.stop = stop or StopRequests()
        self.ledger = ledger
        self.pruning = pruning
        self.same_start = same_start
        self.pruned = False
        # Gradients of float16 products would underflow; a step whose scaled gradients overflow is left out.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=computes_in_float16(config))
        total = train_batches.schedule.total_steps if train_batches is not None else 0
        self.schedule = schedule(config, total)
        # The last one, where the learning rate rises through all of a run.
        self.first_full_step = min(warmup_steps(config, total), max(0, total - 1))
        self.prepare_optimizer()
        self.watch = Watch(lambda text: self.tracker.say(text), config.loss_spike)
        self.examples = 0
        self.updates = 0
        self.tokens = 0
        self.bad_steps = 0
        self.stopping = False
        self.saved_at: int | None = None
        self.evaluated_at: int | None = None
        self.held_out: HeldOut | None = None
        self.held_out_means: dict[str, float] | None = None
        self.best: float | None = None
        self.evaluations_since_best = 0
        self.reference_answers: list[str] | None = None

    def prepare_optimizer(self, masters: bool | None = None) -> None:
        """Make the optimizer and its schedule anew. masters: with float32 master weights; None is as configured."""
        self.optimizer = build_optimizer(self.policy, self.config, masters)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.schedule)

    @property
    def has_masters(self) -> bool:
        """Whether the optimizer keeps float32 master weights."""
        return isinstance(self.optimizer, MasterWeights)

    # ---- the loop -------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Run to the end of the training batches: evaluate and write checkpoints on the way, and both at the end.

        Raises StoppedError, a checkpoint written, where the run is asked to stop, and UserError where too many steps in a row
        could not be taken, or where policy and reference are not the same at the beginning.
        """
        if self.examples == 0:
            self.before_first_step()
        else:
            self.same_start = None
        started = time.perf_counter()
        for batch in self.train_batches:
            lr, tokens = self.optimizer.param_groups[0]["lr"], self.tokens
            metrics = self.train_step(batch)
            size = sum(micro_batch.num_examples for micro_batch in batch)
            now = time.perf_counter()
            if metrics:
                metrics |= {names.LEARNING_RATE: lr, names.EPOCH: self.train_batches.epochs_done, names.TIME: time.time()}
                metrics |= {names.EXAMPLES_PER_SECOND: size / (now - started), names.MEMORY: memory_held(self.device)}
                metrics |= {names.TOKENS_PER_SECOND: (self.tokens - tokens) / (now - started)} | self.counters()
                self.watch.see(metrics)
                self.tracker.log_step(metrics)
            started = now
            if not self.train_batches.finished and self.between_steps(size):
                started = time.perf_counter()
            if self.finished:
                break
        self.evaluate()
        self.save(finished=True)

    @property
    def finished(self) -> bool:
        """Whether no step is left to take, `objective` has not become better for long enough, or the run was pruned."""
        patience = self.config.early_stopping_patience
        not_better = patience is not None and self.evaluations_since_best >= patience
        return self.train_batches.finished or not_better or self.pruned

    def before_first_step(self) -> None:
        """What is known of the reference while the policy is the same, and the first evaluation."""
        if self.reference is not None:
            # Policy and reference are the same weights now, and the reference's answers will not change.
            self.reference_answers = self.answers()
        if self.config.do_first_eval:
            self.evaluate()

    def between_steps(self, size: int) -> bool:
        """Evaluate, write a checkpoint, or stop, where it is time to; `size` examples were just seen. Whether it was."""
        evaluate = self.passed(self.config.eval_every, size)
        strategy = self.config.save_strategy
        save = (strategy == "steps" and self.passed(self.config.save_every or self.config.eval_every, size)) or (
            strategy == "epoch" and self.train_batches.at_end_of_epoch
        )
        if evaluate:
            self.evaluate()
        if save:
            self.save()
        if self.stopping:
            self.save()
            reason = self.stop.reason or "another process of the run is to stop"
            raise StoppedError(f"stopped after {self.examples} examples: {reason}")
        return evaluate or save

    def passed(self, interval: int, size: int) -> bool:
        """Whether the last `size` examples have gone past a multiple of an interval, rounded down to whole batches."""
        interval -= interval % self.config.batch_size
        return self.examples // interval > (self.examples - size) // interval

    # ---- one step -------------------------------------------------------------------------------------------------------

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> Metrics:
        """One optimizer step on one batch, in packs. Returns the batch's metrics, none where the step was not taken.

        The gradient is that of the mean loss over the whole batch, however it was cut and spread over ranks. The step is not
        taken where a loss or the gradient is not finite.
        """
        remembered = self.loss.state_dict()
        num_examples = sum(micro_batch.num_examples for micro_batch in micro_batches)
        sums, statistics, scored = self.backward_within_memory(micro_batches, remembered)
        self.check_start()
        self.same_start = None
        grad_norm = self.scaled_down_gradient()
        # Read at once, before the weights change: one wait for the device.
        tokens = sum(pack.num_tokens for micro_batch in micro_batches for pack in micro_batch.packs)
        *values, tokens, stop, norm = self.added_up(sums, grad_norm, num_examples, tokens).tolist()
        metrics = dict(zip(sums, values, strict=True))
        self.stopping = stop > 0
        self.examples += num_examples
        self.tokens += int(tokens)
        # Where gradients are scaled, the scaler leaves a step out whose gradient has overflown.
        if math.isfinite(metrics[names.TRAIN_LOSS]) and (math.isfinite(norm) or self.scaler.is_enabled()):
            self.take_step(is_sound=math.isfinite(norm))
            if self.ledger is not None:
                self.ledger.record(self.examples, [(part.pairs, part.margins) for part in scored if not part.is_filler])
            return metrics | statistics | {names.GRAD_NORM: norm}
        self.skip(scored)
        self.loss.load_state_dict(remembered)
        return {}

    def check_start(self) -> None:
        """Raise UserError where policy and reference have not been the same until now, though no step was taken."""
        if self.same_start is not None:
            self.same_start.check(self.ranks)

    def backward_within_memory(self, micro_batches: Sequence[MicroBatch], remembered: dict):
        """`backward`; where memory does not suffice, once more in packs half as large, as all batches from then on."""
        try:
            return self.backward(micro_batches)
        except torch.OutOfMemoryError:
            # Other processes would wait for this one's part of what they compute together.
            if several():
                raise
        # Not in the handler: what was raised keeps the tensors of the step.
        self.optimizer.zero_grad(set_to_none=True)
        self.loss.load_state_dict(remembered)
        # A reference that was computed before saw other packs, and its last bits may be others.
        self.same_start = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        halves = self.train_batches.halve_packs(micro_batches)
        self.tracker.say(f"warning: out of memory; packs have at most {self.train_batches.budget.limit} tokens from now on")
        return self.backward(halves)

    def backward(self, micro_batches: Sequence[MicroBatch]) -> tuple[dict[str, Tensor], Metrics, list[Scored]]:
        """Add up the gradient of a batch; sums over this rank's examples, the loss's statistics, and each pack `Scored`."""
        self.policy.train()
        num_examples = sum(micro_batch.num_examples for micro_batch in micro_batches)
        sums: dict[str, Tensor] = {}
        statistics: Metrics = {}
        scored = []
        packs_left = sum(len(micro_batch.packs) for micro_batch in micro_batches)
        for micro_batch in micro_batches:
            for output, policy, pack in self.losses_of(micro_batch):
                packs_left -= 1
                self.before_backward(is_last=packs_left == 0)
                # Sharded gradients are means over the ranks; this makes them sums.
                share = 0.0 if pack.is_filler else self.ranks.size / num_examples
                self.scaler.scale(output.losses.sum() * share).backward()
                for name, values in example_metrics(output, policy, pack.pairs, "train").items():
                    sums[name] = sums.get(name, 0.0) + values.sum() * (not pack.is_filler)
                statistics = output.statistics
                scored.append(Scored.of(pack, output))
        return sums, statistics, scored

    def added_up(self, sums: dict[str, Tensor], grad_norm: Tensor, num_examples: int, tokens: int) -> Tensor:
        """A step's numbers over all ranks: means of `sums`, tokens, whether any is to stop (above 0), the gradient's norm."""
        others = torch.tensor([float(tokens), float(self.stop.reason is not None)], device=self.device)
        totals = self.ranks.total(torch.cat([torch.stack([value / num_examples for value in sums.values()]), others]))
        return torch.cat([totals, grad_norm.detach().to(totals).reshape(1)])

    def scaled_down_gradient(self) -> Tensor:
        """Bring the gradient to its own scale, and down to `max_grad_norm`; returns its norm before that, a scalar."""
        self.scaler.unscale_(self.optimizer)
        return self.clip_gradient()

    def update_weights(self) -> None:
        """Change the weights by the gradient that is there, and forget it."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1

    def looks_at_weights(self) -> bool:
        """Whether the coming step is one that is looked at: the first with the whole learning rate, and some later ones."""
        later = self.updates - self.first_full_step
        return later == 0 or (later > 0 and later & (later - 1) == 0 and self.schedule(self.updates) == 1)

    def take_step(self, is_sound: bool = True) -> None:
        """`update_weights`; warns where a sound step with the whole learning rate leaves most weights as they are."""
        still = StillWeights(updated(self.optimizer)) if is_sound and self.looks_at_weights() else None
        self.update_weights()
        self.move_reference()
        self.bad_steps = 0
        share = None if still is None else still.share_changed()
        if share is not None and share < CHANGED:
            self.watch.warn("weights that stay", self._stay(share))

    def _stay(self, share: float) -> str:
        dtype = "float32" if self.has_masters else str(self.policy.dtype).removeprefix("torch.")
        remedy = "Raise lr."
        if dtype != "float32":
            remedy = "Set master_weights=true, which keeps float32 copies of them in the optimizer, or raise lr."
        return (
            f"a step with lr {self.config.lr:g} has changed {share:.1%} of the weights that were looked at: its updates are "
            f"too small for weights in {dtype}, and most are rounded away. {remedy}"
        )

    def move_reference(self) -> None:
        """Let the reference follow the policy, where the loss wants it and it is time to."""
        update = self.loss.reference_update
        if update is not None and self.updates % update.every == 0:
            self.reference.move_towards(self.policy, update.share)
            # It would answer otherwise now.
            self.reference_answers = None

    def skip(self, scored: list[Scored]) -> None:
        """Forget the gradient of a step that cannot be taken, and name its examples in `bad_batches.jsonl`."""
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.bad_steps += 1
        pairs = [pair for part in scored for pair in zip(part.sources, part.losses.tolist(), strict=True)]
        pairs = [pair for rank in self.ranks.gather(pairs) for pair in rank]
        bad = sorted({source for source, loss in pairs if not math.isfinite(loss)})
        what = "loss" if bad else "gradient"
        names = bad or sorted({source for source, _ in pairs})
        self.tracker.log_bad_step(self.counters() | {"not_finite": what, "pairs": names})
        if self.bad_steps >= self.config.max_bad_steps:
            raise UserError(
                f"max_bad_steps: {self.bad_steps} steps in a row had a loss or gradient that is not finite. The newest "
                "checkpoint is as it was. bad_batches.jsonl names the examples: look at them, lower lr, or compute in float32 "
                "or bfloat16."
            )

    def losses_of(self, micro_batch: MicroBatch) -> Iterator[tuple[LossOutput, Tensor, PackedBatch]]:
        """Loss and policy log-probs [R] of each pack; the caller takes each pack's gradient before the next."""
        packs = [pack.to(self.device) for pack in micro_batch.packs]
        references = [None if self.reference is None else self.reference(pack) for pack in packs]
        statistics = None
        if self.loss.needs_batch_statistics and len(packs) > 1:
            # What is found depends on all packs, and only one of them fits into memory with its gradient.
            with torch.no_grad():
                statistics = self.batch_statistics(micro_batch, packs, [self.logps(pack) for pack in packs], references)
        for pack, reference in zip(packs, references, strict=True):
            policy = self.logps(pack)
            if self.same_start is not None:
                self.same_start.see(pack, policy, reference)
            if self.loss.needs_batch_statistics and statistics is None:
                statistics = self.batch_statistics(micro_batch, packs, [policy.detach()], references)
            found = None if statistics is None else statistics.at(pack.places)
            yield self.loss(policy, reference, pack.pairs, pack.response_lengths, found), policy, pack

    def batch_statistics(self, micro_batch: MicroBatch, packs, policies, references) -> BatchStatistics:
        """The loss's statistics over all pairs of a micro-batch on all ranks, from log-probs [R] of this rank's packs."""
        log_ratios = torch.zeros(micro_batch.num_examples, 2, device=self.device)
        for pack, policy, reference in zip(packs, policies, references, strict=True):
            if not pack.is_filler:
                log_ratios[pack.places] = (policy - reference)[pack.pairs]
        return self.loss.batch_statistics(self.ranks.total(log_ratios))

    def logps(self, batch: PackedBatch) -> Tensor:
        """The policy's log-probs [R] of a batch."""
        return response_logps(self.policy, batch)

    def counters(self) -> Metrics:
        """How far the run is."""
        return {names.EXAMPLES: self.examples, names.UPDATES: self.updates, names.TOKENS: self.tokens}

    # ---- evaluation and checkpoints -------------------------------------------------------------------------------------

    def evaluate(self) -> None:
        """Score the held-out examples and answer the sample prompts, into the tracker."""
        if not self.eval_batches:
            return
        if self.evaluated_at == self.examples:
            return
        see = self.same_start and self.same_start.see
        self.held_out = evaluate_held_out(self.policy, self.reference, self.loss, self.eval_batches, self.ranks, see)
        self.check_start()
        warnings = self.doubts() if self.held_out_means is None else []
        self.held_out_means = self.held_out.means()
        self.evaluated_at = self.examples
        self.compare_with_best()
        self.tracker.log_evaluation(self.held_out_means | interval_metrics(self.held_out) | self.counters())
        for text in warnings:
            self.tracker.say(f"warning: {text}")
        if self.sample_prompts:
            self.tracker.log_samples(self.sample(), self.examples)
        if self.ledger is not None:
            self.ledger.write()
        self.prune()
        self.tracker.report()

    def doubts(self) -> list[str]:
        """What speaks against deciding anything by this run's evaluations."""
        few = too_few(len(set(self.held_out.sources)), "held-out numbers")
        depends = self.loss.evaluation_depends_on
        said = f"loss/eval depends on {depends}: it does not compare between runs, nor exactly between evaluations of this one"
        return [text for text in (few, said if depends else None) if text]

    def compare_with_best(self) -> None:
        """Count the evaluations since `objective` was at its best; say so where the run ends for it."""
        objective = self.config.objective
        value = self.held_out_means[objective]
        if self.best is None or (value < self.best if names.smaller_is_better(objective) else value > self.best):
            self.best, self.evaluations_since_best = value, 0
            return
        self.evaluations_since_best += 1
        if self.evaluations_since_best == self.config.early_stopping_patience and not self.train_batches.finished:
            self.tracker.say(
                f"early stopping: {objective} was not better than {self.best:.4g} in {self.evaluations_since_best} evaluations"
            )

    def prune(self) -> None:
        """End the run here, and say so, where other jobs of the sweep do much better; not before its first step."""
        if self.pruning is None or self.finished or not self.examples:
            return
        judged = self.pruning.verdict(self.examples, self.held_out_means[self.config.objective]) if self.ranks.is_main else None
        verdict = self.ranks.from_main(judged)
        self.pruned = verdict is not None
        if self.pruned:
            self.tracker.say(f"pruned: {verdict}")

    def answers(self, model: nn.Module | None = None) -> list[str]:
        """A model's answers to the sample prompts; the policy's, unless another is given."""
        sampler = Sampler(self.tokenizer, self.config.max_length, self.config.seed, self.ranks)
        return sampler.texts(self.policy if model is None else model, self.sample_prompts)

    def sample(self) -> list[dict]:
        """Answers of the policy, and of the reference where there is one, to the sample prompts.

        Both are drawn from the same noise, so that a reader sees what has changed. No rate is taken of them.
        """
        if self.reference_answers is None and self.loss.reference_update is not None:
            self.reference_answers = self.answers(self.reference.model)
        known = self.reference_answers
        # Before the first step the reference's answers are the policy's: they need not be sampled twice.
        answers = {"policy": self.answers() if known is None or self.updates else known}
        if known is not None:
            answers["reference"] = known
        prompts = self.tokenizer.batch_decode(self.sample_prompts)
        rows = zip(prompts, *answers.values(), strict=True)
        return [{"examples": self.examples, **dict(zip(["prompt", *answers], row, strict=True))} for row in rows]

    def save(self, finished: bool = False) -> None:
        """Write a checkpoint; nothing without a writer. At the end of a run it may hold the weights as one file too."""
        if self.ledger is not None:
            self.ledger.write()
        if self.writer is None or (self.saved_at == self.examples and not finished):
            return
        self.tracker.flush()
        if not self.ranks.from_main(self.writer.checked):
            self.writer.check = checkpoint_check(self.policy, self.config, self.device)
        self.writer.write(self.snapshot(), with_policy_pt=finished and self.config.save_policy_pt)
        self.saved_at = self.examples
        if finished or self.stopping:
            self.writer.wait()
            # A process that ends would have its launcher end the main one, which may still be writing.
            self.ranks.wait()

    def snapshot(self) -> Snapshot:
        """The run as it is now."""
        # Of an optimizer that has not made a step there is nothing to keep.
        optimizer = self.optimizer_state() if self.updates else {"state": {}, "param_groups": []}
        numbers = numbers_of(optimizer["state"])
        state = self.state_dict() | {"optimizer_groups": optimizer["param_groups"], "optimizer_numbers": numbers}
        return Snapshot.of(self.examples, self.weights(), optimizer["state"], state, self.moved_reference())

    def state_dict(self) -> dict:
        """What continues this run beside weights and optimizer: plain values and uint8 tensors."""
        return {
            "examples": self.examples,
            "updates": self.updates,
            "tokens": self.tokens,
            "master_weights": self.has_masters,
            "bad_steps": self.bad_steps,
            "evaluated_at": self.evaluated_at,
            "held_out": self.held_out_means,
            "best": self.best,
            "evaluations_since_best": self.evaluations_since_best,
            "reference_answers": self.reference_answers,
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loss": self.loss.state_dict(),
            "train_batches": self.train_batches.state_dict(),
            "watch": self.watch.state_dict(),
            "random": self.ranks.gather(random_streams()),
        }

    def continue_from(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint as if the run had never stopped; with as many ranks as then, bit for bit."""
        self.take_weights(checkpoint)
        state = checkpoint.state
        if reference := self.moved_reference():
            checkpoint.read_reference(reference)
            self.set_moved_reference(reference)
        for name in ("examples", "updates", "bad_steps", "evaluated_at", "best", "evaluations_since_best"):
            setattr(self, name, state[name])
        self.take_reference_answers(state["reference_answers"])
        self.held_out_means, self.saved_at, self.tokens = state["held_out"], state["examples"], state.get("tokens", 0)
        if self.config.objective == names.EVAL_LOSS and names.loss_is_at_beta_used(self.held_out_means):
            # Losses of now do not compare with those of then.
            self.best, self.evaluations_since_best = None, 0
            self.tracker.say(
                "warning: evaluations before this checkpoint have loss/eval at beta-DPO's beta in force, those from here on at "
                "loss.beta: the best so far is forgotten, and keep_best begins anew"
            )
        if self.updates:
            self.take_optimizer(checkpoint)
        for name in ("scheduler", "scaler", "loss", "train_batches", "watch"):
            getattr(self, name).load_state_dict(state[name])
        if config_then := checkpoint.run.get("config"):
            self.take_schedule(config_then)
        restore_random_streams(checkpoint.streams_of(self.ranks.rank, self.ranks.size))

    def take_reference_answers(self, kept: list[str] | None) -> None:
        """Take over the reference's answers of a checkpoint, whose run may have had fewer sample prompts, or more."""
        wanted = len(self.sample_prompts)
        # Sample prompts are the first of the held-out ones, however many.
        self.reference_answers = kept[:wanted] if kept is not None else None
        if kept is None or len(kept) >= wanted:
            return
        if isinstance(self.reference, LiveReference):
            with self.reference.as_reference(self.reference.model):
                self.reference_answers = self.answers(self.reference.model)
            return
        self.reference_answers = None
        self.tracker.say(
            f"samples: the reference has answered {len(kept)} of the {wanted} sample prompts and only its log-probs are kept: "
            "from here on samples are the policy's alone (reference_logps=live would give the reference's too)"
        )

    def take_optimizer(self, checkpoint: Checkpoint) -> None:
        """Take over the optimizer's state of a checkpoint, and its master weights where it has some and they are wanted."""
        kept, state = checkpoint.has_master_weights, checkpoint.state
        if self.config.master_weights == "auto" and kept != self.has_masters:
            self.prepare_optimizer(masters=kept)
            if not kept:
                self.tracker.say(f"resume: {WITHOUT_MASTERS}")
        elif kept != self.has_masters:
            self.tracker.say(f"resume: {MASTERS_DROPPED if kept else MASTERS_BEGIN}")
        optimizer = self.optimizer_state() | {"param_groups": state["optimizer_groups"]}
        read = optimizer["state"]
        if not kept:
            read = {name: {key: value for key, value in values.items() if key != MASTER} for name, values in read.items()}
        checkpoint.read_optimizer(read)
        for name, values in state["optimizer_numbers"].items():
            optimizer["state"][name] |= values
        self.set_optimizer_state(optimizer)

    def take_schedule(self, config_then: dict) -> None:
        """Let the learning rate go on by this run's schedule, and say so where that is not the one the checkpoint was under."""
        data = self.train_batches.schedule
        length = RunLength(config_then["n_epochs"], config_then["n_examples"], config_then["n_steps"])
        total_then, total = data.with_length(length).total_steps, data.total_steps
        schedule_then = schedule(self.config, total_then)
        before, now = schedule_then(self.updates), self.schedule(self.updates)
        for group, base in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = base * now
        self.scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        to_come = range(self.updates, max(total_then, self.updates + 1))
        if any(schedule_then(step) != self.schedule(step) for step in to_come):
            lr = self.config.lr
            self.tracker.say(
                f"resume: the run has {total:,} steps now, not {total_then:,}, and lr_schedule={self.config.lr_schedule} is "
                f"that of {total:,} steps from here on: lr is {lr * now:.3g} at the next step, where it would have been "
                f"{lr * before:.3g}"
            )

    def take_weights(self, checkpoint: Checkpoint) -> None:
        """Take over the weights of a checkpoint, and nothing else of it."""
        weights = self.weights()
        checkpoint.read_weights(weights)
        self.set_weights(weights)

    # ---- where weights live ---------------------------------------------------------------------------------------------

    def before_backward(self, is_last: bool) -> None:
        """Called before each pack's backward pass; `is_last` for the last one of a step."""

    def clip_gradient(self) -> Tensor:
        """Scale the gradient down to `max_grad_norm`; returns its global norm before that, a scalar."""
        return nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)

    def weights(self) -> dict[str, Tensor]:
        """The weights and kept buffers by their names, alive, or the adapter's; one tensor may have several names."""
        return weights_to_save(self.policy.state_dict(keep_vars=True))

    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Take over new values that were written into what `weights` gave: they are the policy's own."""

    def moved_reference(self) -> dict[str, Tensor]:
        """The weights of a reference that follows the policy, as `weights` gives the policy's; none of one that stays."""
        return {} if self.loss.reference_update is None else self.reference.model.state_dict(keep_vars=True)

    def set_moved_reference(self, weights: dict[str, Tensor]) -> None:
        """Take over new values that were written into what `moved_reference` gave: they are the reference's own."""

    def optimizer_state(self) -> dict:
        """The optimizer's state by the weights' names, alive; made where it is not there yet."""
        return flat_state(get_optimizer_state_dict(self.policy, self.optimizer))

    def set_optimizer_state(self, state: dict) -> None:
        """Take over new values of what `optimizer_state` gave."""
        set_optimizer_state_dict(self.policy, self.optimizer, state)


class LayerSplittingTrainer(BasicTrainer):
    """One process, with a part of every layer on each of its devices. To others its weights look whole."""

    placement = SplitLayers

    def weights(self) -> dict[str, Tensor]:
        """The weights and kept buffers by their names, joined anew; one tensor may have several names."""
        return joined_weights(self.policy)

    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Split new values among the devices."""
        set_joined_weights(self.policy, weights)

    def moved_reference(self) -> dict[str, Tensor]:
        """The weights of a reference that follows the policy, joined anew; none of one that stays."""
        return {} if self.loss.reference_update is None else joined_weights(self.reference.model)

    def set_moved_reference(self, weights: dict[str, Tensor]) -> None:
        """Split new values among the devices."""
        set_joined_weights(self.reference.model, weights)

    def optimizer_state(self) -> dict:
        """The optimizer's state by the names of whole weights, joined anew."""
        return joined_optimizer_state(self.policy, super().optimizer_state())

    def set_optimizer_state(self, state: dict) -> None:
        """Split new values among the devices."""
        super().set_optimizer_state(split_optimizer_state(self.policy, state))


class FSDPTrainer(BasicTrainer):
    """Several processes, each with a part of every weight; how they are laid out says `trainer.sharding`."""

    placement = Sharded

    def __init__(self, config, *parts, **named_parts):
        super().__init__(config, *parts, **named_parts)
        # Where gradients are whole on every rank until the step, they are added up once, behind the last pack.
        self.adds_up_once = config.trainer.sharding in ("optimizer", "none")

    def before_backward(self, is_last: bool) -> None:
        """Tell the engine when gradients are to be added up."""
        self.policy.set_is_last_backward(is_last)
        if self.adds_up_once:
            self.policy.set_requires_gradient_sync(is_last)
            self.policy.set_reshard_after_backward(is_last)

    def clip_gradient(self) -> Tensor:
        """Scale the gradient down to `max_grad_norm`; returns its norm over all ranks before that, a scalar."""
        return clip_by_global_norm(self.policy.parameters(), self.config.max_grad_norm)

    def optimizer_state(self) -> dict:
        """The optimizer's state by the weights' names, alive; made where it is not there yet."""
        let_go_of_gathered(self.policy)
        return super().optimizer_state()


class TensorParallelTrainer(FSDPTrainer):
    """Several processes, each with a part of every layer; processes beyond `trainer.tensor_parallel_size` shard weights."""

    placement = TensorParallel


def computes_in_float16(config) -> bool:
    """Whether products are in float16 while the weights are not."""
    return "float16" in (config.model.autocast_dtype, config.sharded_dtype) and config.model.policy_dtype != "float16"


# By name; `trainer.name` may say those that have a file in config/trainer/.
TRAINERS = {trainer.__name__: trainer for trainer in (BasicTrainer, LayerSplittingTrainer, FSDPTrainer, TensorParallelTrainer)}
