"""How weights change: the optimizer, which weights decay, float32 master weights, and the learning rate over a run's steps."""

import inspect
import math
from collections.abc import Callable, Iterable
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from preference_training.configuration.schema import BITSANDBYTES_OPTIMIZERS, RunConfig
from preference_training.configuration.sections import SPACINGS
from preference_training.core.errors import UserError, first_line
from preference_training.core.process_group import to_local
from preference_training.modeling.adapters.weights import lr_factors
from preference_training.modeling.quantization import import_bitsandbytes

# Types of devices that torch has fused updates for.
FUSED_DEVICES = {"cuda", "cpu", "mps", "xpu"}
# A master weight's name in the optimizer's state.
MASTER = "master"


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
    groups = with_lr_factors(_parameter_groups(policy, config.weight_decay), policy, config)
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


def with_lr_factors(groups: list, policy: nn.Module, config) -> list:
    """The groups, each divided by what the learning rate of its weights is multiplied by: of B matrices with LoRA+."""
    factors = lr_factors(policy, config.model.lora.loraplus_lr_ratio)
    if not factors:
        return groups
    divided = []
    for group in groups if isinstance(groups[0], dict) else [{"params": groups}]:
        for factor in sorted({factors.get(weight, 1.0) for weight in group["params"]}):
            chosen = [weight for weight in group["params"] if factors.get(weight, 1.0) == factor]
            divided.append(group | {"params": chosen, "lr": factor * group.get("lr", config.lr)})
    return divided


# ---- float32 master weights -------------------------------------------------------------------------------------------------


def is_low_precision(weight: Tensor) -> bool:
    """Whether a weight is in bfloat16 or float16, which round small updates away."""
    return weight.dtype in (torch.bfloat16, torch.float16)


class MasterWeights(torch.optim.Optimizer):
    """An optimizer whose low-precision weights have float32 copies: `inner` updates these, and the weights are rounded to them.

    To schedulers, gradient scalers and checkpoints it is an optimizer of the weights themselves; a weight's state has its copy
    beside what `inner` keeps, all of it in float32. The copies are made at the first step, so that a model that is only
    evaluated has none. Copies of sharded weights are sharded alike.
    """

    def __init__(self, inner: torch.optim.Optimizer):
        super().__init__([dict(group) for group in inner.param_groups], dict(inner.defaults))
        self.inner = inner
        self.masters: dict[Tensor, Tensor] = {}

    def make_masters(self) -> None:
        """Copy the weights as they are now, once."""
        if self.masters:
            return
        for mine, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            for weight in mine["params"]:
                self.masters[weight] = nn.Parameter(weight.detach().float()) if is_low_precision(weight) else weight
            inner["params"] = [self.masters[weight] for weight in mine["params"]]

    def sum_gradients_in_float32(self, summed: bool) -> None:
        """Have autograd sum the gradients of several backward passes in float32, not in the weights' dtype.

        One alone keeps the weights' dtype, which is all that it is computed in. Those of sharded weights are FSDP's.
        """
        for weight in chain.from_iterable(group["params"] for group in self.param_groups):
            if is_low_precision(weight) and not isinstance(weight, DTensor):
                weight.grad_dtype = torch.float32 if summed else weight.dtype

    @torch.no_grad()
    def step(self, closure=None):
        """Update the master weights by the gradients of the weights, which are gone then, and round the weights to them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.make_masters()
        copied = [(weight, master) for weight, master in self.masters.items() if master is not weight]
        for weight, master in copied:
            # One by one, so that only one gradient is in memory twice.
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        self._forward_options()
        self.inner.step()
        updated = [(weight, master) for weight, master in copied if master.grad is not None]
        if updated:
            # A kernel for many weights, not one for each.
            torch._foreach_copy_(*([to_local(each) for each in side] for side in zip(*updated, strict=True)))
        for _, master in updated:
            master.grad = None
        self._collect_state()
        return loss

    def _forward_options(self) -> None:
        """Copy the learning rate, and whatever else schedulers change, to `inner`."""
        for mine, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner |= {name: value for name, value in mine.items() if name != "params"}

    def _collect_state(self) -> None:
        for weight, master in self.masters.items():
            kept = self.inner.state.get(master, {})
            self.state[weight] = dict(kept) if master is weight else {**kept, MASTER: master.detach()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Load what `state_dict` returned. Weights without a master weight in it keep theirs."""
        self.make_masters()
        saved = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        weights = chain.from_iterable(group["params"] for group in self.param_groups)
        for name, weight in zip(saved, weights, strict=True):
            values = state_dict["state"].get(name, {})
            if MASTER in values and self.masters[weight] is not weight:
                self.masters[weight].copy_(values[MASTER])
        state = {
            name: {key: value for key, value in values.items() if key != MASTER} for name, values in state_dict["state"].items()
        }
        self.inner.load_state_dict({"state": state, "param_groups": state_dict["param_groups"]})
        for mine, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            mine |= {name: value for name, value in inner.items() if name != "params"}
        self._collect_state()


