"""Adapters on disk, in peft's format: what one holds, its base model, loading and saving it."""

import copy
import json
import math
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from preference_training.configuration.sections import BASE_MODEL, ModelConfig
from preference_training.core.errors import UserError, first_line
from preference_training.modeling.adapters.weights import (
    INITIAL_ADAPTER,
    SUBTRACTED_ADAPTER,
    TRAINED_ADAPTER,
    adapter_shapes,
    adapter_weights,
)
from preference_training.modeling.archives import MODEL_CONFIG
from preference_training.modeling.value_head import VALUE_HEAD
from preference_training.tracking.run_files import read_run_info

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
# peft's name for what an adapter of a reward model does.
VALUE_TASK = "SEQ_CLS"
# The keys that name an adapter on disk.
ARCHIVE, REFERENCE_ARCHIVE = "model.archive", "model.reference_archive"
# Directory, in a run or an export, of the base model of an adapter where no other place has it unchanged.
BASE_DIR = "base"


def is_adapter(archive: str | None) -> bool:
    """Whether `model.archive` is a directory with an adapter and not a whole model."""
    return archive is not None and (Path(archive) / CONFIG_FILE).is_file()


def reference_adapter(model_config: ModelConfig) -> str | None:
    """The adapter with which the reference computes: that of model.reference_archive, else the one that training starts from.

    None where the reference is the model under the adapter, or has weights of its own.
    """
    archive = model_config.reference_archive or model_config.archive
    return archive if model_config.lora.r is not None and archive != BASE_MODEL and is_adapter(archive) else None


def adapter_keys(model_config: ModelConfig) -> dict[str, str]:
    """The adapters on disk that a configuration names, each with the key that names it."""
    found = {model_config.archive: ARCHIVE} if is_adapter(model_config.archive) else {}
    reference = reference_adapter(model_config)
    return found | ({reference: REFERENCE_ARCHIVE} if reference and reference not in found else {})


def save_adapter_config(model: nn.Module, folder: Path) -> None:
    """Write peft's adapter_config.json of the trained adapter."""
    config = copy.copy(model.peft_config[TRAINED_ADAPTER])
    head = [VALUE_HEAD] if config.task_type == VALUE_TASK else []
    config.modules_to_save = [*head, *(config.modules_to_save or [])] or None
    if SUBTRACTED_ADAPTER in model.peft_config:
        # Joined with what is subtracted, in twice the rank, at the same scale.
        config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2
        config.r *= 2
    config.save_pretrained(folder)


def is_value_adapter(archive: str | Path) -> bool:
    """Whether an adapter on disk is a reward model's. Raises UserError where it is damaged."""
    config = read_adapter_config(archive)
    return config.get("task_type") == VALUE_TASK and VALUE_HEAD in (config.get("modules_to_save") or ())


def base_archive(model_config: ModelConfig) -> Path | None:
    """The archive that the weights of the (base) model are read from; None where they come from `name_or_path` or from scratch.

    Raises UserError where `model.archive` is an adapter of another model than the configured one.
    """
    archive = model_config.archive
    if not is_adapter(archive):
        return archive and Path(archive)
    config = _validated_adapter_config(archive, model_config)
    base, configured = config.get("base_model_name_or_path"), model_config.name_or_path
    if base == configured or (base and configured and Path(base).absolute() == Path(configured).absolute()):
        return None
    if base is not None and Path(base).name == BASE_DIR and (saved := saved_base(archive)):
        return saved
    if base is None or not Path(base).exists():
        gone = ", which no longer exists" if base and Path(base).is_absolute() else ""
        raise UserError(
            f"model.archive: the adapter {archive} was trained on {base or 'a model from scratch'}{gone}, and "
            f"model.name_or_path is {configured}. Restore that model, or set base_model_name_or_path in the adapter's "
            f"{CONFIG_FILE} to its new location."
        )
    return Path(base)


def saved_base(archive: str | Path) -> Path | None:
    """The base model that a run or an export saved beside its adapter; both may have been moved together."""
    folder = Path(archive).resolve()
    return next((base for base in (folder / BASE_DIR, folder.parent / BASE_DIR) if (base / MODEL_CONFIG).is_file()), None)


def adapter_options(archive: str) -> dict:
    """The `model.lora` options of an adapter on disk, its own target modules included. Raises UserError if it is damaged."""
    config = read_adapter_config(archive)
    kind = {name: bool(config.get(name)) for name in ("use_dora", "use_rslora")}
    own = {"target_modules": None, "target_parameters": None, "layers": None, "init": "default"}
    own["modules_to_save"] = saved_modules(config) or None
    return {"r": config["r"], "alpha": config["lora_alpha"], **kind, **own}


def saved_modules(config: dict) -> list[str]:
    """The modules that an adapter's configuration has trained whole beside it, the value head aside."""
    return [name for name in config.get("modules_to_save") or () if name != VALUE_HEAD]


