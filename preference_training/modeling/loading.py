"""Load models: from the hub, a directory, an archive, or from scratch with random weights.

    `model` configuration -> transformers configuration -> weights -> kernels, quantization, adapter

Every source ends in the same kind of model: a causal language model of transformers, or a reward model of its kind, in
`policy_dtype` and in training mode but without dropout, so that policy and reference agree exactly before the first step.
"""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from preference_training.configuration.sections import ModelConfig
from preference_training.core.errors import UserError, first_line
from preference_training.core.files import atomic_directory
from preference_training.modeling.adapters.adding import add_adapter, describe_frozen_layers
from preference_training.modeling.adapters.files import (
    ARCHIVE,
    BASE_DIR,
    REFERENCE_ARCHIVE,
    adapter_keys,
    adapter_options,
    base_archive,
    check_adapter_shapes,
    check_base_weights,
    is_adapter,
    is_value_adapter,
    load_adapter,
    reference_adapter,
    saved_base,
    set_initial_adapter,
)
from preference_training.modeling.adapters.merging import merge_adapter
from preference_training.modeling.archives import (
    GENERATION_CONFIG,
    MODEL_CONFIG,
    SAFETENSORS_INDEX,
    TORCH_INDEX,
    archive_shapes,
    indexed_files,
    model_from_archive,
    read_archive,
)
from preference_training.modeling.experts.options import describe_balancing
from preference_training.modeling.kernels import choose_attention, use_liger_kernels
from preference_training.modeling.quantization import dequantize, describe_quantization, quantize, restore_transposed
from preference_training.modeling.sources.configurations import loading_errors, model_configuration
from preference_training.modeling.state import weights_hash
from preference_training.modeling.tuning.added_tokens import add_rows, fit_vocabulary
from preference_training.modeling.tuning.chosen_weights import choose_weights, describe_choice
from preference_training.modeling.tuning.towers import describe_towers, freeze_towers
from preference_training.modeling.value_head import ROW_END, add_values, auto_class, is_classifier
from preference_training.tracking.run_files import CHECKSUMS, STATE, read_run_info


