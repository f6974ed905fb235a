"""GaLore (Zhao et al. 2024): AdamW of hidden matrices in a few directions of their gradients, found anew now and then."""

from typing import Any

import torch
from torch import nn

from preference_training.training.optimizers.groups import hidden_matrices, weight_groups

# How a hidden matrix is projected, by the library's names: the number of directions, the steps between two choices of them, and
# the share of the learning rate, all as in the paper's fine-tuning and its own code.
PROJECTION = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "projection_type": "std"}
# Of the library's state, which is an object, and of ours, the matrix that it holds.
PROJECTOR, DIRECTIONS = "projector", "directions"


def build_galore(policy: nn.Module, config) -> torch.optim.Optimizer:
    """GaLore for the hidden matrices of a model, which is AdamW for its other weights."""
    from pytorch_optimizer import GaLore
    from pytorch_optimizer.optimizer.utils.galore import GaLoreProjector

    class ResumableGaLore(GaLore):
        """The library's GaLore, whose state is made of tensors alone, so that a checkpoint has all of it."""

        @torch.no_grad()
        def step(self, closure=None):
            """Take a step."""
            for group in self.param_groups:
                for weight in group["params"]:
                    state = self.state[weight]
                    if DIRECTIONS in state:
                        state[PROJECTOR] = GaLoreProjector(**{name: group[name] for name in PROJECTION})
                        state[PROJECTOR].ortho_matrix = state.pop(DIRECTIONS)
            loss = super().step(closure)
            for state in self.state.values():
                if PROJECTOR in state:
                    state[DIRECTIONS] = state.pop(PROJECTOR).ortho_matrix.contiguous()
            return loss

    arguments = {"lr": config.lr, **config.optimizer_kwargs}
    projection = PROJECTION | {name: arguments.pop(name) for name in PROJECTION if name in arguments}
    if projection["projection_type"] not in ("std", "reverse_std", "right", "left"):
        raise ValueError(f"projection_type is {projection['projection_type']!r}, expected std, reverse_std, right or left")
    matrices = hidden_matrices(policy)

    def options_of(weight) -> dict[str, Any]:
        return projection if weight in matrices else {}

    unknown = arguments.keys() - {"lr", "betas", "eps", "weight_decay", "maximize", "foreach"}
    if unknown:
        # The library takes any name, and ignores it.
        raise TypeError(f"got an unexpected keyword argument {min(unknown)!r}")
    return ResumableGaLore(weight_groups(policy, config, options_of), **arguments)
