"""The ranks of a run, and collectives over them.

With one process every collective returns what it was given. Only ranks that train on different data count; those that share a
split layer, or the tokens of a pack, are one rank.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate


class Progress:
    """What this process does now, in words, for other processes to read when they wait for it.

    phase: None where it may take any time. since: when it began, by the monotonic clock.
    """

    def __init__(self) -> None:
        self.at(None)

    def at(self, phase: str | None) -> None:
        """Begin a phase."""
        self.phase, self.since = phase, time.monotonic()


progress = Progress()


@dataclass(frozen=True)
class ContextGroup:
    """This process among those that compute the same packs, each a part of the tokens. group: None for a single one."""

    rank: int = 0
    size: int = 1
    group: Any = None


WHOLE_PACKS = ContextGroup()


@dataclass(frozen=True)
class Ranks:
    """This process among the data-parallel ranks. `group` is their process group, None for a single rank.

    is_rank_zero is true for one process of the whole run, the one that writes and prints. context: the processes that are this
    rank together.
    """

    rank: int = 0
    size: int = 1
    is_rank_zero: bool = True
    group: Any = None
    context: ContextGroup = WHOLE_PACKS

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum of all ranks' tensors, the same bits on each."""
        if self.group is None:
            return tensor
        tensor = tensor.clone()
        torch.distributed.all_reduce(tensor, group=self.group)
        return tensor

    def all_gather_object(self, value) -> list:
        """Every rank's value, in rank order. For small values: they are pickled."""
        if self.group is None:
            return [value]
        return _gather_objects(value, self.size, self.group)

    def all_reduce_min(self, number: int) -> int:
        """The smallest number of all processes of the run, also of those that are one rank: they have to agree."""
        if not is_distributed():
            return number
        return min(_gather_objects(number, torch.distributed.get_world_size()))

    @property
    def have_members(self) -> bool:
        """Whether several processes are one rank: they share a split layer, or the tokens of a pack."""
        return is_distributed() and torch.distributed.get_world_size() != self.size

    def any_process(self, flags: Tensor) -> Tensor:
        """Numbers above 0 where those of any process of the run are, also of those that are one rank; same on all."""
        if self.have_members:
            flags = flags.clone()
            torch.distributed.all_reduce(flags)
        return flags

    def broadcast(self, value):
        """The value of rank 0, on every process of the run."""
        if not is_distributed():
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, 0)
        return values[0]

    def barrier(self) -> None:
        """Wait for all processes of the run, those of other groups included."""
        if is_distributed():
            torch.distributed.barrier()

    def shard(self, items: Sequence) -> Sequence:
        """This rank's items: every `size`-th."""
        return items[self.rank :: self.size]


def _gather_objects(value, size: int, group=None) -> list:
    """The values of a group's `size` processes, None for all of the run, in rank order."""
    values: list = [None] * size
    torch.distributed.all_gather_object(values, value, group=group)
    return values


SINGLE_PROCESS = Ranks()


def is_distributed() -> bool:
    """Whether this process has joined a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def local_rank() -> int:
    """This process's rank on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """How many processes of the run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def to_local(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_bytes(tensor: Tensor):
    """The bytes of this process's shard of a tensor, for a hash: a flat numpy array of uint8."""
    return to_local(tensor).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a DTensor, gathered; every process has to call it. Any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: DTensor, values: Tensor) -> DTensor:
    """Values that every process has whole, sharded as a tensor is; nothing is communicated."""
    mesh = tensor.device_mesh
    whole = DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=tensor.placements)


def set_whole(tensor: Tensor, values: Tensor) -> None:
    """Set a tensor, or this process's shard of a DTensor, from all of its values; nothing is communicated."""
    to_local(tensor).copy_(to_local(sharded_like(tensor, values)) if isinstance(tensor, DTensor) else values)


def reshard(model: nn.Module) -> None:
    """Free the gathered weights that FSDP kept after a forward.

    Until then `parameters` gives these copies, which no optimizer knows, and which do not follow the shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