@contextmanager
def reference_errors():
    """Context in which errors of model.archive name model.reference_archive, whose model is loaded as if it were that."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(f"{ARCHIVE}:", f"{REFERENCE_ARCHIVE}:")) from error


@contextmanager
def _size_errors(model_config: ModelConfig):
    """Context in which weights that do not fit what `from_config` sets are an error that says so."""
    try:
        yield
    except RuntimeError as error:
        if not model_config.from_config or "mismatched" not in str(error):
            raise
        raise UserError(
            "its weights have other sizes than model.from_config sets. Set model=blank_model, which sets none"
        ) from error


def load_model(model_config: ModelConfig, tokenizer, cache_dir: str | None = None, base_dir: Path | None = None) -> nn.Module:
    """The model of a `model` configuration on the CPU, in `policy_dtype`, without dropout, in training mode.

    base_dir: the run's own copy of its adapter's base model. It is read if it exists; it is written where no other place has
    that model unchanged. Raises UserError where it cannot be written.
    """
    model = load_base(model_config, tokenizer, cache_dir, base_dir)
    if base_dir is not None and model_config.lora.r is not None and not base_dir.is_dir():
        if not _is_loadable_elsewhere(model.config, model_config):
            _write_base(base_dir, lambda folder: _save_with_tokenizer(model, tokenizer, folder))
        elif _belongs_to_run(archive := base_archive(model_config) or _local_directory(model_config)):
            _write_base(base_dir, lambda folder: _link_model(archive, folder))
    base = str(base_dir.resolve()) if base_dir is not None and base_dir.is_dir() else None
    model = _configure(model, model_config, base, base_dir and base_dir.parent)
    for adapter, key in adapter_keys(model_config).items():
        check_base_weights(adapter, weights_hash(model), key)
    if is_adapter(model_config.archive):
        load_adapter(model_config.archive, model)
    if reference := reference_adapter(model_config):
        set_initial_adapter(model, reference)
    return model


def load_base(model_config: ModelConfig, tokenizer, cache_dir: str | None = None, base_dir: Path | None = None) -> nn.Module:
    """The model of a `model` configuration as transformers builds it: with dropout, not quantized, without an adapter."""
    auto, dtype = auto_class(model_config.head), getattr(torch, model_config.policy_dtype)
    config = model_configuration(model_config, tokenizer, cache_dir)
    remote = {"trust_remote_code": model_config.trust_remote_code}
    archive = base_dir if base_dir is not None and base_dir.is_dir() else base_archive(model_config)
    if archive:
        fit_vocabulary(config, model_config, archive)
        model = model_from_archive(config, read_archive(archive), archive, dtype, **_kind(model_config))
    elif not model_config.name_or_path:
        model = auto.from_config(config, dtype=dtype, **remote)
    else:
        name = model_config.name_or_path
        with loading_errors("model.name_or_path", name), _size_errors(model_config):
            for index in (SAFETENSORS_INDEX, TORCH_INDEX):
                indexed_files(Path(name) / index)
            model = auto.from_pretrained(name, config=config, dtype=dtype, cache_dir=cache_dir, **remote)
    add_rows(model, model_config, tokenizer, archive or _local_directory(model_config))
    return model


def _kind(model_config: ModelConfig) -> dict:
    """Which class of transformers a model has."""
    return {"head": model_config.head, "trust_remote_code": model_config.trust_remote_code}


def saved_head(directory: Path) -> str:
    """The head of a saved model, or of that of a saved adapter: lm or value."""
    if is_adapter(str(directory)):
        return "value" if is_value_adapter(directory) else "lm"
    try:
        architectures = json.loads((directory / MODEL_CONFIG).read_text(encoding="utf-8")).get("architectures") or ()
    except (OSError, ValueError, AttributeError):
        return "lm"
    return "value" if any(map(is_classifier, architectures)) else "lm"


def _is_loadable_elsewhere(config, model_config: ModelConfig) -> bool:
    """Whether other libraries can load an adapter's base model, with its configuration, from a hub id or a directory.

    They cannot where it was built from scratch, comes from a single file, or has another configuration than lies with it.
    """
    archive = base_archive(model_config)
    if model_config.added_tokens:
        return False
    if archive is None:
        return model_config.name_or_path is not None and not model_config.from_config
    if not (archive / MODEL_CONFIG).is_file():
        return False
    from transformers import AutoConfig

    saved = AutoConfig.from_pretrained(archive, trust_remote_code=model_config.trust_remote_code)
    return not config_differences(saved, config)


def _local_directory(model_config: ModelConfig) -> Path | None:
    """The directory that a model is loaded from; None for one on the hub, or from scratch."""
    name = model_config.name_or_path
    return Path(name) if name and Path(name).is_dir() else None


def _belongs_to_run(archive: Path | None) -> bool:
    """Whether an archive is a checkpoint, or a base model, of another run, which may prune, move or delete it."""
    return archive is not None and (archive.resolve().name == BASE_DIR or (archive / STATE).is_file())


# Keys of a transformers configuration that name a model, and change nothing that it computes.
CONFIG_METADATA = frozenset({
    "_name_or_path", "_commit_hash", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "bos_token_id", "eos_token_id", "id2label", "label2id",
})  # fmt: skip
# Keys that are set again whenever a model is loaded.
SET_AT_LOAD = frozenset({"auto_map", "pad_token_id", "_attn_implementation", "attn_implementation", ROW_END})


def config_differences(one, other) -> list[str]:
    """The keys in which two transformers configurations differ, of those that change what a model computes."""
    mine, theirs = (json.loads(json.dumps(config.to_dict(), default=str)) for config in (one, other))
    keys = sorted((mine.keys() | theirs.keys()) - CONFIG_METADATA - SET_AT_LOAD)
    return [key for key in keys if mine.get(key) != theirs.get(key)]


def _write_base(base_dir: Path, write: Callable[[Path], None]) -> None:
    """Create the directory of an adapter's base model with `write`, atomically. Raises UserError where that fails."""
    try:
        with atomic_directory(base_dir) as partial:
            write(partial)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"local_run_dir: cannot write {base_dir}, the base model of the adapter: {first_line(error)}. Free some space, or "
            "set local_dirs or local_run_dir."
        ) from error


