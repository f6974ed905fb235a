"""The kernels that a model computes with: attention implementation, Liger kernels, compilation, activation checkpointing."""

from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from preference_training.core.errors import UserError, first_line

# Architectures whose attention mask is computed from trained weights. For them sdpa chooses another kernel when gradients are
# needed, and policy and reference would differ in their last bits.
LEARNED_MASKS = ("doge",)


def choose_attention(model: nn.Module, name: str) -> None:
    """Set the attention implementation of a model.

    auto is the newest FlashAttention that is installed and supports the model and its dtype, else the model's default; eager
    for LEARNED_MASKS, and where the default would leave out a soft-cap. Raises UserError where the implementation is not
    available.
    """
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if name == "auto" and model.config.model_type in LEARNED_MASKS:
        name = "eager"
    elif name == "auto":
        is_half = model.dtype in (torch.float16, torch.bfloat16)
        available = {"flash_attention_3": is_flash_attn_3_available, "flash_attention_2": is_flash_attn_2_available}
        name = next((name for name, is_available in available.items() if is_available()), None)
        if name is None or not (is_half and torch.cuda.is_available() and model._supports_flash_attn):
            if not lacks_soft_cap(model):
                return
            name = "eager"
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"model.attn_implementation: {type(model).__name__} cannot use {name} here: {first_line(error)}. Use auto, or "
            "install its dependencies."
        ) from error


def lacks_soft_cap(model: nn.Module) -> bool:
    """Whether a model would compute its attention without its soft-cap: by default Gemma 2 does in transformers 5.17."""
    return getattr(model.config, "attn_logit_softcapping", None) is not None and model.config._attn_implementation == "sdpa"


def refuse_kernels(config) -> None:
    """Raise ValueError where a configuration names an attention kernel that transformers would fetch from the hub and run."""
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        attention = getattr(part, "_attn_implementation", None)
        if isinstance(attention, str) and "/" in attention:
            raise ValueError(f"its config.json asks for the code of {attention}")


def use_liger_kernels(model: nn.Module) -> None:
    """Replace a model's norms, rotary embeddings and MLPs by Liger kernels. Raises UserError where they are not available."""
    if not torch.cuda.is_available():
        raise UserError("model.liger_kernels: found true, but there is no GPU here. Set it to false.")
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError as error:
        raise UserError("model.liger_kernels: install the package: pip install -r requirements/gpu.txt") from error
    # Liger's fused losses would replace the head, which scores responses here.
    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
    model.has_liger_kernels = True


# Compiled code is one operation to selective checkpointing, which keeps its results; else it would be computed again.
VISIBLE_REGIONS = {"wrap_inductor_compiled_regions": True}


def compile_between_attentions(model: nn.Module, backend: str = "inductor") -> None:
    """Compile the children of each block except its attention, whose shapes differ from batch to batch; norms beside it too."""
    options = {"options": VISIBLE_REGIONS} if backend == "inductor" else {}
    # Modules of all classes count together, in training and evaluation, with gradients and without: beyond the usual 8
    # torch would compute without compiled code, and policy and reference would differ in their last bits.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    blocks = [item for module in model.modules() if isinstance(module, nn.ModuleList) for item in module]
    for block in blocks:
        for name, child in block.named_children():
            if "att" not in name or "norm" in name:
                child.compile(dynamic=True, backend=backend, **options)


# ---- activation checkpointing -----------------------------------------------------------------------------------------------

# What selective checkpointing keeps: the results of matrix products and of attention, by the names of torch's operations. Not
# those of grouped experts, to which transformers adds biases in place: they are computed again.
KEPT_OPERATIONS = (
    "mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "convolution",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
)  # fmt: skip
# Of operations that hold others: FlexAttention as it is, and a region that inductor has compiled, FlexAttention on a GPU.
KEPT_REGIONS = ("flex_attention", "inductor_compiled_code")


def enable_activation_checkpointing(model: nn.Module, kind: bool | str = True) -> None:
    """Save less of a forward pass for the backward pass, which computes the rest again.

    True saves only the inputs of blocks. "selective" also saves what takes long to compute, and computes norms, activations and
    rotary embeddings again. The numbers are those without it.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _checkpoint_policy)
    # transformers renamed the method; the old name warns where both exist.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


@cache
def _kept() -> frozenset:
    found = {getattr(torch.ops.aten, name).default for name in KEPT_OPERATIONS if hasattr(torch.ops.aten, name)}
    return frozenset(found | {getattr(torch.ops.higher_order, name) for name in KEPT_REGIONS})


def _checkpoint_policy(_context, operation, *_, **__) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _kept() else CheckpointPolicy.PREFER_RECOMPUTE
