"""How much memory a training step will take, found without taking it.

The trainer's own step runs on fake tensors, which have shapes but no data, while every storage that it makes is counted from
its making to its end. Nothing of the arithmetic is guessed, so the estimate follows the code.
"""

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from preference_training.batching.batches import MicroBatch, PackedBatch
from preference_training.core.ranks import ALONE, Ranks, let_go_of_gathered
from preference_training.distributed.sharding import Layout, Sharing, empty_model, local
from preference_training.losses.objectives import (
    DPOLoss,
    Loss,
    PairSelection,
)
from preference_training.modeling.adapters import has_adapter
from preference_training.modeling.loading import build_untrained, enable_activation_checkpointing
from preference_training.modeling.logprobs import LiveReference
from preference_training.modeling.prefix_sharing import attend_over_trees
from preference_training.modeling.tree_attention import forget_masks
from preference_training.training.trainers import TRAINERS, BasicTrainer

# What passes by these operations of FSDP, and is not known as something else, is of the kind.
KINDS = {
    "fsdp.all_gather_copy_in.default": "gathered weights",
    "fsdp.chunk_cat.default": "gradients",
    "c10d._reduce_scatter_base_.default": "gradients",
}


@dataclass(eq=False)
class _Held:
    """What a storage is for, and how many bytes it has."""

    kind: str
    size: int


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of all storages that are made under it, by kind, and finds the moment of the most.

    New storages are of the kind `kind`; of those that pass by in a step, the ones whose last dimension is `vocabulary` are
    logits. A storage is of one kind from its making on, also where that is found out later.
    """

    def __init__(self, vocabulary: int):
        super().__init__()
        self.kind = "parameters"
        self.vocabulary = vocabulary
        self._held: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        # Every change of a storage's size, in the order of time.
        self._changes: list[tuple[_Held, int]] = []
        self._start = 0

    def __enter__(self):
        self._resize = torch.UntypedStorage.resize_

        # Weights that FSDP gathers and lets go keep their storage, whose size changes; no operation says so.
        def resize(storage, size: int):
            result = self._resize(storage, size)
            if held := self._held.get(storage):
                self._change(held, size)
                held.kind = "gathered weights"
            return result

        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *exception):
        torch.UntypedStorage.resize_ = self._resize
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation, and count what it made."""
        if any(issubclass(type_, DTensor) for type_ in types):
            # What it does with this process's part comes by on its own.
            return NotImplemented
        if func is torch.ops._c10d_functional.wait_tensor.default and isinstance(args[0], FakeTensor):
            # As a real one is: waited for, and no copy of it.
            return args[0]
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        for tensor in tree_iter(output):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        if kind := KINDS.get(str(func)):
            for tensor in tree_iter((args, kwargs)):
                if isinstance(tensor, Tensor) and self._kind_of(tensor) == "activations":
                    self.recount(tensor, kind)
        return output

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._held:
            return
        is_logits = self.kind == "activations" and tensor.shape[-1:] == (self.vocabulary,)
        held = self._held[storage] = _Held("logits" if is_logits else self.kind, 0)
        weakref.finalize(storage, self._change, held, 0)
        self._change(held, storage.nbytes())

    def _change(self, held: _Held, size: int) -> None:
        self._changes.append((held, size - held.size))
        held.size = size

    def _kind_of(self, tensor: Tensor) -> str | None:
        held = self._held.get(tensor.untyped_storage())
        return held and held.kind

    def recount(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor's storage as `kind`, from its making on."""
        if held := self._held.get(tensor.untyped_storage()):
            held.kind = kind

    def restart(self) -> None:
        """Look for the moment of the most from now on only."""
        self._start = len(self._changes)

    def most(self) -> Counter[str]:
        """Bytes by kind at the moment when most was held."""
        totals = list(accumulate((change for _, change in self._changes), initial=0))
        moment = max(range(self._start, len(totals)), key=totals.__getitem__)
        kinds: Counter[str] = Counter()
        for held, change in self._changes[:moment]:
            kinds[held.kind] += change
        return kinds


@contextmanager
def fake_tensors(vocabulary: int) -> Iterator[StorageCounter]:
    """Everything computed inside has shapes but no data; gives the counter of its storages."""
    # Masks that are kept for the next batch may not cross the border in either direction.
    forget_masks()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), StorageCounter(vocabulary) as counter:
            yield counter
    finally:
        forget_masks()


def step_memory(config, tokenizer, loss: Loss, live_reference: bool, pieces: Sequence[PackedBatch]) -> dict[str, int]:
    """Bytes that are held in a training step of one process when most is held, by kind.

    pieces are computed one after the other; each is what is computed at once. Models that do not share prefixes take more.
    """
    with fake_tensors(len(tokenizer)) as counter:
        return most_held(fake_trainer(config, tokenizer, loss, live_reference, counter), counter, pieces)


