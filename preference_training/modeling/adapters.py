"""LoRA adapters: add one to a model, load, save, switch and merge it.

An adapter is injected into the model's own modules, so whatever serves a model serves one with an adapter. With its adapter
switched off the model is the one that training started from: the reference then needs no memory of its own. Where training
starts from an adapter, a frozen copy of that adapter is switched on for the reference.
"""

import copy
import json
import re
import warnings
from collections.abc import Iterable
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from preference_training.configuration.sections import BASE_MODEL, ModelConfig
from preference_training.core.errors import UserError, first_line
from preference_training.modeling.archives import MODEL_CONFIG
from preference_training.modeling.lora_targets import (
    adapted_modules,
    fused_experts,
    linear_layers,
    shorten_names,
    unsupported_layers,
)
from preference_training.modeling.quantization import INSTALL
from preference_training.modeling.value_head import VALUE_HEAD, has_value_head, is_head_weight, output_head
from preference_training.tracking.run_files import read_run_info

# peft's names of the adapter that is trained, and of the frozen one that training started from.
TRAINED_ADAPTER, INITIAL_ADAPTER = "default", "starting"
WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
# Prefix of all weight names in peft's files.
PREFIX = "base_model.model."
# peft's name for what an adapter of a reward model does.
VALUE_TASK = "SEQ_CLS"
# Directory, in a run or an export, of the base model of an adapter where no other place has it unchanged.
BASE_DIR = "base"


# ---- add ----------------------------------------------------------------------------------------------------------------


def has_adapter(model: nn.Module) -> bool:
    """Whether a model has LoRA adapters."""
    return hasattr(model, "peft_config")


def build_lora_config(model_config: ModelConfig, model: nn.Module, unsupported: Iterable[str]):
    """peft's LoraConfig for a model, from a `model` configuration or from the adapter that training starts from.

    unsupported: names of layers to exclude where `lora.target_modules` names none.
    """
    from peft import LoraConfig

    lora, archive = model_config.lora, model_config.archive
    targets = lora.target_modules
    if is_adapter(archive):
        config = _load_lora_config(archive)
        config.target_modules = config.target_modules if targets is None else targets
        config.lora_dropout = lora.dropout
        return config
    task = VALUE_TASK if model_config.head == "value" else "CAUSAL_LM"
    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, task_type=task)
    # peft's "all-linear" excludes the head, which many models tie to the embedding.
    config.target_modules = "all-linear" if targets is None else targets
    if targets is None:
        config.exclude_modules = shorten_names(unsupported, model) or None
    return config


def _load_lora_config(archive: str):
    """peft's LoraConfig of an adapter on disk. Raises UserError for a kind that cannot be trained or merged here."""
    from peft import LoraConfig

    try:
        config = LoraConfig.from_peft_type(**read_adapter_config(archive))
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise UserError(f"model.archive: {archive}: its {CONFIG_FILE} is damaged: {first_line(error)}.") from error
    unsupported = [
        (config.peft_type != "LORA", f"peft_type {config.peft_type}"),
        (config.modules_to_save and not is_value_adapter(archive), "modules_to_save"),
        (config.bias != "none", f"bias {config.bias!r}"),
        (config.layer_replication, "layer_replication"),
        (not isinstance(config.init_lora_weights, bool) and config.init_lora_weights not in ("gaussian", "orthogonal"),
         f"init_lora_weights {config.init_lora_weights!r}, which changes the base weights"),
    ]  # fmt: skip
    for is_unsupported, feature in unsupported:
        if is_unsupported:
            raise UserError(f"model.archive: {archive}: an adapter with {feature} is not supported. Expected plain LoRA.")
    # The head is trained in place.
    config.inference_mode, config.modules_to_save = False, None
    return config


