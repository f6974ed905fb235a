"""How weights change: the optimizer, which weights decay, and the learning rate over the steps of a run."""

import inspect
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from adapters import import_bitsandbytes
from configuration import BITSANDBYTES_OPTIMIZERS
from utils import UserError, first_line


def check_optimizer(config) -> None:
    """Raise UserError for arguments that the configuration's optimizer does not take, or a package that it needs."""
    try:
        build_optimizer(nn.Linear(1, 1), config)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"optimizer_kwargs: {config.optimizer} refuses {dict(config.optimizer_kwargs)}: {first_line(error)}. "
            "Expected its own arguments, by their names there."
        ) from error


def build_optimizer(policy: nn.Module, config) -> torch.optim.Optimizer:
    """The optimizer of the configuration over the weights that are trained, with its fused kernel where it has one."""
    arguments = {"lr": config.lr, **config.optimizer_kwargs}
    groups = _decaying(policy, config.weight_decay)
    if config.optimizer in BITSANDBYTES_OPTIMIZERS:
        return getattr(import_bitsandbytes(f"optimizer={config.optimizer}").optim, config.optimizer)(groups, **arguments)
    optimizer_class = getattr(torch.optim, config.optimizer)
    # torch has no fused SGD for weights that lie over several processes.
    without = optimizer_class is torch.optim.SGD and any(isinstance(weight, DTensor) for weight in policy.parameters())
    fused = {"fused": True} if "fused" in inspect.signature(optimizer_class).parameters and not without else {}
    return optimizer_class(groups, **(fused | arguments))


def flat_state(state: dict) -> dict:
    """An optimizer's state without sections inside a weight's values: bitsandbytes hides those of few bits in one."""
    by_weight = {}
    for weight, values in state["state"].items():
        sections = [value for value in values.values() if isinstance(value, dict)]
        plain = {name: value for name, value in values.items() if not isinstance(value, dict)}
        by_weight[weight] = {name: value for part in (plain, *sections) for name, value in part.items()}
    return state | {"state": by_weight}


def _decaying(policy: nn.Module, weight_decay: float | None) -> list:
    """The trained weights, in two groups where `weight_decay` is given: biases and the scales of norms do not decay."""
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    if weight_decay is None:
        return trained
    groups = [
        {"params": [weight for weight in trained if weight.ndim > 1], "weight_decay": weight_decay},
        {"params": [weight for weight in trained if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


# ---- the learning rate ----------------------------------------------------------------------------------------------------


def warmup_steps(config, total_steps: int) -> int:
    """Over how many of a run's optimizer steps the learning rate rises: `warmup_share` of them, else `warmup_steps`."""
    return config.warmup_steps if config.warmup_share is None else round(config.warmup_share * total_steps)


def schedule(config, total_steps: int) -> Callable[[int], float]:
    """The learning rate of each optimizer step (from 0) over `lr`: a linear rise, then the shape that `lr_schedule` names.

    linear and cosine reach `final_lr_share` at the run's last step; inverse_sqrt falls as 1 / sqrt(step).
    """
    warmup, final = warmup_steps(config, total_steps), config.final_lr_share
    shapes = {
        "constant": lambda _: 1.0,
        "linear": lambda step: 1 - (1 - final) * progress(step),
        "cosine": lambda step: final + (1 - final) * (1 + math.cos(math.pi * progress(step))) / 2,
        "inverse_sqrt": lambda step: math.sqrt((warmup + 1) / (step + 1)),
    }

    def progress(step: int) -> float:
        return min(1.0, (step - warmup) / max(1, total_steps - 1 - warmup))

    shape = shapes[config.lr_schedule]
    return lambda step: (step + 1) / (warmup + 1) if step < warmup else shape(step)
