"""What the processes of `test_out_of_memory.py` do: train while one rank runs out of memory at a chosen place."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from preference_training.batching.iterator import BatchIterator, Packing
from preference_training.batching.packing import TokenBudget
from preference_training.batching.schedule import RunLength, Schedule
from preference_training.checkpointing.checkpoint import Checkpoint
from preference_training.checkpointing.writer import CheckpointWriter, SaveOptions
from preference_training.core.process_group import full_tensor, progress
from preference_training.core.random_streams import seed_everything
from preference_training.data.prompt_table import PromptTable
from preference_training.distributed.heartbeats import explain
from preference_training.distributed.launching import end_group, start_group
from preference_training.distributed.out_of_memory import ShardedPasses, groups_of
from preference_training.distributed.placement import Sharded
from preference_training.losses.registry import build_loss
from preference_training.modeling.logprobs import LiveReference
from preference_training.tracking.tracker import NoTracker
from preference_training.training.assembly import token_budgets
from preference_training.training.preparation import PreparedRun
from preference_training.training.start_check import StartCheck
from tests.integration.sharded_work import World, golden_prompts
from tests.support.building import build_trainer, weights_of
from tests.support.files import GOLDEN
from trainers import Trainer

# Tokens of a pack, of targets and of pairs: two packs and more for each rank and step.
BUDGETS, STEPS = {"targets": 60, "pairs": 100}, 3
SETTINGS = {"optimizer": "AdamW", "lr": 1e-3, "warmup_steps": 0, "batch_size": 8}


class Failure:
    """Raises OutOfMemoryError on chosen ranks, in one step, at some calls of a place counted from 0 in each attempt.

    attempts: how many attempts of the step fail.
    """

    def __init__(
        self, rank: int, ranks: tuple[int, ...] = (1,), step: int = 1, calls: tuple[int, ...] = (0,), attempts: int = 1
    ):
        self.is_here, self.step, self.calls, self.attempts = rank in ranks, step, calls, attempts
        self.now = self.called = self.raised = 0

    def begin(self, step: int) -> None:
        """Count the calls of another attempt."""
        self.now, self.called = step, 0

    def __call__(self, *_: object) -> None:
        """At the place."""
        due = self.is_here and self.now == self.step and self.called in self.calls and self.raised < self.attempts
        self.called += 1
        if due:
            self.raised += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")


@contextmanager
def failing(trainer: Trainer, place: str, fail: Failure) -> Iterator[None]:
    """A trainer that calls `fail` at a place: what computes there, or its gradient."""
    policy = trainer.models.policy
    blocks = policy.get_decoder().layers
    passes = ShardedPasses(policy)
    group = groups_of(passes.states[next(name for name, module in passes.modules.items() if module is blocks[-1])])[0]
    reference = getattr(trainer.models.reference, "model", None)
    target, name = {
        "first block": (blocks[0].mlp, "forward"),
        "last block": (blocks[-1].mlp, "forward"),
        "embedding": (policy.get_input_embeddings(), "forward"),
        "head": (policy.get_output_embeddings(), "forward"),
        "reference": (None if reference is None else reference.get_output_embeddings(), "forward"),
        "gathering": (group, "wait_for_unshard"),
        "reducing": (group, "_wait_for_post_backward"),
        "loss": (type(trainer.models.loss), "__call__"),
    }[place.removesuffix(" backward")]
    usual = getattr(target, name)

    def replaced(*arguments, **named):
        if place.endswith(" backward"):
            output = usual(*arguments, **named)
            if output.requires_grad:
                output.register_hook(fail)
            return output
        fail()
        return usual(*arguments, **named)

    begin = trainer.step.lockstep.begin

    def begin_attempt() -> None:
        begin()
        fail.begin(trainer.state.updates)

    with mock.patch.object(target, name, replaced), mock.patch.object(trainer.step.lockstep, "begin", begin_attempt):
        yield


class Saying(NoTracker):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def log_message(self, text: str) -> None:
        """Keep a line."""
        self.said.append(text)


def build(world: World, sharding: str, loss: dict, budget: int | None = None, **changes) -> Trainer:
    """A trainer on golden models with its batches; with `model.lora.r` one of an adapter. budget: None is the usual one."""
    adapter = "model.lora.r" in changes
    config = world.config.changed({"trainer.sharding": sharding} | SETTINGS | changes)
    mesh = world.mesh(sharding, local_size=2)
    placement = Sharded(config, world.tokenizer, world.device, mesh)

    def load(name: str):
        seed_everything(0)
        one = config.changed({"model.name_or_path": str(GOLDEN / name)})
        return Sharded(one, world.tokenizer, world.device, mesh).load_policy()

    policy = load("llama" if adapter else "llama_policy")
    objective = build_loss(**loss)
    reference = None if loss["name"] == "sft" else LiveReference(policy if adapter else load("llama"))
    table = PromptTable.of(golden_prompts(world.tokenizer, objective.examples))
    schedule = Schedule(table, 8, length=RunLength(n_epochs=None, n_steps=STEPS))
    budget = budget or BUDGETS[objective.examples]
    parts = changes.get("gradient_accumulation_steps", 1)
    train = BatchIterator(schedule, parts, Packing(TokenBudget(budget, budget), placement.ranks))
    check = StartCheck(policy, reference) if adapter and reference is not None else None
    return build_trainer(
        config, policy, objective, reference, placement=placement, train=train, tracker=Saying(), start_check=check
    )


def train(trainer: Trainer, limits: dict[int, int]) -> list[dict]:
    """The metrics of each step; from a step in `limits` on, packs are limited to so many tokens."""
    found = []
    for step, batch in enumerate(trainer.batches.train):
        iterator = trainer.batches.train
        if step in limits:
            iterator.budget = TokenBudget(limits[step], limits[step])
            trainer.models.start_check = None
            batch = iterator._repack(batch)
        found.append(trainer.train_step(batch))
    return found


def compare(world: World, place: str, sharding: str, loss: dict, failure: dict, **changes) -> dict:
    """Train with a failure, and without one in the packs that it led to: what is said, and whether all numbers are the same."""
    broken, whole = build(world, sharding, loss, **changes), build(world, sharding, loss, **changes)
    ranks = broken.placement.ranks
    fail = Failure(ranks.rank, **failure)
    with failing(broken, place, fail):
        found = train(broken, {})
    limit = broken.batches.train.budget.limit
    expected = train(whole, {fail.step: limit})
    weights = weights_of(whole)
    same = all(torch.equal(full_tensor(each), full_tensor(weights[name])) for name, each in weights_of(broken).items())
    # As text, in which a gradient norm that has overflowed is equal to itself.
    numbers = [[{name: str(float(value)) for name, value in step.items()} for step in each] for each in (found, expected)]
    return {
        "said": [line for line in broken.tracker.said if "memory" in line],
        "raised": sum(ranks.all_gather_object(fail.raised)),
        "limits": ranks.all_gather_object(limit),
        "same": same and numbers[0] == numbers[1],
        "updates": broken.state.updates,
        "bad": broken.state.bad_steps,
    }


def recover(settings: dict, cases: dict[str, tuple]) -> dict:
    """`compare` of each case: place, sharding, loss, failure, changes."""
    world = World(settings)
    results = {}
    for name, (place, sharding, loss, failure, changes) in cases.items():
        results[name] = compare(world, place, sharding, loss, failure, **changes)
    end_group()
    return results


def fail_for_good(settings: dict, place: str, failure: dict) -> None:
    """Train with a failure that ends the run."""
    trainer = build(World(settings), "full", {"name": "sft"})
    with failing(trainer, place, Failure(trainer.placement.ranks.rank, **failure)):
        train(trainer, {})


def resume(settings: dict, folder: str) -> dict:
    """A checkpoint behind a failure, and what a run that resumes from it begins with."""
    world = World(settings)
    trainer = build(world, "full", {"name": "sft"}, budget=1000)
    ranks = trainer.placement.ranks
    with failing(trainer, "last block", Failure(ranks.rank, ranks=(0, 1), step=0, attempts=2)):
        train(trainer, {})
    options = SaveOptions(timeout_minutes=1)
    with CheckpointWriter(Path(folder), trainer.models.policy, world.tokenizer, ranks, options=options) as writer:
        writer.write(trainer.snapshot())
    ranks.barrier()
    prepared = PreparedRun(trainer.config, Path(folder), False, trainer.models.loss, world.tokenizer, ())
    checkpoint = Checkpoint.read(Path(folder) / "step-24")
    budgets = token_budgets(prepared, trainer.placement, trainer.models.policy, checkpoint, caches_reference=False)
    end_group()
    limits = [budget.limit for budget in (trainer.batches.train.budget, budgets.now, budgets.at_start)]
    return {"said": trainer.tracker.said, "limits": limits}


def stop_answering(minutes: float) -> None:
    """Rank 1 is stopped, by a signal that none can handle, before a collective; the others wait for it."""
    start_group(minutes)
    rank = torch.distributed.get_rank()
    progress.at("step 7, pack 1 of 2")
    torch.distributed.barrier()
    if rank == 1:
        # Long enough that its first heartbeats are written.
        time.sleep(minutes * 60 / 6)
        os.kill(os.getpid(), signal.SIGSTOP)
    progress.at("the end of step 7")
    try:
        torch.distributed.barrier()
    except RuntimeError as error:
        explain(error)
        raise
