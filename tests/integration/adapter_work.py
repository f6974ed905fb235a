"""What the processes of `test_sharded_training.py` do with checkpoints of adapters. Each function runs on every rank."""

from pathlib import Path

import torch

from preference_training.batching.micro_batches import MicroBatch
from preference_training.batching.packing import TokenBudget, iterate_examples
from preference_training.checkpointing.checkpoint import Checkpoint
from preference_training.checkpointing.writer import CheckpointWriter, SaveOptions
from preference_training.distributed.launching import end_group
from preference_training.distributed.sharding import full_tensor
from tests.integration.sharded_work import Adapted, World, golden_prompts
from tests.support.building import weights_of


def save_and_resume(settings: dict, case: dict, folder: str) -> dict:
    """A step of an adapter over all ranks, and a checkpoint of it.

    differing: the names of weights that another sharded trainer, and one in one process, read from it with other values. count,
    shape: of the weights in it, and of the first by name.
    """
    world = World(settings)
    first, second = Adapted(world, case), Adapted(world, case)
    part = list(iterate_examples(golden_prompts(world.tokenizer, "pairs")))[:8]
    first.sharded.train_step([MicroBatch.of(part, TokenBudget(10**6, 10**6), first.ranks)])
    kept = {name: full_tensor(weight).detach().clone() for name, weight in weights_of(first.sharded).items()}
    options = SaveOptions(timeout_minutes=1)
    with CheckpointWriter(Path(folder), first.sharded.models.policy, world.tokenizer, first.ranks, options) as writer:
        writer.write(first.sharded.snapshot())
    first.ranks.barrier()
    checkpoint = Checkpoint.read(Path(folder) / f"step-{first.sharded.state.examples}")
    differing = []
    for trainer in (second.sharded, second.single):
        weights = weights_of(trainer)
        checkpoint.read_weights(weights)
        trainer.placement.set_weights(trainer.models.policy, weights)
        found = weights_of(trainer)
        differing += [name for name, weight in found.items() if not torch.equal(full_tensor(weight).detach(), kept[name])]
    end_group()
    return {"differing": differing, "shape": list(kept[min(kept)].shape), "count": len(kept)}
