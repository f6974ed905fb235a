"""Small parts that are trained in place of all weights (LoRA), and frozen weights in four or eight bits under them (QLoRA).

An adapter lies inside the model that it changes, so that whatever serves a model serves this one. While it is switched off,
the model is the one that it began as: the reference then costs nothing. Where training starts from an adapter, a frozen copy
of that one is switched on in its place.
"""

import copy
import inspect
import json
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from preference_training.core.errors import UserError, first_line
from preference_training.modeling.archives import MODEL_CONFIG
from preference_training.tracking.run_files import run_of

# Names of the adapter that is trained, and of the frozen one that training starts from.
TRAINED, STARTING = "default", "starting"
WEIGHTS_FILE, SETTINGS_FILE = "adapter_model.safetensors", "adapter_config.json"
# Dotted names in peft's files begin so.
PREFIX = "base_model.model."
# In a run directory, or an export: the model under an adapter, where nobody else keeps it as it was.
BASE_DIR = "base"
INSTALL = "Install what adapters need: pip install -r requirements/lora.txt"


# ---- adapters -----------------------------------------------------------------------------------------------------------


def has_adapter(model: nn.Module) -> bool:
    """Whether a small part of the model is trained in place of its weights."""
    return hasattr(model, "peft_config")


def settings_of(model_config, model: nn.Module, unfit: Iterable[str]):
    """peft's LoraConfig of a `model` configuration for a model: all of the adapter's own, where training starts from one.

    unfit: the names of `unfit_layers`, left out where no layers are named. Raises UserError where peft is not installed.
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
        settings.exclude_modules = _shortened(unfit, model) or None
    return settings


def _settings_of_archive(archive: str):
    """peft's settings in an adapter's directory. Raises UserError for what cannot be trained on or merged here."""
    from peft import LoraConfig

    found = settings_of_file(archive)
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
    unfit = unfit_layers(model)
    settings = settings_of(model_config, model, unfit)
    for name in (TRAINED, STARTING)[: 1 + starting]:
        own = copy.deepcopy(settings)
        if name == STARTING:
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
    useless = sorted({unfit[name] for name in unfit.keys() & _adapted(model)})
    if useless:
        raise UserError(_no_such_layers(model, model_config, "; ".join(useless)))
    model.set_adapter(TRAINED)
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


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a model but for its head, by name; transformers' Conv1D is one too. Those under adapters too."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and ".lora_" not in name
    }


def unfit_layers(model: nn.Module) -> dict[str, str]:
    """The linear layers on which an adapter could do nothing, or would break the model: name → why."""
    reasons = {}
    for name, layer in linear_layers(model).items():
        parent, _, leaf = name.rpartition(".")
        parent_class = type(model.get_submodule(parent))
        if _refused_by_peft(model, leaf):
            reasons[name] = f"peft refuses {leaf} for {model.config.model_type}"
        elif _is_read_past(parent_class, leaf):
            reasons[name] = f"{parent_class.__name__} reads the weight of {leaf} itself, past an adapter"
        elif not _gives_a_tensor(layer):
            reasons[name] = f"{leaf} gives more than one tensor ({type(layer).__name__})"
    return reasons


def _refused_by_peft(model: nn.Module, leaf: str) -> bool:
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    check = getattr(LoraModel, "_check_target_module_compatiblity", None)
    try:
        if check is not None:
            check(None, LoraConfig(), model, leaf)
    except ValueError:
        return True
    return False


@cache
def _is_read_past(parent: type, leaf: str) -> bool:
    """Whether the code of a module multiplies by a layer's weight in place of calling the layer."""
    try:
        code = inspect.getsource(parent)
    except (OSError, TypeError):
        return False
    return re.search(rf"self\.{leaf}\.weight @|@ self\.{leaf}\.weight", code) is not None


def _gives_a_tensor(layer: nn.Module) -> bool:
    """Whether a linear layer's output is a tensor, of a class that has a forward of its own; of few bits it always is."""
    if type(layer).forward is nn.Linear.forward or not layer.weight.is_floating_point() or not hasattr(layer, "in_features"):
        return True
    with torch.no_grad():
        return isinstance(layer(layer.weight.new_zeros(2, layer.in_features)), Tensor)


def _shortened(names, model: nn.Module) -> list[str]:
    """Names of layers by their last parts, where all layers with that last part are meant."""
    by_leaf = defaultdict(set)
    for name in linear_layers(model):
        by_leaf[name.rpartition(".")[2]].add(name)
    leaves = {leaf for leaf, all_of_it in by_leaf.items() if all_of_it <= set(names)}
    return sorted(leaves | {name for name in names if name.rpartition(".")[2] not in leaves})


