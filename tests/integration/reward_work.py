"""What the processes of `test_reward_models.py` do: each runs on every rank; rank 0's result is the test's."""

from pathlib import Path

import torch

from preference_training.batching.micro_batches import MicroBatch
from preference_training.batching.packing import TokenBudget, iterate_examples, pack_examples
from preference_training.checkpointing.saved_models import load_plain
from preference_training.checkpointing.writer import CheckpointWriter, SaveOptions
from preference_training.core.process_group import SINGLE_PROCESS
from preference_training.core.random_streams import seed_everything
from preference_training.distributed.launching import end_group
from preference_training.distributed.placement import Sharded
from preference_training.distributed.sharding import full_tensor
from preference_training.losses.registry import build_loss
from preference_training.modeling.loading import load_model
from preference_training.modeling.logprobs import response_scores
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from tests.integration.sharded_work import World, golden_prompts
from tests.support.building import build_trainer, weights_of
from tests.support.files import GOLDEN

BUDGET = TokenBudget(10**6, 10**6)


def follow(settings: dict, folder: str) -> dict:
    """Steps of a reward model over two processes and alone: how far numbers, weights and what is saved are apart."""
    world = World(settings)
    examples = list(iterate_examples(golden_prompts(world.tokenizer, "pairs")))
    results = {}
    for name in ("full", "none", "tensor", "adapter", "context"):
        changes = {"optimizer": "AdamW", "lr": 1e-3, "warmup_steps": 0, "model.name_or_path": str(GOLDEN / "llama")}
        changes |= {"trainer.sharding": "none" if name == "none" else "full", "model.lora.r": 4 if name == "adapter" else None}
        changes |= {"trainer.context_parallel_size": 2 if name == "context" else 1}
        config = world.config.changed(changes).with_head("value")
        mesh = world.mesh(config.trainer.sharding, 2 if name == "tensor" else 1)
        placement = Sharded(config, world.tokenizer, world.device, mesh)
        seed_everything(0)
        policy = placement.load_policy()
        seed_everything(0)
        own = load_model(config.model, world.tokenizer)
        share_prefixes(own, "on")
        loss = build_loss("reward", center_coefficient=0.01)
        sharded = build_trainer(config, policy, loss, placement=placement)
        single = build_trainer(config, own, loss, tokenizer=world.tokenizer)
        numbers = 0.0
        for step in range(4):
            part = examples[8 * step : 8 * step + 8]
            found, expected = (
                trainer.train_step([MicroBatch.of(part, BUDGET, on)])
                for trainer, on in ((sharded, placement.ranks), (single, SINGLE_PROCESS))
            )
            assert found.keys() == expected.keys() and "rewards_train/margins" in found
            numbers = max(numbers, *(abs(found[key] / expected[key] - 1) for key in ("loss/train", "grad_norm")))
        kept = weights_of(single)
        apart = [(full_tensor(weight).detach() - kept[key].detach()).norm() for key, weight in weights_of(sharded).items()]
        assert len(apart) == len(kept)
        weights = (sum(apart) / sum(weight.norm() for weight in kept.values())).item()
        run_dir = Path(folder) / name
        run_dir.mkdir(exist_ok=True)
        placement.ranks.barrier()
        with CheckpointWriter(run_dir, policy, world.tokenizer, placement.ranks, SaveOptions(timeout_minutes=1)) as writer:
            writer.write(sharded.snapshot())
        # Rank 0 has not finished the directory when the others return.
        saved = saved_difference(run_dir, world.tokenizer, own) if placement.ranks.is_rank_zero else 0.0
        results[name] = {"numbers": numbers, "weights": weights, "saved": saved}
    end_group()
    return results


@torch.no_grad()
def saved_difference(run_dir: Path, tokenizer, model) -> float:
    """How far the values of a checkpoint, as others load it, are from those of a model."""
    batch = pack_examples(list(iterate_examples(golden_prompts(tokenizer, "pairs")[:6])))
    values = [response_scores(each.eval(), batch) for each in (load_plain(run_dir / "LATEST", torch.float32), model)]
    return (values[0] - values[1]).abs().max().item()
