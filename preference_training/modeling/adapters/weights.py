"""The weights of adapters in a model: whether it has any, which they are, and computing with those of the reference."""

import re
from contextlib import contextmanager

from torch import Tensor, nn

from preference_training.modeling.value_head import is_head_weight

# peft's names of the adapter that is trained, and of the frozen one that training started from.
TRAINED_ADAPTER, INITIAL_ADAPTER = "default", "starting"
# Prefix of all weight names in peft's files.
PREFIX = "base_model.model."


def has_adapter(model: nn.Module) -> bool:
    """Whether a model has LoRA adapters."""
    return hasattr(model, "peft_config")


def adapter_weights(named_weights: dict[str, Tensor], adapter: str = TRAINED_ADAPTER) -> dict[str, Tensor]:
    """The weights of an adapter among a model's named weights, not copied, by their names in peft's files.

    With the trained adapter goes a value head, which is trained beside it.
    """
    part = re.compile(rf"(\.lora_\w+)\.{adapter}(?=\.|$)")
    found = {PREFIX + part.sub(r"\1", name): weight for name, weight in named_weights.items() if part.search(name)}
    if found and adapter == TRAINED_ADAPTER:
        found |= {PREFIX + name: weight for name, weight in named_weights.items() if is_head_weight(name)}
    return found


def weights_to_save(named_weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The named weights that a checkpoint holds: those of the trained adapter, or all where there is no adapter."""
    return adapter_weights(named_weights) or named_weights


def initial_weights(named_weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The named weights that training started from: those of the base model, and those of the initial adapter, if any.

    A value head that is trained beside an adapter belongs to neither.
    """
    adapted = any(".lora_" in name for name in named_weights)
    base = {
        name.replace(".base_layer.", "."): weight
        for name, weight in named_weights.items()
        if ".lora_" not in name and not (adapted and is_head_weight(name))
    }
    return base, adapter_weights(named_weights, INITIAL_ADAPTER)


@contextmanager
def reference_mode(model: nn.Module):
    """Context in which a model with an adapter computes as its reference: as it did before training."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
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
