"""What the processes of `test_context_parallel.py` do: several compute the packs of one rank together.

Each function runs on every process; the first one's result is the test's.
"""

import random

import torch
from torch.distributed.fsdp import fully_shard

from preference_training.batching.packing import TokenBudget, build_packs, iterate_examples
from preference_training.core.process_group import full_tensor
from preference_training.distributed.launching import end_group, start_group
from preference_training.distributed.sharding import data_ranks, find_blocks, make_mesh
from preference_training.modeling.kernels import enable_activation_checkpointing
from preference_training.modeling.logprobs import response_scores
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from tests.architectures import tiny_models
from tests.integration.sharded_work import BETA_DPO, OTHER_LOSSES, TRAJECTORIES, World, follow
from tests.support.random_tries import plain_results, random_prompts, relative_error, weighted_sum

# Every token of a pack takes part in these: sums, means over tokens, collisions, labels and statistics of a micro-batch.
LOSSES = (BETA_DPO, *(loss for loss in OTHER_LOSSES if loss["name"] in ("kto", "wpo", "rpo")))


def follow_trajectories(settings: dict, numbers: list[int], others: bool) -> dict:
    """Golden trajectories on two processes that share packs: under some shardings, in small packs, other losses."""
    world = World(settings)
    results = {}
    both = {"context_parallel_size": 2}
    for number in numbers:
        for sharding in ("full", "optimizer") if others else ("full",):
            results[f"{number} {sharding}"] = follow(world, TRAJECTORIES[number], world.mesh(sharding), sharding, **both)
    first = TRAJECTORIES[numbers[0]]
    results["small packs"] = follow(world, first, world.mesh("full"), "full", budget=60, **both)
    for loss in LOSSES if others else ():
        results[loss["name"]] = follow(world, first, world.mesh("full"), "full", loss, budget=150, **both)
    end_group()
    return results


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
            examples = list(iterate_examples(random_prompts(random.Random(seed), longest=40, most=6)))
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
