"""How much memory a training step will take, found without taking it.

The training step itself runs on fake tensors, which have shapes but no data, while every storage that it makes is counted from
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
from preference_training.core.process_group import reshard, to_local
from preference_training.distributed.placement import Placement, Sharded
from preference_training.distributed.sharding import Sharing, empty_model
from preference_training.losses.objectives import DPOLoss, Loss, PairSelection
from preference_training.modeling.adapters import has_adapter
from preference_training.modeling.loading import build_untrained, enable_activation_checkpointing
from preference_training.modeling.logprobs import LiveReference
from preference_training.modeling.prefix_sharing import attend_over_trees
from preference_training.modeling.tree_attention import forget_masks
from preference_training.training.parts import Models
from preference_training.training.state import RunState
from preference_training.training.step import TrainingStep

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


def step_memory(placement: Placement, loss: Loss, live_reference: bool, packs: Sequence[PackedBatch]) -> dict[str, int]:
    """Bytes that a training step of one process holds at its peak, by kind.

    packs are computed one after the other. Models that do not share prefixes take more.
    """
    with fake_tensors(len(placement.tokenizer)) as counter:
        return peak_memory(fake_step(placement, loss, live_reference, counter), counter, packs)


def fake_step(placement: Placement, loss: Loss, live_reference: bool, counter: StorageCounter) -> TrainingStep:
    """The training step of a placement's configuration on fake tensors, its weights counted."""
    config = placement.config
    policy = _model(placement, config.model.policy_dtype)
    counter.vocabulary = policy.config.get_text_config().vocab_size
    counter.kind = "reference"
    reference = None
    if live_reference:
        shared = has_adapter(policy)
        reference = LiveReference(policy if shared else _model(placement, config.model.reference_dtype))
    elif loss.needs_reference:
        reference = lambda pack: torch.zeros(len(pack.response_lengths))  # noqa: E731
    counter.kind = "activations"
    step = TrainingStep(config, placement, Models(policy, reference, _without_numbers(loss)), RunState(), total_steps=0)
    updater = step.updater
    inner = updater.optimizer.inner if updater.has_masters else updater.optimizer
    if hasattr(inner, "fill_qmap"):
        # What eight bits stand for is computed by numbers.
        with unset_fake_temporarily():
            inner.fill_qmap()
    # It would look at whether gradients are finite.
    updater.scaler = torch.amp.GradScaler("cpu", enabled=False)
    return step


def _model(placement: Placement, dtype: str) -> nn.Module:
    """The model of a configuration; it attends over response trees without the proof, for which it has no numbers."""
    config, tokenizer = placement.config, placement.tokenizer
    sharing = Sharing(scores_in_head=True) if config.prefix_sharing != "off" else None
    if isinstance(placement, Sharded):
        # A mesh looks for its place among the ranks, and that must be a number.
        with unset_fake_temporarily():
            model = empty_model(placement.layout, tokenizer, dtype, sharing, torch.device("meta"))
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


def faked(batch: Sequence[MicroBatch]) -> list[MicroBatch]:
    """A step's micro-batches with tensors that are made here and now: fake ones where all are."""
    return [
        MicroBatch([pack.with_tensors(lambda tensor: tensor.clone()) for pack in part.pieces], part.num_examples)
        for part in batch
    ]


def take_unchecked(step: TrainingStep, batch: Sequence[MicroBatch]) -> None:
    """Take a step as if its numbers were finite: fake tensors have none to look at."""
    result = step.backward(batch)
    step.reduce(result.sums, step.updater.clip_gradient(), sum(part.num_examples for part in batch), 0)
    step.updater.update()


def peak_memory(step: TrainingStep, counter: StorageCounter, packs: Sequence[PackedBatch]) -> dict[str, int]:
    """Bytes that a step with these packs holds at its peak, by kind; all of it was made under the counter."""
    models, updater = step.models, step.updater

    def name_gradients(*_) -> None:
        for weight in models.policy.parameters():
            if weight.grad is not None:
                counter.recount(to_local(weight.grad), "gradients")

    def name_copied_gradients(*_) -> None:
        for master in updater.optimizer.masters.values():
            if master.grad is not None:
                counter.recount(to_local(master.grad), "gradients")

    updater.optimizer.register_step_pre_hook(name_gradients)
    if updater.has_masters:
        updater.optimizer.inner.register_step_pre_hook(name_copied_gradients)
    batch = faked([MicroBatch([pack], pack.num_examples) for pack in packs])
    take_unchecked(step, batch)
    for state in updater.optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                counter.recount(to_local(value), "optimizer")
    name_weights(counter, models.policy, "parameters")
    if isinstance(models.reference, LiveReference) and models.reference.model is not models.policy:
        name_weights(counter, models.reference.model, "reference")
    # The first step has made the optimizer's state; from the second on it is there when activations are.
    counter.restart()
    take_unchecked(step, batch)
    return {kind: size for kind, size in counter.most().items() if size}


def name_weights(counter: StorageCounter, model: nn.Module, kind: str) -> None:
    """Count a model's weights as `kind` after a step, and those that stay gathered as such."""
    for weight in model.parameters():
        counter.recount(to_local(weight), "gathered weights")
    reshard(model)
    for weight in model.parameters():
        counter.recount(to_local(weight), kind)
