"""Add adapters to a model: freeze it, and inject the layers of a `model.lora` configuration."""

import copy
import re
import warnings
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from torch import nn

from preference_training.configuration.sections import ModelConfig
from preference_training.core.errors import UserError, first_line
from preference_training.modeling.adapters.files import (
    ARCHIVE,
    CONFIG_FILE,
    REFERENCE_ARCHIVE,
    VALUE_TASK,
    base_archive,
    is_adapter,
    read_adapter_config,
    reference_adapter,
)
from preference_training.modeling.adapters.starting import measure_lengths, subtract_start
from preference_training.modeling.adapters.targets import (
    adapted_modules,
    fused_experts,
    linear_layers,
    shorten_names,
    unsupported_layers,
)
from preference_training.modeling.adapters.weights import (
    INITIAL_ADAPTER,
    SUBTRACTED_ADAPTER,
    TRAINED_ADAPTER,
    is_added,
    name_pattern,
)
from preference_training.modeling.adapters.whole import describe_whole, train_whole, whole_modules
from preference_training.modeling.quantization import INSTALL
from preference_training.modeling.tuning.towers import towers
from preference_training.modeling.value_head import VALUE_HEAD, has_value_head, is_head_weight, output_head


def build_lora_config(model_config: ModelConfig, model: nn.Module, unsupported: Iterable[str]):
    """peft's LoraConfig for a model, from a `model` configuration or from the adapter that training starts from.

    unsupported: names of layers to exclude where `lora.target_modules` names none.
    """
    from peft import LoraConfig

    lora, archive = model_config.lora, model_config.archive
    targets = lora.target_modules
    whole = whole_modules(model, lora.modules_to_save) if lora.modules_to_save else None
    if is_adapter(archive):
        config = _load_lora_config(archive)
        config.modules_to_save = whole
        config.target_modules = config.target_modules if targets is None else targets
        config.lora_dropout = lora.dropout
        return config
    task = VALUE_TASK if model_config.head == "value" else "CAUSAL_LM"
    kind = {"use_dora": lora.use_dora, "use_rslora": lora.use_rslora, "layers_to_transform": lora.layers}
    kind["modules_to_save"] = whole
    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, task_type=task, **kind)
    config.target_parameters = lora.target_parameters and _known_parameters(lora.target_parameters, model)
    if lora.init in ("gaussian", "orthogonal"):
        config.init_lora_weights = lora.init
    # peft's "all-linear" excludes the head, which many models tie to the embedding.
    config.target_modules = targets or _default_targets(model_config, model)
    config.exclude_modules = _excluded_modules(model, unsupported if targets is None else ())
    return config


def _excluded_modules(model: nn.Module, unsupported: Iterable[str]) -> list[str] | str | None:
    """What peft shall not adapt: layers of these names, and towers that text does not reach, for which it takes a pattern."""
    names = shorten_names(unsupported, model)
    if not (beside := towers(model)):
        return names or None
    patterns = [*map(re.escape, names), *(re.escape(name) + r"(\..*)?" for name in beside)]
    return rf"(.*\.)?({'|'.join(patterns)})"


