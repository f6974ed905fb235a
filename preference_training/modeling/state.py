"""What a model is made of: where it computes, and a frozen copy of its parameters and buffers.

A copy is made from state, on a new model of the same configuration. What hangs on the modules of the original (the hooks that
move inputs between devices, tensors of the last forward) is not state, and stays with it.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def compute_device(model: nn.Module) -> torch.device:
    """The device that batches for a model go to: what its placement has said, else where its first weight lies.

    Weights may lie elsewhere: on other GPUs, or in the machine's memory until they are needed.
    """
    device = getattr(model, "compute_device", None)
    return next(model.parameters()).device if device is None else device


def several_devices(model: nn.Module) -> bool:
    """Whether the layers of one model lie on several devices."""
    return len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1


def dtype_of_copy(model: nn.Module, parameter: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that a parameter has in a copy in `dtype`, None for the original's.

    Parameters that the model keeps in another dtype than the rest keep theirs.
    """
    return parameter.dtype if dtype is None or parameter.dtype != model.dtype else dtype


def take_buffers(model: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Put tensors in place of a model's buffers by name, in their own dtypes and on their own devices."""
    for name, buffer in buffers.items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = buffer


@torch.no_grad()
def frozen_copy(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A model of the same configuration and state, which nothing trains, on the same devices.

    Parameters are in `dtype` (None: as they are). Buffers keep theirs, whatever it is: positions, rotary frequencies and
    biases of routers are float32 in a model of bfloat16 too, and rounded they make another model.
    """
    twin = _empty_twin(model)
    for module, other in zip(model.modules(), twin.modules(), strict=True):
        # A change of class is how a head becomes one that scores.
        other.__class__ = module.__class__
        _take_numbers(module, other)
    copies: dict[int, nn.Parameter] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if id(weight) not in copies:
            values = weight.detach().to(dtype_of_copy(model, weight, dtype), copy=True)
            copies[id(weight)] = nn.Parameter(values, requires_grad=False)
        path, _, leaf = name.rpartition(".")
        twin.get_submodule(path)._parameters[leaf] = copies[id(weight)]
    twin.autocast_dtype = getattr(model, "autocast_dtype", None)
    twin.compute_device = compute_device(model)
    return twin.eval()


def _empty_twin(model: nn.Module) -> nn.Module:
    """A model of the same class, configuration and attention, whose tensors have no memory."""
    config = copy.deepcopy(model.config)
    with torch.device("meta"), _without_warnings():
        twin = type(model)._from_config(config, dtype=model.dtype)
    return twin


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Inside, transformers does not repeat what it said of the same configuration when the original was made."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _take_numbers(module: nn.Module, other: nn.Module) -> None:
    """Give a module of a twin the buffers and plain numbers of the original's, dropout probabilities among them."""
    for name, buffer in module._buffers.items():
        other._buffers[name] = None if buffer is None else buffer.detach().clone()
    other._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    for name, value in vars(other).items():
        here = vars(module).get(name)
        if isinstance(value, Tensor) and isinstance(here, Tensor):
            # A constant that the module keeps beside its buffers.
            vars(other)[name] = here.detach().clone()
        elif isinstance(value, float) and isinstance(here, float):
            vars(other)[name] = here


def free_memory(device: torch.device) -> int:
    """Bytes that are free now on a GPU, or in the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available
