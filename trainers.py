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

from batches import BatchIterator, MicroBatch, PackedBatch
from checkpoints import save_checkpoint, save_policy_pt
from evaluation import HeldOut, evaluate, sample_answers
from logprobs import response_logps
from losses import Loss, LossOutput, example_metrics, gap
from models import enable_activation_checkpointing, place
from tracking import Metrics, Tracker


class BasicTrainer:
    """One process: all weights on one device, or layer by layer over its GPUs.

    policy has been placed where it trains. reference gives the log-probs [R] of a batch; None where the loss needs none.
    sample_prompts are the token ids of the held-out prompts that are answered at each evaluation. held_out is the newest
    evaluation's result, None before the first.
    """

    place = staticmethod(place)

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
    ):
        self.config = config
        self.policy = policy
        self.device = next(policy.parameters()).device
        self.reference = reference
        if config.activation_checkpointing:
            enable_activation_checkpointing(self.policy)
        self.loss = loss
        self.tokenizer = tokenizer
        self.train_batches = train_batches
        self.eval_batches = eval_batches
        self.sample_prompts = sample_prompts
        self.tracker = tracker
        self.run_dir = run_dir
        self.optimizer = build_optimizer(policy, config)
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
            size = sum(piece.num_examples for micro_batch in batch for piece in micro_batch)
            now = time.perf_counter()
            metrics |= {"examples_per_second": size / (now - started), **self.counters()}
            started = now
            self.tracker.log_step(metrics)
        self.evaluate()
        checkpoint = self.save()
        if checkpoint and self.config.save_policy_pt:
            save_policy_pt(checkpoint, self.policy, self.examples, self.held_out.means() if self.held_out else {})

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> Metrics:
        """One optimizer step on one batch, in pieces. Returns the batch's metrics; values may still be on the device.

        The gradient is that of the mean loss over the whole batch, however it was cut.
        """
        self.policy.train()
        num_examples = sum(piece.num_examples for micro_batch in micro_batches for piece in micro_batch)
        sums: dict[str, Tensor] = {}
        statistics: Metrics = {}
        for micro_batch in micro_batches:
            for output, policy, pairs in self.losses_of(micro_batch):
                (output.losses.sum() / num_examples).backward()
                for name, values in example_metrics(output, policy, pairs, "train").items():
                    sums[name] = sums.get(name, 0.0) + values.sum()
                statistics = output.statistics
        grad_norm = self.clip_gradient()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.examples += num_examples
        self.updates += 1
        return {name: total / num_examples for name, total in sums.items()} | statistics | {"grad_norm": grad_norm}

    def losses_of(self, micro_batch: MicroBatch) -> Iterator[tuple[LossOutput, Tensor, Tensor]]:
        """Loss, policy log-probs [R] and pairs [P, 2] of each piece; the caller takes each piece's gradient before the next."""
        pieces = [piece.to(self.device) for piece in micro_batch]
        references = [None if self.reference is None else self.reference(piece) for piece in pieces]
        ahead = None
        if self.loss.selects_pairs and len(pieces) > 1:
            # What is kept depends on all pieces, and only one of them fits into memory with its gradient.
            with torch.no_grad():
                gaps = [gap(self.logps(piece) - known, piece.pairs) for piece, known in zip(pieces, references, strict=True)]
            ahead = self.loss.select(torch.cat(gaps))
        start = 0
        for piece, reference in zip(pieces, references, strict=True):
            policy = self.logps(piece)
            if ahead is not None:
                selection = ahead.part(start, start := start + piece.num_examples)
            else:
                selection = self.loss.select(gap(policy.detach() - reference, piece.pairs)) if self.loss.selects_pairs else None
            yield self.loss(policy, reference, piece.pairs, piece.response_lengths, selection), policy, piece.pairs

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
        self.held_out = evaluate(self.policy, self.reference, self.loss, self.eval_batches)
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

    def save(self) -> Path | None:
        """Write a checkpoint and say where; None under debug."""
        if self.config.debug:
            return None
        self.tracker.flush()
        checkpoint = save_checkpoint(self.run_dir, self.examples, self.policy, self.tokenizer, self.state_dict())
        self.tracker.say(f"checkpoint: {checkpoint}")
        return checkpoint

    def state_dict(self) -> dict:
        """What continues this run beside the weights: tensors and plain values only."""
        return {
            "examples": self.examples,
            "updates": self.updates,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "loss": self.loss.state_dict(),
            "train_batches": self.train_batches.state_dict(),
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from what `state_dict` gave; the weights are loaded apart, from the same checkpoint."""
        self.examples, self.updates = state["examples"], state["updates"]
        for name in ("optimizer", "scheduler", "loss", "train_batches"):
            getattr(self, name).load_state_dict(state[name])
        torch.set_rng_state(state["random"])

    # ---- where weights live ---------------------------------------------------------------------------------------------

    def clip_gradient(self) -> Tensor:
        """Scale the gradient down to `max_grad_norm`; returns its global norm before that, a scalar."""
        return nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)


def build_optimizer(policy: nn.Module, config) -> torch.optim.Optimizer:
    """The torch optimizer of the configuration, with its fused kernel where it has one."""
    optimizer_class = getattr(torch.optim, config.optimizer)
    fused = {"fused": True} if "fused" in inspect.signature(optimizer_class).parameters else {}
    return optimizer_class(policy.parameters(), lr=config.lr, **(fused | dict(config.optimizer_kwargs)))


# The classes that `trainer.name` may say.
TRAINERS = {"BasicTrainer": BasicTrainer}
