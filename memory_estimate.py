"""How much memory a training step will take, found without taking it.

The trainer's own step runs on fake tensors, which have shapes but no data, while every storage that it makes is counted from
its making to its end. Nothing of the arithmetic is guessed, so the estimate follows the code.
"""

import weakref
from collections import Counter
from contextlib import contextmanager

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from batches import MicroBatch, PackedBatch
from logprobs import LiveReference
from losses import build_loss
from models import attend_over_trees, build_untrained, enable_activation_checkpointing
from response_trees import forget_masks
from trainers import BasicTrainer


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of all storages that are made under it and alive, by kind, and keeps the moment of the most.

    New storages are counted as `kind`; of those that pass by in a step, the ones whose last dimension is `vocabulary` are
    logits.
    """

    def __init__(self, vocabulary: int):
        super().__init__()
        self.kind = "parameters"
        self.vocabulary = vocabulary
        self.alive: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        # Storage → its kind, in a list so that it can change.
        self._kinds: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation, and count what it made."""
        output = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, output)
        return output

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._kinds:
            return
        is_logits = self.kind == "activations" and tensor.shape[-1:] == (self.vocabulary,)
        kind = self._kinds[storage] = ["logits" if is_logits else self.kind]
        weakref.finalize(storage, self._forget, kind, storage.nbytes())
        self.alive[kind[0]] += storage.nbytes()
        if self.alive.total() > self.most.total():
            self.most = self.alive.copy()

    def _forget(self, kind: list[str], size: int) -> None:
        self.alive[kind[0]] -= size

    def recount(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor's storage as `kind` from now on."""
        storage = tensor.untyped_storage()
        known = self._kinds.get(storage)
        if known is not None:
            self.alive[known[0]] -= storage.nbytes()
            self.alive[kind] += storage.nbytes()
            known[0] = kind


@contextmanager
def fake_tensors(vocabulary: int):
    """Everything computed inside has shapes but no data; gives the counter of its storages."""
    # Masks that are kept for the next batch may not cross the border in either direction.
    forget_masks()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), StorageCounter(vocabulary) as counter:
            yield counter
    finally:
        forget_masks()


def step_memory(config, tokenizer, paired: bool, live_reference: bool, pieces: list[PackedBatch]) -> dict[str, int]:
    """Bytes that are held in a training step when most is held, by kind.

    pieces are computed one after the other; each is what is computed at once. Models that do not share prefixes take more.
    """
    with fake_tensors(len(tokenizer)) as counter:
        policy = _model(config, tokenizer, config.model.policy_dtype)
        counter.vocabulary = policy.config.get_text_config().vocab_size
        counter.kind = "reference"
        reference = LiveReference(_model(config, tokenizer, config.model.reference_dtype)) if live_reference else None
        counter.kind = "activations"
        # Which loss it is makes no difference to memory, but some look at numbers.
        loss = build_loss("dpo", beta=0.1, reference_free=reference is None) if paired else build_loss("sft")
        if paired and reference is None:
            reference = lambda piece: torch.zeros(len(piece.response_lengths))  # noqa: E731
        if config.activation_checkpointing:
            enable_activation_checkpointing(policy)
        trainer = BasicTrainer(config, policy, reference, loss, tokenizer, None, [], [], None, None)
        for weight in policy.parameters():
            weight.register_post_accumulate_grad_hook(lambda weight: counter.recount(weight.grad, "gradients"))
        fake = [piece.with_tensors(lambda tensor: tensor.clone()) for piece in pieces]
        step = [MicroBatch([piece], piece.num_examples) for piece in fake]
        trainer.backward(step)
        trainer.scaled_down_gradient()
        trainer.update_weights()
        for state in trainer.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    counter.recount(value, "optimizer")
        # The first step has made the optimizer's state; from the second on it is there when activations are.
        counter.most.clear()
        trainer.backward(step)
        trainer.scaled_down_gradient()
        trainer.update_weights()
    return dict(counter.most)


def _step(trainer: BasicTrainer, micro_batches: list[MicroBatch]) -> None:
    """The trainer's step without its look at the numbers, of which there are none."""
    trainer.backward(micro_batches)
    trainer.scaled_down_gradient()
    trainer.update_weights()


def _model(config, tokenizer, dtype: str) -> nn.Module:
    """The model of a configuration; it attends over response trees without the proof, for which it has no numbers."""
    model = build_untrained(OmegaConf.merge(config.model, {"policy_dtype": dtype}), tokenizer, config.cache_dir)
    if config.prefix_sharing != "off":
        attend_over_trees(model)
    return model