def _save_with_tokenizer(model: nn.Module, tokenizer, directory: Path) -> None:
    save_model(model, directory)
    tokenizer.save_pretrained(directory)


# Files of a checkpoint that belong to its run and not to its model.
RUN_STATE_FILES = (STATE, CHECKSUMS)


def _link_model(archive: Path, directory: Path) -> None:
    """Hard-link the files of a model into a new directory, which takes no space; copy them where links are not supported."""
    for file in sorted(archive.resolve().iterdir()):
        if file.is_file() and file.suffix != ".pt" and file.name not in RUN_STATE_FILES:
            try:
                os.link(file, directory / file.name)
            except OSError:
                shutil.copyfile(file, directory / file.name)


def save_model(model: nn.Module, directory: Path, **options) -> None:
    """`save_pretrained`, with the generation configuration written as it is.

    transformers would refuse to write a changed one whose sampling options are unused by its defaults.
    """
    generation = model.generation_config if model.can_generate() else None
    try:
        if generation is not None:
            model.generation_config = type(generation)()
        model.save_pretrained(directory, **options)
    finally:
        if generation is not None:
            model.generation_config = generation
    if generation is not None:
        generation.to_json_file(directory / GENERATION_CONFIG)


def load_with_adapter(checkpoint: Path, model_config: ModelConfig, tokenizer, cache_dir: str | None = None) -> nn.Module:
    """The model of a run with the adapter of one of its checkpoints, on the CPU; `model_config` is the run's.

    A base model from scratch that the run did not save is rebuilt from the run's seed.
    """
    return _load_checkpoint(load_model, checkpoint, model_config, tokenizer, cache_dir)


def load_adapter_base(checkpoint: Path, model_config: ModelConfig, tokenizer, cache_dir: str | None = None) -> nn.Module:
    """The base model of a checkpoint's adapter, not quantized."""
    return _load_checkpoint(load_base, checkpoint, model_config, tokenizer, cache_dir)


def _load_checkpoint(loader, checkpoint: Path, model_config: ModelConfig, tokenizer, cache_dir: str | None) -> nn.Module:
    lora = replace(model_config.lora, **adapter_options(str(checkpoint)))
    config = replace(model_config.portable(), archive=str(checkpoint), reference_archive=None, lora=lora)
    with seeded_as_its_run(checkpoint):
        return loader(config, tokenizer, cache_dir, saved_base(checkpoint))


@contextmanager
def seeded_as_its_run(checkpoint: Path):
    """Context in which a model from scratch is built with the random weights that a checkpoint's run began with."""
    config = read_run_info(checkpoint).get("config")
    seed = config.get("seed") if isinstance(config, dict) else None
    with torch.random.fork_rng(devices=[]):
        if isinstance(seed, int):
            torch.manual_seed(seed)
            # Runs try their optimizer on such a layer before they build the model.
            nn.Linear(1, 1)
        yield


def merge_and_cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Dequantize a model, merge its adapter and cast it to `dtype`, in place."""
    dequantize(model, torch.float32)
    merge_adapter(model, dtype)
    restore_transposed(model)
    cast_weights(model, dtype)
    return model


@torch.no_grad()
def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast a model's weights in place, except those that its class keeps in float32; buffers keep their dtypes."""
    # As in from_pretrained: the strict list applies to both half-precision dtypes, the other one to float16 only.
    kept = set(model._keep_in_fp32_modules_strict or ()) if dtype in (torch.bfloat16, torch.float16) else set()
    kept |= set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not (weight.dtype == torch.float32 and kept & set(name.split("."))):
            weight.data = weight.data.to(dtype)
    model.config.dtype = dtype