def _known_parameters(targets: list[str], model: nn.Module) -> list[str]:
    """The ends of names of weights, checked. Raises UserError for one that no weight has."""
    names = [name for name, _ in model.named_parameters()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            stacked = {name_pattern(name) for name, weight in model.named_parameters() if weight.ndim == 3}
            raise UserError(
                f"model.lora.target_parameters: found {target}, and no weight of {type(model).__name__} ends so. Stacked "
                f"weights of it: {', '.join(sorted(stacked)) or 'none'}."
            )
    return targets


def _default_targets(model_config: ModelConfig, model: nn.Module) -> str | list[str]:
    """Every linear layer but the head; with added tokens also the embedding and the head, which must learn of them."""
    if not model_config.added_tokens:
        return "all-linear" if model_config.lora.layers is None else _last_parts(linear_layers(model))
    ends = {id(model.get_input_embeddings()), id(output_head(model))}
    names = [name for name, module in model.named_modules() if id(module) in ends]
    return _last_parts([*linear_layers(model), *names])


def _load_lora_config(archive: str, key: str = ARCHIVE):
    """peft's LoraConfig of an adapter on disk. Raises UserError for a kind that cannot be trained or merged here."""
    from peft import LoraConfig

    try:
        config = LoraConfig.from_peft_type(**read_adapter_config(archive, key))
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise UserError(f"{key}: {archive}: its {CONFIG_FILE} is damaged: {first_line(error)}.") from error
    unsupported = [
        (config.peft_type != "LORA", f"peft_type {config.peft_type}"),
        (config.bias != "none", f"bias {config.bias!r}"),
        (config.layer_replication, "layer_replication"),
        (not isinstance(config.init_lora_weights, bool) and config.init_lora_weights not in ("gaussian", "orthogonal"),
         f"init_lora_weights {config.init_lora_weights!r}, which changes the base weights"),
    ]  # fmt: skip
    for is_unsupported, feature in unsupported:
        if is_unsupported:
            raise UserError(f"{key}: {archive}: an adapter with {feature} is not supported. Expected plain LoRA.")
    config.inference_mode = False
    return config


def add_adapter(model: nn.Module, model_config: ModelConfig, base: str | None = None) -> None:
    """Freeze a model and add the adapter of a `model` configuration; a new adapter leaves the model's outputs unchanged.

    Adapter weights are float32 whatever the model's dtype; so is a value head, which is trained itself. Where the reference has
    an adapter (`reference_adapter`), a frozen one with its own rank, scale and kind is added beside the trained one. base: the
    location of the base model; None is where it was loaded from. Raises UserError for target modules that the model does not
    have, or on which an adapter would have no effect.
    """
    if find_spec("peft") is None:
        raise UserError(f"model.lora.r: an adapter needs the package peft. {INSTALL}")
    model.requires_grad_(False)
    reference = reference_adapter(model_config)
    base = base or _base_location(model_config)
    unsupported = unsupported_layers(model)
    config = build_lora_config(model_config, model, unsupported)
    subtracts = model_config.lora.subtracts_start and not is_adapter(model_config.archive)
    frozen = [name for name, used in ((INITIAL_ADAPTER, reference), (SUBTRACTED_ADAPTER, subtracts)) if used]
    uses_dora = False
    for name in (TRAINED_ADAPTER, *frozen):
        own = copy.deepcopy(config)
        if name == INITIAL_ADAPTER and reference not in (None, model_config.archive):
            own = _load_lora_config(reference, REFERENCE_ARCHIVE)
            own.modules_to_save = config.modules_to_save
        uses_dora |= own.use_dora
        if name != TRAINED_ADAPTER:
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
    if reference is not None:
        _check_same_modules(model, reference)
    model.set_adapter(TRAINED_ADAPTER)
    train_whole(model, config.modules_to_save or [], [INITIAL_ADAPTER] * (reference is not None))
    for name, weight in model.named_parameters():
        if ".lora_" in name or (has_value_head(model) and is_head_weight(name)):
            weight.data = weight.data.float()
    if uses_dora:
        measure_lengths(model)
    if subtracts:
        subtract_start(model, model_config.lora.init)
    if has_value_head(model):
        output_head(model).requires_grad_(True)


def _check_same_modules(model: nn.Module, reference: str) -> None:
    """Raise UserError where the reference's adapter changes other modules than the trained one."""
    from peft.tuners.lora import LoraLayer

    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and (TRAINED_ADAPTER in layer.r) != (INITIAL_ADAPTER in layer.r):
            which = "does not adapt" if TRAINED_ADAPTER in layer.r else "adapts"
            raise UserError(
                f"model.reference_archive: the adapter {reference} {which} {name}, in which it differs from the one that is "
                "trained. Set model.lora.target_modules to those of its run."
            )


def _last_parts(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _target_error(model: nn.Module, model_config: ModelConfig, reason: str) -> UserError:
    linear = _last_parts(linear_layers(model))
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
        if skipped := sorted({name_pattern(name) for name in frozen if name not in reasons}):
            lines.append(
                f"adapter: {', '.join(skipped)} stay frozen: for {model.config.model_type} peft adapts the routed experts only"
            )
    lines += describe_whole(model)
    experts = [
        name for name in fused_experts(model) if not is_added(name) and not {name, name.removesuffix(".base_layer")} & adapted
    ]
    if frozen := sorted({name_pattern(name) for name in experts}):
        lines.append(
            f"adapter: the routed experts of {type(model).__name__} stay frozen ({', '.join(frozen)}); "
            "model.lora.target_parameters adapts their weights"
        )
    return lines
