"""The weights of adapters in a model: whether it has any, which they are, and computing with those of the reference."""

import re
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from preference_training.core.process_group import full_tensor, set_whole
from preference_training.modeling.value_head import is_head_weight

# peft's names of the adapter that is trained, and of the frozen one that training started from.
TRAINED_ADAPTER, INITIAL_ADAPTER = "default", "starting"
# And of the frozen values that are subtracted from an adapter that starts from directions of the weights.
SUBTRACTED_ADAPTER = "subtracted"
# Prefix of all weight names in peft's files.
PREFIX = "base_model.model."


def has_adapter(model: nn.Module) -> bool:
    """Whether a model has LoRA adapters."""
    return hasattr(model, "peft_config")


def adapter_weights(named_weights: dict[str, Tensor], adapter: str = TRAINED_ADAPTER) -> dict[str, Tensor]:
    """The weights of an adapter among a model's named weights, not copied, by their names in peft's files.

    With the trained adapter goes a value head, which is trained beside it. One from which another is subtracted is joined with
    that: whole copies, of twice the rank, for which all processes call this.
    """
    found = _of_adapter(named_weights, adapter)
    if adapter != TRAINED_ADAPTER:
        return found
    found |= _joined(found, _of_adapter(named_weights, SUBTRACTED_ADAPTER))
    return found and found | {PREFIX + name: weight for name, weight in named_weights.items() if is_head_weight(name)}


def _of_adapter(named_weights: dict[str, Tensor], adapter: str) -> dict[str, Tensor]:
    part = re.compile(rf"(?:(\.lora_\w+)|\.modules_to_save)\.{adapter}(?=\.|$)")
    return {PREFIX + part.sub(r"\1", name): weight for name, weight in named_weights.items() if part.search(name)}


def is_added(name: str) -> bool:
    """Whether a weight or module of this name is an adapter's, or a module's trained beside it, and not the base model's."""
    return ".lora_" in name or ".modules_to_save." in name


@torch.no_grad()
def _joined(trained: dict[str, Tensor], subtracted: dict[str, Tensor]) -> dict[str, Tensor]:
    """B A - B' A' as one adapter: A [2r, in] above A', B [out, 2r] beside -B'."""
    return {
        name: torch.cat([full_tensor(trained[name]), full_tensor(other) * (-1 if dim else 1)], dim=dim)
        for name, other, dim in ((name, other, _rank_dim(name)) for name, other in subtracted.items())
    }


def _rank_dim(name: str) -> int:
    """The dimension of a matrix of an adapter that is its rank: A is [r, in], B [out, r]."""
    return 0 if ".lora_A." in name else 1


def adapter_shapes(named_weights: dict[str, Tensor], adapter: str = TRAINED_ADAPTER) -> dict[str, tuple[int, ...]]:
    """The shapes of what `adapter_weights` gives; nothing is communicated."""
    own = {name: weight for name, weight in named_weights.items() if f".{SUBTRACTED_ADAPTER}." not in name}
    shapes = {name: tuple(weight.shape) for name, weight in adapter_weights(own, adapter).items()}
    for name in _of_adapter(named_weights, SUBTRACTED_ADAPTER) if adapter == TRAINED_ADAPTER else ():
        shapes[name] = tuple(size * (1 + (dim == _rank_dim(name))) for dim, size in enumerate(shapes[name]))
    return shapes


@torch.no_grad()
def set_joined_adapter(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Take over joined adapters from `adapter_weights`, where a model has any, into what they were joined from."""
    named = dict(model.named_parameters())
    trained, subtracted = _of_adapter(named, TRAINED_ADAPTER), _of_adapter(named, SUBTRACTED_ADAPTER)
    for name in subtracted:
        dim = _rank_dim(name)
        first, second = weights[name].chunk(2, dim=dim)
        set_whole(trained[name], first.contiguous())
        set_whole(subtracted[name], -second if dim else second)


def weights_to_save(named_weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The named weights that a checkpoint holds: those of the trained adapter, or all where there is no adapter."""
    return adapter_weights(named_weights) or named_weights


def initial_weights(named_weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The named weights that training started from: those of the base model, and those of the initial adapter, if any.

    A value head that is trained beside an adapter belongs to neither.
    """
    adapted = any(map(is_added, named_weights))
    base = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): weight
        for name, weight in named_weights.items()
        if not is_added(name) and not (adapted and is_head_weight(name))
    }
    return base, adapter_weights(named_weights, INITIAL_ADAPTER)


@contextmanager
def reference_mode(model: nn.Module):
    """Context in which a model with an adapter computes as its reference: as it did before training."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)]
    has_initial = INITIAL_ADAPTER in model.peft_config
    # peft's own switches also change requires_grad, and a graph may still be waiting for its backward pass.
    for layer in layers:
        layer._disable_adapters = not has_initial
        layer._active_adapter = [INITIAL_ADAPTER] if has_initial else layer._active_adapter
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
            layer._active_adapter = [TRAINED_ADAPTER]


# ---- the learning rate ----------------------------------------------------------------------------------------------------


def is_b_matrix(name: str) -> bool:
    """Whether a weight of this name is the B matrix of an adapter."""
    return re.search(r"\.lora_(embedding_)?B\.", name) is not None


def name_pattern(name: str) -> str:
    """The name of a module or a weight with a * for the number of its block."""
    return re.sub(r"\.\d+\.", ".*.", name)
