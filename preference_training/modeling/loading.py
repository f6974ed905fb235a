"""Load tokenizer, policy and reference: from the hub, a directory, a configuration (from scratch), or an archive.

Every source ends in the same place: a causal language model of transformers in the asked dtype, without dropout, so that
policy and reference say exactly the same before the first step. Whether a model can share prompts between responses is
proved here, on itself, before it is relied on.
"""

import copy
import json
import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor, nn

from preference_training.core.errors import UserError, first_line
from preference_training.core.files import atomic_directory
from preference_training.core.ranks import bytes_of
from preference_training.modeling.adapters import (
    BASE_DIR,
    add_adapter,
    base_archive,
    began_as,
    check_base,
    check_fit,
    is_adapter,
    kept_base,
    lines_of_adapter,
    merge,
    quantise,
    read_adapter,
    restore_bits,
    settings_in,
)
from preference_training.modeling.archives import (
    GENERATION_CONFIG,
    MODEL_CONFIG,
    SAFETENSORS_INDEX,
    archive_shapes,
    files_of_index,
    read_archive,
)
from preference_training.modeling.state import frozen_copy, several_devices
from preference_training.tracking.run_files import (
    CHECKSUMS,
    STATE,
    run_of,
)


@contextmanager
def _loading(key: str, name: str):
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


def weights_hash(model: nn.Module) -> str:
    """Hash of the weights that a model began with, or of this process's parts of them; 32 hexadecimal digits.

    Where an adapter is trained, these are the frozen weights, and 32 digits more are of the adapter that it started from, if
    there is one. Else they are the weights as they are now.
    """
    return "".join(_hash_of(part) for part in began_as(model.state_dict()) if part)


def _hash_of(tensors: dict[str, Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def reference_copy(policy: nn.Module, model_config) -> nn.Module:
    """A frozen copy of the policy as it is now, on the same devices; its parameters are in `reference_dtype`."""
    reference = frozen_copy(policy, getattr(torch, model_config.reference_dtype))
    if getattr(policy, "has_liger_kernels", False):
        use_liger_kernels(reference)
    return dispatched(reference, policy.hf_device_map) if several_devices(policy) else reference


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
        check_base(model_config.archive, weights_hash(model))
        read_adapter(model_config.archive, model)
    return model


def load_base(model_config, tokenizer, cache_dir: str | None = None, base_dir: Path | None = None) -> nn.Module:
    """The model of a `model` configuration as transformers makes it: with dropout, without an adapter, not quantised."""
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, model_config.policy_dtype)
    config = model_configuration(model_config, tokenizer, cache_dir)
    remote = {"trust_remote_code": model_config.trust_remote_code}
    archive = base_dir if base_dir is not None and base_dir.is_dir() else base_archive(model_config)
    if archive:
        return model_of_archive(config, read_archive(archive), archive, dtype, model_config.trust_remote_code)
    if not model_config.name_or_path:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **remote)
    name = model_config.name_or_path
    with _loading("model.name_or_path", name):
        for index in (SAFETENSORS_INDEX, "pytorch_model.bin.index.json"):
            files_of_index(Path(name) / index)
        return AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype, cache_dir=cache_dir, **remote)


def _has_no_directory(config, model_config) -> bool:
    """Whether no directory or hub id gives the model under an adapter to other libraries.

    It was made from scratch, lies in a single file, or has another configuration than lies with its weights.
    """
    archive, changed = base_archive(model_config), bool(len(model_config.from_config))
    if archive is None:
        return model_config.name_or_path is None or changed
    if not (archive / MODEL_CONFIG).is_file():
        return True
    from transformers import AutoConfig

    lies_there = AutoConfig.from_pretrained(archive, trust_remote_code=model_config.trust_remote_code)
    return bool(config_differences(lies_there, config))


def _is_of_a_run(archive: Path | None) -> bool:
    """Whether an archive is a checkpoint, or a kept base, of a run: that run may prune it, or be set aside or removed."""
    return archive is not None and (archive.resolve().name == BASE_DIR or (archive / STATE).is_file())


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
    try:
        with atomic_directory(base_dir) as partial:
            write(partial)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"local_run_dir: {base_dir}, the model under the adapter, cannot be written: {first_line(error)}. Make room, or "
            "set local_dirs or local_run_dir."
        ) from error


def _save_with_tokenizer(model: nn.Module, tokenizer, directory: Path) -> None:
    save_model(model, directory)
    tokenizer.save_pretrained(directory)