def add_adapter(model: nn.Module, model_config: ModelConfig, base: str | None = None) -> None:
    """Freeze a model and add the adapter of a `model` configuration; a new adapter leaves the model's outputs unchanged.

    Adapter weights are float32 whatever the model's dtype; so is a value head, which is trained itself. Where the reference has
    an adapter (`reference_adapter`), a frozen one for it is added beside the trained one. base: the location of the base model;
    None is where it was loaded from. Raises UserError for target modules that the model does not have, or on which an adapter
    would have no effect.
    """
    if find_spec("peft") is None:
        raise UserError(f"model.lora.r: an adapter needs the package peft. {INSTALL}")
    model.requires_grad_(False)
    has_initial = reference_adapter(model_config) is not None
    base = base or _base_location(model_config)
    unsupported = unsupported_layers(model)
    config = build_lora_config(model_config, model, unsupported)
    for name in (TRAINED_ADAPTER, INITIAL_ADAPTER)[: 1 + has_initial]:
        own = copy.deepcopy(config)
        if name == INITIAL_ADAPTER:
            own.lora_dropout = 0.0
        try:
            with warnings.catch_warnings():
                # Tied heads and transposed Conv1D layers are handled by `merge_adapter`.
                warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
                warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
                # peft matches its own patterns of fused experts against modules only.
                warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
                model.add_adapter(own, name)
            own.base_model_name_or_path = base
        except ValueError as error:
            raise _target_error(model, model_config, first_line(error)) from error
    if has_value_head(model) and VALUE_HEAD in adapted_modules(model):
        raise _target_error(model, model_config, f"{VALUE_HEAD}, the value head, is trained itself")
    if reasons := sorted({unsupported[name] for name in unsupported.keys() & adapted_modules(model)}):
        raise _target_error(model, model_config, "; ".join(reasons))
    model.set_adapter(TRAINED_ADAPTER)
    for name, weight in model.named_parameters():
        if ".lora_" in name or (has_value_head(model) and is_head_weight(name)):
            weight.data = weight.data.float()
    if has_value_head(model):
        output_head(model).requires_grad_(True)


def _target_error(model: nn.Module, model_config: ModelConfig, reason: str) -> UserError:
    linear = sorted({name.rpartition(".")[2] for name in linear_layers(model)})
    return UserError(
        f"model.lora.target_modules: found {model_config.lora.target_modules}: {reason}. Linear layers of "
        f"{type(model).__name__}: {', '.join(linear)}."
    )


def _base_location(model_config: ModelConfig) -> str | None:
    """Where the base model is loaded from: an absolute path, a hub id, or None for a model built from scratch."""
    archive = base_archive(model_config)
    if archive:
        return str(archive.resolve())
    name = model_config.name_or_path
    return str(Path(name).absolute()) if name and Path(name).is_dir() else name


def describe_frozen_layers(model: nn.Module, model_config: ModelConfig) -> list[str]:
    """Lines for the user: the layers that an adapter leaves frozen although its configuration seems to include them."""
    adapted, lines = adapted_modules(model), []
    if model_config.lora.target_modules is None and not is_adapter(model_config.archive):
        reasons = unsupported_layers(model)
        frozen = [name for name in linear_layers(model) if name not in adapted]
        lines += sorted({f"adapter: some layers stay frozen: {reasons[name]}" for name in frozen if name in reasons})
        if skipped := sorted({_pattern(name) for name in frozen if name not in reasons}):
            lines.append(
                f"adapter: {', '.join(skipped)} stay frozen: for {model.config.model_type} peft adapts the routed experts only"
            )
    experts = [name for name in fused_experts(model) if not {name, name.removesuffix(".base_layer")} & adapted]
    if frozen := sorted({_pattern(name) for name in experts}):
        lines.append(f"adapter: the routed experts of {type(model).__name__} stay frozen ({', '.join(frozen)})")
    return lines


def _pattern(name: str) -> str:
    """A module's name with a * for the number of its block."""
    return re.sub(r"\.\d+\.", ".*.", name)


# ---- weights --------------------------------------------------------------------------------------------------------------


def adapter_weights(named_weights: dict[str, Tensor], adapter: str = TRAINED_ADAPTER) -> dict[str, Tensor]:
    """The weights of an adapter among a model's named weights, not copied, by their names in peft's files.

    With the trained adapter goes a value head, which is trained beside it.
    """
    part = re.compile(rf"(\.lora_\w+)\.{adapter}(?=\.|$)")
    found = {PREFIX + part.sub(r"\1", name): weight for name, weight in named_weights.items() if part.search(name)}
    if found and adapter == TRAINED_ADAPTER:
        found |= {PREFIX + name: weight for name, weight in named_weights.items() if is_head_weight(name)}
    return found