def pending_updates(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, Tensor]]:
    """What an optimizer is about to update, with its gradients: master weights where it has them, else the weights."""
    masters = {}
    if isinstance(optimizer, MasterWeights):
        optimizer.make_masters()
        masters = optimizer.masters
    weights = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    return [(masters.get(weight, weight), weight.grad) for weight in weights if weight.grad is not None]


# ---- the learning rate ----------------------------------------------------------------------------------------------------


def warmup_steps(config, total_steps: int) -> int:
    """Over how many of a run's optimizer steps the learning rate rises: `warmup_share` of them, else `warmup_steps`."""
    return (config.warmup_steps or 0) if config.warmup_share is None else round(config.warmup_share * total_steps)


def schedule(config, total_steps: int) -> Callable[[int], float]:
    """The learning rate of each optimizer step (from 0) over `lr`: a linear rise, then the shape that `lr_schedule` names.

    linear and cosine reach `final_lr_share` at the run's last step; inverse_sqrt falls as 1 / sqrt(step). A share of 0 would
    be reached one step later: a step with learning rate 0 is computed for nothing.
    """
    warmup, final = warmup_steps(config, total_steps), config.final_lr_share
    last = total_steps - 1 if final else total_steps
    shapes = {
        "constant": lambda _: 1.0,
        "linear": lambda step: 1 - (1 - final) * progress(step),
        "cosine": lambda step: final + (1 - final) * (1 + math.cos(math.pi * progress(step))) / 2,
        "inverse_sqrt": lambda step: math.sqrt((warmup + 1) / (step + 1)),
    }

    def progress(step: int) -> float:
        return min(1.0, (step - warmup) / max(1, last - warmup))

    shape = shapes[config.lr_schedule]
    return lambda step: (step + 1) / (warmup + 1) if step < warmup else shape(step)


# ---- notices --------------------------------------------------------------------------------------------------------------


def precision_notices(config: RunConfig) -> list[str]:
    """Notices about weights that are trained in low precision; empty where there are none."""
    dtype, lines = config.model.policy_dtype, []
    if config.master_weights is True and not config.model.trains_low_precision:
        why = "an adapter's weights are float32" if dtype in SPACINGS else f"model.policy_dtype={dtype}"
        lines.append(f"master_weights: none are needed: {why}")
    if config.model.trains_low_precision:
        lines.append(f"master_weights: {_chosen_precision(config)}")
    share = config.loss.reference_update_share
    if share is not None and share < 0.5 and config.model.reference_dtype in SPACINGS:
        lines.append(
            f"loss.reference_update_share: with {share:g} a reference in {config.model.reference_dtype} follows the policy "
            f"only where they differ by more than {0.5 / share:.2g} times the distance of neighboring numbers: smaller moves "
            "are rounded away. Not so with a share of 0.5 or more, or model.policy_dtype=float32 (and "
            "model.autocast_dtype=bfloat16)"
        )
    return lines


def _chosen_precision(config: RunConfig) -> str:
    dtype = config.model.policy_dtype
    kept = config.keeps_master_weights
    copies, none = f"the optimizer keeps float32 copies of the {dtype} weights", f"none, {dtype} weights are updated directly"
    what = copies if kept else none
    if config.master_weights != "auto":
        return what
    limit = config.model.smallest_kept_lr
    if config.optimizer == "SGD":
        return f"{what}: SGD's updates may be too small for {dtype} (master_weights=false does without, in less memory)"
    if kept:
        return f"{what}: updates of lr {config.lr:g} would be rounded away (master_weights=false does without, in less memory)"
    return f"{what}: updates of lr {config.lr:g} are not rounded away in weights of ordinary size (limit: {limit:.1g})"
