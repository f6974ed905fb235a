"""The processes of a run, as the training loop sees them: who shares the data, and what they add up or gather.

One process is the ordinary case, in which everything here returns what it was given. Only ranks that train on different data
count; those that share a split layer are one rank together.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the data. `group` is their process group, None where there is one alone.

    is_main is true for the one process of all that writes and prints.
    """

    rank: int = 0
    size: int = 1
    is_main: bool = True
    group: Any = None

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's tensor; the same bits on each."""
        if self.group is None:
            return tensor
        tensor = tensor.clone()
        torch.distributed.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, value) -> list:
        """Every rank's value, in the order of the ranks. For small things: it is pickled between processes of this run."""
        if self.group is None:
            return [value]
        values: list = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def lowest(self, number: int) -> int:
        """The smallest of every rank's numbers."""
        return min(self.gather(number))

    def from_main(self, value):
        """The main process's value, on every process of the run."""
        if not several():
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, 0)
        return values[0]

    def wait(self) -> None:
        """Go on when all processes of the run have come here, those of other groups too."""
        if several():
            torch.distributed.barrier()

    def share(self, items: Sequence) -> Sequence:
        """This rank's part of some items: every `size`-th of them."""
        return items[self.rank :: self.size]


ALONE = Ranks()


def several() -> bool:
    """Whether this process has joined others."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def local_rank() -> int:
    """This worker's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """How many processes of the run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that lies over several; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def bytes_of(tensor: Tensor):
    """The bytes of this process's part of a tensor, for a hash: a flat numpy array of uint8."""
    return local(tensor).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, from the parts of all processes; each of them has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def let_go_of_gathered(model: nn.Module) -> None:
    """Leave each process its part of a sharded model's weights: those that stayed gathered after a forward are copies.

    Until then `parameters` gives the copies, which no optimizer knows, and which stay what they are when the parts change.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
