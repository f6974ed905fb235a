"""Merge a trained adapter into the weights under it."""

import torch
from torch import nn

from preference_training.core.errors import UserError
from preference_training.modeling.adapters.weights import TRAINED_ADAPTER
from preference_training.modeling.adapters.whole import original, wrapped_modules


@torch.no_grad()
def merge_adapter(model: nn.Module, dtype: torch.dtype) -> None:
    """Merge the trained adapter into the base weights, in float32, rounded once to `dtype`, and remove it.

    Layers without an adapter stay as they are; modules that were trained whole take the place of their originals. A head and an
    embedding that were tied are untied where either was trained, because each differs then. Raises UserError where several
    adapted layers share one base weight.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    _untie(model)
    for name, wrapper in wrapped_modules(model).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, wrapper.modules_to_save[TRAINED_ADAPTER])
    adapted = _outermost_adapted(model)
    _refuse_shared_weights(model, adapted)
    for name, layer in adapted.items():
        parent, _, leaf = name.rpartition(".")
        base = layer.get_base_layer()
        for weight in base.parameters(recurse=False):
            weight.data = weight.data.float()
        if hasattr(layer, "unload_and_optionally_merge_module"):
            base = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=[TRAINED_ADAPTER])
        else:
            layer.merge(adapter_names=[TRAINED_ADAPTER])
        setattr(model.get_submodule(parent), leaf, base)
        for weight in base.parameters(recurse=False):
            weight.data = weight.data.to(dtype)
    remaining = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if remaining:
        raise RuntimeError(f"{remaining[0]} could not be merged")
    del model.peft_config
    model._hf_peft_config_loaded = False


def _outermost_adapted(model: nn.Module) -> dict[str, nn.Module]:
    """The adapted layers by name; of nested ones only the outer layer, which merges both."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    inner = {name for name in adapted if name.rpartition(".")[0] in adapted or name.endswith(".base_layer")}
    return {name: module for name, module in adapted.items() if name not in inner}


def _refuse_shared_weights(model: nn.Module, adapted: dict[str, nn.Module]) -> None:
    owners: dict[nn.Parameter, str] = {}
    for name, layer in adapted.items():
        for weight in layer.get_base_layer().parameters(recurse=False):
            if (other := owners.setdefault(weight, name)) != name:
                raise UserError(
                    f"--merge: in {type(model).__name__} {other} and {name} share their weights, and the adapter changes "
                    "each differently, so no merged model of this architecture is equivalent. Export without --merge."
                )


def _untie(model: nn.Module) -> None:
    layers = model.get_output_embeddings(), model.get_input_embeddings()
    if layers[0] is None or all(original(layer) is layer for layer in layers):
        return
    head, embedding = map(original, layers)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.data.clone(), requires_grad=False)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
