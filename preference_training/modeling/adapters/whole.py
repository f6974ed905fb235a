"""Modules that are trained whole beside an adapter: embeddings and head for added tokens, norms.

They are peft's `modules_to_save`. Each has a copy that is trained, in the dtype of the model; the original stays beside it, for
`reference_mode`.
"""

import re

from torch import nn

from preference_training.configuration.keys import listed
from preference_training.core.errors import UserError, nearest
from preference_training.modeling.adapters.weights import TRAINED_ADAPTER, name_pattern
from preference_training.modeling.value_head import VALUE_HEAD, has_value_head


def whole_modules(model: nn.Module, patterns: list[str] | str) -> list[str]:
    """The names of the modules that patterns name: ends of names, or one regular expression for whole names.

    Of nested modules the outermost. Raises UserError for a pattern that names none, and for modules that cannot be trained so.
    """
    names = [name for name, _ in model.named_modules() if name]
    found: set[str] = set()
    for pattern in listed(patterns):
        ends = patterns if isinstance(patterns, str) else rf"(.*\.)?{re.escape(pattern)}"
        matching = {name for name in names if re.fullmatch(ends, name)}
        if not matching:
            weights = (name for name, _ in model.named_parameters(remove_duplicate=False))
            kinds = dict.fromkeys(name.split(".")[-2] for name in weights if "." in name)
            raise UserError(
                f"model.lora.modules_to_save: found {pattern}, and no module of {type(model).__name__} has that name; "
                + nearest(pattern, kinds, f"modules with weights: {', '.join(kinds)}.")
            )
        found |= matching
    outermost = [name for name in names if name in found and not any(name.startswith(f"{other}.") for other in found)]
    for name in outermost:
        if reason := _reason_against(model, name):
            raise UserError(f"model.lora.modules_to_save: found {name}: {reason}.")
    return outermost


def _reason_against(model: nn.Module, name: str) -> str | None:
    """Why a module cannot be trained whole beside an adapter, if it cannot."""
    module = model.get_submodule(name)
    if has_value_head(model) and name == VALUE_HEAD:
        return "the value head is trained whole without being named"
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return "it is a list of modules. Name its items, such as " + f"{name}.{next(iter(module.named_children()))[0]}"
    if next(module.parameters(), None) is None:
        return "it has no weights"
    if not all(weight.is_floating_point() for weight in module.parameters()):
        return (
            "its weights are quantized, and cannot be trained themselves. Embeddings, norms and the head are not; or leave "
            "model.quantization null"
        )
    return None


def train_whole(model: nn.Module, names: list[str], frozen: list[str]) -> None:
    """Give the modules of these names copies that are trained, and frozen ones for the adapters that are named in `frozen`.

    Raises UserError where an adapter is inside one of them.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for name in names:
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(name)
        # peft's newer versions have wrapped it, for every adapter.
        wrapper = module if isinstance(module, ModulesToSaveWrapper) else ModulesToSaveWrapper(module, TRAINED_ADAPTER)
        if any(isinstance(part, BaseTunerLayer) for part in wrapper.original_module.modules()):
            raise UserError(
                f"model.lora.modules_to_save: found {name}, in which model.lora.target_parameters adapts weights too. Expected "
                "one of them."
            )
        for adapter in frozen:
            wrapper.update(adapter)
        wrapper.set_adapter(TRAINED_ADAPTER)
        for adapter in wrapper.modules_to_save.keys() - {TRAINED_ADAPTER, *frozen}:
            wrapper.delete_adapter(adapter, [TRAINED_ADAPTER])
        setattr(model.get_submodule(parent), leaf, wrapper)


def wrapped_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that are trained whole beside an adapter, with their originals, by name."""
    from peft.utils import ModulesToSaveWrapper

    return {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}


def original(layer: nn.Module) -> nn.Module:
    """A layer as it is in the model under an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if isinstance(layer, ModulesToSaveWrapper):
        return layer.original_module
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def describe_whole(model: nn.Module) -> list[str]:
    """Lines for the user: what is trained whole beside an adapter, and what becomes of tied embeddings."""
    wrapped = wrapped_modules(model)
    if not wrapped:
        return []
    kinds = dict.fromkeys(name_pattern(name) for name in wrapped)
    numbers = sum(
        weight.numel() for module in wrapped.values() for weight in module.modules_to_save[TRAINED_ADAPTER].parameters()
    )
    lines = [f"model.lora.modules_to_save: {', '.join(kinds)} are trained whole, {numbers:,} weights"]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    trained = [layer for layer in (embedding, head) if layer is not None and any(layer is each for each in wrapped.values())]
    if trained and head is not None and original(head).weight is original(embedding).weight:
        which = "each is" if len(trained) == 2 else f"the {'embedding' if trained[0] is embedding else 'head'} alone is"
        lines.append(
            f"model.lora.modules_to_save: embedding and head of {type(model).__name__} share their weights; {which} trained, "
            "so that they differ afterwards, and a merged model has both"
        )
    return lines