def weights_to_save(named_weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The named weights that a checkpoint holds: those of the trained adapter, or all where there is no adapter."""
    return adapter_weights(named_weights) or named_weights


def initial_weights(named_weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The named weights that training started from: those of the base model, and those of the initial adapter, if any.

    A value head that is trained beside an adapter belongs to neither.
    """
    adapted = any(".lora_" in name for name in named_weights)
    base = {
        name.replace(".base_layer.", "."): weight
        for name, weight in named_weights.items()
        if ".lora_" not in name and not (adapted and is_head_weight(name))
    }
    return base, adapter_weights(named_weights, INITIAL_ADAPTER)


@contextmanager
def reference_mode(model: nn.Module):
    """Context in which a model with an adapter computes as its reference: as it did before training."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    has_initial = INITIAL_ADAPTER in model.peft_config
    # peft's own switches also change requires_grad, and a graph may still be waiting for its backward pass.
    for layer in layers:
        layer._disable_adapters = not has_initial
        layer._active_adapter = [INITIAL_ADAPTER] if has_initial else layer._active_adapter
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
            layer._active_adapter = [TRAINED_ADAPTER]


# ---- load and save --------------------------------------------------------------------------------------------------------


def is_adapter(archive: str | None) -> bool:
    """Whether `model.archive` is a directory with an adapter and not a whole model."""
    return archive is not None and (Path(archive) / CONFIG_FILE).is_file()


def reference_adapter(model_config: ModelConfig) -> str | None:
    """The adapter with which the reference computes: that of model.reference_archive, else the one that training starts from.

    None where the reference is the model under the adapter, or has weights of its own.
    """
    archive = model_config.reference_archive or model_config.archive
    return archive if model_config.lora.r is not None and archive != BASE_MODEL and is_adapter(archive) else None


def save_adapter_config(model: nn.Module, folder: Path) -> None:
    """Write peft's adapter_config.json of the trained adapter."""
    config = copy.copy(model.peft_config[TRAINED_ADAPTER])
    config.modules_to_save = [VALUE_HEAD] if config.task_type == VALUE_TASK else None
    config.save_pretrained(folder)


def is_value_adapter(archive: str | Path) -> bool:
    """Whether an adapter on disk is a reward model's. Raises UserError where it is damaged."""
    config = read_adapter_config(archive)
    return config.get("task_type") == VALUE_TASK and config.get("modules_to_save") == [VALUE_HEAD]


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
    return {"r": config["r"], "alpha": config["lora_alpha"], "target_modules": None}


def read_adapter_config(archive: str | Path) -> dict:
    """The adapter_config.json of an adapter on disk. Raises UserError where it is damaged."""
    try:
        config = json.loads((Path(archive) / CONFIG_FILE).read_text())
        _ = config["r"], config["lora_alpha"], config["target_modules"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"model.archive: {archive}: its {CONFIG_FILE} is damaged. Expected a checkpoint of a run.") from error
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
    for key, value, found in (("r", config["r"], lora.r), ("alpha", config["lora_alpha"], lora.alpha)):
        if value != found:
            raise UserError(f"model.lora.{key}: found {found}, expected {value}: the adapter {archive} was trained with that.")
    return config


def check_base_weights(archive: str, began_with: str) -> None:
    """Raise UserError where an adapter was trained on other base weights than those loaded; `began_with` is their hash.

    Adapters that other tools wrote record no hash, and pass.
    """
    before = read_run_info(Path(archive)).get("began_with")
    if isinstance(before, str) and before[:32] != began_with[:32]:
        raise UserError(
            f"model.archive: the adapter {archive} was trained on other weights than those of the model as configured. Set "
            "the model, dtype and quantization of its run, and the same seed for a model from scratch."
        )


def check_adapter_shapes(archive: str, model: nn.Module) -> None:
    """Raise UserError where the names or shapes of an adapter's weights on disk are not those of the adapter in a model."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(Path(archive) / WEIGHTS_FILE, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"model.archive: {archive}: its {WEIGHTS_FILE} cannot be read: {first_line(error)}.") from error
    expected = {name: tuple(weight.shape) for name, weight in adapter_weights(dict(model.named_parameters())).items()}
    differing = [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
    if differing:
        raise UserError(
            f"model.archive: the adapter {archive} does not fit {type(model).__name__} as configured; {len(differing)} tensors "
            f"differ, the first is {differing[0]}. Set the model and model.lora of its run."
        )


@torch.no_grad()
def load_adapter(archive: str, model: nn.Module) -> None:
    """Load the weights of an adapter on disk into a model's adapters: the trained one and its frozen copy."""
    from safetensors.torch import load_file

    found = load_file(Path(archive) / WEIGHTS_FILE)
    for adapter in (TRAINED_ADAPTER, INITIAL_ADAPTER):
        for name, weight in adapter_weights(dict(model.named_parameters()), adapter).items():
            weight.copy_(found[name])


@torch.no_grad()
def set_initial_adapter(model: nn.Module, archive: str | None) -> None:
    """Have a loaded model compute in `reference_mode` with the adapter of an archive, or, for None, without any.

    A model is loaded as if training went on from its adapter, with a copy of it for the reference.
    """
    from safetensors.torch import load_file

    if archive is None:
        model.delete_adapter(INITIAL_ADAPTER)
        return
    found = load_file(Path(archive) / WEIGHTS_FILE)
    for name, weight in adapter_weights(dict(model.named_parameters()), INITIAL_ADAPTER).items():
        weight.copy_(found[name])


# ---- merge ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def merge_adapter(model: nn.Module, dtype: torch.dtype) -> None:
    """Merge the trained adapter into the base weights, in float32, rounded once to `dtype`, and remove it.

    Layers without an adapter stay as they are. A head and an embedding that were tied are untied where either has an adapter,
    because training has changed only one of them. Raises UserError where several adapted layers share one base weight.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    _untie(model)
    adapted = _outermost_adapted(model)
    _refuse_shared_weights(model, adapted)
    for name, layer in adapted.items():
        parent, _, leaf = name.rpartition(".")
        base = layer.get_base_layer()
        for weight in base.parameters(recurse=False):
            weight.data = weight.data.float()
        if hasattr(layer, "unload_and_optionally_merge_module"):
            base = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=[TRAINED_ADAPTER])
        else:
            layer.merge(adapter_names=[TRAINED_ADAPTER])
        setattr(model.get_submodule(parent), leaf, base)
        for weight in base.parameters(recurse=False):
            weight.data = weight.data.to(dtype)
    remaining = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if remaining:
        raise RuntimeError(f"{remaining[0]} could not be merged")
    del model.peft_config
    model._hf_peft_config_loaded = False


def _outermost_adapted(model: nn.Module) -> dict[str, nn.Module]:
    """The adapted layers by name; of nested ones only the outer layer, which merges both."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    inner = {name for name in adapted if name.rpartition(".")[0] in adapted or name.endswith(".base_layer")}
    return {name: module for name, module in adapted.items() if name not in inner}


def _refuse_shared_weights(model: nn.Module, adapted: dict[str, nn.Module]) -> None:
    owners: dict[nn.Parameter, str] = {}
    for name, layer in adapted.items():
        for weight in layer.get_base_layer().parameters(recurse=False):
            if (other := owners.setdefault(weight, name)) != name:
                raise UserError(
                    f"--merge: in {type(model).__name__} {other} and {name} share their weights, and the adapter changes "
                    "each differently, so no merged model of this architecture is equivalent. Export without --merge."
                )


def _untie(model: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not any(isinstance(layer, BaseTunerLayer) for layer in (head, embedding)):
        return
    head = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
    embedding = embedding.get_base_layer() if isinstance(embedding, BaseTunerLayer) else embedding
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.data.clone(), requires_grad=False)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
