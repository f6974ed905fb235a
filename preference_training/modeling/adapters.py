"""Small parts that are trained in place of all weights (LoRA), and frozen weights in four or eight bits under them (QLoRA).

An adapter lies inside the model that it changes, so that whatever serves a model serves this one. While it is switched off,
the model is the one that it began as: the reference then costs nothing. Where training starts from an adapter, a frozen copy
of that one is switched on in its place.
"""

import copy
import json
import re
import warnings
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from preference_training.core.errors import UserError, first_line
from preference_training.modeling.lora_targets import (
    adapted_modules,
    fused_experts,
    linear_layers,
    shorten_names,
    unsupported_layers,
)
from preference_training.modeling.quantization import INSTALL

# Names of the adapter that is trained, and of the frozen one that training starts from.
TRAINED_ADAPTER, INITIAL_ADAPTER = "default", "starting"
WEIGHTS_FILE, SETTINGS_FILE = "adapter_model.safetensors", "adapter_config.json"
# Dotted names in peft's files begin so.
PREFIX = "base_model.model."
# In a run directory, or an export: the model under an adapter, where nobody else keeps it as it was.
BASE_DIR = "base"


# ---- adapters -----------------------------------------------------------------------------------------------------------


def has_adapter(model: nn.Module) -> bool:
    """Whether a small part of the model is trained in place of its weights."""
    return hasattr(model, "peft_config")


def build_lora_config(model_config, model: nn.Module, unfit: Iterable[str]):
    """peft's LoraConfig of a `model` configuration for a model: all of the adapter's own, where training starts from one.

    unfit: the names of `unsupported_layers`, left out where no layers are named. Raises UserError where peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UserError(f"model.lora.r: an adapter needs the package peft. {INSTALL}") from error
    lora, archive = model_config.lora, model_config.archive
    targets = lora.target_modules
    targets = targets if targets is None or isinstance(targets, str) else list(targets)
    if is_adapter(archive):
        settings = _settings_of_archive(archive)
        settings.target_modules = settings.target_modules if targets is None else targets
        settings.lora_dropout = lora.dropout
        return settings
    settings = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, task_type="CAUSAL_LM")
    # The head is none of them: it is shared with the embedding in many models.
    settings.target_modules = "all-linear" if targets is None else targets
    if targets is None:
        settings.exclude_modules = shorten_names(unfit, model) or None
    return settings


def _settings_of_archive(archive: str):
    """peft's settings in an adapter's directory. Raises UserError for what cannot be trained on or merged here."""
    from peft import LoraConfig

    found = read_adapter_config(archive)
    try:
        settings = LoraConfig.from_peft_type(**found)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise UserError(f"model.archive: {archive}: its {SETTINGS_FILE} is damaged: {first_line(error)}.") from error
    foreign = [
        (settings.peft_type != "LORA", f"peft_type {settings.peft_type}"),
        (settings.modules_to_save, "modules_to_save"),
        (settings.bias != "none", f"bias {settings.bias!r}"),
        (settings.layer_replication, "layer_replication"),
        (not isinstance(settings.init_lora_weights, bool) and settings.init_lora_weights not in ("gaussian", "orthogonal"),
         f"init_lora_weights {settings.init_lora_weights!r}, which changes the weights under it"),
    ]  # fmt: skip
    for is_foreign, what in foreign:
        if is_foreign:
            raise UserError(f"model.archive: {archive}: an adapter with {what} is not supported. Expected plain LoRA.")
    settings.inference_mode = False
    return settings


def add_adapter(model: nn.Module, model_config, base: str | None = None) -> None:
    """Freeze a model and put an adapter of a `model` configuration into it; fresh, it changes nothing that the model says.

    Its weights are float32, whatever the model's are. Where training starts from an adapter, a frozen one comes beside it.
    base: where the model under it lies; None is where it came from. Raises UserError for layers that the model does not have,
    or on which an adapter could do nothing.
    """
    model.requires_grad_(False)
    starting = is_adapter(model_config.archive)
    base = base or _origin(model_config)
    unfit = unsupported_layers(model)
    settings = build_lora_config(model_config, model, unfit)
    for name in (TRAINED_ADAPTER, INITIAL_ADAPTER)[: 1 + starting]:
        own = copy.deepcopy(settings)
        if name == INITIAL_ADAPTER:
            own.lora_dropout = 0.0
        try:
            with warnings.catch_warnings():
                # That a head stays tied to an adapted embedding, and that Conv1D is transposed, is heeded here.
                warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
                warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
                # peft looks for its own patterns of fused experts among modules alone.
                warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
                model.add_adapter(own, name)
            own.base_model_name_or_path = base
        except ValueError as error:
            raise UserError(_no_such_layers(model, model_config, first_line(error))) from error
    useless = sorted({unfit[name] for name in unfit.keys() & adapted_modules(model)})
    if useless:
        raise UserError(_no_such_layers(model, model_config, "; ".join(useless)))
    model.set_adapter(TRAINED_ADAPTER)
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            weight.data = weight.data.float()


def _no_such_layers(model: nn.Module, model_config, reason: str) -> str:
    linear = sorted({name.rpartition(".")[2] for name in linear_layers(model)})
    return (
        f"model.lora.target_modules: found {model_config.lora.target_modules}: {reason}. Linear layers of "
        f"{type(model).__name__}: {', '.join(linear)}."
    )


def _origin(model_config) -> str | None:
    """Where the weights under an adapter come from: an absolute path, a hub id, or None for a model made from scratch."""
    archive = base_archive(model_config)
    if archive:
        return str(archive.resolve())
    name = model_config.name_or_path
    return str(Path(name).absolute()) if name and Path(name).is_dir() else name


# ---- which layers get one -------------------------------------------------------------------------------------------------


def describe_frozen_layers(model: nn.Module, model_config) -> list[str]:
    """What an adapter leaves frozen that its configuration seems to mean, in lines for the user."""
    adapted, lines = adapted_modules(model), []
    if model_config.lora.target_modules is None and not is_adapter(model_config.archive):
        reasons = unsupported_layers(model)
        left = [name for name in linear_layers(model) if name not in adapted]
        lines += sorted({f"adapter: none on some layers: {reasons[name]}" for name in left if name in reasons})
        passed = sorted({_place(name) for name in left if name not in reasons})
        if passed:
            lines.append(
                f"adapter: none on {', '.join(passed)}: of {model.config.model_type} peft takes the routed experts alone"
            )
    frozen = sorted({_place(name) for name in fused_experts(model) if not _under(name, adapted)})
    if frozen:
        lines.append(f"adapter: the routed experts of {type(model).__name__} stay frozen ({', '.join(frozen)})")
    return lines


def _under(name: str, adapted: set[str]) -> bool:
    return name in adapted or name.removesuffix(".base_layer") in adapted


def _place(name: str) -> str:
    """A module's name for all layers of the model."""
    return re.sub(r"\.\d+\.", ".*.", name)


