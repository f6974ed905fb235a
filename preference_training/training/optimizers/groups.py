"""Which weights are trained at which share of the learning rate, and which of them decay."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from preference_training.configuration.schema import RunConfig
from preference_training.core.errors import UserError, nearest
from preference_training.core.values import counted
from preference_training.modeling.adapters.weights import is_b_matrix
from preference_training.modeling.value_head import VALUE_HEAD


def lr_factor(config: RunConfig, name: str) -> float:
    """The learning rate of a weight, by its name in the model, in multiples of `lr`.

    Of the patterns of `lr_groups` that are found in the name, the last one counts; it is multiplied by the ratio of LoRA+ for
    the B matrices of adapters.
    """
    found = [factor for pattern, factor in (config.lr_groups or {}).items() if re.search(pattern, name)]
    ratio = config.model.lora.loraplus_lr_ratio if is_b_matrix(name) else None
    return (found[-1] if found else 1.0) * (ratio or 1.0)


def weight_groups(
    policy: nn.Module, config: RunConfig, options_of: Callable[[Tensor], dict[str, Any]] = lambda _: {}
) -> list[dict[str, Any]]:
    """The trained weights as an optimizer's parameter groups: those of one kind, learning rate and decay together.

    Where `weight_decay` is given, biases and the scales of norms do not decay. options_of: further options of a weight's group.
    """
    groups: dict[tuple, dict[str, Any]] = {}
    for name, weight in policy.named_parameters():
        if not weight.requires_grad:
            continue
        options = dict(options_of(weight))
        if (factor := lr_factor(config, name)) != 1.0:
            options["lr"] = config.lr * factor
        if config.weight_decay is not None:
            options["weight_decay"] = config.weight_decay if weight.ndim > 1 else 0.0
        groups.setdefault(tuple(options.items()), options | {"params": []})["params"].append(weight)
    # Those that decay first, as before there were other groups.
    return sorted(groups.values(), key=lambda group: group.get("weight_decay") == 0.0)


def hidden_matrices(policy: nn.Module) -> set[Tensor]:
    """The trained matrices within a model: not embeddings, nor what reads the last hidden states (language or value head)."""
    outside = {module.weight for module in policy.modules() if isinstance(module, nn.Embedding)}
    heads = [getattr(policy, "get_output_embeddings", lambda: None)(), getattr(policy, VALUE_HEAD, None)]
    outside |= {head.weight for head in heads if isinstance(getattr(head, "weight", None), torch.Tensor)}
    return {weight for weight in policy.parameters() if weight.requires_grad and weight.ndim == 2} - outside


def lr_group_lines(config: RunConfig, names: Iterable[str]) -> list[str]:
    """What `lr_groups` does to the trained weights of these names, a line for each pattern.

    Raises UserError for a pattern that is found in none of them.
    """
    names, lines = list(names), []
    for pattern, factor in (config.lr_groups or {}).items():
        matches = [name for name in names if re.search(pattern, name)]
        if not matches:
            parts = sorted({part for name in names for part in name.split(".") if not part.isdecimal()})
            raise UserError(
                f"lr_groups: no trained weight has {pattern!r} in its name; {nearest(pattern, parts)} "
                f"Names are such as {names[0]}."
            )
        which = f"{counted(len(matches), 'weight')}, such as {matches[0]}"
        rate = "" if config.lr is None else f", lr {config.lr * factor:.3g}"
        lines.append(f"lr_groups: {pattern}: {factor:g} times lr for {which}{rate}")
    return lines
