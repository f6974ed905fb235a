"""What the processes of `test_real_scaling.py` do: a real step of a sharded trainer, with everything held and sent counted."""

import torch
from omegaconf import OmegaConf

from batches import BatchIterator, examples_of, pack
from logprobs import LiveReference
from losses import build_loss
from memory_estimate import StorageCounter, most_held
from models import load_tokenizer
from prompt_table import PromptTable
from ranks import Ranks
from scaling import Traffic, attributed
from sharding import local
from tokenization import TokenizedPrompt
from trainers import TRAINERS


def prompts(count: int = 8) -> list[TokenizedPrompt]:
    """Pairs of 120 to 127 tokens."""
    return [TokenizedPrompt([2] * (50 + n), [[3] * 30, [4] * 40], [(0, 1)]) for n in range(count)]


def pieces_and_step(ranks: Ranks) -> tuple:
    """Two pieces, and this rank's part of a step of eight pairs."""
    step = next(iter(BatchIterator(PromptTable.of(prompts()), 8, 2, ranks=ranks)))
    return [pack(list(examples_of(prompts(2))))] * 2, step


def real_steps(settings: list[dict]) -> list[dict]:
    """`real_step` under one configuration after the other."""
    return [real_step(one) for one in settings]


def real_step(settings: dict) -> dict:
    """Memory and traffic of a real step, as the counters see them and (held) as the objects' own storages are."""
    config = OmegaConf.create(settings)
    trainer_class = TRAINERS[config.trainer.name]
    tokenizer = load_tokenizer(config.model)
    placement = trainer_class.placement(config, tokenizer)
    with StorageCounter(len(tokenizer)) as counter:
        policy = placement.policy()
        counter.kind = "reference"
        reference = LiveReference(placement.reference(policy))
        counter.kind = "activations"
        parts = policy, reference, build_loss("dpo", beta=0.1), tokenizer, None, [], [], None, None, placement.ranks
        trainer = trainer_class(config, *parts)
        pieces, step = pieces_and_step(placement.ranks)
        held: dict[str, int] = {}
        trainer.optimizer.register_step_pre_hook(lambda *_: held.update(held_by(trainer)))
        memory = most_held(trainer, counter, pieces)
    with Traffic() as traffic:
        trainer.reference = attributed(reference, traffic)
        trainer.train_step(step)
    placement.end()
    return {"memory": memory, "held": held, "sent": dict(traffic.sent), "calls": dict(traffic.calls)}


def held_by(trainer) -> dict[str, int]:
    """Bytes of the storages of weights, gradients and optimizer state."""
    weights = list(trainer.policy.parameters())
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    tensors = {"parameters": weights, "gradients": [weight.grad for weight in weights], "optimizer": states}
    return {
        kind: sum({local(t).untyped_storage().data_ptr(): local(t).untyped_storage().nbytes() for t in found}.values())
        for kind, found in tensors.items()
        if all(isinstance(t, torch.Tensor) for t in found)
    }
