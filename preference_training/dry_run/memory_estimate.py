"""An estimate of the peak memory of a training step, made without using that memory.

The training step itself runs on fake tensors, which have shapes but no data, while a counter follows every storage from its
creation to its end. The estimate follows the code, since nothing about the computation is assumed.
"""

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.nn.functional import logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from preference_training.batching.micro_batches import MicroBatch
from preference_training.batching.packing import PackedBatch
from preference_training.core.process_group import WHOLE_PACKS, ContextGroup, reshard, to_local
from preference_training.distributed.placement import Placement, Sharded
from preference_training.distributed.sharding import Sharing, check_cuttable, empty_model
from preference_training.losses.base import Examples, Loss, LossOutput, SharedStatistics
from preference_training.modeling.adapters.weights import has_adapter
from preference_training.modeling.kernels import enable_activation_checkpointing
from preference_training.modeling.loading import build_on_meta
from preference_training.modeling.logprobs import LiveReference
from preference_training.modeling.prefix_sharing.sharing import attend_over_tries
from preference_training.modeling.prefix_sharing.tree_attention import clear_mask_cache
from preference_training.training.optimizers.averages import AVERAGE
from preference_training.training.parts import Models, RunState
from preference_training.training.step import TrainingStep

# Tensors seen in these operations of FSDP, and not known otherwise, are of this kind.
KINDS = {
    "fsdp.all_gather_copy_in.default": "gathered weights",
    "fsdp.chunk_cat.default": "gradients",
    "c10d._reduce_scatter_base_.default": "gradients",
}


@dataclass(eq=False)
class _Held:
    """The kind of a storage, and its size in bytes."""

    kind: str
    size: int


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of all storages that are created under it, by kind, and finds their peak.

    New storages are of the kind `kind`, except that activations whose last dimension is `vocabulary` are logits. A storage has
    one kind for all of its life, even where that kind is found out later.
    """

    def __init__(self, vocabulary: int):
        super().__init__()
        self.kind = "parameters"
        self.vocabulary = vocabulary
        self._held: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        # Every change of a storage's size, in order.
        self._changes: list[tuple[_Held, int]] = []
        self._start = 0

    def __enter__(self):
        self._resize = torch.UntypedStorage.resize_

        # FSDP gathers and reshards weights by resizing their storage, which no dispatched operation shows.
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
        """Run an operation, and count the storages that it creates."""
        if any(issubclass(type_, DTensor) for type_ in types):
            # Its operation on the local shard is dispatched separately.
            return NotImplemented
        if func is torch.ops._c10d_functional.wait_tensor.default and isinstance(args[0], FakeTensor):
            # As with real tensors, waiting makes no copy.
            return args[0]
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            # Some optimizers look at a number, which a fake tensor lacks; what they keep does not depend on it.
            return 1.0 if args[0].is_floating_point() else 1
        kwargs = kwargs or {}
        is_grouped = func is torch.ops.aten._grouped_mm.default and isinstance(args[0], FakeTensor)
        output = _grouped_product(*args, **kwargs) if is_grouped else func(*args, **kwargs)
        for tensor in tree_iter(output):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        if kind := KINDS.get(str(func)):
            for tensor in tree_iter((args, kwargs)):
                if isinstance(tensor, Tensor) and self._lookup_kind(tensor) == "activations":
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

    def _lookup_kind(self, tensor: Tensor) -> str | None:
        held = self._held.get(tensor.untyped_storage())
        return held and held.kind

    def recount(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor's storage as `kind`, from its creation on."""
        if held := self._held.get(tensor.untyped_storage()):
            held.kind = kind

    def restart(self) -> None:
        """Look for the peak from now on only."""
        self._start = len(self._changes)

    def most(self) -> Counter[str]:
        """Bytes by kind at the peak."""
        totals = list(accumulate((change for _, change in self._changes), initial=0))
        moment = max(range(self._start, len(totals)), key=totals.__getitem__)
        kinds: Counter[str] = Counter()
        for held, change in self._changes[:moment]:
            kinds[held.kind] += change
        return kinds


def _grouped_product(first: Tensor, second: Tensor, ends: Tensor | None = None, *_: object, **__: object) -> Tensor:
    """The shape of torch's `_grouped_mm`, the products of experts, which for fake tensors knows bfloat16 only."""
    groups = [len(ends)] if first.ndim == second.ndim == 2 and ends is not None else []
    groups = [len(first)] if first.ndim == second.ndim == 3 else groups
    return first.new_empty(*groups, first.shape[-2], second.shape[-1])


@contextmanager
def fake_tensors(vocabulary: int) -> Iterator[StorageCounter]:
    """Context in which tensors have shapes but no data; yields the counter of their storages."""
    # Cached masks must not cross this border in either direction.
    clear_mask_cache()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), StorageCounter(vocabulary) as counter:
            yield counter
    finally:
        clear_mask_cache()


