"""The memory and communication of rank 0 of a sharded run, estimated without the other processes.

torch's fake process group stands in for them: it accepts every message and delivers none. The model is sharded over it as in a
run, on fake tensors, and the training step itself shows what it would hold and send.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.distributed._tools.fake_collectives import collective_ops, sync_ops
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from preference_training.batching.micro_batches import MicroBatch
from preference_training.batching.packing import UNLIMITED, PackedBatch, TokenBudget
from preference_training.core.machine import pick_device
from preference_training.core.values import counted
from preference_training.distributed.launching import end_group, number_of_workers
from preference_training.distributed.placement import Sharded
from preference_training.distributed.sharding import empty_model
from preference_training.dry_run.memory_estimate import fake_step, fake_tensors, faked, peak_memory, take_unchecked
from preference_training.losses.base import Loss
from preference_training.modeling.state import free_memory
from preference_training.modeling.token_budget import token_budget

GIB = 2**30


# ---- fake processes -------------------------------------------------------------------------------------------------------


@contextmanager
def fake_processes(size: int) -> Iterator[None]:
    """Context in which this process is rank 0 of `size` processes, the others of which do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        end_group()


def world_size(trainer) -> int:
    """The number of processes of the run: `trainer.world_size`, else those that would be started here."""
    return trainer.world_size or number_of_workers(trainer)


def fake_placement(placement_class: type[Sharded], config, tokenizer) -> Sharded:
    """The placement of rank 0 of the run, inside `fake_processes`. Raises UserError where it cannot be sharded so."""
    mesh = placement_class.mesh(config, "cpu", number_of_workers(config.trainer))
    placement = placement_class(config, tokenizer, torch.device("cpu"), mesh)
    if config.trainer.cpu_offload:
        # Pinned memory needs a GPU, and takes no more than pageable memory.
        placement.layout = replace(placement.layout, offload=CPUOffloadPolicy(pin_memory=False))
    return placement


def rank_budget(placement: Sharded) -> TokenBudget:
    """The token budget of each rank, by the run's own rule; UNLIMITED where the memory of the devices is not known."""
    return _device_budget(placement).over(placement.ranks.context.size)


def _device_budget(placement: Sharded) -> TokenBudget:
    config = placement.config
    trainer, limit = config.trainer, config.max_tokens_per_microbatch
    if limit is not None:
        return TokenBudget(limit, limit)
    if trainer.world_size is not None and trainer.device_memory is None:
        return UNLIMITED
    device = torch.device("cuda") if trainer.device_memory else pick_device()
    if trainer.device_memory:
        free = int(trainer.device_memory * GIB)
    else:
        free = free_memory(device) // (1 if device.type == "cuda" else world_size(trainer))
    # On meta, so that the memory of this rank's shards still counts as free.
    model = empty_model(placement.layout, placement.tokenizer, config.model.policy_dtype, None, torch.device("meta"))
    return token_budget(model, None, device, free, config.weight_copies)


# ---- communication --------------------------------------------------------------------------------------------------------


class Message(NamedTuple):
    """A kind of collective: for which model, which operation, in which dtype, among how many ranks."""

    model: str
    operation: str
    dtype: torch.dtype
    ranks: int


class Collective(NamedTuple):
    """A collective operation of torch: its name, and the positions of its tensor and process group among its arguments.

    A rank sends `rounds` times the other ranks' share of the whole tensor. of_part: the argument is this rank's shard of it.
    """

    name: str
    tensor: int
    group: int
    rounds: int = 1
    of_part: bool = False


COLLECTIVES = {
    "c10d._allgather_base_.default": Collective("all-gather", 0, 2),
    "c10d._reduce_scatter_base_.default": Collective("reduce-scatter", 1, 2),
    "c10d.allreduce_.default": Collective("all-reduce", 0, 1, rounds=2),
    "_c10d_functional.all_gather_into_tensor.default": Collective("all-gather", 0, 2, of_part=True),
    "_c10d_functional.reduce_scatter_tensor.default": Collective("reduce-scatter", 0, 3),
    "_c10d_functional.all_reduce.default": Collective("all-reduce", 0, 2, rounds=2),
}


