"""Loss scaling: gradients that float16 cannot hold are computed at a multiple of their size, which follows them."""

import torch
from torch import Tensor

from preference_training.configuration.schema import RunConfig


class LossScaler(torch.amp.GradScaler):
    """Scales the loss before the backward pass, and gradients back after it; takes no step whose scaled gradient overflows.

    Unlike torch's own it takes gradients in float16 too: those of float16 weights without float32 master weights, alone or
    beside an adapter. Scaled back, they lose what float16 does not hold; all others are whole.
    """

    def load_state_dict(self, state_dict: dict) -> None:
        """Load what `state_dict` returned; the scale stays that of a beginning where the run had none then."""
        if state_dict:
            super().load_state_dict(state_dict)

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        # As in torch's ShardedGradScaler.
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)


def computes_in_float16(config: RunConfig) -> bool:
    """Whether anything on the way of a gradient is computed in float16, where it would underflow, whatever is trained."""
    model, trainer = config.model, config.trainer
    # A sharded trainer gathers weights of any dtype in its own.
    dtypes = {model.autocast_dtype, config.sharded_dtype or model.policy_dtype}
    if model.quantization is not None:
        dtypes.add(model.quantized_compute_dtype)
    if trainer.is_sharded:
        dtypes |= {trainer.reduce_dtype, trainer.output_dtype}
    return "float16" in dtypes