def step_memory(placement: Placement, loss: Loss, live_reference: bool, packs: Sequence[PackedBatch]) -> dict[str, int]:
    """Peak bytes of a training step of one process, by kind.

    packs: computed one after the other. Models that do not share prefixes need more.
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
    # The code book of 8-bit optimizers is computed from real values, when they are built.
    with unset_fake_temporarily():
        step = TrainingStep(placement, Models(policy, reference, _without_numbers(loss)), RunState(), total_steps=0)
    # A real scaler would test whether gradients are finite.
    step.updater.scaler = torch.amp.GradScaler("cpu", enabled=False)
    return step


def _model(placement: Placement, dtype: str) -> nn.Module:
    """The model of a configuration, sharing prefixes without the proof, which needs real values."""
    config, tokenizer = placement.config, placement.tokenizer
    sharing = Sharing(scores_in_head=True) if config.prefix_sharing != "off" else None
    if isinstance(placement, Sharded):
        # A device mesh reads its coordinates from real tensors.
        with unset_fake_temporarily():
            model = empty_model(placement.layout, tokenizer, dtype, sharing, torch.device("meta"))
        check_cuttable(model, placement.ranks.context)
        return model.to_empty(device="cpu")
    # peft does not support fake tensors.
    with unset_fake_temporarily():
        model = build_on_meta(config.model, tokenizer, config.cache_dir, dtype)
    model.to_empty(device="cpu")
    model.tie_weights()
    if sharing is not None:
        attend_over_tries(model)
    if config.activation_checkpointing:
        enable_activation_checkpointing(model, config.activation_checkpointing)
    return model


class _StandIn(Loss):
    """Reads what another loss reads, which takes statistics of a micro-batch, and looks at no number."""

    def __init__(self, loss: Loss):
        for name in ("examples", "model_head", "needs_reference", "needs_batch_statistics", "reads_tokens", "reads_collision"):
            setattr(self, name, getattr(loss, name))

    def batch_statistics(self, policy: Tensor, reference: Tensor | None, examples: Examples) -> SharedStatistics:
        """Nothing, of all examples."""
        return SharedStatistics()

    def __call__(
        self, policy: Tensor, reference: Tensor | None, examples: Examples, batch_statistics: object = None
    ) -> LossOutput:
        values = policy if reference is None else policy - reference
        losses, known = -logsigmoid(values[examples.first] - values[examples.last]), values.detach()
        return LossOutput(losses, known[examples.first], known[examples.last])


def _without_numbers(loss: Loss) -> Loss:
    """A loss that computes as much without looking at numbers, as those do that take statistics of a micro-batch."""
    return _StandIn(loss) if loss.needs_batch_statistics else loss


def faked(batch: Sequence[MicroBatch], policy: nn.Module) -> list[MicroBatch]:
    """A step's micro-batches with cloned tensors, which are fake inside `fake_tensors`."""
    context = getattr(policy, "context", WHOLE_PACKS)
    return [replace(part, packs=[_faked(pack, context) for pack in part.packs]) for part in batch]


def _faked(pack: PackedBatch, context: ContextGroup) -> PackedBatch:
    if context.size > 1:
        # Its numbers are read where a context group divides its tokens; read among fake tensors they would be random.
        with unset_fake_temporarily():
            pack.on_host.part(context.rank, context.size)
    return replace(pack.with_tensors(lambda tensor: tensor.clone()), source=pack.on_host)


def take_unchecked(step: TrainingStep, batch: Sequence[MicroBatch]) -> None:
    """Take a step without its checks for finite values, which fake tensors do not have."""
    result = step.backward(batch)
    step.reduce(result.sums, step.updater.clip_gradient(), (0, 0))
    step.updater.update()


def peak_memory(step: TrainingStep, counter: StorageCounter, packs: Sequence[PackedBatch]) -> dict[str, int]:
    """Peak bytes of a step with these packs, by kind; the step was built under the counter."""
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
    batch = faked(
        [MicroBatch([pack], pack.num_examples, pack.members.shape[1], first_tokens=1) for pack in packs], models.policy
    )
    take_unchecked(step, batch)
    for state in updater.optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                counter.recount(to_local(value), "averaged weights" if name == AVERAGE else "optimizer")
    name_weights(counter, models.policy, "parameters")
    if isinstance(models.reference, LiveReference) and models.reference.model is not models.policy:
        name_weights(counter, models.reference.model, "reference")
    # The first step creates the optimizer's state; from the second on it is in memory along with the activations.
    counter.restart()
    take_unchecked(step, batch)
    return {kind: size for kind, size in counter.most().items() if size}


def name_weights(counter: StorageCounter, model: nn.Module, kind: str) -> None:
    """Count a model's weights as `kind` after a step, and those that are still gathered as such."""
    for weight in model.parameters():
        counter.recount(to_local(weight), "gathered weights")
    reshard(model)
    for weight in model.parameters():
        counter.recount(to_local(weight), kind)
