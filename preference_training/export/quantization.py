"""Weight-only quantization of an exported model's linear layers, with torchao."""

from pathlib import Path

import torch

from preference_training.core.errors import UserError, nearest
from preference_training.export.directory import SHARD_SIZE

# Not int4: torchao packs it with GPU kernels only, so that no CPU can write or read it.
QUANTIZATIONS = ("int8",)


def quantization_config(name: str):
    """The transformers configuration of a weight-only quantization. Raises UserError without the package torchao."""
    from transformers import TorchAoConfig

    if name not in QUANTIZATIONS:
        raise UserError(f"--quantize: no format {name!r}; {nearest(name, QUANTIZATIONS)}")
    try:
        from torchao.quantization import Int8WeightOnlyConfig
    except ImportError as error:
        raise UserError(
            "--quantize: the package torchao is missing, or does not match this version of torch. Run: "
            "pip install -r requirements/export.txt"
        ) from error
    return TorchAoConfig(Int8WeightOnlyConfig())


def quantize_weights(directory: Path, name: str, dtype: str) -> None:
    """Replace a directory's weights by quantized ones."""
    from transformers import AutoModelForCausalLM

    config = quantization_config(name)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype), quantization_config=config)
    for file in directory.glob("model*.safetensors*"):
        file.unlink()
    model.save_pretrained(directory, max_shard_size=SHARD_SIZE)
