"""What the processes of `test_real_scaling.py` do: a real step of a sharded trainer, with everything held and sent counted."""

import gc

import torch

from preference_training.batching.iterator import BatchIterator, Packing
from preference_training.batching.packing import iterate_examples, pack_examples
from preference_training.batching.schedule import Schedule
from preference_training.configuration.schema import RunConfig
from preference_training.core.process_group import Ranks, to_local
from preference_training.data.prompt_table import PromptTable
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.distributed.launching import end_group, start_group
from preference_training.dry_run.memory_estimate import StorageCounter, peak_memory
from preference_training.dry_run.scaling import Traffic, attributed
from preference_training.losses.registry import build_loss
from preference_training.modeling.prefix_sharing.tree_attention import clear_mask_cache
from preference_training.modeling.tokenizer import load_tokenizer
from tests.support.building import build_trainer
from trainers import TRAINERS


def prompts(count: int = 8) -> list[TokenizedPrompt]:
    """Pairs of 120 to 127 tokens."""
    return [TokenizedPrompt([2] * (50 + n), [[3] * 30, [4] * 40], [(0, 1)]) for n in range(count)]


def packs_and_step(ranks: Ranks) -> tuple:
    """Two packs, and this rank's part of a step of eight pairs."""
    step = next(iter(BatchIterator(Schedule(PromptTable.of(prompts()), 8), 2, Packing(ranks=ranks))))
    return [pack_examples(list(iterate_examples(prompts(2))))] * 2, step


def real_steps(settings: list[dict]) -> list[dict]:
    """`real_step` under one configuration after the other."""
    device = start_group(5)
    results = [real_step(RunConfig.of(one), device) for one in settings]
    end_group()
    return results


def real_step(config, device: torch.device) -> dict:
    """Memory and traffic of a real step, as the counters see them and (held) as the objects' own storages are."""
    tokenizer, placement_class = load_tokenizer(config.model), TRAINERS[config.trainer.name].placement_class
    mesh = placement_class.mesh(config, device.type, config.trainer.nproc_per_node)
    placement = placement_class(config, tokenizer, device, mesh)
    with StorageCounter(len(tokenizer)) as counter:
        policy = placement.load_policy()
        counter.kind = "reference"
        reference = placement.reference(policy)
        counter.kind = "activations"
        # Those that the model was proved with are not a step's, nor is what the proof left for Python to collect.
        clear_mask_cache()
        gc.collect()
        trainer = build_trainer(config, policy, build_loss("dpo", beta=0.1), reference, placement=placement)
        pieces, batch = packs_and_step(placement.ranks)
        held: dict[str, int] = {}
        trainer.step.updater.optimizer.register_step_pre_hook(lambda *_: held.update(held_by(trainer)))
        memory = peak_memory(trainer.step, counter, pieces)
    with Traffic() as traffic:
        trainer.models.reference = attributed(reference, traffic)
        trainer.train_step(batch)
    return {"memory": memory, "held": held, "sent": dict(traffic.sent), "calls": dict(traffic.calls)}


def held_by(trainer) -> dict[str, int]:
    """Bytes of the storages of weights, gradients and optimizer state."""
    weights = list(trainer.models.policy.parameters())
    states = [value for state in trainer.step.updater.optimizer.state.values() for value in state.values()]
    tensors = {"parameters": weights, "gradients": [weight.grad for weight in weights], "optimizer": states}
    return {
        kind: sum({to_local(t).untyped_storage().data_ptr(): to_local(t).untyped_storage().nbytes() for t in found}.values())
        for kind, found in tensors.items()
        if all(isinstance(t, torch.Tensor) for t in found)
    }
