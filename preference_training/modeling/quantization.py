"""Quantized linear layers: frozen weights in four or eight bits, under LoRA adapters (QLoRA)."""

import math

import torch
from torch import Tensor, nn

from preference_training.core.errors import UserError

INSTALL = "Install what adapters need: pip install -r requirements/lora.txt"


def import_bitsandbytes(key: str):
    """The package bitsandbytes. Raises UserError where it is not installed, for a configuration's key that needs it."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(f"{key}: it needs the package bitsandbytes. {INSTALL}") from error
    return bitsandbytes


def quantize(model: nn.Module, model_config) -> None:
    """Turn a model's linear layers, but for its head, into four bits (nf4) or eight (int8), frozen; on the CPU or meta.

    Four bits are NormalFloat4 in blocks of 64, whose scales are quantised again with `double_quantization` (Dettmers et al.
    2023, section 3). Raises UserError where bitsandbytes is not installed, or the model has no such layers.
    """
    bitsandbytes = import_bitsandbytes("model.quantization")
    head = model.get_output_embeddings()
    make = _in_four_bits if model_config.quantization == "nf4" else _in_eight_bits
    if head.weight.is_meta:
        make = _without_numbers
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and layer is not head:
                small = make(bitsandbytes.nn, layer, model_config)
                small.bias = layer.bias
                # Moved, it is quantised.
                setattr(parent, name, small.to(layer.weight.device))
    model.requires_grad_(False)


class _Product(torch.autograd.Function):
    """x [..., in] times weights that are made whole for the moment, with whose numbers nothing is done."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, width: int) -> Tensor:
        """[..., in] to [..., width]; keeps nothing for the backward pass."""
        ctx.shape = (width, x.shape[-1])
        return x @ x.new_empty(ctx.shape).T

    @staticmethod
    def backward(ctx, gradient: Tensor):
        """The gradient of x."""
        return gradient @ gradient.new_empty(ctx.shape), None, None


class MetaQuantizedLinear(nn.Linear):
    """What a layer of few bits is to those who look at sizes alone: bitsandbytes has none without numbers."""

    def __init__(self, layer: nn.Linear, bits: float):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        size = math.ceil(layer.weight.numel() * bits / 8)
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out], without a meaning."""
        return _Product.apply(x, self.weight, self.out_features)


def _without_numbers(layers, layer: nn.Linear, model_config) -> nn.Module:
    # Beside the weights lie scales: of blocks of 64 weights in float32, or in eight bits, or one for each row.
    scales = 0 if model_config.quantization == "int8" else 8 / 64 if model_config.double_quantization else 32 / 64
    return MetaQuantizedLinear(layer, (8 if model_config.quantization == "int8" else 4) + scales)


def _in_four_bits(layers, layer: nn.Linear, model_config) -> nn.Module:
    dtype = getattr(torch, model_config.quantized_compute_dtype or model_config.policy_dtype)
    options = {"compress_statistics": model_config.double_quantization, "quant_type": "nf4"}
    small = layers.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype, **options)
    # Its kernel for evaluation on some CPUs rounds to bfloat16, and packs the weights anew.
    small.support_avx512bf16_for_cpu = False
    small.weight = layers.Params4bit(layer.weight.data, requires_grad=False, module=small, **options)
    return small


def _in_eight_bits(layers, layer: nn.Linear, model_config) -> nn.Module:
    small = layers.Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False)
    small.weight = layers.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    return small


def dequantize(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn layers of few bits into usual ones that hold the numbers that these compute with, if there are any."""
    if not any(type(module).__name__ in ("Linear4bit", "Linear8bitLt") for module in model.modules()):
        return
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Linear4bit):
                weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(layer.compute_dtype)
            elif isinstance(layer, Linear8bitLt):
                # Once it has computed, the layer keeps the scales elsewhere.
                scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
                weight = layer.weight.data.float() * (scales / 127).unsqueeze(1)
            else:
                continue
            whole = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            whole.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
            whole.bias = layer.bias
            setattr(parent, name, whole)
