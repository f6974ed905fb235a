"""The optimizer of a configuration: which class, with which kernels, over which groups of weights."""

import inspect
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from preference_training.configuration.schema import BITSANDBYTES_OPTIMIZERS
from preference_training.core.errors import UserError, first_line
from preference_training.modeling.quantization import import_bitsandbytes
from preference_training.training.optimizers.master_weights import MasterWeights, is_low_precision

# Types of devices that torch has fused updates for.
FUSED_DEVICES = {"cuda", "cpu", "mps", "xpu"}


def check_optimizer(config) -> None:
    """Raise UserError for arguments that the configuration's optimizer does not take, or a package that it needs."""
    try:
        build_optimizer(nn.Linear(1, 1), config)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"optimizer_kwargs: {config.optimizer} refuses {config.optimizer_kwargs}: {first_line(error)}. "
            "Expected its own arguments, by their names there."
        ) from error


def build_optimizer(policy: nn.Module, config, masters: bool | None = None) -> torch.optim.Optimizer:
    """The optimizer of the configuration over the weights that are trained, with its fused kernel where it has one.

    masters: whether low-precision weights have float32 master weights; None decides as configured.
    """
    optimizer = _plain_optimizer(policy, config)
    if masters is None:
        masters = config.keeps_master_weights
    low_precision = any(weight.requires_grad and is_low_precision(weight) for weight in policy.parameters())
    return MasterWeights(optimizer) if masters and low_precision else optimizer


def _plain_optimizer(policy: nn.Module, config) -> torch.optim.Optimizer:
    arguments = {"lr": config.lr, **config.optimizer_kwargs}
    groups = _parameter_groups(policy, config.weight_decay)
    if config.optimizer in BITSANDBYTES_OPTIMIZERS:
        return getattr(import_bitsandbytes(f"optimizer={config.optimizer}").optim, config.optimizer)(groups, **arguments)
    optimizer_class = getattr(torch.optim, config.optimizer)
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    is_sharded = any(isinstance(weight, DTensor) for weight in trained)
    kernels = update_kernels(optimizer_class, {(weight.device.type, weight.dtype) for weight in trained}, is_sharded)
    # At most one of them may be true.
    chosen = {} if arguments.keys() & {"fused", "foreach"} else kernels
    return optimizer_class(groups, **(chosen | arguments))


def update_kernels(optimizer_class: type, weights: Iterable[tuple[str, torch.dtype]], is_sharded: bool) -> dict[str, bool]:
    """How an optimizer of torch updates weights of these types of device and dtypes, as arguments of its class.

    fused: one kernel for many weights, where torch has one; else, on a GPU, foreach: a few kernels for many weights. Both keep
    the same state as the update of one weight after the other, so that a run resumes with either.
    """
    weights = set(weights)
    devices = {device for device, _ in weights}
    has_fused = "fused" in inspect.signature(optimizer_class).parameters and devices <= FUSED_DEVICES
    # torch has no fused SGD for weights that lie over several processes.
    without = optimizer_class is torch.optim.SGD and is_sharded
    if has_fused and not without and all(dtype.is_floating_point for _, dtype in weights):
        return {"fused": True}
    return {"foreach": True} if devices == {"cuda"} else {}


def _parameter_groups(policy: nn.Module, weight_decay: float | None) -> list:
    """The trained weights, in two groups where `weight_decay` is given: biases and the scales of norms do not decay."""
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    if weight_decay is None:
        return trained
    groups = [
        {"params": [weight for weight in trained if weight.ndim > 1], "weight_decay": weight_decay},
        {"params": [weight for weight in trained if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
