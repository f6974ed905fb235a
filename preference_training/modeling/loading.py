"""Load tokenizer, policy and reference: from the hub, a directory, a configuration (from scratch), or an archive.

Every source ends in the same place: a causal language model of transformers in the asked dtype, without dropout, so that
policy and reference say exactly the same before the first step. Whether a model can share prompts between responses is
proved here, on itself, before it is relied on.
"""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from preference_training.core.errors import UserError, first_line
from preference_training.core.values import UNREADABLE
from preference_training.modeling.adapters import (
    BASE_DIR,
    adapter_options,
    add_adapter,
    base_archive,
    check_adapter_shapes,
    check_base_weights,
    describe_frozen_layers,
    is_adapter,
    load_adapter,
    merge_adapter,
    saved_base,
)
from preference_training.modeling.archives import (
    SAFETENSORS_INDEX,
    archive_shapes,
    indexed_files,
    model_from_archive,
    read_archive,
)
from preference_training.modeling.kernels import choose_attention, refuse_kernels, use_liger_kernels
from preference_training.modeling.quantization import dequantize, quantize
from preference_training.modeling.state import weights_hash


@contextmanager
def loading_errors(key: str, name: str):
    """Inside, what is wrong with a model's files becomes a UserError: they are data, and nothing of them may be executed."""
    if name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir():
        raise UserError(f"{key}: {name}: no such directory. Paths are relative to {Path.cwd()}.")
    try:
        yield
    except Exception as error:  # a dozen types: of networks, and of damaged files in half a dozen formats
        raise UserError(
            f"{key}: {name} could not be loaded: {first_line(error)}. Expected a model id of the hub (and a network, or the "
            "model in the hub library's cache) or a local directory. Code that comes with it runs only with "
            "model.trust_remote_code=true."
        ) from error


def load_model(model_config, tokenizer, cache_dir: str | None = None, base_dir: Path | None = None) -> nn.Module:
    """The model of a `model` configuration on the CPU, in `policy_dtype`, without dropout, in training mode.

    base_dir: where a run keeps the model under its adapter, if nobody else keeps it as it is: it is read from there, or written
    there where it is not yet. Raises UserError where that cannot be.
    """
    model = load_base(model_config, tokenizer, cache_dir, base_dir)
    if base_dir is not None and model_config.lora.r is not None and not base_dir.is_dir():
        if _has_no_directory(model.config, model_config):
            _keep(base_dir, lambda place: _save_with_tokenizer(model, tokenizer, place))
        elif _is_of_a_run(archive := base_archive(model_config)):
            _keep(base_dir, lambda place: _link_model(archive, place))
    base = str(base_dir.resolve()) if base_dir is not None and base_dir.is_dir() else None
    model = _made_ready(model, model_config, base)
    if is_adapter(model_config.archive):
        check_base_weights(model_config.archive, weights_hash(model))
        load_adapter(model_config.archive, model)
    return model


def load_base(model_config, tokenizer, cache_dir: str | None = None, base_dir: Path | None = None) -> nn.Module:
    """The model of a `model` configuration as transformers makes it: with dropout, without an adapter, not quantised."""
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, model_config.policy_dtype)
    config = model_configuration(model_config, tokenizer, cache_dir)
    remote = {"trust_remote_code": model_config.trust_remote_code}
    archive = base_dir if base_dir is not None and base_dir.is_dir() else base_archive(model_config)
    if archive:
        return model_from_archive(config, read_archive(archive), archive, dtype, model_config.trust_remote_code)
    if not model_config.name_or_path:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **remote)
    name = model_config.name_or_path
    with loading_errors("model.name_or_path", name):
        for index in (SAFETENSORS_INDEX, "pytorch_model.bin.index.json"):
            indexed_files(Path(name) / index)
        return AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype, cache_dir=cache_dir, **remote)


def _has_no_directory(config, model_config) -> bool:
    """Whether no directory or hub id gives the model under an adapter to other libraries.

    It was made from scratch, lies in a single file, or has another configuration than lies with its weights.
    """
    archive, changed = base_archive(model_config), bool(len(model_config.from_config))
    if archive is None:
        return model_config.name_or_path is None or changed
    if not (archive / "config.json").is_file():
        return True
    from transformers import AutoConfig

    lies_there = AutoConfig.from_pretrained(archive, trust_remote_code=model_config.trust_remote_code)
    return bool(config_differences(lies_there, config))


def _is_of_a_run(archive: Path | None) -> bool:
    """Whether an archive is a checkpoint, or a kept base, of a run: that run may prune it, or be set aside or removed."""
    return archive is not None and (archive.resolve().name == BASE_DIR or (archive / "state.json").is_file())