def fake_trainer(
    config,
    tokenizer,
    loss: Loss,
    live_reference: bool,
    counter: StorageCounter,
    ranks: Ranks = ALONE,
    layout: Layout | None = None,
) -> BasicTrainer:
    """The trainer of a configuration on fake tensors, its weights counted; `layout` says how a sharded one's lie."""
    policy = _model(config, tokenizer, config.model.policy_dtype, layout)
    counter.vocabulary = policy.config.get_text_config().vocab_size
    counter.kind = "reference"
    reference = None
    if live_reference:
        shared = has_adapter(policy)
        reference = LiveReference(policy if shared else _model(config, tokenizer, config.model.reference_dtype, layout))
    elif loss.needs_reference:
        reference = lambda piece: torch.zeros(len(piece.response_lengths))  # noqa: E731
    counter.kind = "activations"
    parts = policy, reference, _without_numbers(loss), tokenizer, None, [], [], None, None, ranks
    trainer = TRAINERS[config.trainer.name](config, *parts)
    inner = trainer.optimizer.inner if trainer.has_masters else trainer.optimizer
    if hasattr(inner, "fill_qmap"):
        # What eight bits stand for is computed by numbers.
        with unset_fake_temporarily():
            inner.fill_qmap()
    # It would look at whether gradients are finite.
    trainer.scaler = torch.amp.GradScaler("cpu", enabled=False)
    return trainer


def _model(config, tokenizer, dtype: str, layout: Layout | None) -> nn.Module:
    """The model of a configuration; it attends over response trees without the proof, for which it has no numbers."""
    sharing = Sharing(scores_in_head=True) if config.prefix_sharing != "off" else None
    if layout is not None:
        # A mesh looks for its place among the ranks, and that must be a number.
        with unset_fake_temporarily():
            model = empty_model(config, tokenizer, dtype, sharing, layout, torch.device("meta"))
        return model.to_empty(device="cpu")
    # Adapters are put into real models.
    with unset_fake_temporarily(), torch.device("meta"):
        model = build_untrained(config.model, tokenizer, config.cache_dir, dtype)
    model.to_empty(device="cpu")
    model.tie_weights()
    if sharing is not None:
        attend_over_trees(model)
    if config.activation_checkpointing:
        enable_activation_checkpointing(model)
    return model


class _Surveying(DPOLoss):
    """Sees all pairs of a micro-batch before any is trained on, as beta-DPO does."""

    surveys = True

    def survey(self, log_ratios: Tensor) -> PairSelection:
        """Every pair."""
        return PairSelection(log_ratios.new_ones(len(log_ratios)), torch.ones(()), {})


def _without_numbers(loss: Loss) -> Loss:
    """A loss that computes as much without looking at numbers, which those do that survey a micro-batch."""
    return _Surveying(0.1) if loss.surveys else loss


def faked(step: Sequence[MicroBatch]) -> list[MicroBatch]:
    """A step's micro-batches with tensors that are made here and now: fake ones where all are."""
    return [
        MicroBatch([piece.with_tensors(lambda tensor: tensor.clone()) for piece in part.pieces], part.num_examples)
        for part in step
    ]


def step_without_look(trainer: BasicTrainer, step: Sequence[MicroBatch]) -> None:
    """The trainer's step as if its numbers were sound: fake tensors have none to look at."""
    sums, _, _ = trainer.backward(step)
    trainer.added_up(sums, trainer.scaled_down_gradient(), sum(part.num_examples for part in step), 0)
    trainer.update_weights()


def most_held(trainer: BasicTrainer, counter: StorageCounter, pieces: Sequence[PackedBatch]) -> dict[str, int]:
    """Bytes that a trainer holds in a step with these pieces when most is held, by kind; all was made under the counter."""

    def name_gradients(*_) -> None:
        for weight in trainer.policy.parameters():
            if weight.grad is not None:
                counter.recount(local(weight.grad), "gradients")

    def name_copied_gradients(*_) -> None:
        for master in trainer.optimizer.masters.values():
            if master.grad is not None:
                counter.recount(local(master.grad), "gradients")

    trainer.optimizer.register_step_pre_hook(name_gradients)
    if trainer.has_masters:
        trainer.optimizer.inner.register_step_pre_hook(name_copied_gradients)
    step = faked([MicroBatch([piece], piece.num_examples) for piece in pieces])
    step_without_look(trainer, step)
    for state in trainer.optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                counter.recount(local(value), "optimizer")
    name_weights(counter, trainer.policy, "parameters")
    if isinstance(trainer.reference, LiveReference) and trainer.reference.model is not trainer.policy:
        name_weights(counter, trainer.reference.model, "reference")
    # The first step has made the optimizer's state; from the second on it is there when activations are.
    counter.restart()
    step_without_look(trainer, step)
    return {kind: size for kind, size in counter.most().items() if size}


def name_weights(counter: StorageCounter, model: nn.Module, kind: str) -> None:
    """Count a model's weights as `kind` after a step, and those that stay gathered as such."""
    for weight in model.parameters():
        counter.recount(local(weight), "gathered weights")
    let_go_of_gathered(model)
    for weight in model.parameters():
        counter.recount(local(weight), kind)
