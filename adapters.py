"""Small parts that are trained in place of all weights (LoRA), and frozen weights in four or eight bits under them (QLoRA).

An adapter lies inside the model that it changes, so that whatever serves a model serves this one. While it is switched off,
the model is the one that it began as: the reference then costs nothing. Where training starts from an adapter, a frozen copy
of that one is switched on in its place.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from utils import UserError, first_line

# Names of the adapter that is trained, and of the frozen one that training starts from.
TRAINED, STARTING = "default", "starting"
WEIGHTS_FILE, SETTINGS_FILE = "adapter_model.safetensors", "adapter_config.json"
# Dotted names in peft's files begin so.
PREFIX = "base_model.model."
INSTALL = "Install what adapters need: pip install -r requirements-lora.txt"


# ---- adapters -----------------------------------------------------------------------------------------------------------


def has_adapter(model: nn.Module) -> bool:
    """Whether a small part of the model is trained in place of its weights."""
    return hasattr(model, "peft_config")


def settings_of(model_config):
    """peft's LoraConfig of a `model` configuration. Raises UserError where peft is not installed."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UserError(f"model.lora.r: an adapter needs the package peft. {INSTALL}") from error
    lora = model_config.lora
    targets = lora.target_modules
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        # The head is none of them: it is shared with the embedding in many models.
        target_modules="all-linear" if targets is None else targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )


def add_adapter(model: nn.Module, model_config, starting: bool = False) -> None:
    """Freeze a model and put an adapter of a `model` configuration into it; fresh, it changes nothing that the model says.

    Its weights are float32, whatever the model's are. starting: a second, frozen one beside it, to be filled with what
    training starts from. Raises UserError for layers that the model does not have.
    """
    model.requires_grad_(False)
    linear = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
    for name in (TRAINED, STARTING)[: 1 + starting]:
        settings = settings_of(model_config)
        if name == STARTING:
            settings.lora_dropout = 0.0
        try:
            model.add_adapter(settings, name)
        except ValueError as error:
            asked = model_config.lora.target_modules
            raise UserError(
                f"model.lora.target_modules: found {asked}: {first_line(error)}. Linear layers of {type(model).__name__}: "
                f"{', '.join(linear)}."
            ) from error
    model.set_adapter(TRAINED)
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            weight.data = weight.data.float()


def adapter_weights(named_weights: dict[str, Tensor], adapter: str = TRAINED) -> dict[str, Tensor]:
    """Those of a model's named weights that belong to an adapter, alive, by their names in peft's files."""
    part = re.compile(rf"(\.lora_\w+)\.{adapter}(?=\.|$)")
    return {PREFIX + part.sub(r"\1", name): weight for name, weight in named_weights.items() if part.search(name)}