# What of a configuration says nothing of what a model computes, or is said again when it is loaded.
NOT_COMPUTED = (
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "auto_map", "eos_token_id",
    "bos_token_id", "pad_token_id", "use_cache", "_attn_implementation", "attn_implementation",
)  # fmt: skip


def config_differences(one, other) -> list[str]:
    """The keys in which two configurations of transformers differ, of those that say what a model computes."""
    mine, theirs = (json.loads(json.dumps(config.to_dict(), default=str)) for config in (one, other))
    keys = sorted((mine.keys() | theirs.keys()) - set(NOT_COMPUTED))
    return [key for key in keys if mine.get(key) != theirs.get(key)]


def _keep(base_dir: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make the directory of the model under an adapter. Raises UserError where the system does not let it."""
    partial = base_dir.with_name(f"{base_dir.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        write(partial)
        partial.rename(base_dir)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"local_run_dir: {base_dir}, the model under the adapter, cannot be written: {first_line(error)}. Make room, or "
            "set local_dirs or local_run_dir."
        ) from error


def _save_with_tokenizer(model: nn.Module, tokenizer, directory: Path) -> None:
    save_model(model, directory)
    tokenizer.save_pretrained(directory)


# Files of a checkpoint that continue its run, and say nothing of its model.
CONTINUES_A_RUN = ("state.json", "checksums.json")


def _link_model(archive: Path, directory: Path) -> None:
    """Give the files of a model a second name in another directory, which takes no room; copy them where there are no links."""
    directory.mkdir()
    for file in sorted(archive.resolve().iterdir()):
        if file.is_file() and file.suffix != ".pt" and file.name not in CONTINUES_A_RUN:
            try:
                os.link(file, directory / file.name)
            except OSError:
                shutil.copyfile(file, directory / file.name)


def save_model(model: nn.Module, directory: Path, **options) -> None:
    """`save_pretrained`; how it generates is written as it is, also where the library would want it otherwise.

    Of sampling settings that its defaults do not use the library makes an error once anything beside them has changed.
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
        generation.to_json_file(directory / "generation_config.json")


def load_with_adapter(checkpoint: Path, model_config, tokenizer, cache_dir: str | None = None) -> nn.Module:
    """The model of a run with the adapter of a checkpoint in it, on the CPU, as the run computes.

    model_config is the run's. A base made from scratch that its run has not kept is made again.
    """
    return _of_adapter(load_model, checkpoint, model_config, tokenizer, cache_dir)


def load_adapter_base(checkpoint: Path, model_config, tokenizer, cache_dir: str | None = None) -> nn.Module:
    """The model under the adapter of a checkpoint, before it was quantised."""
    return _of_adapter(load_base, checkpoint, model_config, tokenizer, cache_dir)


def _of_adapter(make, checkpoint: Path, model_config, tokenizer, cache_dir: str | None) -> nn.Module:
    from omegaconf import OmegaConf

    # Of how the run computed on its machine nothing is needed here, and some of it may not be there.
    here = {"liger_kernels": False, "attn_implementation": "auto", "autocast_dtype": None}
    its_own = {"archive": str(checkpoint), "lora": adapter_options(str(checkpoint))}
    config = OmegaConf.merge(model_config, here, its_own)
    with torch.random.fork_rng(devices=[]):
        if (seed := _seed_of(checkpoint)) is not None:
            torch.manual_seed(seed)
            # A run that kept no base had tried its optimizer on such a layer before it made its model.
            nn.Linear(1, 1)
        return make(config, tokenizer, cache_dir, saved_base(checkpoint))


def _seed_of(checkpoint: Path) -> int | None:
    """The seed of the run of a checkpoint; None where it does not say."""
    try:
        seed = json.loads((checkpoint / "state.json").read_text())["run"]["config"]["seed"]
    except UNREADABLE:
        return None
    return seed if isinstance(seed, int) else None


def load_merged(
    checkpoint: Path, model_config, tokenizer, cache_dir: str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """A whole model on the CPU: the frozen weights of a run's `model` configuration with the adapter of a checkpoint.

    They are added in float32, and rounded once to `dtype`; None is `policy_dtype`.
    """
    model = load_with_adapter(checkpoint, model_config, tokenizer, cache_dir)
    return merge_and_cast(model, dtype or getattr(torch, model_config.policy_dtype))


def merge_and_cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A model with its adapter, made whole in place."""
    dequantize(model, torch.float32)
    merge_adapter(model, dtype)
    cast_weights(model, dtype)
    return model


@torch.no_grad()
def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model's weights a dtype, in place, but for those that its class keeps in float32. Buffers stay what they are."""
    # What from_pretrained keeps so, in either of the short dtypes or in float16 alone.
    kept = set(model._keep_in_fp32_modules_strict or ()) if dtype in (torch.bfloat16, torch.float16) else set()
    kept |= set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not (weight.dtype == torch.float32 and kept & set(name.split("."))):
            weight.data = weight.data.to(dtype)
    model.config.dtype = dtype


def build_untrained(model_config, tokenizer, cache_dir: str | None = None, dtype: str | None = None) -> nn.Module:
    """The model of a `model` configuration with weights that were never trained: what it is like, without reading any.

    dtype is a name such as bfloat16; None is `policy_dtype`.
    """
    from transformers import AutoModelForCausalLM

    config = model_configuration(model_config, tokenizer, cache_dir)
    options = {"dtype": getattr(torch, dtype or model_config.policy_dtype), "trust_remote_code": model_config.trust_remote_code}
    return _made_ready(AutoModelForCausalLM.from_config(config, **options), model_config)


def _made_ready(model: nn.Module, model_config, base: str | None = None) -> nn.Module:
    disable_dropout(model)
    model.autocast_dtype = model_config.autocast_dtype and getattr(torch, model_config.autocast_dtype)
    choose_attention(model, model_config.attn_implementation)
    if model_config.liger_kernels and not next(model.parameters()).is_meta:
        use_liger_kernels(model)
    if model_config.quantization:
        quantize(model, model_config)
    if model_config.lora.r is not None:
        add_adapter(model, model_config, base)
    return model.train()


def model_configuration(model_config, tokenizer, cache_dir: str | None = None):
    """The transformers configuration: of `name_or_path`, or made from `from_config`; `from_config` changes its values."""
    from omegaconf import OmegaConf
    from transformers import AutoConfig

    values = OmegaConf.to_container(model_config.from_config)
    if model_config.name_or_path:
        name, trusted = model_config.name_or_path, model_config.trust_remote_code
        with loading_errors("model.name_or_path", name):
            config = AutoConfig.from_pretrained(name, **(values | {"cache_dir": cache_dir, "trust_remote_code": trusted}))
            if not trusted:
                refuse_kernels(config)
            return config
    tokens = {
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        # Ids may have gaps: the largest counts.
        size = max(len(tokenizer), *(number + 1 for number in tokenizer.get_vocab().values()))
        return AutoConfig.for_model(**{"vocab_size": size, **tokens, **values})
    except ValueError as error:
        raise UserError(f"model.from_config.model_type: {values.get('model_type')!r} is not known to transformers.") from error


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of `model` to 0: modules, and probabilities that attention reads as a number.

    Experts and routers that add noise in training (Mixtral's, Phi's) compute as they do in evaluation.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        # Not set to 0: Phi's routers draw experts in training whatever it is, and read it as a threshold in evaluation.
        if any("jitter" in name and isinstance(value, float) for name, value in vars(module).items()):
            module.register_forward_pre_hook(_as_in_evaluation)


def _as_in_evaluation(module: nn.Module, _inputs) -> None:
    module.training = False


def check_model(model_config, tokenizer, cache_dir: str | None = None) -> list[str]:
    """Raise UserError where archive or adapter do not fit the model, before either takes memory or time.

    Returns what there is to be said of the model: what of it has no effect here, or stays as it is.
    """
    path = base_archive(model_config)
    config = model_configuration(model_config, tokenizer, cache_dir)
    lines = describe_unused_options(config)
    if path:
        shapes = {name: torch.empty(shape, device="meta") for name, shape in archive_shapes(path).items()}
        model_from_archive(config, shapes, path, torch.float32, model_config.trust_remote_code, device_map={"": "meta"})
    if model_config.lora.r is not None:
        with torch.device("meta"):
            model = build_untrained(model_config, tokenizer, cache_dir)
        if is_adapter(model_config.archive):
            check_adapter_shapes(model_config.archive, model)
        lines += describe_frozen_layers(model, model_config)
    return lines


def describe_unused_options(config) -> list[str]:
    """What of a model's configuration has no effect in training here."""
    text = config.get_text_config()
    keys = [key for key in ("router_aux_loss_coef", "aux_loss_alpha") if getattr(text, key, None)]
    return [f"model: {key} ({getattr(text, key)}) has no effect: the loss alone is trained, routers included" for key in keys]