def build_untrained(model_config: ModelConfig, tokenizer, cache_dir: str | None = None, dtype: str | None = None) -> nn.Module:
    """The model of a `model` configuration with untrained weights; reads no weight files.

    dtype: its name, such as bfloat16; None is `policy_dtype`.
    """
    config = model_configuration(model_config, tokenizer, cache_dir)
    options = {"dtype": getattr(torch, dtype or model_config.policy_dtype), "trust_remote_code": model_config.trust_remote_code}
    model = auto_class(model_config.head).from_config(config, **options)
    add_rows(model, model_config, tokenizer)
    return _configure(model, model_config)


def build_on_meta(model_config: ModelConfig, tokenizer, cache_dir: str | None = None, dtype: str | None = None) -> nn.Module:
    """`build_untrained` on the meta device: names, shapes and modules alone, in no memory."""
    with torch.device("meta"):
        return build_untrained(model_config, tokenizer, cache_dir, dtype)


def _configure(model: nn.Module, model_config: ModelConfig, base: str | None = None, run_dir: Path | None = None) -> nn.Module:
    """Apply what a `model` configuration says of computing, quantization and what is trained to a model of transformers."""
    if model_config.head == "value":
        add_values(model)
    disable_dropout(model)
    model.autocast_dtype = model_config.autocast_dtype and getattr(torch, model_config.autocast_dtype)
    choose_attention(model, model_config.attn_implementation)
    if model_config.liger_kernels and not next(model.parameters()).is_meta:
        use_liger_kernels(model)
    if model_config.quantization:
        quantize(model, model_config)
    if model_config.lora.r is not None:
        add_adapter(model, model_config, base)
    choose_weights(model, model_config, run_dir)
    freeze_towers(model)
    return model.train()


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of a model to 0: of modules, and those that attention reads as plain numbers.

    Routers and experts that add noise in training (Mixtral's, Phi's) compute as in evaluation.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        # Not set to 0: Phi's routers sample experts in training whatever the value, and use it as a threshold in evaluation.
        if any("jitter" in name and isinstance(value, float) for name, value in vars(module).items()):
            module.register_forward_pre_hook(_evaluation_mode)


def _evaluation_mode(module: nn.Module, _inputs) -> None:
    module.training = False


def check_model(model_config: ModelConfig, tokenizer, cache_dir: str | None = None) -> list[str]:
    """Raise UserError where archives or adapters do not fit the model; compares shapes, and loads no weights.

    Returns lines for the user: options of the model without effect here, and layers that stay frozen.
    """
    if model_config.reference_archive is not None and model_config.lora.r is None:
        with reference_errors():
            check_model(model_config.of_reference(), tokenizer, cache_dir)
    path = base_archive(model_config)
    config = model_configuration(model_config, tokenizer, cache_dir)
    lines = describe_balancing(config, model_config.router_aux_loss)
    if path:
        fit_vocabulary(config, model_config, path)
        shapes = {name: torch.empty(shape, device="meta") for name, shape in archive_shapes(path).items()}
        model_from_archive(config, shapes, path, torch.float32, device_map={"": "meta"}, **_kind(model_config))
    elif model_config.from_config and (directory := _local_directory(model_config)):
        _check_sizes(config, directory)
    has_towers = config.get_text_config() is not config
    if has_towers or model_config.lora.r is not None or model_config.head == "value" or model_config.chooses_weights:
        model = build_on_meta(model_config, tokenizer, cache_dir)
    if has_towers:
        lines += describe_towers(model)
    for adapter, key in adapter_keys(model_config).items():
        check_adapter_shapes(adapter, model, key)
    if model_config.lora.r is not None:
        lines += describe_frozen_layers(model, model_config)
    if model_config.quantization:
        lines += describe_quantization(model, model_config)
    return lines + (describe_choice(model, model_config) if model_config.chooses_weights else [])


def _check_sizes(config, directory: Path) -> None:
    """Raise UserError where the embedding of a model in a directory has another size than `from_config` sets."""
    from transformers import AutoConfig

    own = AutoConfig.from_pretrained(directory)
    sizes = ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "intermediate_size")
    for key in sizes:
        found, expected = (getattr(each.get_text_config(), key, None) for each in (own, config))
        if found != expected:
            raise UserError(
                f"model.from_config.{key}: found {expected}, and the weights of {directory} are of {found}. Name the model by "
                f"model={directory}, which sets none."
            )
