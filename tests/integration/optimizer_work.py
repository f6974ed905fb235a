"""What the processes of `test_sharded_optimizers.py` do: each optimizer on sharded weights, beside the same alone."""

from pathlib import Path

import torch

from preference_training.batching.iterator import BatchIterator, Packing
from preference_training.batching.schedule import RunLength, Schedule
from preference_training.checkpointing.checkpoint import Checkpoint
from preference_training.checkpointing.writer import CheckpointWriter, SaveOptions
from preference_training.core.process_group import SINGLE_PROCESS, full_tensor
from preference_training.data.prompt_table import PromptTable
from preference_training.distributed.launching import end_group
from tests.integration.sharded_work import World, golden_prompts
from tests.support.building import weights_of

LOSS = {"name": "sft"}


def train_with(settings: dict, folder: str, cases: dict[str, dict]) -> dict:
    """Four steps in each case, sharded and alone, and a trainer that continues from the second step.

    For each case: the cosine of both updates and the ratio of their lengths, of the weights that are evaluated; whether the
    third trainer ends with the same weights and averages; the share of a state that this process holds.
    """
    world, results = World(settings), {}
    table = PromptTable.of(golden_prompts(world.tokenizer, "targets"))
    for name, changes in cases.items():
        mesh, run_dir = world.mesh("full"), Path(folder) / name
        changes = {"warmup_steps": 0, "batch_size": 8, **changes}
        (first, ranks), (second, _) = (world.sharded("llama", LOSS, mesh, "full", **changes) for _ in range(2))
        single = world.alone("llama", LOSS, **changes)
        for trainer, on in ((first, ranks), (second, ranks), (single, SINGLE_PROCESS)):
            length = RunLength(n_epochs=None, n_steps=4)
            trainer.batches.train = BatchIterator(Schedule(table, 8, length=length), packing=Packing(ranks=on))
        before = _flat(single)
        for step in first.batches.train:
            first.train_step(step)
            if first.state.updates == 2:
                _save(first, world, run_dir)
        for step in single.batches.train:
            single.train_step(step)
        second.continue_from(Checkpoint.read(run_dir / "step-16"))
        for step in second.batches.train:
            second.train_step(step)
        same = [torch.equal(_flat(first), _flat(second))]
        held = [_share_held(first)]
        for trainer in (first, second, single):
            trainer.average = trainer.step.updater.averages_in_place()
            trainer.average.__enter__()
        same.append(torch.equal(_flat(first), _flat(second)))
        moved, expected = (_flat(trainer) - before for trainer in (first, single))
        results[name] = {
            "cosine": torch.cosine_similarity(moved, expected, 0).item(),
            "ratio": (moved.norm() / expected.norm()).item(),
            "again": all(same),
            "held": held[0],
        }
    end_group()
    return results


def _flat(trainer) -> torch.Tensor:
    """All weights of a trainer's policy as they are now."""
    return torch.cat([full_tensor(weight).detach().double().flatten() for weight in weights_of(trainer).values()])


def _save(trainer, world: World, run_dir: Path) -> None:
    ranks = trainer.placement.ranks
    if ranks.is_rank_zero:
        run_dir.mkdir(exist_ok=True)
    ranks.barrier()
    options = SaveOptions(timeout_minutes=5)
    writer = CheckpointWriter(run_dir, trainer.models.policy, world.tokenizer, ranks, options)
    with writer, trainer.step.updater.averages_in_place():
        writer.write(trainer.snapshot())


def _share_held(trainer) -> float:
    """The share of the optimizer's whole states that this process holds."""
    states = [value for values in trainer.step.updater.optimizer.state.values() for value in values.values()]
    tensors = [value for value in states if isinstance(value, torch.Tensor) and value.dim() > 1]
    local = [value.to_local() if hasattr(value, "to_local") else value for value in tensors]
    return sum(value.numel() for value in local) / sum(value.numel() for value in tensors)
