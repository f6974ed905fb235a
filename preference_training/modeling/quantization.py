"""Linear layers in few bits: frozen base weights in four or eight for LoRA adapters (QLoRA), and products in FP8."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from preference_training.configuration.sections import ModelConfig
from preference_training.core.errors import UserError
from preference_training.modeling.value_head import output_head

INSTALL = "Install the dependencies of adapters: pip install -r requirements/lora.txt"


def import_bitsandbytes(key: str):
    """Import bitsandbytes. Raises UserError, naming the `key` that needs it, where it is not installed."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(f"{key}: needs the package bitsandbytes. {INSTALL}") from error
    return bitsandbytes


def quantize(model: nn.Module, model_config: ModelConfig) -> None:
    """Replace a model's linear layers, except its head, by frozen ones in four (nf4) or eight bits (int8); on CPU or meta.

    nf4 is NormalFloat4 in blocks of 64 weights, whose scales are quantized too with `double_quantization` (Dettmers et al.
    2023, section 3). Raises UserError where bitsandbytes is not installed.
    """
    bitsandbytes = import_bitsandbytes("model.quantization")
    head = output_head(model)
    make = _nf4_linear if model_config.quantization == "nf4" else _int8_linear
    if head.weight.is_meta:
        make = _meta_linear
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and layer is not head:
                quantized = make(bitsandbytes.nn, layer, model_config)
                quantized.bias = layer.bias
                # bitsandbytes quantizes when a layer is moved.
                setattr(parent, name, quantized.to(layer.weight.device))
    model.requires_grad_(False)


# ---- products in FP8 ------------------------------------------------------------------------------------------------------

# The oldest NVIDIA GPUs that multiply FP8 matrices: RTX 40, L4, H100.
FP8_CAPABILITY = (8, 9)
# Sizes that are multiples of this are what the kernels take.
FP8_MULTIPLE = 16
# Layers that choose experts: small, and a rounded score chooses another one.
ROUTERS = ("gate", "router", "shared_expert_gate")


def check_float8() -> None:
    """Raise UserError where model.fp8 cannot work: a GPU without FP8, or no torchao."""
    if torch.cuda.is_available() and (found := torch.cuda.get_device_capability()) < FP8_CAPABILITY:
        raise UserError(
            f"model.fp8: {torch.cuda.get_device_name()} has compute capability {'.'.join(map(str, found))}, and FP8 needs 8.9. "
            "Set it to false; bf16=true computes in bfloat16."
        )
    _import_float8()


def _import_float8():
    try:
        from torchao import float8
    except ImportError as error:
        raise UserError("model.fp8: needs the package torchao. Run: pip install -r requirements/fp8.txt") from error
    return float8


def use_float8(model: nn.Module) -> int:
    """Let a model's linear layers multiply in FP8, in place, weights unchanged; returns how many do.

    All three products of a layer (output, gradients of input and weight) have one scale for each row (torchao's recipe
    `rowwise`), so that what a token is rounded to does not depend on what else is in its pack. The head, routers, and layers
    whose sizes are no multiples of 16 stay as they are. Emulated without a GPU.
    """
    float8 = _import_float8()
    head = output_head(model)
    config = float8.Float8LinearConfig.from_recipe_name("rowwise")
    config = replace(config, emulate=not torch.cuda.is_available(), pad_inner_dim=True)

    def is_fit(layer: nn.Module, name: str) -> bool:
        sizes = (layer.in_features, layer.out_features)
        return layer is not head and name.split(".")[-1] not in ROUTERS and not any(size % FP8_MULTIPLE for size in sizes)

    # Its own log line counts no layers.
    float8.convert_to_float8_training(model, module_filter_fn=is_fit, config=config)
    return sum(type(module).__name__ == "Float8Linear" for module in model.modules())


# ---- layers in few bits ---------------------------------------------------------------------------------------------------


class _DequantizedMatmul(torch.autograd.Function):
    """x [..., in] times weights that are dequantized for the moment: memory as in a real layer, values undefined."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, width: int) -> Tensor:
        """[..., in] to [..., width]; saves no tensor for the backward pass."""
        ctx.shape = (width, x.shape[-1])
        return x @ x.new_empty(ctx.shape).T

    @staticmethod
    def backward(ctx, gradient: Tensor):
        """The gradient of x."""
        return gradient @ gradient.new_empty(ctx.shape), None, None


class MetaQuantizedLinear(nn.Linear):
    """Stands for a quantized linear layer on the meta device, which bitsandbytes does not support; only sizes are right."""

    def __init__(self, layer: nn.Linear, bits: float):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        size = math.ceil(layer.weight.numel() * bits / 8)
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out], with undefined values."""
        return _DequantizedMatmul.apply(x, self.weight, self.out_features)


def _meta_linear(layers, layer: nn.Linear, model_config: ModelConfig) -> nn.Module:
    # Bits that scales add to a weight: nf4 has one scale for 64 weights, in float32 or eight bits; int8 has only one a row.
    scales = 0 if model_config.quantization == "int8" else 8 / 64 if model_config.double_quantization else 32 / 64
    return MetaQuantizedLinear(layer, (8 if model_config.quantization == "int8" else 4) + scales)


def _nf4_linear(layers, layer: nn.Linear, model_config: ModelConfig) -> nn.Module:
    dtype = getattr(torch, model_config.quantized_compute_dtype or model_config.policy_dtype)
    options = {"compress_statistics": model_config.double_quantization, "quant_type": "nf4"}
    quantized = layers.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype, **options)
    # The evaluation kernel for some CPUs rounds to bfloat16 and repacks the weights.
    quantized.support_avx512bf16_for_cpu = False
    quantized.weight = layers.Params4bit(layer.weight.data, requires_grad=False, module=quantized, **options)
    return quantized


def _int8_linear(layers, layer: nn.Linear, model_config: ModelConfig) -> nn.Module:
    quantized = layers.Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False)
    quantized.weight = layers.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    return quantized


def dequantize(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace quantized linear layers, if any, by ordinary ones in `dtype` with the same effective weights."""
    if not any(type(module).__name__ in ("Linear4bit", "Linear8bitLt") for module in model.modules()):
        return
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Linear4bit):
                weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(layer.compute_dtype)
            elif isinstance(layer, Linear8bitLt):
                # After its first forward a layer keeps its scales in its state.
                scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
                weight = layer.weight.data.float() * (scales / 127).unsqueeze(1)
            else:
                continue
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
            linear.bias = layer.bias
            setattr(parent, name, linear)
