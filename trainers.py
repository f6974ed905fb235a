"""The training loop, once. Trainer classes differ only in where weights live.

A trainer is handed everything ready: models, loss, batches, tracker. It reads numbers from the configuration and never
asks which loss, data set or trainer it serves.
"""

import inspect
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)  # fmt: skip

from batches import BatchIterator, MicroBatch, PackedBatch
from checkpoints import save_checkpoint, save_policy_pt
from configuration import sharded_dtype
from evaluation import HeldOut, evaluate, sample_answers
from logprobs import response_logps
from losses import Loss, LossOutput, PairSelection, example_metrics, gap
from placement import OneProcess, Sharded, TensorParallel
from ranks import ALONE, Ranks
from sharding import clip_by_global_norm, whole_weights
from tracking import Metrics, Tracker


class BasicTrainer:
    """One process: all weights on one device, or layer by layer over its GPUs.

    policy has been placed where it trains. reference gives the log-probs [R] of a batch; None where the loss needs none.
    sample_prompts are the token ids of the held-out prompts that are answered at each evaluation. held_out is the newest
    evaluation's result, None before the first.
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
        run_dir: Path,
        ranks: Ranks = ALONE,
    ):
        self.config = config
        self.ranks = ranks
        self.policy = policy
        self.device = next(policy.parameters()).device
        self.reference = reference
        self.loss = loss
        self.tokenizer = tokenizer
        self.train_batches = train_batches
        self.eval_batches = eval_batches
        self.sample_prompts = sample_prompts
        self.tracker = tracker
        self.run_dir = run_dir
        self.optimizer = build_optimizer(policy, config)
        # Gradients of float16 products would underflow; a step whose scaled gradients overflow is left out.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=computes_in_float16(config))
        warmup = config.warmup_steps + 1
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / warmup))
        self.examples = 0
        self.updates = 0
        self.held_out: HeldOut | None = None
        self.reference_answers: list[str] | None = None

    # ---- the loop -------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Run to the end of the training batches: evaluate and write checkpoints on the way, and both at the end."""
        interval = self.config.eval_every - self.config.eval_every % self.config.batch_size
        if self.reference is not None:
            # Policy and reference are the same weights now, and the reference's answers will not change.
            self.reference_answers = self.answers()
        if self.config.do_first_eval:
            self.evaluate()
        next_stop = interval
        started = time.perf_counter()
        for batch in self.train_batches:
            if self.examples >= next_stop:
                self.evaluate()
                self.save()
                next_stop = self.examples + interval
                started = time.perf_counter()
            metrics = self.train_step(batch)
            size = sum(micro_batch.num_examples for micro_batch in batch)
            now = time.perf_counter()
            metrics |= {"examples_per_second": size / (now - started), **self.counters()}
            started = now
            self.tracker.log_step(metrics)
        self.evaluate()
        self.save(with_policy_pt=self.config.save_policy_pt)

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> Metrics:
        """One optimizer step on one batch, in pieces. Returns the batch's metrics; values may still be on the device.

        The gradient is that of the mean loss over the whole batch, however it was cut and spread over ranks.
        """
        self.policy.train()
        num_examples = sum(micro_batch.num_examples for micro_batch in micro_batches)
        sums: dict[str, Tensor] = {}
        statistics: Metrics = {}
        pieces_left = sum(len(micro_batch.pieces) for micro_batch in micro_batches)
        for micro_batch in micro_batches:
            for output, policy, piece in self.losses_of(micro_batch):
                pieces_left -= 1
                self.before_backward(is_last=pieces_left == 0)
                # Sharded gradients are means over the ranks; this makes them sums.
                share = 0.0 if piece.is_filler else self.ranks.size / num_examples
                self.scaler.scale(output.losses.sum() * share).backward()
                for name, values in example_metrics(output, policy, piece.pairs, "train").items():
                    sums[name] = sums.get(name, 0.0) + values.sum() * (not piece.is_filler)
                statistics = output.statistics
        self.scaler.unscale_(self.optimizer)
        grad_norm = self.clip_gradient()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.examples += num_examples
        self.updates += 1
        totals = self.ranks.total(torch.stack(list(sums.values())) / num_examples)
        return dict(zip(sums, totals, strict=True)) | statistics | {"grad_norm": grad_norm}

    def losses_of(self, micro_batch: MicroBatch) -> Iterator[tuple[LossOutput, Tensor, PackedBatch]]:
        """Loss and policy log-probs [R] of each piece; the caller takes each piece's gradient before the next."""
        pieces = [piece.to(self.device) for piece in micro_batch.pieces]
        references = [None if self.reference is None else self.reference(piece) for piece in pieces]
        selection = None
        if self.loss.selects_pairs and len(pieces) > 1:
            # What is kept depends on all pieces, and only one of them fits into memory with its gradient.
            with torch.no_grad():
                selection = self.select(micro_batch, pieces, [self.logps(piece) for piece in pieces], references)
        for piece, reference in zip(pieces, references, strict=True):
            policy = self.logps(piece)
            if self.loss.selects_pairs and selection is None:
                selection = self.select(micro_batch, pieces, [policy.detach()], references)
            chosen = None if selection is None else selection.at(piece.places)
            yield self.loss(policy, reference, piece.pairs, piece.response_lengths, chosen), policy, piece

    def select(self, micro_batch: MicroBatch, pieces, policies, references) -> PairSelection:
        """The loss's selection among all pairs of a micro-batch on all ranks, from log-probs [R] of this rank's pieces."""
        gaps = torch.zeros(micro_batch.num_examples, device=self.device)
        for piece, policy, reference in zip(pieces, policies, references, strict=True):
            if not piece.is_filler:
                gaps[piece.places] = gap(policy - reference, piece.pairs)
        return self.loss.select(self.ranks.total(gaps))

    def logps(self, batch: PackedBatch) -> Tensor:
        """The policy's log-probs [R] of a batch."""
        return response_logps(self.policy, batch)

    def counters(self) -> Metrics:
        """How far the run is."""
        return {"counters/examples": self.examples, "counters/updates": self.updates}

    # ---- evaluation and checkpoints -------------------------------------------------------------------------------------

    def evaluate(self) -> None:
        """Score the held-out examples and answer the sample prompts, into the tracker and `samples.jsonl`."""
        if not self.eval_batches:
            return
        self.held_out = evaluate(self.policy, self.reference, self.loss, self.eval_batches, self.ranks)
        self.tracker.log_evaluation(self.held_out.means() | self.counters())
        if self.sample_prompts:
            samples = self.sample()
            with (self.run_dir / "samples.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
            self.tracker.log_samples(samples, self.examples)

    def answers(self) -> list[str]:
        """The policy's answers to the sample prompts."""
        return sample_answers(self.policy, self.tokenizer, self.sample_prompts, self.config.max_length, self.config.seed)

    def sample(self) -> list[dict]:
        """Answers of the policy, and of the reference where there is one, to the sample prompts."""
        known = self.reference_answers
        # Before the first step the reference's answers are the policy's: they need not be sampled twice.
        answers = {"policy": self.answers() if known is None or self.updates else known}
        if known is not None:
            answers["reference"] = known
        prompts = self.tokenizer.batch_decode(self.sample_prompts)
        rows = zip(prompts, *answers.values(), strict=True)
        return [{"examples": self.examples, **dict(zip(["prompt", *answers], row, strict=True))} for row in rows]

    def save(self, with_policy_pt: bool = False) -> None:
        """Write a checkpoint, with the weights as one file too if asked to; nothing under debug."""
        if self.config.debug:
            return
        self.tracker.flush()
        weights, state = self.weights(), self.state_dict()
        if self.ranks.is_main:
            checkpoint = save_checkpoint(self.run_dir, self.examples, self.policy, weights, self.tokenizer, state)
            if with_policy_pt:
                save_policy_pt(checkpoint, weights, self.examples, self.held_out.means() if self.held_out else {})
            self.tracker.say(f"checkpoint: {checkpoint}")
        self.ranks.wait()

    def state_dict(self) -> dict:
        """What continues this run beside the weights: tensors and plain values only. Whole on the main rank."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return {
            "examples": self.examples,
            "updates": self.updates,
            # By the weights' names, so that any trainer on any number of ranks can read it.
            "optimizer": get_optimizer_state_dict(self.policy, self.optimizer, options=whole),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loss": self.loss.state_dict(),
            "train_batches": self.train_batches.state_dict(),
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from what `state_dict` gave; the weights are loaded apart, from the same checkpoint."""
        self.examples, self.updates = state["examples"], state["updates"]
        whole = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(self.policy, self.optimizer, state["optimizer"], options=whole)
        for name in ("scheduler", "scaler", "loss", "train_batches"):
            getattr(self, name).load_state_dict(state[name])
        torch.set_rng_state(state["random"])

    # ---- where weights live ---------------------------------------------------------------------------------------------

    def before_backward(self, is_last: bool) -> None:
        """Called before each piece's backward pass; `is_last` for the last one of a step."""

    def clip_gradient(self) -> Tensor:
        """Scale the gradient down to `max_grad_norm`; returns its global norm before that, a scalar."""
        return nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)

    def weights(self) -> dict[str, Tensor]:
        """All weights by their names; on the main rank, and nothing on the others."""
        return self.policy.state_dict()


