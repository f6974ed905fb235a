"""The training loop, once. Trainer classes differ only in where weights live.

A trainer is handed everything ready: models, loss, batches, tracker. It reads numbers from the configuration and never
asks which loss, data set or trainer it serves.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from batches import BatchIterator, PackedBatch
from checkpoints import save_checkpoint, save_policy_pt
from evaluation import HeldOut, evaluate, sample_answers
from logprobs import response_logps
from losses import Loss, example_metrics, gap
from models import enable_activation_checkpointing, place
from tracking import Metrics, Tracker
from utils import pick_device


class BasicTrainer:
    """One process: all weights on one device, or layer by layer over its GPUs.

    reference is None where the loss needs none. sample_prompts are the token ids of the held-out prompts that are answered
    at each evaluation. held_out is the newest evaluation's result, None before the first.
    """

    def __init__(
        self,
        config,
        policy: nn.Module,
        reference: nn.Module | None,
        loss: Loss,
        tokenizer,
        train_batches: BatchIterator,
        eval_batches: Sequence[PackedBatch],
        sample_prompts: Sequence[list[int]],
        tracker: Tracker,
        run_dir: Path,
    ):
        self.config = config
        self.device = pick_device()
        self.policy = place(policy, self.device)
        self.reference = None if reference is None else place(reference, self.device)
        if config.activation_checkpointing:
            enable_activation_checkpointing(self.policy)
        self.loss = loss
        self.tokenizer = tokenizer
        self.train_batches = train_batches
        self.eval_batches = eval_batches
        self.sample_prompts = sample_prompts
        self.tracker = tracker
        self.run_dir = run_dir
        self.optimizer = getattr(torch.optim, config.optimizer)(
            self.policy.parameters(), lr=config.lr, **config.optimizer_kwargs
        )
        warmup = config.warmup_steps + 1
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / warmup))
        self.examples = 0
        self.updates = 0
        self.held_out: HeldOut | None = None

    # ---- the loop -------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Run to the end of the training batches: evaluate and write checkpoints on the way, and both at the end."""
        interval = self.config.eval_every - self.config.eval_every % self.config.batch_size
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
        checkpoint = self.save()
        if checkpoint and self.config.save_policy_pt:
            save_policy_pt(checkpoint, self.policy, self.examples, self.held_out.means() if self.held_out else {})

    def train_step(self, micro_batches: Sequence[PackedBatch]) -> Metrics:
        """One optimizer step on one batch, in pieces. Returns the batch's metrics; values may still be on the device.

        The gradient is that of the mean loss over the whole batch, however it was cut.
        """
        self.policy.train()
        num_examples = sum(batch.num_examples for batch in micro_batches)
        sums: dict[str, Tensor] = {}
        statistics: Metrics = {}
        for batch in micro_batches:
            batch = batch.to(self.device)
            policy, reference = response_logps(self.policy, batch), self.reference_logps(batch)
            selection = None if reference is None else self.loss.select(gap(policy.detach() - reference, batch.pairs))
            output = self.loss(policy, reference, batch.pairs, batch.response_lengths, selection)
            (output.losses.sum() / num_examples).backward()
            for name, values in example_metrics(output, policy, batch.pairs, "train").items():
                sums[name] = sums.get(name, 0.0) + values.sum()
            statistics = output.statistics
        grad_norm = self.clip_gradient()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.examples += num_examples
        self.updates += 1
        return {name: total / num_examples for name, total in sums.items()} | statistics | {"grad_norm": grad_norm}

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

    def sample(self) -> list[dict]:
        """Answers of the policy, and of the reference where there is one, to the sample prompts."""
        models = {"policy": self.policy} | ({"reference": self.reference} if self.reference is not None else {})
        answers = {
            name: sample_answers(model, self.tokenizer, self.sample_prompts, self.config.max_length, self.config.seed)
            for name, model in models.items()
        }
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

    def reference_logps(self, batch: PackedBatch) -> Tensor | None:
        """The reference's log-probs [R] of a batch; None where the loss needs none."""
        if self.reference is None:
            return None
        with torch.no_grad():
            return response_logps(self.reference, batch)

    def clip_gradient(self) -> Tensor:
        """Scale the gradient down to `max_grad_norm`; returns its global norm before that, a scalar."""
        return nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)


# The classes that `trainer.name` may say.
TRAINERS = {"BasicTrainer": BasicTrainer}