def read_adapter_config(archive: str | Path, key: str = ARCHIVE) -> dict:
    """The adapter_config.json of an adapter on disk. Raises UserError where it is damaged."""
    try:
        config = json.loads((Path(archive) / CONFIG_FILE).read_text())
        _ = config["r"], config["lora_alpha"], config["target_modules"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{key}: {archive}: its {CONFIG_FILE} is damaged. Expected a checkpoint of a run.") from error
    return config


def _validated_adapter_config(archive: str, model_config: ModelConfig) -> dict:
    """The adapter_config.json of an adapter. Raises UserError where it is damaged or differs from `model.lora`."""
    if model_config.lora.r is None:
        raise UserError(
            f"model.archive: {archive} is an adapter, and model.lora.r is not given. Add +adapter=lora (or qlora) to "
            "continue training it, or merge it first: python scripts/export.py CHECKPOINT --merge --to DIRECTORY"
        )
    config = read_adapter_config(archive)
    lora = model_config.lora
    kinds = [(name, False, True) for name in ("use_dora", "use_rslora") if getattr(lora, name) and not config.get(name)]
    for key, value, found in (("r", config["r"], lora.r), ("alpha", config["lora_alpha"], lora.alpha), *kinds):
        if value != found:
            raise UserError(f"model.lora.{key}: found {found}, expected {value}: the adapter {archive} was trained with that.")
    if bool(whole := saved_modules(config)) != bool(lora.modules_to_save):
        raise UserError(
            f"model.lora.modules_to_save: found {lora.modules_to_save}, expected {whole or 'null'}: the adapter {archive} was "
            "trained with that."
        )
    if lora.init != "default":
        raise UserError(f"model.lora.init: found {lora.init}, and training starts from the adapter {archive}.")
    if lora.layers is not None and lora.layers != (own := config.get("layers_to_transform")):
        raise UserError(f"model.lora.layers: found {lora.layers}, and the adapter {archive} has {own or 'all'}. Leave it null.")
    own = config.get("target_parameters") or []
    if lora.target_parameters is not None and sorted(lora.target_parameters) != sorted(own):
        raise UserError(
            f"model.lora.target_parameters: found {lora.target_parameters}, and the adapter {archive} has {own or 'none'}. "
            "Leave it null."
        )
    return config


def check_base_weights(archive: str, began_with: str, key: str = ARCHIVE) -> None:
    """Raise UserError where an adapter was trained on other base weights than those loaded; `began_with` is their hash.

    Adapters that other tools wrote record no hash, and pass.
    """
    before = read_run_info(Path(archive)).get("began_with")
    if isinstance(before, str) and before[:32] != began_with[:32]:
        raise UserError(
            f"{key}: the adapter {archive} was trained on other weights than those of the model as configured. Set "
            "the model, dtype and quantization of its run, and the same seed for a model from scratch."
        )


def check_adapter_shapes(archive: str, model: nn.Module, key: str = ARCHIVE) -> None:
    """Raise UserError where the names or shapes of an adapter's weights on disk are not those of the adapter in a model.

    key: the one that names it. Of model.reference_archive it is the frozen adapter.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(Path(archive) / WEIGHTS_FILE, framework="pt") as file:
            found = {_own_name(name): tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{key}: {archive}: its {WEIGHTS_FILE} cannot be read: {first_line(error)}.") from error
    adapter = INITIAL_ADAPTER if key == REFERENCE_ARCHIVE else TRAINED_ADAPTER
    expected = adapter_shapes(dict(model.named_parameters()), adapter)
    differing = [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
    if differing:
        raise UserError(
            f"{key}: the adapter {archive} does not fit {type(model).__name__} as configured; {len(differing)} tensors "
            f"differ, the first is {differing[0]}. Set the model and model.lora of its run."
        )


def _own_name(name: str) -> str:
    """The name of a weight of an adapter file as we write it; peft drops the end of DoRA's, and reads both."""
    return re.sub(r"(\.lora_magnitude_vector)$", r"\1.weight", name)


def _read_weights(archive: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {_own_name(name): weight for name, weight in load_file(Path(archive) / WEIGHTS_FILE).items()}


@torch.no_grad()
def load_adapter(archive: str, model: nn.Module) -> None:
    """Load the weights of an adapter on disk into a model's trained adapter."""
    _copy_adapter(archive, model, TRAINED_ADAPTER)


@torch.no_grad()
def set_initial_adapter(model: nn.Module, archive: str | None) -> None:
    """Have a loaded model compute in `reference_mode` with the adapter of an archive, or, for None, without any.

    A model is loaded as if training went on from its adapter, with a copy of it for the reference.
    """
    if archive is None:
        model.delete_adapter(INITIAL_ADAPTER)
        return
    _copy_adapter(archive, model, INITIAL_ADAPTER)


def _copy_adapter(archive: str, model: nn.Module, adapter: str) -> None:
    found = _read_weights(archive)
    for name, weight in adapter_weights(dict(model.named_parameters()), adapter).items():
        weight.copy_(found[name])
