"""Whether an exported directory is the run's model: plain transformers (and peft) load it, and its log-probs match."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from preference_training.checkpointing.saved_models import (
    DifferentModelError,
    compare,
    compute_in_float32,
    fits_in_memory,
    largest_difference,
    load_plain,
    probe_logps,
    probe_logps_in_float32,
    tolerance,
)
from preference_training.core.errors import UserError
from preference_training.export.source import Source
from preference_training.modeling import loading
from preference_training.modeling.adapters.files import BASE_DIR
from preference_training.modeling.quantization import dequantize, quantize


@contextmanager
def refuse_other_model(path: Path) -> Iterator[None]:
    """Turn the finding that a directory holds another model than the run's into a UserError."""
    try:
        yield
    except DifferentModelError as error:
        raise UserError(
            f"--to: {path}: the exported model is not the run's: {error}. It was removed; the checkpoint is unchanged. "
            "Export without --merge or --quantize, or with the library versions of the run."
        ) from error


def merge_and_round(model, source: Source, dtype: str) -> tuple[Tensor | None, list[str]]:
    """Merge a model's adapter and cast its weights to a dtype, in place; returns its float32 log-probs, and notes.

    No log-probs (None) where memory does not hold the model in float32.
    """
    target = getattr(torch, dtype)
    if not fits_in_memory(sum(weight.numel() for weight in model.parameters())):
        loading.merge_and_cast(model, target) if source.is_adapter else loading.cast_weights(model, target)
        return None, ["not enough memory to compare log-probs: compared names, shapes, values and configuration"]
    stored, notes = getattr(torch, source.dtype), []
    if source.config["model"].get("quantization") and source.is_adapter:
        notes += _dequantize(model, source)
    before = probe_logps(compute_in_float32(model))
    if source.is_adapter:
        loading.merge_and_cast(model, torch.float32)
        merged = probe_logps(model)
        compare(merged, before, model, tolerance(before, model))
        stored, before = torch.float32, merged
    loading.cast_weights(model, target)
    expected = probe_logps_in_float32(model, target)
    if target != stored and (difference := largest_difference(expected, before, model)):
        notes.append(f"rounding the weights to {dtype} changes log-probs by up to {difference:.2g} nats per token")
    return expected, notes


def _dequantize(model, source: Source) -> list[str]:
    """Replace a model's quantized linear layers by ordinary ones and compare log-probs; returns notes."""
    config, model.autocast_dtype = source.config["model"], None
    before = probe_logps(model)
    dequantize(model, getattr(torch, config["policy_dtype"]))
    after = probe_logps(model)
    if config["quantization"] == "int8":
        # These layers also round their inputs, which ordinary weights cannot reproduce.
        difference = largest_difference(after, before, model)
        return [f"merged layers no longer round their inputs to int8: up to {difference:.2g} nats per token"]
    dtype = getattr(torch, config.get("quantized_compute_dtype") or config["policy_dtype"])
    compare(after, before, model, tolerance(before, model, dtype))
    return []


def compare_exported(directory: Path, expected: Tensor, dtype: str, trust_remote_code: bool = False) -> None:
    """Compare the model that others load from a directory with expected log-probs. Raises DifferentModelError."""
    model = load_plain(directory, getattr(torch, dtype), trust_remote_code)
    compare(probe_logps(compute_in_float32(model)), expected, model, tolerance(expected, model))


def quantization_error(directory: Path, expected: Tensor, dtype: str, trust_remote_code: bool = False) -> float:
    """How far a quantized directory's log-probs are from the expected ones, at most. Unit: nats per token."""
    model = load_plain(directory, getattr(torch, dtype), trust_remote_code)
    return largest_difference(probe_logps(model), expected, model)


def compare_adapter(source: Source, directory: Path, dtype: str) -> list[str]:
    """Compare an adapter, as plain peft loads it, with the run's model; returns notes. Raises DifferentModelError."""
    config, model = source.model_config(), source.load_model()
    if not fits_in_memory(2 * sum(weight.numel() for weight in model.parameters())):
        return ["not enough memory to compare log-probs with the run's"]
    expected = probe_logps(compute_in_float32(model))
    del model
    prepare = (lambda model: quantize(model, config)) if config.quantization else None
    base = directory / BASE_DIR if (directory / BASE_DIR).is_dir() else None
    exported = load_plain(directory, getattr(torch, dtype), source.trust_remote_code, source.cache_dir, base, prepare)
    compare(probe_logps(compute_in_float32(exported)), expected, exported, tolerance(expected, exported))
    return []
