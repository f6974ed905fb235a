"""Linear layers in few bits: frozen base weights in four or eight for LoRA adapters (QLoRA), and products in FP8."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from preference_training.configuration.sections import ModelConfig
from preference_training.core.errors import UserError
from preference_training.modeling.adapters.targets import fused_experts
from preference_training.modeling.adapters.weights import is_added, name_pattern
from preference_training.modeling.tuning.towers import towers
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
    2023, section 3). A Conv1D of transformers, whose weight is transposed, becomes the linear layer that computes the same.
    What text does not reach stays as it is. Raises UserError where bitsandbytes is not installed, and for a model without such
    layers.
    """
    from transformers.pytorch_utils import Conv1D

    bitsandbytes = import_bitsandbytes("model.quantization")
    head = output_head(model)
    make = _nf4_linear if model_config.quantization == "nf4" else _int8_linear
    if head.weight.is_meta:
        make = lambda _, layer, options: PackedLinear(layer, options)  # noqa: E731
    kept = {head, *(module for tower in towers(model).values() for module in tower.modules())}
    count = 0
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear | Conv1D) and layer not in kept:
                linear = _linear_of(layer) if isinstance(layer, Conv1D) else layer
                quantized = make(bitsandbytes.nn, linear, model_config)
                quantized.bias, quantized.was_transposed = layer.bias, linear is not layer
                # bitsandbytes quantizes when a layer is moved.
                setattr(parent, name, quantized.to(layer.weight.device))
                count += 1
    if not count:
        raise UserError(
            f"model.quantization: found {model_config.quantization}, and {type(model).__name__} has no linear layer to "
            "quantize. Set it to null: +adapter=lora trains an adapter on weights in policy_dtype."
        )
    model.requires_grad_(False)
    _release_files(model)


def _linear_of(layer: nn.Module) -> nn.Linear:
    """The linear layer that computes what a Conv1D computes."""
    width, out = layer.weight.shape
    linear = nn.Linear(width, out, device="meta")
    linear.weight, linear.bias = nn.Parameter(layer.weight.data.T.contiguous(), requires_grad=False), layer.bias
    return linear


def restore_transposed(model: nn.Module) -> None:
    """Turn linear layers that were a Conv1D before they were quantized, and are in full precision again, back into one."""
    from transformers.pytorch_utils import Conv1D

    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if getattr(linear, "was_transposed", False):
                layer = Conv1D(0, 0)
                layer.nx, layer.nf = linear.in_features, linear.out_features
                layer.weight = nn.Parameter(linear.weight.data.T.contiguous(), requires_grad=False)
                layer.bias = linear.bias
                setattr(parent, name, layer)


def describe_quantization(model: nn.Module, model_config: ModelConfig) -> list[str]:
    """Lines for the user: how many of a model's weights are quantized, and that stacked experts are not."""
    numels = {name: number for name, number in weight_numels(model).items() if not is_added(name)}
    kept = {name for name, weight in model.named_parameters() if weight.is_floating_point()}
    total, quantized = sum(numels.values()), sum(number for name, number in numels.items() if name not in kept)
    lines = [
        f"model.quantization: {quantized:,} of {total:,} weights ({quantized / total:.1%}) are quantized to "
        f"{model_config.quantization}: the linear layers but the head; all others stay in {model_config.policy_dtype}"
    ]
    stacked = [name.removesuffix(".base_layer") for name in fused_experts(model) if not is_added(name)]
    if stacked:
        number = sum(number for name, number in numels.items() if name.startswith(tuple(f"{each}." for each in stacked)))
        where = ", ".join(sorted({name_pattern(name) for name in stacked}))
        lines.append(
            f"model.quantization: the routed experts of {type(model).__name__} ({where}) are no linear layers, and their "
            f"{number:,} weights stay in {model_config.policy_dtype}"
        )
    return lines


def _release_files(model: nn.Module) -> None:
    """Copy the weights that were not quantized: one that still lies in a mapped file keeps all of its pages in memory."""
    for weight in model.parameters():
        if weight.is_floating_point() and not weight.is_meta:
            weight.data = weight.data.clone()


# ---- products in FP8 ------------------------------------------------------------------------------------------------------

# The oldest NVIDIA GPUs that multiply FP8 matrices: RTX 40, L4, H100.
FP8_CAPABILITY = (8, 9)
# Sizes that are multiples of this are what the kernels take.
FP8_MULTIPLE = 16
# Layers that choose experts: small, and a rounded score chooses another one.
ROUTERS = ("gate", "router", "shared_expert_gate")


def check_float8(model_config: ModelConfig) -> None:
    """Raise UserError where model.fp8 cannot work: products in another dtype, a GPU without FP8, or no torchao."""
    products = model_config.autocast_dtype or model_config.policy_dtype
    if products != "bfloat16":
        raise UserError(
            f"model.fp8: the products are {products}, expected bfloat16, which FP8 layers return. Set bf16=true, or "
            "model.autocast_dtype=bfloat16."
        )
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


