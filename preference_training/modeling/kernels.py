"""How a model computes: its attention implementation, Liger kernels, compilation and activation checkpointing."""

import torch
from torch import nn

from preference_training.core.errors import UserError, first_line

# Architectures whose attention has a mask made of trained weights. There sdpa takes another kernel where it needs gradients,
# and policy and reference would differ in their last bits.
TRAINED_MASKS = ("doge",)


def choose_attention(model: nn.Module, name: str) -> None:
    """Give a model the attention of a name; auto is the newest flash attention there is for its dtype, or what the model has.

    For auto, models of TRAINED_MASKS have eager attention. Raises UserError where the attention cannot be had.
    """
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if name == "auto" and model.config.model_type in TRAINED_MASKS:
        name = "eager"
    elif name == "auto":
        short = model.dtype in (torch.float16, torch.bfloat16)
        there = {"flash_attention_3": is_flash_attn_3_available, "flash_attention_2": is_flash_attn_2_available}
        name = next((name for name, is_there in there.items() if short and torch.cuda.is_available() and is_there()), None)
        if name is None or not model._supports_flash_attn:
            return
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"model.attn_implementation: {type(model).__name__} cannot have {name} here: {first_line(error)}. Use auto, or "
            "install what it needs."
        ) from error


def refuse_kernels(config) -> None:
    """Raise ValueError where a model's configuration names an attention that transformers would fetch from the hub and run."""
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        attention = getattr(part, "_attn_implementation", None)
        if isinstance(attention, str) and "/" in attention:
            raise ValueError(f"its config.json asks for the code of {attention}")


def use_liger_kernels(model: nn.Module) -> None:
    """Put Liger's kernels in place of a model's norms, rotary embeddings and MLPs. Raises UserError where that cannot be."""
    if not torch.cuda.is_available():
        raise UserError("model.liger_kernels: they are for GPUs, and there is none here. Set it to false.")
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError as error:
        raise UserError("model.liger_kernels: install the package: pip install -r requirements/gpu.txt") from error
    # The losses of its own would take the head's place, which scores responses here.
    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
    model.has_liger_kernels = True


def compile_between_attentions(model: nn.Module) -> None:
    """Compile the children of each block but for its attention, whose work has another shape in every batch."""
    blocks = [item for module in model.modules() if isinstance(module, nn.ModuleList) for item in module]
    for block in blocks:
        for name, child in block.named_children():
            if "att" not in name:
                child.compile(dynamic=True)


def enable_activation_checkpointing(model: nn.Module) -> None:
    """Keep only the blocks' inputs for the backward pass, and compute the rest again there."""
    # The method's name until transformers 5.22 or so; the older one then warns.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
