"""Float32 master weights, from which low-precision weights are rounded after each update."""

from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from preference_training.core.process_group import to_local

# A master weight's name in the optimizer's state.
MASTER = "master"


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
        """Have autograd sum the gradients of the backward passes in float32, not in the weights' dtype.

        That of one pass is computed in the weights' dtype, and needs float32 only to be scaled back. Those of sharded weights
        are FSDP's.
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
        self._take_options()
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

    def _take_options(self) -> None:
        """Copy what `inner` counts in its groups, such as its steps."""
        for mine, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            mine |= {name: value for name, value in inner.items() if name != "params"}

    @torch.no_grad()
    def round_weights(self) -> None:
        """Round the weights to their master weights, where these were changed by others, and take over `inner`'s state."""
        for weight, master in self.masters.items():
            if master is not weight:
                weight.copy_(master)
        self._collect_state()

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
        self._take_options()
        self._collect_state()


def pending_updates(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, Tensor]]:
    """What an optimizer is about to update, with its gradients: master weights where it has them, else the weights."""
    masters = {}
    if isinstance(optimizer, MasterWeights):
        optimizer.make_masters()
        masters = optimizer.masters
    weights = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    return [(masters.get(weight, weight), weight.grad) for weight in weights if weight.grad is not None]
