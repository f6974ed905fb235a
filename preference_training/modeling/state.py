"""What a model is made of: where it computes, and a frozen copy of its parameters and buffers.

A copy is made from state, on a new model of the same configuration. What hangs on the modules of the original (the hooks that
move inputs between devices, tensors of the last forward) is not state, and stays with it.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import xxhash
from torch import Tensor, nn

from preference_training.core.errors import UserError
from preference_training.core.ranks import bytes_of
from preference_training.modeling.adapters import initial_weights
from preference_training.modeling.kernels import use_liger_kernels


def compute_device(model: nn.Module) -> torch.device:
    """The device that batches for a model go to: what its placement has said, else where its first weight lies.

    Weights may lie elsewhere: on other GPUs, or in the machine's memory until they are needed.
    """
    device = getattr(model, "compute_device", None)
    return next(model.parameters()).device if device is None else device


def spans_devices(model: nn.Module) -> bool:
    """Whether the layers of one model lie on several devices."""
    return len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1


def copied_dtype(model: nn.Module, parameter: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that a parameter has in a copy in `dtype`, None for the original's.

    Parameters that the model keeps in another dtype than the rest keep theirs.
    """
    return parameter.dtype if dtype is None or parameter.dtype != model.dtype else dtype


def set_buffers(model: nn.Module, buffers: dict[str, Tensor]) -> None:
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
            values = weight.detach().to(copied_dtype(model, weight, dtype), copy=True)
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


def weights_hash(model: nn.Module) -> str:
    """Hash of the weights that a model began with, or of this process's parts of them; 32 hexadecimal digits.

    Where an adapter is trained, these are the frozen weights, and 32 digits more are of the adapter that it started from, if
    there is one. Else they are the weights as they are now.
    """
    return "".join(_hash_of(part) for part in initial_weights(model.state_dict()) if part)


def _hash_of(tensors: dict[str, Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def reference_copy(policy: nn.Module, model_config) -> nn.Module:
    """A frozen copy of the policy as it is now, on the same devices; its parameters are in `reference_dtype`."""
    reference = frozen_copy(policy, getattr(torch, model_config.reference_dtype))
    if getattr(policy, "has_liger_kernels", False):
        use_liger_kernels(reference)
    return dispatch(reference, policy.hf_device_map) if spans_devices(policy) else reference


def move_to_devices(model: nn.Module, device: torch.device) -> nn.Module:
    """Put `model` on the device; where there are several GPUs, its layers over them in order.

    Raises UserError where their memory does not hold it.
    """
    model.compute_device = device
    if device.type != "cuda" or torch.cuda.device_count() == 1:
        return model.to(device)
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    blocks = list(model._no_split_modules or [])
    memory = get_balanced_memory(model, no_split_module_classes=blocks)
    device_map = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=blocks)
    if elsewhere := {"cpu", "disk"} & set(device_map.values()):
        raise UserError(
            f"trainer: {type(model).__name__} does not fit into the memory of {torch.cuda.device_count()} GPUs: layers would "
            f"be left on {' and '.join(sorted(elsewhere))}, where they cannot be trained. Use trainer=FSDPTrainer with "
            "trainer.cpu_offload=true, an adapter, or a smaller model."
        )
    return dispatch(model, device_map)


def dispatch(model: nn.Module, device_map: dict) -> nn.Module:
    """A model with its modules on the devices of a map, which hands their inputs on from one to the next."""
    from accelerate import dispatch_model

    main_device = next(iter(device_map.values()))
    # By their numbers are GPUs meant.
    model.compute_device = torch.device("cuda", main_device) if isinstance(main_device, int) else torch.device(main_device)
    return dispatch_model(model, device_map, main_device=main_device)
