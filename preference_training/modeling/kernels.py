"""The kernels that a model computes with: attention implementation, Liger kernels, compilation, activation checkpointing."""

import torch
from torch import nn

from preference_training.core.errors import UserError, first_line

# Architectures whose attention mask is computed from trained weights. For them sdpa chooses another kernel when gradients are
# needed, and policy and reference would differ in their last bits.
LEARNED_MASKS = ("doge",)


def choose_attention(model: nn.Module, name: str) -> None:
    """Set the attention implementation of a model.

    auto is the newest FlashAttention that is installed and supports the model and its dtype, else the model's default; eager
    for LEARNED_MASKS. Raises UserError where the implementation is not available.
    """
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if name == "auto" and model.config.model_type in LEARNED_MASKS:
        name = "eager"
    elif name == "auto":
        is_half = model.dtype in (torch.float16, torch.bfloat16)
        available = {"flash_attention_3": is_flash_attn_3_available, "flash_attention_2": is_flash_attn_2_available}
        name = next((name for name, is_available in available.items() if is_available()), None)
        if name is None or not (is_half and torch.cuda.is_available() and model._supports_flash_attn):
            return
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"model.attn_implementation: {type(model).__name__} cannot use {name} here: {first_line(error)}. Use auto, or "
            "install its dependencies."
        ) from error


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


def compile_between_attentions(model: nn.Module) -> None:
    """Compile the children of each block except its attention, whose shapes differ from batch to batch."""
    blocks = [item for module in model.modules() if isinstance(module, nn.ModuleList) for item in module]
    for block in blocks:
        for name, child in block.named_children():
            if "att" not in name:
                child.compile(dynamic=True)


def enable_activation_checkpointing(model: nn.Module) -> None:
    """Save only the inputs of blocks for the backward pass, which recomputes their activations."""
    # transformers renamed the method; the old name warns where both exist.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
