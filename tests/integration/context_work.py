"""What the processes of `test_context_parallel.py` do: several compute the packs of one rank together.

Each function runs on every process; the first one's result is the test's.
"""

import random
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard

from preference_training.batching.iterator import BatchIterator, Packing
from preference_training.batching.packing import TokenBudget, build_packs, iterate_examples
from preference_training.batching.schedule import RunLength, Schedule
from preference_training.checkpointing.checkpoint import Checkpoint
from preference_training.checkpointing.writer import CheckpointWriter, SaveOptions
from preference_training.core.process_group import SINGLE_PROCESS, full_tensor
from preference_training.data.prompt_table import PromptTable
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.distributed.launching import end_group, start_group
from preference_training.distributed.sharding import data_ranks, find_blocks, make_mesh
from preference_training.modeling.kernels import enable_activation_checkpointing
from preference_training.modeling.logprobs import response_scores
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from tests.architectures import tiny_models
from tests.integration.sharded_work import BETA_DPO, TRAJECTORIES, World, follow, golden_prompts
from tests.support.building import weights_of
from tests.support.random_tries import plain_results, random_prompts, relative_error, weighted_sum


def follow_one(settings: dict, number: int) -> dict:
    """One trajectory, in packs that are cut."""
    world = World(settings)
    results = {"cut": follow(world, TRAJECTORIES[number], world.mesh("full"), "full", budget=60)}
    end_group()
    return results


def follow_on_four(settings: dict, number: int) -> dict:
    """Two ranks of two processes each, sharded over all, and over two machines; and one rank of four."""
    results = {}
    world = World(settings)
    for sharding in ("full", "hybrid"):
        mesh = world.mesh(sharding, local_size=2)
        results[sharding] = follow(world, TRAJECTORIES[number], mesh, sharding, BETA_DPO, budget=60)
    world.config = world.config.changed({"trainer.context_parallel_size": 4})
    results["four"] = follow(world, TRAJECTORIES[number], world.mesh("full"), "full")
    end_group()
    return results


def resume_elsewhere(settings: dict, folder: str) -> dict[str, float]:
    """Four steps of one rank of two processes; how far from its end two ranks, and one process, come from its second step."""
    world = World(settings)
    changes = {"optimizer": "AdamW", "lr": 1e-3, "warmup_steps": 0, "batch_size": 8}
    table, loss = PromptTable.of(golden_prompts(world.tokenizer, "pairs")), {"name": "dpo", "beta": 0.1}
    mesh, alone = world.mesh("full"), {"trainer.context_parallel_size": 1}
    together, ranks = world.sharded("llama", loss, mesh, "full", **changes)
    apart, each = world.sharded("llama", loss, mesh, "full", **changes, **alone)
    assert (ranks.size, each.size) == (1, 2)
    trainers = {"together": (together, ranks), "two": (apart, each), "one": (world.alone("llama", loss, **changes), None)}
    for trainer, on in trainers.values():
        packing = Packing(TokenBudget(150, 150), on or SINGLE_PROCESS)
        schedule = Schedule(table, 8, length=RunLength(n_epochs=None, n_steps=4))
        trainer.batches.train = BatchIterator(schedule, packing=packing)
    for step in together.batches.train:
        # A signal that has reached one process so far is one to both.
        assert together.step.take(step, together.halve, lambda: torch.distributed.get_rank() == 1).stops
        if together.state.updates == 2:
            options = SaveOptions(timeout_minutes=1)
            with CheckpointWriter(Path(folder), together.models.policy, world.tokenizer, ranks, options) as writer:
                writer.write(together.snapshot())
    for name in ("two", "one"):
        trainer = trainers[name][0]
        trainer.continue_from(Checkpoint.read(Path(folder) / "step-16"))
        for step in trainer.batches.train:
            trainer.train_step(step)
    ends = {
        name: torch.cat([full_tensor(weight).detach().flatten() for weight in weights_of(trainer).values()])
        for name, (trainer, _) in trainers.items()
    }
    end_group()
    return {name: ((end - ends["together"]).norm() / end.norm()).item() for name, end in ends.items()}


def one_tree_or_many(seed: int) -> list[TokenizedPrompt]:
    """Random prompts: those of an odd seed share nothing, and are so many that they can be divided without a cut."""
    if seed % 2 == 0:
        return random_prompts(random.Random(seed), longest=40, most=6)
    prompts: list[TokenizedPrompt] = []
    for k in range(12):
        (prompt,) = random_prompts(random.Random(100 * seed + k), longest=10, most=1)
        first_row = prompts[-1].first_row + len(prompts[-1].responses) if prompts else 0
        prompts.append(replace(prompt, first_row=first_row))
    return prompts


def compute_any_trie(names: list[str], context_size: int, seeds: int) -> dict[str, dict[str, float]]:
    """Log-probs and gradients of random tries, and those of each sequence alone in plain transformers: largest differences.

    Also how many packs were divided by whole trees, and how many were cut.
    """
    start_group(5)
    mesh = make_mesh("cpu", torch.distributed.get_world_size(), 1, "full")
    ranks = data_ranks(mesh, context_size)
    results = {}
    for name in names:
        plain, model = tiny_models.build(name).eval(), tiny_models.build(name).eval()
        assert share_prefixes(model, "on")
        for block in find_blocks(model, None):
            fully_shard(block, mesh=mesh["shard"])
        fully_shard(model, mesh=mesh["shard"])
        model.context = ranks.context
        found = results[name] = {"logps": 0.0, "gradient": 0.0, "whole trees": 0, "cut": 0}
        for seed in range(seeds):
            if seed == seeds - 1:
                enable_activation_checkpointing(model.train())
            examples = list(iterate_examples(one_tree_or_many(seed)))
            expected, expected_gradients = plain_results(plain, examples)
            for batch in build_packs(examples, TokenBudget(300, 200), ranks):
                logps = response_scores(model, batch)
                wanted = torch.stack([expected[row] for row in batch.response_rows.tolist()]).float()
                found["logps"] = max(found["logps"], (logps.detach() - wanted).abs().max().item())
                (weighted_sum(logps, batch) * (0 if batch.is_filler else ranks.size)).backward()
                layout = batch.part(ranks.context.rank, ranks.context.size).layout
                found["cut" if hasattr(layout, "pieces") else "whole trees"] += 1
            gradients = [full_tensor(weight.grad) for weight in model.parameters()]
            found["gradient"] = max(found["gradient"], relative_error(gradients, expected_gradients))
            model.zero_grad()
    end_group()
    return results