class FSDPTrainer(BasicTrainer):
    """Several processes, each with a part of every weight; how they are laid out says `trainer.sharding`."""

    placement = Sharded

    def __init__(self, config, *parts):
        super().__init__(config, *parts)
        # Where gradients are whole on every rank until the step, they are added up once, behind the last piece.
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

    def weights(self) -> dict[str, Tensor]:
        """All weights by their names, gathered on the main rank."""
        return whole_weights(self.policy)


class TensorParallelTrainer(FSDPTrainer):
    """Several processes, each with a part of every layer; processes beyond `trainer.tensor_parallel_size` shard weights."""

    placement = TensorParallel


def computes_in_float16(config) -> bool:
    """Whether products are in float16 while the weights are not."""
    return "float16" in (config.model.autocast_dtype, sharded_dtype(config)) and config.model.policy_dtype != "float16"


def build_optimizer(policy: nn.Module, config) -> torch.optim.Optimizer:
    """The torch optimizer of the configuration, with its fused kernel where it has one."""
    optimizer_class = getattr(torch.optim, config.optimizer)
    fused = {"fused": True} if "fused" in inspect.signature(optimizer_class).parameters else {}
    return optimizer_class(policy.parameters(), lr=config.lr, **(fused | dict(config.optimizer_kwargs)))


# The classes that `trainer.name` may say.
TRAINERS = {trainer.__name__: trainer for trainer in (BasicTrainer, FSDPTrainer, TensorParallelTrainer)}