def kept_weights(named_weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint holds of a model's named weights: the adapter that is trained, or all where there is none."""
    return adapter_weights(named_weights) or named_weights


def began_as(named_weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of a model without what the adapter that is trained has added to it."""
    for name, weight in named_weights.items():
        if f".{TRAINED}." not in name:
            yield name.replace(".base_layer.", "."), weight


@contextmanager
def as_it_began(model: nn.Module):
    """Inside, a model computes as it did before its adapter was trained."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    starting = STARTING in model.peft_config
    # peft's own switches also change which weights are trained, and a graph may be waiting for its backward pass.
    for layer in layers:
        layer._disable_adapters = not starting
        layer._active_adapter = [STARTING] if starting else layer._active_adapter
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
            layer._active_adapter = [TRAINED]


# ---- adapters on disk ---------------------------------------------------------------------------------------------------


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter in place of a whole model."""
    return (path / SETTINGS_FILE).is_file()


def read_settings(path: Path) -> dict:
    """An adapter's settings as its directory has them. Raises UserError where they are damaged."""
    try:
        settings = json.loads((path / SETTINGS_FILE).read_text())
        return {"r": settings["r"], "alpha": settings["lora_alpha"], "target_modules": settings["target_modules"]}
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"model.archive: {path}: its {SETTINGS_FILE} is damaged. Expected a checkpoint of a run.") from error


def read_adapter(path: Path, model: nn.Module) -> None:
    """Fill a model's adapters with those of a directory, the trained one and the frozen one alike.

    Raises UserError where it does not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise UserError(f"model.archive: {path}: its {WEIGHTS_FILE} cannot be read: {first_line(error)}.") from error
    for name in model.peft_config:
        expected = adapter_weights(dict(model.named_parameters()), name)
        shapes = {key: list(weight.shape) for key, weight in expected.items()}
        if shapes != {key: list(weight.shape) for key, weight in found.items()}:
            differing = sorted(shapes.keys() ^ found.keys()) or ["their shapes"]
            raise UserError(
                f"model.archive: {path}: this adapter does not fit {type(model).__name__} as configured; they differ in "
                f"{', '.join(differing[:3])}. Give the model and model.lora of the run that it comes from."
            )
        with torch.no_grad():
            for key, weight in expected.items():
                weight.copy_(found[key])


def check_settings(path: Path, model_config) -> None:
    """Raise UserError where an adapter's directory and the `model` configuration that is to train it on do not agree."""
    if model_config.lora.r is None:
        raise UserError(
            f"model.archive: {path} is an adapter, and model.lora.r is not given. Add +adapter=lora (or qlora) to train it on, "
            "or make a whole model of it: python scripts/export.py CHECKPOINT --merge --to DIRECTORY"
        )
    before, asked = read_settings(path), model_config.lora
    for key in ("r", "alpha"):
        if before[key] != asked[key]:
            raise UserError(
                f"model.lora.{key}: found {asked[key]}, but the adapter {path} was trained with {before[key]}. Give it the same."
            )


# ---- few bits -------------------------------------------------------------------------------------------------------------


def quantise(model: nn.Module, model_config) -> None:
    """Turn a model's linear layers, but for its head, into four bits (nf4) or eight (int8), frozen; on the CPU.

    Four bits are NormalFloat4 in blocks of 64, whose scales are quantised again with `double_quantization` (Dettmers et al.
    2023, section 3). Raises UserError where bitsandbytes is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(f"model.quantization: it needs the package bitsandbytes. {INSTALL}") from error
    head = model.get_output_embeddings()
    make = _in_four_bits if model_config.quantization == "nf4" else _in_eight_bits
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and layer is not head:
                small = make(bitsandbytes.nn, layer, model_config)
                small.bias = layer.bias
                # Moved, it is quantised.
                setattr(parent, name, small.to(layer.weight.device))
    model.requires_grad_(False)


def _in_four_bits(layers, layer: nn.Linear, model_config) -> nn.Module:
    dtype = getattr(torch, model_config.quantized_compute_dtype or model_config.policy_dtype)
    options = {"compress_statistics": model_config.double_quantization, "quant_type": "nf4"}
    small = layers.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype, **options)
    small.weight = layers.Params4bit(layer.weight.data, requires_grad=False, module=small, **options)
    return small


def _in_eight_bits(layers, layer: nn.Linear, model_config) -> nn.Module:
    small = layers.Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False)
    small.weight = layers.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    return small


def restore_bits(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn layers of few bits into usual ones that hold the same numbers."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Linear4bit):
                weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            elif isinstance(layer, Linear8bitLt):
                weight = layer.weight.data.float() * (layer.weight.SCB / 127).unsqueeze(1)
            else:
                continue
            whole = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            whole.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
            whole.bias = layer.bias
            setattr(parent, name, whole)


def merge(model: nn.Module) -> None:
    """Add the adapter that is trained to the weights under it, in their dtype, and take it out."""
    from peft.tuners.lora import Linear

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Linear):
                layer.merge(adapter_names=[TRAINED])
                setattr(parent, name, layer.get_base_layer())
    del model.peft_config
    model._hf_peft_config_loaded = False
