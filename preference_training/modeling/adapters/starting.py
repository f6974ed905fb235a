"""How adapters start, where that depends on the weights under them: DoRA's lengths, and directions of the weights.

An adapter that starts from directions of a weight W, with matrices A and B (PiSSA, OLoRA), is usually trained on what is left
of W, which is then another base model, rounded. Here W stays, and what the adapter started as is subtracted from it:

    W x + s (B A x - B' A' x)         A', B' frozen, equal to A, B before training; s the adapter's scale

The gradients of A and B are those of the usual form. Before training the difference is exactly 0 in every dtype; without the
adapter the model is the original one; and the adapter is a plain one of rank 2r on it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from preference_training.core.errors import UserError
from preference_training.modeling.adapters.weights import SUBTRACTED_ADAPTER, TRAINED_ADAPTER


class DifferenceFromStart:
    """A variant of peft's LoRA layers: from what the trained adapter computes, what another of the layer does is subtracted."""

    def forward(self, module: nn.Module, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """x [..., in] and the base layer's result [..., out] to the layer's [..., out]."""
        x = module.lora_dropout[active_adapter](x)
        learned, start = (module.lora_B[name](module.lora_A[name](x)) for name in (active_adapter, SUBTRACTED_ADAPTER))
        return result + (learned - start) * module.scaling[active_adapter]


@torch.no_grad()
def subtract_start(model: nn.Module, init: str) -> None:
    """Let the trained adapters start from directions of the weights under them, which stay: `init` is PiSSA's or OLoRA's.

    orthogonal: they stay as they are, which changes outputs by rounding alone. On the meta device nothing is computed. Raises
    UserError for adapters on anything but linear layers.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight
    from transformers.pytorch_utils import Conv1D

    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        base = layer.get_base_layer()
        if not isinstance(base, nn.Linear | Conv1D):
            raise UserError(
                f"model.lora.init: found {init}, and {name} is no linear layer, whose directions it could start from. Expected "
                "target_modules of linear layers, or init=default."
            )
        layer.lora_variant[TRAINED_ADAPTER] = DifferenceFromStart()
        if init == "orthogonal":
            a, b = layer.lora_A[TRAINED_ADAPTER].weight, layer.lora_B[TRAINED_ADAPTER].weight
        elif not base.weight.is_meta:
            weight = dequantize_module_weight(base).float()
            weight = weight.T if isinstance(base, Conv1D) else weight
            a, b = _directions(weight, init, layer.r[TRAINED_ADAPTER], layer.scaling[TRAINED_ADAPTER])
        if not base.weight.is_meta:
            for adapter in (TRAINED_ADAPTER, SUBTRACTED_ADAPTER):
                layer.lora_A[adapter].weight.copy_(a)
                layer.lora_B[adapter].weight.copy_(b)


def _directions(weight: Tensor, init: str, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] of a weight [out, in], in float32.

    pissa: scale * B A is the best approximation of rank r (Meng et al. 2024, equation 2; pissa_niter_N: by N rounds of subspace
    iteration). olora: B and A are the first columns of Q and rows of R of the QR decomposition (Büyükakyüz 2024).
    """
    if rank > min(weight.shape):
        raise UserError(
            f"model.lora.init: found {init} with model.lora.r={rank}, and a weight of {weight.shape[0]} by {weight.shape[1]} "
            f"has {min(weight.shape)} directions. Expected a smaller rank."
        )
    if init == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    if init == "pissa":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        left, values, right = torch.svd_lowrank(weight, rank, niter=int(init.rpartition("_")[2]))
        right = right.T
    root = (values[:rank] / scale).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


@torch.no_grad()
def measure_lengths(model: nn.Module) -> None:
    """Set the lengths that DoRA learns to those of the weights as they are computed in training, in the adapters' dtype.

    peft measures them in the dtype of the weights; a forward pass does not, so that a new adapter would change outputs.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight

    for layer in model.modules():
        if isinstance(layer, LoraLayer) and not layer.get_base_layer().weight.is_meta:
            for adapter in layer.lora_magnitude_vector.keys() & layer.lora_A.keys():
                lengths = layer.lora_magnitude_vector[adapter]
                weight = dequantize_module_weight(layer.get_base_layer()).to(layer.lora_A[adapter].weight.dtype)
                # Without dimensions: of a Conv1D peft transposes the weight alone.
                lengths.weight.data = lengths.get_weight_norm(weight, weight.new_zeros(()), 0.0)