def weight_numels(model: nn.Module) -> dict[str, int]:
    """How many numbers each of a model's weights stands for, by name; quantized ones are packed into fewer, or more, bytes."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and not layer.weight.is_floating_point()]
    packed = {id(layer.weight): layer.in_features * layer.out_features for layer in layers}
    return {name: packed.get(id(weight), weight.numel()) for name, weight in model.named_parameters()}


# ---- packed into bytes ------------------------------------------------------------------------------------------------------

# Kernels read vectors of 16 bytes.
ALIGNMENT = 16
# Of bitsandbytes: weights of nf4 that share a scale, and scales that share one of their own.
NF4_BLOCK, SCALE_BLOCK = 64, 256


class PackedLinear(nn.Linear):
    """A quantized linear layer whose weight is one vector of bytes (uint8): the quantized weights, then their scales.

    Such a vector can be cut anywhere, so FSDP shards and gathers it as any other weight. From the gathered bytes of nf4 a
    forward computes with bitsandbytes what the layer computes that they were packed from. On the meta device, and with fake
    tensors, only sizes are right.
    """

    def __init__(self, layer: nn.Linear, model_config: ModelConfig):
        """An empty layer on the meta device for a linear `layer` of any kind."""
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.sections = _sections(layer.out_features, layer.in_features, model_config)
        # That of the weights before they were quantized, and that of the products.
        self.weight_dtype = getattr(torch, model_config.policy_dtype)
        self.compute_dtype = getattr(torch, model_config.quantized_compute_dtype or model_config.policy_dtype)
        packed = torch.empty(_packed_size(self.sections), dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out], in the dtype of x."""
        if x.is_meta or isinstance(x, FakeTensor):
            return _DequantizedMatmul.apply(x, self.weight, self.out_features)
        import bitsandbytes

        parts = _parts(self.weight, self.sections)
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        state = self._nf4_state(parts, bitsandbytes.functional.QuantState)
        return bitsandbytes.matmul_4bit(x.to(self.compute_dtype), parts["weight"], quant_state=state, bias=bias).to(x.dtype)

    @property
    def W_q(self) -> Tensor:  # noqa: N802  peft's name
        """The packed weight, by whose name peft recognizes layers that it may ask to dequantize their weight."""
        return self.weight

    def dequantize(self) -> Tensor:
        """The weight that the layer multiplies by, [out, in]; values are undefined on meta and with fake tensors."""
        if self.weight.is_meta or isinstance(self.weight, FakeTensor):
            return self.weight.new_empty((self.out_features, self.in_features), dtype=self.weight_dtype)
        from bitsandbytes.functional import QuantState, dequantize_4bit

        parts = _parts(self.weight, self.sections)
        return dequantize_4bit(parts["weight"], self._nf4_state(parts, QuantState))

    def _nf4_state(self, parts: dict[str, Tensor], state_of):
        """bitsandbytes' QuantState, the class `state_of`, of the gathered parts."""
        nested = None
        if "nested_absmax" in parts:
            nested = state_of(parts["nested_absmax"], code=parts["nested_code"], blocksize=SCALE_BLOCK, dtype=torch.float32)
        options = {"blocksize": NF4_BLOCK, "quant_type": "nf4", "dtype": self.weight_dtype}
        shape = torch.Size((self.out_features, self.in_features))
        return state_of(parts["absmax"], shape, parts["code"], offset=parts.get("offset"), state2=nested, **options)


def _sections(out: int, width: int, model_config: ModelConfig) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors of a quantized weight [out, width] in the order in which they are packed: their dtypes and shapes."""
    numel, byte, single = out * width, torch.uint8, torch.float32
    if model_config.quantization == "int8":
        return {"weight": (torch.int8, (out, width)), "scales": (single, (out,))}
    blocks = math.ceil(numel / NF4_BLOCK)
    packed = {"weight": (byte, (math.ceil(numel / 2), 1)), "code": (single, (16,))}
    if not model_config.double_quantization:
        return packed | {"absmax": (single, (blocks,))}
    scales = {"absmax": (byte, (blocks,)), "nested_absmax": (single, (math.ceil(blocks / SCALE_BLOCK),))}
    return packed | scales | {"nested_code": (single, (256,)), "offset": (single, ())}


def _padded_size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.ceil(math.prod(shape) * dtype.itemsize / ALIGNMENT) * ALIGNMENT


def _packed_size(sections: dict) -> int:
    """The bytes of a packed weight."""
    return sum(_padded_size(*section) for section in sections.values())


def _parts(packed: Tensor, sections: dict) -> dict[str, Tensor]:
    """Views of the tensors in a packed weight, uint8 [bytes]."""
    parts, start = {}, 0
    for name, (dtype, shape) in sections.items():
        part = packed[start : start + math.prod(shape) * dtype.itemsize]
        parts[name] = part.view(dtype).view(shape)
        start += _padded_size(dtype, shape)
    return parts


def packed_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model, in which the weights of nf4 layers of bitsandbytes, if any, are those of a `PackedLinear`."""
    state = model.state_dict()
    for name, layer in model.named_modules():
        if type(layer).__name__ == "Linear4bit":
            weight = f"{name}.weight"
            for key in [key for key in state if key.startswith(f"{weight}.")]:
                del state[key]
            state[weight] = _pack(layer.weight)
    return state


def _pack(weight: Tensor) -> Tensor:
    """The packed form of a Params4bit, uint8 [bytes]."""
    state, nested = weight.quant_state, weight.quant_state.state2
    found = {"weight": weight.data, "code": state.code, "absmax": state.absmax}
    if nested is not None:
        found |= {"nested_absmax": nested.absmax, "nested_code": nested.code, "offset": state.offset}
    sections = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()}
    packed = torch.zeros(_packed_size(sections), dtype=torch.uint8)
    for name, part in _parts(packed, sections).items():
        part.copy_(found[name])
    return packed


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
    """Replace quantized linear layers, if any, by ordinary ones in `dtype` with the same effective weights.

    Those of a Conv1D become linear too, which is what an adapter on them expects; `restore_transposed` follows a merge.
    """
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
            linear.bias, linear.was_transposed = layer.bias, getattr(layer, "was_transposed", False)
            setattr(parent, name, linear)
