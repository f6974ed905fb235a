"""The state of a model: its weights and buffers, the devices they lie on, and frozen copies of them.

A copy is a new model of the same configuration that takes over weights and buffers. Whatever else hangs on the original's
modules (hooks that move inputs between devices, tensors of the last forward) stays with the original.
"""

import copy
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import xxhash
from torch import Tensor, nn

from preference_training.core.errors import UserError
from preference_training.core.process_group import local_bytes
from preference_training.modeling.adapters.weights import initial_weights
from preference_training.modeling.kernels import use_liger_kernels
from preference_training.modeling.quantization import weight_numels

# ---- devices -----------------------------------------------------------------------------------------------------------------


def compute_device(model: nn.Module) -> torch.device:
    """The device that a model takes its batches on: the one set by its placement, else that of its first weight.

    Weights may lie elsewhere: on other GPUs, or offloaded to CPU memory.
    """
    device = getattr(model, "compute_device", None)
    return next(model.parameters()).device if device is None else device


def spans_devices(model: nn.Module) -> bool:
    """Whether a model's device map places its layers on several devices."""
    return len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1


def print_loaded(model: nn.Module, began: float) -> None:
    """Print what was loaded, and how long that took since `began`, by `time.perf_counter`."""
    number = sum(weight_numels(model).values())
    size = f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"
    dtype, seconds = str(model.dtype).removeprefix("torch."), time.perf_counter() - began
    print(f"model: {type(model).__name__}, {size} parameters in {dtype}, loaded in {seconds:.1f} s", flush=True)


def free_memory(device: torch.device) -> int:
    """Bytes of memory that are free now: of a GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def move_to_devices(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to `device`, or, where there are several GPUs, its blocks in order to all of them.

    Raises UserError where the model does not fit into their memory.
    """
    model.compute_device = device
    if device.type != "cuda" or torch.cuda.device_count() == 1:
        return model.to(device)
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    blocks = list(model._no_split_modules or [])
    memory = get_balanced_memory(model, no_split_module_classes=blocks)
    device_map = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=blocks)
    if offloaded := {"cpu", "disk"} & set(device_map.values()):
        raise UserError(
            f"trainer: {type(model).__name__} does not fit into the memory of {torch.cuda.device_count()} GPUs: layers would "
            f"be offloaded to {' and '.join(sorted(offloaded))}, where they cannot be trained. Use trainer=FSDPTrainer with "
            "trainer.cpu_offload=true, an adapter, or a smaller model."
        )
    return dispatch(model, device_map)


def dispatch(model: nn.Module, device_map: dict) -> nn.Module:
    """Move the modules of a model to the devices of a device map; hooks move their inputs from one to the next."""
    from accelerate import dispatch_model

    main_device = next(iter(device_map.values()))
    # accelerate names GPUs by number.
    model.compute_device = torch.device("cuda", main_device) if isinstance(main_device, int) else torch.device(main_device)
    return dispatch_model(model, device_map, main_device=main_device)


# ---- weights and buffers -----------------------------------------------------------------------------------------------------


def weights_hash(model: nn.Module) -> str:
    """Hash of the weights that training started from, or of this process's shards of them: 32 hexadecimal digits.

    Without an adapter these are the weights as they are now. With one they are the base weights, followed by 32 digits for the
    initial adapter where training started from one.
    """
    return "".join(_hash_tensors(part) for part in initial_weights(model.state_dict()) if part)


def _hash_tensors(tensors: dict[str, Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(local_bytes(tensor))
    return digest.hexdigest()


def set_buffers(model: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Replace a model's buffers by name; dtypes and devices are those of the new tensors."""
    for name, buffer in buffers.items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = buffer


# ---- copies ------------------------------------------------------------------------------------------------------------------


def reference_copy(policy: nn.Module, model_config) -> nn.Module:
    """A frozen copy of the policy as it is now, on the same devices, with parameters in `reference_dtype`."""
    reference = frozen_copy(policy, getattr(torch, model_config.reference_dtype))
    if getattr(policy, "has_liger_kernels", False):
        use_liger_kernels(reference)
    return dispatch(reference, policy.hf_device_map) if spans_devices(policy) else reference


@torch.no_grad()
def frozen_copy(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of a model in evaluation mode, on the same devices, whose parameters need no gradient.

    Parameters are cast to `dtype` (None: unchanged). Buffers keep theirs: positions, rotary frequencies and biases of routers
    are float32 in a bfloat16 model too, and rounding them would change what the model computes.
    """
    twin = _empty_copy(model)
    for module, other in zip(model.modules(), twin.modules(), strict=True):
        # A ScoringHead is a linear layer whose class was changed.
        other.__class__ = module.__class__
        _copy_constants(module, other)
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


def copied_dtype(model: nn.Module, parameter: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a parameter in a copy of a model in `dtype` (None: unchanged).

    Parameters in another dtype than the model's, such as routers kept in float32, keep theirs.
    """
    return parameter.dtype if dtype is None or parameter.dtype != model.dtype else dtype


def _empty_copy(model: nn.Module) -> nn.Module:
    """A model of the same class, configuration and attention on the meta device."""
    with torch.device("meta"), _without_warnings():
        return type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Context in which transformers does not repeat its warnings about the configuration of the original."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _copy_constants(module: nn.Module, other: nn.Module) -> None:
    """Copy the buffers and float attributes of a module, such as dropout probabilities, to its counterpart in a copy."""
    for name, buffer in module._buffers.items():
        other._buffers[name] = None if buffer is None else buffer.detach().clone()
    other._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    for name, value in vars(other).items():
        original = vars(module).get(name)
        if isinstance(value, Tensor) and isinstance(original, Tensor):
            # A constant tensor that is not registered as a buffer.
            vars(other)[name] = original.detach().clone()
        elif isinstance(value, float) and isinstance(original, float):
            vars(other)[name] = original