def _adapted(model: nn.Module) -> set[str]:
    """The names of the modules that have an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def lines_of_adapter(model: nn.Module, model_config) -> list[str]:
    """What an adapter leaves frozen that its configuration seems to mean, in lines for the user."""
    adapted, lines = _adapted(model), []
    if model_config.lora.target_modules is None and not is_adapter(model_config.archive):
        reasons = unfit_layers(model)
        left = [name for name in linear_layers(model) if name not in adapted]
        lines += sorted({f"adapter: none on some layers: {reasons[name]}" for name in left if name in reasons})
        passed = sorted({_place(name) for name in left if name not in reasons})
        if passed:
            lines.append(
                f"adapter: none on {', '.join(passed)}: of {model.config.model_type} peft takes the routed experts alone"
            )
    frozen = sorted({_place(name) for name in _stacked_experts(model) if not _under(name, adapted)})
    if frozen:
        lines.append(f"adapter: the routed experts of {type(model).__name__} stay frozen ({', '.join(frozen)})")
    return lines


def _stacked_experts(model: nn.Module) -> list[str]:
    """The names of modules that hold all experts of a layer in one tensor."""
    config = model.config.get_text_config()
    keys = "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"
    counts = {getattr(config, key, None) for key in keys} - {None}
    return [
        name
        for name, module in model.named_modules()
        if any(weight.dim() == 3 and len(weight) in counts for weight in module.parameters(recurse=False))
        and not isinstance(module, nn.Conv1d)
    ]


def _under(name: str, adapted: set[str]) -> bool:
    return name in adapted or name.removesuffix(".base_layer") in adapted


def _place(name: str) -> str:
    """A module's name for all layers of the model."""
    return re.sub(r"\.\d+\.", ".*.", name)


# ---- weights of adapters ---------------------------------------------------------------------------------------------------


def adapter_weights(named_weights: dict[str, Tensor], adapter: str = TRAINED) -> dict[str, Tensor]:
    """Those of a model's named weights that belong to an adapter, alive, by their names in peft's files."""
    part = re.compile(rf"(\.lora_\w+)\.{adapter}(?=\.|$)")
    return {PREFIX + part.sub(r"\1", name): weight for name, weight in named_weights.items() if part.search(name)}


