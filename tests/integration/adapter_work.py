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


def follow_and_save(settings: dict, cases: list[dict], folder: str) -> list[dict]:
    """What `Adapted.follow` finds in each case, and the names of weights that one process reads otherwise from a checkpoint."""
    world = World(settings)
    results = []
    for number, case in enumerate(cases):
        adapted = Adapted(world, case)
        found = adapted.follow(list(iterate_examples(golden_prompts(world.tokenizer, adapted.single.models.loss.examples))))
        kept = {name: full_tensor(weight).detach().clone() for name, weight in weights_of(adapted.sharded).items()}
        run_dir, policy = Path(folder) / str(number), adapted.sharded.models.policy
        if adapted.ranks.is_rank_zero:
            run_dir.mkdir()
        adapted.ranks.barrier()
        options = SaveOptions(timeout_minutes=1)
        with CheckpointWriter(run_dir, policy, adapted.single.placement.tokenizer, adapted.ranks, options) as writer:
            writer.write(adapted.sharded.snapshot())
        adapted.ranks.barrier()
        weights = weights_of(adapted.single)
        Checkpoint.read(run_dir / f"step-{adapted.sharded.state.examples}").read_weights(weights)
        adapted.single.placement.set_weights(adapted.single.models.policy, weights)
        read = weights_of(adapted.single)
        results.append(found | {"differing": [name for name, weight in kept.items() if not torch.equal(weight, read[name])]})
    end_group()
    return results
