"""A memory meter that exists on a CPU: the bytes of what autograd keeps for the backward pass."""

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class SavedTensors:
    """Counts the distinct storages that are saved for backward at any one time; every device has `size` bytes in all."""

    devices: Sequence[torch.device] = (torch.device("cpu"),)

    def __init__(self, size: int):
        self.size = size

    def room(self) -> list[int]:
        """As was given."""
        return [self.size]

    def peaks(self, work: Callable[[], object]) -> list[int]:
        """The most bytes that were saved at once during some work."""
        tally = _Tally()
        with saved_tensors_hooks(lambda tensor: _Saved(tensor, tally), lambda saved: saved.tensor):
            work()
        return [tally.most]


class _Tally:
    def __init__(self):
        self.held, self.now, self.most = Counter(), 0, 0


class _Saved:
    """A saved tensor, counted until autograd lets go of it."""

    def __init__(self, tensor: Tensor, tally: _Tally):
        storage = tensor.untyped_storage()
        self.tensor, self.tally, self.key, self.size = tensor, tally, storage.data_ptr(), storage.nbytes()
        if not tally.held[self.key]:
            tally.now += self.size
            tally.most = max(tally.most, tally.now)
        tally.held[self.key] += 1

    def __del__(self):
        self.tally.held[self.key] -= 1
        if not self.tally.held[self.key]:
            self.tally.now -= self.size