# Files of a checkpoint that continue its run, and say nothing of its model.
CONTINUES_A_RUN = (STATE, CHECKSUMS)


def _link_model(archive: Path, directory: Path) -> None:
    """Give the files of a model a second name in another directory, which takes no room; copy them where there are no links."""
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
        generation.to_json_file(directory / GENERATION_CONFIG)


def load_with_adapter(checkpoint: Path, model_config, tokenizer, cache_dir: str | None = None) -> nn.Module:
    """The model of a run with the adapter of a checkpoint in it, on the CPU, as the run computes.

    model_config is the run's. A base made from scratch that its run has not kept is made again.
    """
    return _of_adapter(load_model, checkpoint, model_config, tokenizer, cache_dir)


def base_of(checkpoint: Path, model_config, tokenizer, cache_dir: str | None = None) -> nn.Module:
    """The model under the adapter of a checkpoint, before it was quantised."""
    return _of_adapter(load_base, checkpoint, model_config, tokenizer, cache_dir)


def _of_adapter(make, checkpoint: Path, model_config, tokenizer, cache_dir: str | None) -> nn.Module:
    from omegaconf import OmegaConf

    # Of how the run computed on its machine nothing is needed here, and some of it may not be there.
    here = {"liger_kernels": False, "attn_implementation": "auto", "autocast_dtype": None}
    its_own = {"archive": str(checkpoint), "lora": settings_in(str(checkpoint))}
    config = OmegaConf.merge(model_config, here, its_own)
    with torch.random.fork_rng(devices=[]):
        if (seed := _seed_of(checkpoint)) is not None:
            torch.manual_seed(seed)
            # A run that kept no base had tried its optimizer on such a layer before it made its model.
            nn.Linear(1, 1)
        return make(config, tokenizer, cache_dir, kept_base(checkpoint))


def _seed_of(checkpoint: Path) -> int | None:
    """The seed of the run of a checkpoint; None where it does not say."""
    config = run_of(checkpoint).get("config")
    seed = config.get("seed") if isinstance(config, dict) else None
    return seed if isinstance(seed, int) else None