class Traffic(TorchDispatchMode):
    """Counts what this process sends under it: `calls`, and bytes in `sent`, of each kind of message.

    The bytes are those of ring algorithms, which are optimal: for S bytes over n ranks an all-gather and a reduce-scatter send
    S (n-1)/n, an all-reduce twice that, and as much is received. Raises ValueError for an unknown collective.
    """

    def __init__(self):
        super().__init__()
        self.model = "policy"
        self.calls: Counter[Message] = Counter()
        self.sent: Counter[Message] = Counter()

    @contextmanager
    def of(self, model: str) -> Iterator[None]:
        """Context in which messages count as those of another model."""
        self.model, before = model, self.model
        try:
            yield
        finally:
            self.model = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operation, and count what it sends."""
        if any(issubclass(type_, DTensor) for type_ in types):
            # Its collectives are dispatched separately.
            return NotImplemented
        if collective := COLLECTIVES.get(str(func)):
            self._count(collective, args)
        elif func in collective_ops - sync_ops:
            raise ValueError(f"{func} is not counted")
        return func(*args, **(kwargs or {}))

    def _count(self, collective: Collective, args) -> None:
        tensors, group = args[collective.tensor], args[collective.group]
        ranks = group_size(group)
        for tensor in tensors if isinstance(tensors, list | tuple) else [tensors]:
            whole = tensor.numel() * tensor.element_size() * (ranks if collective.of_part else 1)
            message = Message(self.model, collective.name, tensor.dtype, ranks)
            self.calls[message] += ranks > 1
            self.sent[message] += collective.rounds * whole * (ranks - 1) // ranks


def group_size(group) -> int:
    """The number of ranks of a process group, given as operations take it: by name, or boxed."""
    if isinstance(group, str):
        return _resolve_process_group(group).size()
    if not isinstance(group, torch.distributed.ProcessGroup):
        group = torch.distributed.ProcessGroup.unbox(group)
    return group.size()


# ---- a step ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepCosts:
    """The costs of a step for rank 0: its peak memory in bytes, by kind, and what it sends."""

    memory: dict[str, int]
    traffic: Traffic


def step_costs(
    placement: Sharded, loss: Loss, live_reference: bool, packs: Sequence[PackedBatch], batch: Sequence[MicroBatch]
) -> StepCosts:
    """The peak memory of a step with these packs, and the traffic of a step on `batch`; inside `fake_processes`."""
    with fake_tensors(len(placement.tokenizer)) as counter:
        step = fake_step(placement, loss, live_reference, counter)
        memory = peak_memory(step, counter, packs)
        with Traffic() as traffic:
            step.models.reference = attributed(step.models.reference, traffic)
            take_unchecked(step, faked(batch, step.models.policy))
    return StepCosts(memory, traffic)


def attributed(reference: Callable | None, traffic: Traffic) -> Callable | None:
    """A reference whose messages count as those of the reference model."""
    if reference is None:
        return None

    def call(pack: PackedBatch):
        with traffic.of("reference"):
            return reference(pack)

    return call


def in_device_memory(config, memory: dict[str, int]) -> int:
    """The bytes of a step's memory on the device, without the kinds that `trainer.cpu_offload` keeps in CPU memory."""
    offloaded = ("parameters", "reference", "gradients", "optimizer", "averaged weights") if config.trainer.cpu_offload else ()
    return sum(size for kind, size in memory.items() if kind not in offloaded)


def describe_traffic(traffic: Traffic, packs: int) -> list[str]:
    """Lines about what rank 0 sends in a step of so many packs."""
    sent = [message for message in traffic.sent if message.ranks > 1]
    lines = [
        f"  {message.model:10}{message.operation:15}{str(message.dtype).removeprefix('torch.'):9} over {message.ranks:6,} ranks"
        f"{traffic.calls[message]:8,} calls {traffic.sent[message] / GIB:10.3f} GB"
        for message in sorted(sent, key=lambda message: -traffic.sent[message])
    ]
    if not lines:
        return ["  none"]
    return [f"  sent by each rank, and as much received, in a step of {counted(packs, 'pack')}:", *lines]
