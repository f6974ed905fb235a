"""What the processes of `test_expert_balance.py` do; rank 0's result is the test's."""

import torch
from torch.distributed.fsdp import fully_shard

from preference_training.batching.micro_batches import MicroBatch
from preference_training.batching.packing import TokenBudget, iterate_examples
from preference_training.configuration.schema import RunConfig
from preference_training.core.process_group import SINGLE_PROCESS, Ranks, full_tensor
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.distributed.launching import end_group, start_group
from preference_training.distributed.placement import Sharded
from preference_training.distributed.sharding import find_blocks
from preference_training.losses.registry import build_loss
from preference_training.modeling.kernels import enable_activation_checkpointing
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from tests.architectures import tiny_models
from tests.support.building import build_trainer

SHARED = list(range(40, 64))
# Of different lengths, so that ranks have different numbers of tokens, and one of them a filler.
PROMPTS = [TokenizedPrompt([*SHARED, 70 + k], [[80, 81 + k] * (k + 1) + [0], [90, 91, 0]], [(0, 1)]) for k in range(5)]


def batch(ranks: Ranks) -> list[MicroBatch]:
    """Two micro-batches of small packs."""
    examples, budget = list(iterate_examples(PROMPTS)), TokenBudget(70, 70)
    return [MicroBatch.of(part, budget, ranks) for part in (examples[:3], examples[3:])]


def trainer(config: RunConfig, name: str, placement=None):
    """A trainer on a tiny model, sharded where a placement is given."""
    model = tiny_models.build(name)
    assert share_prefixes(model, "on")
    enable_activation_checkpointing(model)
    if placement is not None:
        for block in find_blocks(model, None):
            fully_shard(block, mesh=placement.layout.mesh["shard"])
        fully_shard(model, mesh=placement.layout.mesh["shard"])
        model.context = placement.ranks.context
    return build_trainer(config, model, build_loss("simpo", beta=2.0, gamma=1.0), placement=placement)


def gradients_over_processes(settings: dict, names: list[str]) -> dict[str, dict[str, float]]:
    """How far gradient and numbers of a batch over two processes are from those of one, and the gradient of the loss alone."""
    device = start_group(5)
    results = {}
    for name in names:
        for size in (1, 2):
            config = RunConfig.of(settings).changed({"model.router_aux_loss": 3.0, "trainer.context_parallel_size": size})
            placement = Sharded(config, None, device, Sharded.mesh(config, "cpu", torch.distributed.get_world_size()))
            sharded, alone = trainer(config, name, placement), trainer(config, name)
            without = trainer(config.changed({"model.router_aux_loss": None}), name)
            sharded.step.backward(batch(placement.ranks))
            numbers = sharded.step.balance.metrics()
            for one in (alone, without):
                one.step.backward(batch(SINGLE_PROCESS))
            expected = alone.step.balance.metrics()
            found, wanted, bare = (gradient(one.models.policy) for one in (sharded, alone, without))
            results[f"{name}, {size} processes a rank"] = {
                "gradient": ((found - wanted).norm() / wanted.norm()).item(),
                "loss alone": ((bare - wanted).norm() / wanted.norm()).item(),
                "numbers": max(abs(numbers[key] - value) / max(1.0, value) for key, value in expected.items()),
            }
    end_group()
    return results


def gradient(model) -> torch.Tensor:
    """All gradients of a model, gathered."""
    found = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in model.parameters()]
    return torch.cat([full_tensor(each).flatten() for each in found])
