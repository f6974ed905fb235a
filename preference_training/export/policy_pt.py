"""A policy.pt, of the original DPO code or of this one, as a directory that AutoModelForCausalLM loads."""

from dataclasses import replace
from pathlib import Path

import torch

from preference_training.checkpointing.model_files import save_tokenizer
from preference_training.checkpointing.saved_models import compare_parts, fits_in_memory, probe_logps_in_float32
from preference_training.configuration.composition import compose_overrides, group_choices
from preference_training.configuration.saved import model_config
from preference_training.configuration.sections import ModelConfig
from preference_training.core.errors import UserError, nearest
from preference_training.core.files import check_destination, load_tensors
from preference_training.export.directory import new_directory, save_weights
from preference_training.export.verification import compare_exported, refuse_other_model
from preference_training.modeling import loading
from preference_training.modeling.tokenizer import load_tokenizer
from preference_training.reporting.model_card import CardFacts, model_card


def convert(archive: Path, name: str, to: Path, dtype: str | None = None) -> list[str]:
    """Write the weights of a policy.pt as a directory; returns the lines to print.

    name: a preset of config/model/, or a model's path or hub id, that the weights belong to. Raises UserError.
    """
    check_destination(to)
    if not archive.is_file():
        raise UserError(f"{archive}: no such file. Expected a policy.pt.")
    config = _model_config(name, archive)
    # Presets of pretrained models leave it to the device that trains.
    config = replace(config, policy_dtype=dtype or config.policy_dtype or "float32")
    tokenizer = load_tokenizer(config)
    loading.check_model(config, tokenizer)
    with new_directory(to) as partial, refuse_other_model(to):
        model = loading.load_model(config, tokenizer)
        parameters = _write_model(model, partial, tokenizer, config.policy_dtype)
        facts = CardFacts(
            name=to.resolve().name,
            architecture=type(model).__name__,
            dtype=config.policy_dtype,
            parameters=parameters,
            config=None,
            base=config.name_or_path,
            notes=["Converted from a single weights file, which does not record the training data or the configuration."],
            **_progress(archive),
        )
        (partial / "README.md").write_text(model_card(facts), encoding="utf-8")
    return [facts.summary(to)]


def _model_config(name: str, archive: Path) -> ModelConfig:
    """The `model` configuration of a preset, or of a model's path or hub id, that loads an archive's weights."""
    presets = group_choices("model")
    if name not in presets and "/" not in name and not Path(name).is_dir():
        raise UserError(f"--model: no preset {name!r}, and no directory; {nearest(name, presets)}")
    if name in presets:
        return model_config(compose_overrides(f"model={name}")[0].model, archive=str(archive))
    return model_config({}, name_or_path=name, archive=str(archive))


def _write_model(model, directory: Path, tokenizer, dtype: str) -> int:
    """Write a model and its tokenizer, and compare what was written; returns its number of parameters."""
    compares_logps = fits_in_memory(sum(weight.numel() for weight in model.parameters()))
    expected = probe_logps_in_float32(model, getattr(torch, dtype)) if compares_logps else None
    parameters = save_weights(model, directory, tokenizer)
    save_tokenizer(tokenizer, directory)
    if expected is not None:
        compare_exported(directory, expected, dtype)
    else:
        compare_parts(directory, model)
    return parameters


def _progress(archive: Path) -> dict:
    """The number of examples that an archive's weights were trained on, if it says so, and its numeric metrics."""
    content = load_tensors(archive, mapped=True)
    step, metrics = content.get("step_idx"), content.get("metrics")
    items = metrics.items() if isinstance(metrics, dict) else ()
    held_out = {str(name): float(value) for name, value in items if isinstance(value, float | int)}
    return {"examples": step if isinstance(step, int) else None, "held_out": held_out}