# ---- weights of adapters ---------------------------------------------------------------------------------------------------


def adapter_weights(named_weights: dict[str, Tensor], adapter: str = TRAINED_ADAPTER) -> dict[str, Tensor]:
    """Those of a model's named weights that belong to an adapter, alive, by their names in peft's files."""
    part = re.compile(rf"(\.lora_\w+)\.{adapter}(?=\.|$)")
    return {PREFIX + part.sub(r"\1", name): weight for name, weight in named_weights.items() if part.search(name)}


def weights_to_save(named_weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint holds of a model's named weights: the adapter that is trained, or all where there is none."""
    return adapter_weights(named_weights) or named_weights


def initial_weights(named_weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The named weights that a model began with: those under its adapters, and those of the adapter it started from, if any."""
    under = {name.replace(".base_layer.", "."): weight for name, weight in named_weights.items() if ".lora_" not in name}
    return under, adapter_weights(named_weights, INITIAL_ADAPTER)


@contextmanager
def reference_mode(model: nn.Module):
    """Inside, a model computes as it did before its adapter was trained."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    starting = INITIAL_ADAPTER in model.peft_config
    # peft's own switches also change which weights are trained, and a graph may be waiting for its backward pass.
    for layer in layers:
        layer._disable_adapters = not starting
        layer._active_adapter = [INITIAL_ADAPTER] if starting else layer._active_adapter
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
            layer._active_adapter = [TRAINED_ADAPTER]


# ---- adapters on disk ---------------------------------------------------------------------------------------------------


def is_adapter(archive: str | None) -> bool:
    """Whether `model.archive` is a directory that holds an adapter in place of a whole model."""
    return archive is not None and (Path(archive) / SETTINGS_FILE).is_file()


def save_adapter_config(model: nn.Module, folder: Path) -> None:
    """Write the settings of the adapter that is trained, as peft reads them."""
    model.peft_config[TRAINED_ADAPTER].save_pretrained(folder)


def base_archive(model_config) -> Path | None:
    """The archive with the weights under the adapter, or with all; None where they are not an archive's.

    Raises UserError where `model.archive` is an adapter, and not one of the configured model.
    """
    archive = model_config.archive
    if not is_adapter(archive):
        return archive and Path(archive)
    settings = _checked_settings(archive, model_config)
    base, configured = settings.get("base_model_name_or_path"), model_config.name_or_path
    if base == configured or (base and configured and Path(base).absolute() == Path(configured).absolute()):
        return None
    kept = saved_base(archive) if base is not None and Path(base).name == BASE_DIR else None
    if kept is not None:
        return kept
    if base is None or not Path(base).exists():
        gone = ", which is not there any more" if base and Path(base).is_absolute() else ""
        raise UserError(
            f"model.archive: the adapter {archive} was trained on {base or 'a model from scratch'}{gone}, and "
            f"model.name_or_path is {configured}. Put that model where it was, or name another place of it as "
            f"base_model_name_or_path in the adapter's {SETTINGS_FILE}."
        )
    return Path(base)


def saved_base(archive: str | Path) -> Path | None:
    """The model under an adapter that its run, or its export, has kept beside it: it may have been moved with it."""
    place = Path(archive).resolve()
    return next((found for found in (place / BASE_DIR, place.parent / BASE_DIR) if (found / "config.json").is_file()), None)


def adapter_options(archive: str) -> dict:
    """The `model.lora` of an adapter's directory; its layers are those of its file. Raises UserError where it is damaged."""
    settings = read_adapter_config(archive)
    return {"r": settings["r"], "alpha": settings["lora_alpha"], "target_modules": None}


def read_adapter_config(archive: str | Path) -> dict:
    """peft's settings in an adapter's directory, as they lie there. Raises UserError where they are damaged."""
    try:
        settings = json.loads((Path(archive) / SETTINGS_FILE).read_text())
        _ = settings["r"], settings["lora_alpha"], settings["target_modules"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"model.archive: {archive}: its {SETTINGS_FILE} is damaged. Expected a checkpoint of a run.") from error
    return settings


def _checked_settings(archive: str, model_config) -> dict:
    """peft's settings of an adapter. Raises UserError where they are damaged, or are not the configured ones."""
    if model_config.lora.r is None:
        raise UserError(
            f"model.archive: {archive} is an adapter, and model.lora.r is not given. Add +adapter=lora (or qlora) to train it "
            "on, or make a whole model of it first: python scripts/export.py CHECKPOINT --merge --to DIRECTORY"
        )
    settings = read_adapter_config(archive)
    for key, value in {"r": settings["r"], "alpha": settings["lora_alpha"]}.items():
        if value != model_config.lora[key]:
            raise UserError(
                f"model.lora.{key}: found {model_config.lora[key]}, but the adapter {archive} was trained with {value}. Give "
                "it the same."
            )
    return settings


def check_base_weights(archive: str, began_with: str) -> None:
    """Raise UserError where an adapter was trained on other weights than those loaded, whose hash begins `began_with`.

    Of an adapter that no run of this project has written, nothing is known.
    """
    try:
        before = json.loads((Path(archive) / "state.json").read_text())["run"]["began_with"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return
    if before is not None and before[:32] != began_with[:32]:
        raise UserError(
            f"model.archive: the adapter {archive} was trained on other weights than those of the model as configured. Give "
            "the model, dtype and quantization of its run, and the same seed for a model from scratch."
        )


def check_adapter_shapes(archive: str, model: nn.Module) -> None:
    """Raise UserError where an adapter's weights are not those that a model has a place for."""
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
            f"differ, as {differing[0]}. Give the model and model.lora of its run."
        )


@torch.no_grad()
def load_adapter(archive: str, model: nn.Module) -> None:
    """Fill a model's adapters with that of an archive: the one that is trained, and the frozen one beside it."""
    from safetensors.torch import load_file

    found = load_file(Path(archive) / WEIGHTS_FILE)
    for adapter in (TRAINED_ADAPTER, INITIAL_ADAPTER):
        for name, weight in adapter_weights(dict(model.named_parameters()), adapter).items():
            weight.copy_(found[name])


# ---- few bits -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def merge_adapter(model: nn.Module, dtype: torch.dtype) -> None:
    """Add the adapter that is trained to the weights under it, in float32, rounded once to a dtype, and take it out.

    Layers without an adapter stay as they are. A head that is tied to an adapted embedding, or the reverse, becomes a weight of
    its own: training has changed one of the two. Raises UserError where layers of the architecture share a weight, and the
    adapter changes it for each of them.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    _untie(model)
    adapted = _outermost_adapted(model)
    _refuse_shared(model, adapted)
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
    left = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if left:
        raise RuntimeError(f"{left[0]} could not be merged")
    del model.peft_config
    model._hf_peft_config_loaded = False


def _outermost_adapted(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with an adapter, by their names; of one within another the one around it, which merges both."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    inner = {name for name in adapted if name.rpartition(".")[0] in adapted or name.endswith(".base_layer")}
    return {name: module for name, module in adapted.items() if name not in inner}


def _refuse_shared(model: nn.Module, adapted: dict[str, nn.Module]) -> None:
    owners: dict[nn.Parameter, str] = {}
    for name, layer in adapted.items():
        for weight in layer.get_base_layer().parameters(recurse=False):
            if (other := owners.setdefault(weight, name)) != name:
                raise UserError(
                    f"--merge: in {type(model).__name__} {other} and {name} share their weights, and the adapter changes each "
                    "by its own: no whole model of this architecture says what they say. Export without --merge."
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
