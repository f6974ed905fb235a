"""Muon (Jordan et al. 2024): updates of hidden matrices are orthogonalized; of all other weights AdamW's are taken.

By default of the size of AdamW's updates (Liu et al. 2025, "Muon is scalable for LLM training"), so that both have one
learning rate, the one that AdamW would have.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from preference_training.core.process_group import full_tensor, sharded_like
from preference_training.training.optimizers.combined import Combined
from preference_training.training.optimizers.groups import hidden_matrices, weight_groups

# Where `optimizer_kwargs` has the arguments of AdamW; the others are Muon's.
ADAMW = "adamw"
# Updates of the size of AdamW's.
ADJUSTED = {"adjust_lr_fn": "match_rms_adamw"}


def build_muon(policy: nn.Module, config, kernels: dict[str, bool]) -> torch.optim.Optimizer:
    """Muon for the hidden matrices of a model, and AdamW, with these kernels, for its other weights."""
    arguments = {"lr": config.lr, **ADJUSTED, **config.optimizer_kwargs}
    others = {"lr": config.lr, **kernels, **arguments.pop(ADAMW, {})}
    matrices = hidden_matrices(policy)
    groups = weight_groups(policy, config, lambda weight: {"is_matrix": weight in matrices})
    made: list[torch.optim.Optimizer] = []
    for optimizer, is_matrix, given in ((ShardedMuon, True, arguments), (torch.optim.AdamW, False, others)):
        if listed := [_without(group, "is_matrix") for group in groups if group["is_matrix"] is is_matrix]:
            made.append(optimizer(listed, **given))
    return Combined(made)


def _without(group: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != name}


class ShardedMuon(torch.optim.Muon):
    """torch's Muon, also of sharded matrices: every process gathers each update, orthogonalizes it, and keeps its part."""

    @torch.no_grad()
    def step(self, closure=None):
        """Take a step."""
        weights = [weight for group in self.param_groups for weight in group["params"]]
        if not any(isinstance(weight, DTensor) for weight in weights):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)
        return loss

    def _update(self, weight: DTensor, group: dict) -> None:
        state, momentum = self.state[weight], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight.grad)
        average = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
        update = weight.grad.lerp(average, momentum) if group["nesterov"] else average
        whole = _orthogonalized(full_tensor(update), group)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(sharded_like(weight, whole), alpha=group["lr"])


def _orthogonalized(update: Tensor, group: dict) -> Tensor:
    """What torch's Muon would add to a matrix for this update, with a learning rate of 1."""
    moved = nn.Parameter(torch.zeros_like(update))
    moved.grad = update
    kept = {name: group[name] for name in ("ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
    # Without momentum the update is the gradient itself.
    torch.optim.Muon([moved], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, **kept).step()
    return moved.detach()