def load_merged(
    checkpoint: Path, model_config, tokenizer, cache_dir: str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """A whole model on the CPU: the frozen weights of a run's `model` configuration with the adapter of a checkpoint.

    They are added in float32, and rounded once to `dtype`; None is `policy_dtype`.
    """
    model = load_with_adapter(checkpoint, model_config, tokenizer, cache_dir)
    return merged(model, dtype or getattr(torch, model_config.policy_dtype))


def merged(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A model with its adapter, made whole in place."""
    restore_bits(model, torch.float32)
    merge(model, dtype)
    round_weights(model, dtype)
    return model


@torch.no_grad()
def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
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
        quantise(model, model_config)
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
        with _loading("model.name_or_path", name):
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


def refuse_kernels(config) -> None:
    """Raise ValueError where a model's configuration names an attention that transformers would fetch from the hub and run."""
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        attention = getattr(part, "_attn_implementation", None)
        if isinstance(attention, str) and "/" in attention:
            raise ValueError(f"its config.json asks for the code of {attention}")


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


# Architectures whose attention has a mask made of trained weights. There sdpa takes another kernel where it needs gradients,
# and policy and reference would differ in their last bits.
TRAINED_MASKS = ("doge",)


def choose_attention(model: nn.Module, name: str) -> None:
    """Give a model the attention of a name; auto is the newest flash attention there is for its dtype, or what the model has.

    For auto, models of TRAINED_MASKS have eager attention. Raises UserError where the attention cannot be had.
    """
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if name == "auto" and model.config.model_type in TRAINED_MASKS:
        name = "eager"
    elif name == "auto":
        short = model.dtype in (torch.float16, torch.bfloat16)
        there = {"flash_attention_3": is_flash_attn_3_available, "flash_attention_2": is_flash_attn_2_available}
        name = next((name for name, is_there in there.items() if short and torch.cuda.is_available() and is_there()), None)
        if name is None or not model._supports_flash_attn:
            return
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"model.attn_implementation: {type(model).__name__} cannot have {name} here: {first_line(error)}. Use auto, or "
            "install what it needs."
        ) from error


def use_liger_kernels(model: nn.Module) -> None:
    """Put Liger's kernels in place of a model's norms, rotary embeddings and MLPs. Raises UserError where that cannot be."""
    if not torch.cuda.is_available():
        raise UserError("model.liger_kernels: they are for GPUs, and there is none here. Set it to false.")
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError as error:
        raise UserError("model.liger_kernels: install the package: pip install -r requirements/gpu.txt") from error
    # The losses of its own would take the head's place, which scores responses here.
    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
    model.has_liger_kernels = True


def compile_between_attentions(model: nn.Module) -> None:
    """Compile the children of each block but for its attention, whose work has another shape in every batch."""
    blocks = [item for module in model.modules() if isinstance(module, nn.ModuleList) for item in module]
    for block in blocks:
        for name, child in block.named_children():
            if "att" not in name:
                child.compile(dynamic=True)


def enable_activation_checkpointing(model: nn.Module) -> None:
    """Keep only the blocks' inputs for the backward pass, and compute the rest again there."""
    # The method's name until transformers 5.22 or so; the older one then warns.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Put `model` on the device; where there are several GPUs, its layers over them in order.

    Raises UserError where their memory does not hold it.
    """
    model.compute_device = device
    if device.type != "cuda" or torch.cuda.device_count() == 1:
        return model.to(device)
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    blocks = list(model._no_split_modules or [])
    memory = get_balanced_memory(model, no_split_module_classes=blocks)
    device_map = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=blocks)
    if elsewhere := {"cpu", "disk"} & set(device_map.values()):
        raise UserError(
            f"trainer: {type(model).__name__} does not fit into the memory of {torch.cuda.device_count()} GPUs: layers would "
            f"be left on {' and '.join(sorted(elsewhere))}, where they cannot be trained. Use trainer=FSDPTrainer with "
            "trainer.cpu_offload=true, an adapter, or a smaller model."
        )
    return dispatched(model, device_map)


def dispatched(model: nn.Module, device_map: dict) -> nn.Module:
    """A model with its modules on the devices of a map, which hands their inputs on from one to the next."""
    from accelerate import dispatch_model

    main_device = next(iter(device_map.values()))
    # By their numbers are GPUs meant.
    model.compute_device = torch.device("cuda", main_device) if isinstance(main_device, int) else torch.device(main_device)
    return dispatch_model(model, device_map, main_device=main_device)


def check_model(model_config, tokenizer, cache_dir: str | None = None) -> list[str]:
    """Raise UserError where archive or adapter do not fit the model, before either takes memory or time.

    Returns what there is to be said of the model: what of it has no effect here, or stays as it is.
    """
    path = base_archive(model_config)
    config = model_configuration(model_config, tokenizer, cache_dir)
    lines = lines_of_configuration(config)
    if path:
        shapes = {name: torch.empty(shape, device="meta") for name, shape in archive_shapes(path).items()}
        model_of_archive(config, shapes, path, torch.float32, model_config.trust_remote_code, device_map={"": "meta"})
    if model_config.lora.r is not None:
        with torch.device("meta"):
            model = build_untrained(model_config, tokenizer, cache_dir)
        if is_adapter(model_config.archive):
            check_fit(model_config.archive, model)
        lines += lines_of_adapter(model, model_config)
    return lines


def lines_of_configuration(config) -> list[str]:
    """What of a model's configuration has no effect in training here."""
    text = config.get_text_config()
    keys = [key for key in ("router_aux_loss_coef", "aux_loss_alpha") if getattr(text, key, None)]
    return [f"model: {key} ({getattr(text, key)}) has no effect: the loss alone is trained, routers included" for key in keys]


def model_of_archive(
    config, state: dict[str, Tensor], path: Path, dtype: torch.dtype, trust_remote_code: bool = False, **where
) -> nn.Module:
    """A model with an archive's weights. transformers renames what older versions of it named otherwise.

    Raises UserError naming the tensors that differ from what `config` asks for.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    model, info = type(empty).from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **where,
    )
    faults = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    faults += [f"{name} is not part of the model" for name in sorted(info["unexpected_keys"])]
    faults += [f"{name} is {list(found)}, expected {list(asked)}" for name, found, asked in sorted(info["mismatched_keys"])]
    if faults:
        listed = "".join(f"\n  {fault}" for fault in faults[:10]) + ("\n  ..." if len(faults) > 10 else "")
        raise UserError(
            f"model.archive: {path} does not fit {type(model).__name__} as configured; {len(faults)} tensors differ:{listed}\n"
            "Choose the model preset that the archive was trained with."
        )
    return model
