"""Several optimizers as one."""

from collections.abc import Sequence

import torch


class Combined(torch.optim.Optimizer):
    """Several optimizers, each of weights of its own. To schedulers and checkpoints they are one, with one state."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]):
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        self._share()

    def _share(self) -> None:
        """Have the parts read and write the groups and the state of the whole."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.state = self.state
            part.param_groups = [next(groups) for _ in part.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        """Take a step of each."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """Load what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self._share()
