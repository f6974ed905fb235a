"""What a checkpoint is made of: a run at one moment."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions


@dataclass(frozen=True)
class Snapshot:
    """A run after `examples` training examples. Tensors may be shards, and training may still change them.

    tied: a weight's other name → the name under which `weights` has it. state: plain values, and uint8 tensors. reference:
    the weights of a reference that follows the policy; empty for a fixed one.
    """

    examples: int
    weights: dict[str, Tensor]
    tied: dict[str, str]
    optimizer: dict[str, Tensor]
    state: dict
    reference: dict[str, Tensor]

    @classmethod
    def of(
        cls,
        examples: int,
        named_weights: dict[str, Tensor],
        optimizer: dict[str, dict],
        state: dict,
        named_reference: dict[str, Tensor] | None = None,
    ) -> "Snapshot":
        """From named weights, of which some may be tied, and an optimizer's state by weight name."""
        reference, _ = distinct(named_reference or {})
        return cls(examples, *distinct(named_weights), distinct(tensor_state(optimizer))[0], state, reference)

    @property
    def num_bytes(self) -> int:
        """The size of all tensors, unsharded."""
        tensors = (*self.weights.values(), *self.optimizer.values(), *self.reference.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def copied(self) -> "Snapshot":
        """The same with copies of its tensors on the CPU, which training does not change."""
        staging = StagingOptions(False, False, False, torch.cuda.is_available())
        stager = DefaultStager(staging)
        tensors = stager.stage({"weights": self.weights, "optimizer": self.optimizer, "reference": self.reference})
        stager.close()
        return replace(self, **tensors)


def distinct(named: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by their first names, and each further name of a tied weight with its first."""
    first_names: dict[int, str] = {}
    first = {name: first_names.setdefault(id(tensor), name) for name, tensor in named.items()}
    tied = {name: other for name, other in first.items() if name != other}
    return {name: tensor.detach() for name, tensor in named.items() if name not in tied}, tied


def tensor_state(by_weight: dict[str, dict]) -> dict[str, Tensor]:
    """The tensors of an optimizer's state, as "<weight>.<name>"."""
    named = ((f"{weight}.{name}", value) for weight, values in by_weight.items() for name, value in values.items())
    return {name: value for name, value in named if isinstance(value, Tensor)}


def scalar_state(by_weight: dict[str, dict]) -> dict[str, dict]:
    """The plain values of an optimizer's state, such as its step count, by weight name."""
    numbers = {
        weight: {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        for weight, values in by_weight.items()
    }
    return {weight: values for weight, values in numbers.items() if values}