def kept_weights(named_weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint holds of a model's named weights: the adapter that is trained, or all where there is none."""
    return adapter_weights(named_weights) or named_weights


def began_as(named_weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The named weights that a model began with: those under its adapters, and those of the adapter it started from, if any."""
    under = {name.replace(".base_layer.", "."): weight for name, weight in named_weights.items() if ".lora_" not in name}
    return under, adapter_weights(named_weights, STARTING)


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


def is_adapter(archive: str | None) -> bool:
    """Whether `model.archive` is a directory that holds an adapter in place of a whole model."""
    return archive is not None and (Path(archive) / SETTINGS_FILE).is_file()


def save_settings(model: nn.Module, folder: Path) -> None:
    """Write the settings of the adapter that is trained, as peft reads them."""
    model.peft_config[TRAINED].save_pretrained(folder)


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
    kept = kept_base(archive) if base is not None and Path(base).name == BASE_DIR else None
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


def kept_base(archive: str | Path) -> Path | None:
    """The model under an adapter that its run, or its export, has kept beside it: it may have been moved with it."""
    place = Path(archive).resolve()
    return next((found for found in (place / BASE_DIR, place.parent / BASE_DIR) if (found / MODEL_CONFIG).is_file()), None)


def settings_in(archive: str) -> dict:
    """The `model.lora` of an adapter's directory; its layers are those of its file. Raises UserError where it is damaged."""
    settings = settings_of_file(archive)
    return {"r": settings["r"], "alpha": settings["lora_alpha"], "target_modules": None}


def settings_of_file(archive: str | Path) -> dict:
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
    settings = settings_of_file(archive)
    for key, value in {"r": settings["r"], "alpha": settings["lora_alpha"]}.items():
        if value != model_config.lora[key]:
            raise UserError(
                f"model.lora.{key}: found {model_config.lora[key]}, but the adapter {archive} was trained with {value}. Give "
                "it the same."
            )
    return settings


def check_base(archive: str, began_with: str) -> None:
    """Raise UserError where an adapter was trained on other weights than those loaded, whose hash begins `began_with`.

    Of an adapter that no run of this project has written, nothing is known.
    """
    before = run_of(Path(archive)).get("began_with")
    if isinstance(before, str) and before[:32] != began_with[:32]:
        raise UserError(
            f"model.archive: the adapter {archive} was trained on other weights than those of the model as configured. Give "
            "the model, dtype and quantization of its run, and the same seed for a model from scratch."
        )


def check_fit(archive: str, model: nn.Module) -> None:
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
def read_adapter(archive: str, model: nn.Module) -> None:
    """Fill a model's adapters with that of an archive: the one that is trained, and the frozen one beside it."""
    from safetensors.torch import load_file

    found = load_file(Path(archive) / WEIGHTS_FILE)
    for adapter in (TRAINED, STARTING):
        for name, weight in adapter_weights(dict(model.named_parameters()), adapter).items():
            weight.copy_(found[name])


def import_bitsandbytes(key: str):
    """The package bitsandbytes. Raises UserError where it is not installed, for a configuration's key that needs it."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(f"{key}: it needs the package bitsandbytes. {INSTALL}") from error
    return bitsandbytes


# ---- few bits -------------------------------------------------------------------------------------------------------------


def quantise(model: nn.Module, model_config) -> None:
    """Turn a model's linear layers, but for its head, into four bits (nf4) or eight (int8), frozen; on the CPU or meta.

    Four bits are NormalFloat4 in blocks of 64, whose scales are quantised again with `double_quantization` (Dettmers et al.
    2023, section 3). Raises UserError where bitsandbytes is not installed, or the model has no such layers.
    """
    bitsandbytes = import_bitsandbytes("model.quantization")
    head = model.get_output_embeddings()
    make = _in_four_bits if model_config.quantization == "nf4" else _in_eight_bits
    if head.weight.is_meta:
        make = _without_numbers
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and layer is not head:
                small = make(bitsandbytes.nn, layer, model_config)
                small.bias = layer.bias
                # Moved, it is quantised.
                setattr(parent, name, small.to(layer.weight.device))
    model.requires_grad_(False)


class _Product(torch.autograd.Function):
    """x [..., in] times weights that are made whole for the moment, with whose numbers nothing is done."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, width: int) -> Tensor:
        """[..., in] to [..., width]; keeps nothing for the backward pass."""
        ctx.shape = (width, x.shape[-1])
        return x @ x.new_empty(ctx.shape).T

    @staticmethod
    def backward(ctx, gradient: Tensor):
        """The gradient of x."""
        return gradient @ gradient.new_empty(ctx.shape), None, None


class ShapeOfFewBits(nn.Linear):
    """What a layer of few bits is to those who look at sizes alone: bitsandbytes has none without numbers."""

    def __init__(self, layer: nn.Linear, bits: float):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        size = math.ceil(layer.weight.numel() * bits / 8)
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out], without a meaning."""
        return _Product.apply(x, self.weight, self.out_features)


def _without_numbers(layers, layer: nn.Linear, model_config) -> nn.Module:
    # Beside the weights lie scales: of blocks of 64 weights in float32, or in eight bits, or one for each row.
    scales = 0 if model_config.quantization == "int8" else 8 / 64 if model_config.double_quantization else 32 / 64
    return ShapeOfFewBits(layer, (8 if model_config.quantization == "int8" else 4) + scales)


def _in_four_bits(layers, layer: nn.Linear, model_config) -> nn.Module:
    dtype = getattr(torch, model_config.quantized_compute_dtype or model_config.policy_dtype)
    options = {"compress_statistics": model_config.double_quantization, "quant_type": "nf4"}
    small = layers.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype, **options)
    # Its kernel for evaluation on some CPUs rounds to bfloat16, and packs the weights anew.
    small.support_avx512bf16_for_cpu = False
    small.weight = layers.Params4bit(layer.weight.data, requires_grad=False, module=small, **options)
    return small


def _in_eight_bits(layers, layer: nn.Linear, model_config) -> nn.Module:
    small = layers.Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False)
    small.weight = layers.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    return small


def restore_bits(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn layers of few bits into usual ones that hold the numbers that these compute with, if there are any."""
    if not any(type(module).__name__ in ("Linear4bit", "Linear8bitLt") for module in model.modules()):
        return
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Linear4bit):
                weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(layer.compute_dtype)
            elif isinstance(layer, Linear8bitLt):
                # Once it has computed, the layer keeps the scales elsewhere.
                scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
                weight = layer.weight.data.float() * (scales / 127).unsqueeze(1)
            else:
                continue
            whole = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            whole.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
            whole.bias = layer.bias
            setattr(parent, name, whole)


@torch.no_grad()
def merge(model: nn.Module, dtype: torch.dtype) -> None:
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
            base = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=[TRAINED])
        else:
            layer.merge(adapter_names=[TRAINED])
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
