"""The optimizer of a configuration: which class, with which kernels, over which groups of weights."""

import inspect
from collections.abc import Iterable
from importlib import import_module

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from preference_training.configuration.optimizers import OPTIMIZERS
from preference_training.core.errors import UserError, first_line
from preference_training.modeling.quantization import import_bitsandbytes
from preference_training.training.optimizers.averages import average_in
from preference_training.training.optimizers.groups import weight_groups
from preference_training.training.optimizers.low_rank import build_galore
from preference_training.training.optimizers.master_weights import MasterWeights, is_low_precision
from preference_training.training.optimizers.muon import build_muon

# Types of devices that torch has fused updates for.
FUSED_DEVICES = {"cuda", "cpu", "mps", "xpu"}
# Installs schedulefree and pytorch_optimizer.
INSTALL = "Run `pip install -r requirements/optimizers.txt`."


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
    if config.ema_decay is not None:
        average_in(optimizer, config.ema_decay)
    if masters is None:
        masters = config.keeps_master_weights
    low_precision = any(weight.requires_grad and is_low_precision(weight) for weight in policy.parameters())
    return MasterWeights(optimizer) if masters and low_precision else optimizer


def _plain_optimizer(policy: nn.Module, config) -> torch.optim.Optimizer:
    name, package = config.optimizer, OPTIMIZERS[config.optimizer].package
    if package == "pytorch_optimizer":
        _import(package, name)
        return build_galore(policy, config)
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    is_sharded = any(isinstance(weight, DTensor) for weight in trained)
    devices_and_dtypes = {(weight.device.type, weight.dtype) for weight in trained}
    if name == "Muon":
        return build_muon(policy, config, update_kernels(torch.optim.AdamW, devices_and_dtypes, is_sharded))
    arguments = {"lr": config.lr, **config.optimizer_kwargs}
    groups = weight_groups(policy, config)
    if package == "bitsandbytes":
        return getattr(import_bitsandbytes(f"optimizer={name}").optim, name)(groups, **arguments)
    if package == "schedulefree":
        # Of sharded weights, one after the other: not all of its kernels for many weights take them.
        optimizer = getattr(_import(package, name), name)(groups, **({"foreach": not is_sharded} | arguments))
        for group in optimizer.param_groups:
            # What its `train` does, which would also begin a state for each weight.
            group["train_mode"] = True
        return optimizer
    optimizer_class = getattr(torch.optim, name)
    kernels = update_kernels(optimizer_class, devices_and_dtypes, is_sharded)
    # At most one of them may be true.
    chosen = {} if arguments.keys() & {"fused", "foreach"} else kernels
    return optimizer_class(groups, **(chosen | arguments))


def _import(package: str, optimizer: str):
    """Import an optional package. Raises UserError where it is not installed."""
    try:
        return import_module(package)
    except ImportError as error:
        raise UserError(f"optimizer: {optimizer} needs the package {package}. {INSTALL}") from error


def update_kernels(optimizer_class: type, weights: Iterable[tuple[str, torch.dtype]], is_sharded: bool) -> dict[str, bool]:
    """How an optimizer of torch updates weights of these types of device and dtypes, as arguments of its class.

    fused: one kernel for many weights, where torch has one; else, on a GPU, foreach: a few kernels for many weights. Both keep
    the same state as the update of one weight after the other, so that a run resumes with either.
    """
    # Its kernels for many weights need as much memory as the weights; it is there to need little.
    if optimizer_class is torch.optim.Adafactor:
        return {}
    weights = set(weights)
    devices = {device for device, _ in weights}
    has_fused = "fused" in inspect.signature(optimizer_class).parameters and devices <= FUSED_DEVICES
    # torch has no fused SGD for weights that lie over several processes.
    without = optimizer_class is torch.optim.SGD and is_sharded
    if has_fused and not without and all(dtype.is_floating_point for _, dtype in weights):
        return {"fused": True}
    return {"foreach": True} if devices == {"cuda"} else {}
