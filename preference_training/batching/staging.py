"""Tensors as one block of memory, so that they reach a GPU in one copy, which overlaps with what the GPU computes."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Each tensor begins at a multiple of it, as kernels expect. Unit: bytes.
ALIGNMENT = 16


@dataclass(frozen=True)
class StagedTensors:
    """Tensors of a CPU in one block of bytes, pinned where there is a GPU.

    places: the name, first byte, dtype and shape of each.
    """

    block: Tensor
    places: tuple[tuple[str, int, torch.dtype, torch.Size], ...]

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "StagedTensors":
        """Copy tensors into a new block."""
        places, size = [], 0
        for name, tensor in tensors.items():
            places.append((name, size, tensor.dtype, tensor.shape))
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        block = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        staged = cls(block, tuple(places))
        for view, tensor in zip(staged.views(block).values(), tensors.values(), strict=True):
            view.copy_(tensor)
        return staged

    def to(self, device: torch.device) -> dict[str, Tensor]:
        """The tensors on a device, by name: one copy, which the host does not wait for."""
        return self.views(self.block.to(device, non_blocking=True))

    def views(self, block: Tensor) -> dict[str, Tensor]:
        """The tensors as views of a block like this one."""
        found = {}
        for name, start, dtype, shape in self.places:
            found[name] = block[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
        return found
