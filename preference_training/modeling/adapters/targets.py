"""Which layers of a model can take a LoRA adapter, and why the others cannot."""

import inspect
import re
from collections import defaultdict
from functools import cache

import torch
from torch import Tensor, nn

from preference_training.modeling.adapters.weights import is_added
from preference_training.modeling.experts.routers import num_experts
from preference_training.modeling.tuning.towers import is_in, towers
from preference_training.modeling.value_head import output_head


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a model except its head, by name, transformers' Conv1D and the base layers of adapters included.

    Those that text does not reach are left out.
    """
    from transformers.pytorch_utils import Conv1D

    head, beside = output_head(model), towers(model)
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and not is_added(name)
        and ".original_module" not in name
        and not is_in(name, beside)
    }


def unsupported_layers(model: nn.Module) -> dict[str, str]:
    """The linear layers on which an adapter would have no effect or break the model: name → reason."""
    reasons = {}
    for name, layer in linear_layers(model).items():
        parent, _, leaf = name.rpartition(".")
        parent_class = type(model.get_submodule(parent))
        if _refused_by_peft(model, leaf):
            reasons[name] = f"peft refuses {leaf} for {model.config.model_type}"
        elif _is_bypassed(parent_class, leaf):
            reasons[name] = f"{parent_class.__name__} reads the weight of {leaf} directly, bypassing an adapter"
        elif not _returns_tensor(layer):
            reasons[name] = f"{leaf} returns more than one tensor ({type(layer).__name__})"
    return reasons


def _refused_by_peft(model: nn.Module, leaf: str) -> bool:
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    check = getattr(LoraModel, "_check_target_module_compatiblity", None)
    try:
        if check is not None:
            check(None, LoraConfig(), model, leaf)
    except ValueError:
        return True
    return False


@cache
def _is_bypassed(parent: type, leaf: str) -> bool:
    """Whether the source of a module multiplies by a child layer's weight instead of calling the layer."""
    try:
        code = inspect.getsource(parent)
    except (OSError, TypeError):
        return False
    return re.search(rf"self\.{leaf}\.weight @|@ self\.{leaf}\.weight", code) is not None


def _returns_tensor(layer: nn.Module) -> bool:
    """Whether the output of a linear layer is one tensor; subclasses with their own forward are called to find out."""
    if type(layer).forward is nn.Linear.forward or not layer.weight.is_floating_point() or not hasattr(layer, "in_features"):
        return True
    with torch.no_grad():
        return isinstance(layer(layer.weight.new_zeros(2, layer.in_features)), Tensor)


def shorten_names(names, model: nn.Module) -> list[str]:
    """Replace names of layers by their last component where all layers with that last component are listed."""
    by_leaf = defaultdict(set)
    for name in linear_layers(model):
        by_leaf[name.rpartition(".")[2]].add(name)
    leaves = {leaf for leaf, layers in by_leaf.items() if layers <= set(names)}
    return sorted(leaves | {name for name in names if name.rpartition(".")[2] not in leaves})


def adapted_modules(model: nn.Module) -> set[str]:
    """The names of the modules with an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def fused_experts(model: nn.Module) -> list[str]:
    """The names of modules that hold all experts of a mixture-of-experts layer in one tensor."""
    number = num_experts(model.config)
    return [
        name
        for name, module in model.named_modules()
        if number is not None
        and any(_is_stacked(f"{name}.{leaf}", weight, number) for leaf, weight in module.named_parameters(recurse=False))
        and not isinstance(module, nn.Conv1d)
    ]


def _is_stacked(name: str, weight: Tensor, number: int) -> bool:
    """Whether a weight is that of so many experts, one behind another; DBRX has their rows in one matrix."""
    in_rows = ".experts." in name and not name.endswith(".weight") and weight.dim() == 2 and len(weight) % number == 0
    return in_rows or (weight.dim() == 3 and len(weight) == number)
