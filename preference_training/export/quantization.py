"""Weight-only quantization of an exported model's linear layers: int8 with torchao, int4 with AutoRound.

int8: one scale a row, rounded to nearest. int4: groups of 128 weights with a scale each, whose rounding is learned block by
block on rows of the run (Cheng et al. 2024, "Optimize Weight Rounding via Signed Gradient Descent", SignRound), in the format
W4A16 of compressed-tensors, which plain transformers and vLLM load. Head and embedding stay as they are.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from preference_training.core.errors import UserError, nearest
from preference_training.export.directory import SHARD_SIZE
from preference_training.modeling.archives import MODEL_CONFIG
from preference_training.modeling.experts.routers import num_experts

# Not torchao's int4: its packings are for GPUs only, so that no CPU can write or read it.
QUANTIZATIONS = ("int8", "int4")
# The packages of int4, as they are imported, and what installs them.
INT4_PACKAGES, INT4_INSTALL = ("auto_round", "compressed_tensors"), "pip install -r requirements/int4.txt"
# Weights with one scale, where the sizes of all layers are multiples of it; else the next.
GROUP_SIZES = (128, 64, 32)
# Calibration: windows of training rows, their tokens, and steps for the rounding of each block, on a GPU and on a CPU.
WINDOWS, WINDOW, STEPS, CPU_STEPS = 128, 512, 200, 50


def check_quantization(name: str) -> None:
    """Raise UserError for an unknown format, and where its package is missing."""
    if name not in QUANTIZATIONS:
        also = " gptq and awq are not written; int4 is as small, and vLLM reads it." if name in ("gptq", "awq") else ""
        raise UserError(f"--quantize: no format {name!r}; {nearest(name, QUANTIZATIONS)}{also}")
    if name == "int8":
        quantization_config(name)
        return
    try:
        for package in INT4_PACKAGES:
            import_module(package)
    except ImportError as error:
        raise UserError(
            f"--quantize: int4 needs the packages auto-round and compressed-tensors ({error}). Run: {INT4_INSTALL}"
        ) from error


def quantization_config(name: str):
    """The transformers configuration of int8. Raises UserError without the package torchao."""
    from transformers import TorchAoConfig

    try:
        from torchao.quantization import Int8WeightOnlyConfig
    except ImportError as error:
        raise UserError(
            "--quantize: the package torchao is missing, or does not match this version of torch. Run: "
            "pip install -r requirements/export.txt"
        ) from error
    return TorchAoConfig(Int8WeightOnlyConfig())


def quantize_weights(
    directory: Path,
    name: str,
    dtype: str,
    tokenizer=None,
    windows: Sequence[Tensor] = (),
    trust_remote_code: bool = False,
) -> None:
    """Replace a directory's weights by quantized ones. windows: calibration rows of int4, token ids [1, length] each."""
    from transformers import AutoModelForCausalLM

    options: dict = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code}
    if name == "int4":
        _quantize_int4(AutoModelForCausalLM.from_pretrained(directory, **options), directory, tokenizer, windows)
        return
    options["quantization_config"] = quantization_config(name)
    model = AutoModelForCausalLM.from_pretrained(directory, **options)
    _remove_weights(directory)
    model.save_pretrained(directory, max_shard_size=SHARD_SIZE)


def _remove_weights(directory: Path) -> None:
    for file in directory.glob("model*.safetensors*"):
        file.unlink()


def group_size(model: nn.Module) -> int:
    """How many weights share a scale in int4. Raises UserError for a model whose layers have no such groups."""
    if num_experts(model.config) is not None:
        raise UserError("--quantize: int4 is not written for mixtures of experts. Use int8, or serve bfloat16.")
    head = model.get_output_embeddings()
    sizes = {layer.in_features for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not head}
    for size in GROUP_SIZES:
        if sizes and not any(number % size for number in sizes):
            return size
    raise UserError(
        f"--quantize: int4 needs linear layers whose inputs are multiples of {GROUP_SIZES[-1]}, found {sorted(sizes)}. Use "
        "int8."
    )


def _quantize_int4(model: nn.Module, directory: Path, tokenizer, windows: Sequence[Tensor]) -> None:
    """Replace the weights of the directory that a model is from by quantized ones."""
    from auto_round import AutoRound

    logging.getLogger("autoround").setLevel(logging.ERROR)
    on_gpu = torch.cuda.is_available()
    options = {
        "bits": 4,
        "group_size": group_size(model),
        "sym": True,
        "iters": STEPS if on_gpu else CPU_STEPS,
        "nsamples": len(windows),
        "seqlen": windows[0].shape[1],
        "batch_size": min(8, len(windows)),
        "dataset": [{"input_ids": window} for window in windows],
        "device_map": "cuda" if on_gpu else "cpu",
    }
    with tempfile.TemporaryDirectory(dir=directory) as name:
        AutoRound(model, tokenizer, **options).quantize_and_save(name, format="llm_compressor")
        # It adds a folder of its own.
        [written] = [path.parent for path in Path(name).rglob(MODEL_CONFIG)]
        config, own = (json.loads((path / MODEL_CONFIG).read_text(encoding="utf-8")) for path in (written, directory))
        _remove_weights(directory)
        for file in written.glob("model*.safetensors*"):
            shutil.move(file, directory / file.name)
    own["quantization_config"] = config["quantization_config"]
    (directory / MODEL_CONFIG).write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
