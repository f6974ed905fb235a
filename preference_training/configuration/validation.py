"""Whether a composed configuration makes sense, and what to say if not. Imports no heavy library.

The YAML files under config/ are the only list of keys there is: a key is known if one of them has it.
"""

import math
import os
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

from preference_training.configuration.composition import CONFIG_DIR, GROUPS, OPEN_SECTIONS, _leaves, _unknown_key, choices_of
from preference_training.core.errors import UserError, nearest
from preference_training.core.metric_names import (
    EVAL_ACCURACY,
    EVAL_CHOSEN_LOGPS,
    EVAL_CHOSEN_REWARD,
    EVAL_LOSS,
    EVAL_MARGIN,
    EVAL_REJECTED_LOGPS,
    EVAL_REJECTED_REWARD,
)

BITSANDBYTES_OPTIMIZERS = ("AdamW8bit", "RMSprop8bit", "Lion8bit", "PagedAdamW", "PagedAdamW8bit")


OPTIMIZERS = ("RMSprop", "AdamW", "Adam", "SGD", *BITSANDBYTES_OPTIMIZERS)


# Of Optuna's those that judge by the values of runs alone.
PRUNERS = ("MedianPruner", "PercentilePruner", "ThresholdPruner")


SCHEDULES = ("constant", "linear", "cosine", "inverse_sqrt")


# How FSDPTrainer lays weights out: ZeRO stage 3, 2, 1; replicas; stage 3 within a machine and replicas across.
SHARDINGS = ("full", "grad_op", "optimizer", "none", "hybrid")


ATTENTIONS = ("auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3")


DTYPES = ("float32", "bfloat16", "float16")


# Relative distance of neighbouring numbers of a low-precision dtype, at most. A smaller update of a weight may be rounded away.
SPACINGS = {"bfloat16": 2**-7, "float16": 2**-10}


# The largest of ordinary weights: matrices of language models have standard deviations of 0.02 to 0.05.
ORDINARY_WEIGHT = 0.05


TEMPLATES = ("raw", "hh", "chatml", "chat")


TRUNCATION_MODES = ("keep_start", "keep_end", "drop")


# Keys of a run that an entry of `datasets` may set for itself.
GENERAL_KEYS = ("template", "system_prompt", "truncation_mode", "on_bad_row", "weight")


# What some of them may say, beside null.
GENERAL_CHOICES = {"template": TEMPLATES, "truncation_mode": TRUNCATION_MODES, "on_bad_row": ("stop", "skip")}


def check_config(config: DictConfig, overrides: list[str] = (), choices: dict[str, str] | None = None) -> None:
    """Raise UserError, with one message, for the first thing in a composed configuration that cannot work.

    `overrides` are the command line's, `choices` say which file each group was composed from: with them keys that were
    added with a leading + are checked against the files.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"{missing[0]}: not given. Expected a value on the command line: {missing[0]}=...")
    if any(text.startswith(("+", "~")) for text in overrides):
        _check_added_and_removed_keys(config, choices or {})
    _check_sections(config)
    _check_numbers(config)
    _check_choices(config)
    _check_loss(config)
    if config.per_device_batch_size is None:
        check_sizes(config)
    elif any(text.startswith("batch_size=") for text in overrides):
        raise UserError("per_device_batch_size: given beside batch_size, which follows from it. Expected one of them.")
    _check_paths(config)
    _check_evaluation(config)
    _check_tracking(config)


def _check_added_and_removed_keys(config: DictConfig, choices: dict[str, str]) -> None:
    from hydra import compose

    pristine = compose("config", overrides=[f"{group}={choices[group]}" for group in GROUPS if group in choices])
    found, expected = _leaves(config), _leaves(pristine)
    for key in sorted(found ^ expected):
        if f"{key}.".startswith(tuple(f"{name}." for name in OPEN_SECTIONS)):
            continue
        if key in found:
            raise UserError(_unknown_key(key))
        raise UserError(f"{key}: removed by ~, but needed. Leave it out of the command line, or give it a value.")


def _require(sound: bool, key: str, found, expected: str) -> None:
    if not sound:
        raise UserError(f"{key}: found {found!r}, expected {expected}.")


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


COUNTS = (
    "batch_size", "eval_batch_size", "gradient_accumulation_steps", "max_length", "max_prompt_length", "eval_every",
    "max_bad_steps", "evaluation.judge_attempts", "evaluation.judge_workers",
)  # fmt: skip


OPTIONAL_COUNTS = (
    "n_epochs", "n_examples", "n_eval_examples", "max_tokens_per_microbatch", "save_every", "keep_last",
    "keep_best", "evaluation.n_prompts", "evaluation.task_limit", "n_steps", "early_stopping_patience",
    "per_device_batch_size", "gpus_per_job", "evaluation.judge_max_tokens",
)  # fmt: skip


COUNTS_FROM_ZERO = ("warmup_steps", "n_eval_model_samples", "seed")


SWITCHES = (
    "debug", "dry_run", "eval_only", "wandb.enabled", "do_first_eval", "activation_checkpointing", "save_policy_pt", "compile",
    "tf32", "save_async", "ledger", "model.trust_remote_code", "model.double_quantization", "model.liger_kernels",
)  # fmt: skip


TEXTS = ("exp_name", "wandb.project", "objective", "evaluation.against")


OPTIONAL_TEXTS = (
    "resume", "sweep_dir", "system_prompt", "wandb.entity", "cache_dir", "model.name_or_path", "model.tokenizer_name_or_path",
    "model.archive", "model.block_name", "evaluation.to", "evaluation.judge", "evaluation.judge_url", "evaluation.task_path",
)  # fmt: skip


# Of exp_name; most systems allow a directory's name 255, and the moment follows it. Unit: bytes.
LONGEST_NAME = 200


def _check_sections(config: DictConfig) -> None:
    for key in ("model.from_config", "optimizer_kwargs", "pruner_kwargs", "wandb", "evaluation"):
        section = OmegaConf.select(config, key)
        _require(isinstance(section, DictConfig), key, section, "a section: keys with values, or {}")
    for key in (*TEXTS, *OPTIONAL_TEXTS):
        value = OmegaConf.select(config, key)
        sound = isinstance(value, str) or (value is None and key in OPTIONAL_TEXTS)
        _require(sound, key, value, "a text" + " or null" * (key in OPTIONAL_TEXTS))
    name = config.exp_name
    sound = name.isprintable() and "/" not in name and len(name.encode()) <= LONGEST_NAME
    _require(sound, "exp_name", name, f"the beginning of a directory's name: at most {LONGEST_NAME} bytes, none of them a /")


def _check_numbers(config: DictConfig) -> None:
    for key in (*COUNTS, *OPTIONAL_COUNTS, *COUNTS_FROM_ZERO):
        value = OmegaConf.select(config, key)
        least = 0 if key in COUNTS_FROM_ZERO else 1
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
        may_be_null = key in OPTIONAL_COUNTS
        sound = whole or (may_be_null and value is None)
        _require(sound, key, value, f"a whole number from {least}" + " or null" * may_be_null)
    for key in ("lr", "max_grad_norm"):
        unlimited = key == "max_grad_norm" and config[key] == math.inf
        _require(unlimited or (_is_number(config[key]) and config[key] > 0), key, config[key], "a number above 0")
    interval = config.minimum_log_interval_secs
    _require(_is_number(interval) and interval >= 0, "minimum_log_interval_secs", interval, "a number of seconds from 0")
    for key in ("max_wall_time", "loss_spike"):
        limit = config[key]
        _require(limit is None or (_is_number(limit) and limit > 0), key, limit, "a number above 0 or null")
    for key in ("held_out_share", "final_lr_share", "warmup_share"):
        share, may_be_null = config[key], key == "warmup_share"
        sound = (_is_number(share) and 0 <= share < 1) or (share is None and may_be_null)
        _require(sound, key, share, "a share from 0 to below 1" + " or null" * may_be_null)
    decay = config.weight_decay
    _require(decay is None or (_is_number(decay) and decay >= 0), "weight_decay", decay, "a number from 0 or null")
    port = config.fsdp_port
    _require(port is None or (type(port) is int and 0 < port < 2**16), "fsdp_port", port, "a port from 1 to 65535, or null")
    sample = config.sample_during_eval
    _require(sample is None or isinstance(sample, bool), "sample_during_eval", sample, "true, false or null")
    for key in SWITCHES:
        value = OmegaConf.select(config, key)
        _require(isinstance(value, bool), key, value, "true or false")


def _check_choices(config: DictConfig) -> None:
    if config.optimizer not in OPTIMIZERS:
        raise UserError(f"optimizer: no optimizer {config.optimizer!r}; {nearest(str(config.optimizer), OPTIMIZERS)}")
    if config.optimizer in BITSANDBYTES_OPTIMIZERS and is_sharded(config):
        raise UserError(
            f"optimizer: found {config.optimizer}, whose kernels do not know weights that lie over several processes. Use "
            "trainer=BasicTrainer, or AdamW, whose states the processes share."
        )
    if config.weight_decay is not None and "weight_decay" in config.optimizer_kwargs:
        raise UserError("weight_decay: given here and in optimizer_kwargs, which decays all weights. Expected one of them.")
    if config.pruner is not None and config.pruner not in PRUNERS:
        raise UserError(f"pruner: no pruner {config.pruner!r}; {nearest(str(config.pruner), PRUNERS)}")
    _require(config.lr_schedule in SCHEDULES, "lr_schedule", config.lr_schedule, ", ".join(SCHEDULES))
    optional = ("model.fsdp_policy_mp", "model.autocast_dtype", "model.quantized_compute_dtype")
    for key in ("model.policy_dtype", "model.reference_dtype", *optional):
        value = OmegaConf.select(config, key)
        if value not in DTYPES and not (value is None and key in optional):
            raise UserError(f"{key}: no dtype {value!r}; {nearest(str(value), DTYPES)}")
    if config.compile and config.trainer.name == "TensorParallelTrainer":
        raise UserError("compile: TensorParallelTrainer splits what would be compiled. Use FSDPTrainer or BasicTrainer.")
    attention = config.model.attn_implementation
    _require(attention in ATTENTIONS, "model.attn_implementation", attention, ", ".join(ATTENTIONS))
    strategy = config.save_strategy
    _require(strategy in ("steps", "epoch", "no"), "save_strategy", strategy, "steps, epoch or no")
    masters = config.master_weights
    _require(masters == "auto" or isinstance(masters, bool), "master_weights", masters, "auto, true or false")
    _require(config.prefix_sharing in ("auto", "on", "off"), "prefix_sharing", config.prefix_sharing, "auto, on or off")
    cached = (None, "live", "cached")
    _require(config.reference_logps in cached, "reference_logps", config.reference_logps, "live, cached or null")
    for key, known in GENERAL_CHOICES.items():
        value = config[key]
        _require(value is None or value in known, key, value, f"{', '.join(known)} or null")
    if config.trainer.name not in choices_of("trainer"):
        hint = nearest(str(config.trainer.name), choices_of("trainer"))
        raise UserError(f"trainer.name: no trainer {config.trainer.name!r}; {hint}")
    if is_sharded(config):
        _check_sharded_trainer(config.trainer)
    _check_adapter(config)


def _check_adapter(config: DictConfig) -> None:
    model, lora = config.model, config.model.lora
    _require(lora.r is None or (type(lora.r) is int and lora.r > 0), "model.lora.r", lora.r, "a whole number from 1 or null")
    _require(_is_number(lora.alpha) and lora.alpha > 0, "model.lora.alpha", lora.alpha, "a number above 0")
    share = lora.dropout
    _require(_is_number(share) and 0 <= share < 1, "model.lora.dropout", share, "a share from 0 to below 1")
    bits, targets = model.quantization, lora.target_modules
    names = [targets] if isinstance(targets, str) else targets or []
    listed = isinstance(names, ListConfig | list) and all(isinstance(name, str) for name in names) and targets != []
    _require(listed, "model.lora.target_modules", targets, "names of layers, as in [q_proj,v_proj], or null")
    _require(bits in (None, "nf4", "int8"), "model.quantization", bits, "nf4, int8 or null")
    if bits and lora.r is None:
        raise UserError("model.quantization: weights of few bits cannot be trained themselves. Add +adapter=lora.")
    if bits and is_sharded(config):
        raise UserError(
            f"model.quantization: {config.trainer.name} cannot lay weights of few bits over processes: PyTorch's fully_shard "
            "splits a weight into rows, and these have none. Use trainer=BasicTrainer, or leave model.quantization null."
        )
    if lora.r is not None and config.trainer.name == "TensorParallelTrainer":
        raise UserError(
            "model.lora.r: TensorParallelTrainer splits the layers that an adapter changes. Use FSDPTrainer or BasicTrainer."
        )
    if lora.r is not None and moves_reference(config):
        raise UserError(
            f"model.lora.r: loss={config.loss.name} moves the reference, which with an adapter has no weights of its own. "
            "Train all weights, or use another loss."
        )
    if lora.r is not None and model.reference_dtype != model.policy_dtype:
        raise UserError(
            f"model.reference_dtype: found {model.reference_dtype}, expected policy_dtype, {model.policy_dtype}: with an "
            "adapter the reference is the same weights."
        )


def is_sharded(config: DictConfig) -> bool:
    """Whether the trainer lays weights over several processes."""
    return config.trainer.name != "BasicTrainer"


def sharded_dtype(config: DictConfig) -> str | None:
    """The dtype that a sharded trainer gathers weights in and computes in; None is the weights' own."""
    return (config.trainer.param_dtype or config.model.fsdp_policy_mp) if is_sharded(config) else None


def two_models_asked_for(config: DictConfig) -> str | None:
    """What to say where policy and reference are not one model at a run's beginning, because the user wants it so."""
    policy, reference = config.model.policy_dtype, config.model.reference_dtype
    if policy == reference:
        return None
    return (
        f"model.reference_dtype: {reference}, and the policy is {policy}: two models, whose margins are not 0 at the "
        "beginning; that they start alike is not checked"
    )


def caches_reference(config: DictConfig, read_again: bool) -> bool:
    """Whether the reference's log-probs are computed before training: if asked for, or left open and read more than once.

    Never where the reference follows the policy.
    """
    return config.reference_logps == "cached" or (config.reference_logps is None and read_again and not moves_reference(config))


def _check_sharded_trainer(trainer: DictConfig) -> None:
    sharding = trainer.sharding
    if sharding not in SHARDINGS:
        raise UserError(f"trainer.sharding: no sharding {sharding!r}; {nearest(str(sharding), SHARDINGS)}")
    for key in ("param_dtype", "reduce_dtype", "output_dtype"):
        if trainer[key] is not None and trainer[key] not in DTYPES:
            raise UserError(f"trainer.{key}: no dtype {trainer[key]!r}; {nearest(str(trainer[key]), DTYPES)}")
    for key in ("nproc_per_node", "tensor_parallel_size", "world_size"):
        value = trainer.get(key)
        _require(value is None or (type(value) is int and value > 0), f"trainer.{key}", value, "a whole number from 1 or null")
    minutes = trainer.distributed_timeout_minutes
    _require(_is_number(minutes) and minutes > 0, "trainer.distributed_timeout_minutes", minutes, "a number above 0")
    _require(isinstance(trainer.cpu_offload, bool), "trainer.cpu_offload", trainer.cpu_offload, "true or false")
    memory = trainer.device_memory
    _require(memory is None or (_is_number(memory) and memory > 0), "trainer.device_memory", memory, "a number above 0 or null")
    if trainer.world_size is not None:
        _check_world_size(trainer)


def _check_world_size(trainer: DictConfig) -> None:
    size = trainer.world_size
    if trainer.sharding == "hybrid" and trainer.nproc_per_node is None:
        raise UserError(
            "trainer.nproc_per_node: not given. Expected the processes of each machine: with trainer.sharding=hybrid they "
            "share the weights, and trainer.world_size does not say how many they are."
        )
    divisors = {"tensor_parallel_size": trainer.get("tensor_parallel_size")}
    if trainer.sharding == "hybrid":
        divisors["nproc_per_node"] = trainer.nproc_per_node
    for key, divisor in divisors.items():
        if divisor and size % divisor:
            raise UserError(f"trainer.world_size: found {size}, expected a multiple of trainer.{key}, which is {divisor}.")


def trains_low_precision(config: DictConfig) -> bool:
    """Whether weights in bfloat16 or float16 are trained; adapters are float32 whatever lies under them."""
    return config.model.policy_dtype in SPACINGS and config.model.lora.r is None


def smallest_kept_lr(dtype: str) -> float:
    """The learning rate from which ordinary weights of a low-precision dtype take every update, of one lr in size."""
    # Half of the distance is rounded up.
    return ORDINARY_WEIGHT * SPACINGS[dtype] / 2


def keeps_master_weights(config: DictConfig) -> bool:
    """Whether low-precision weights have float32 master weights in the optimizer, from which they are rounded.

    auto has them where updates would be rounded away. RMSprop, AdamW and the like take steps of about lr; of SGD's nothing is
    known before.
    """
    if config.master_weights != "auto":
        return config.master_weights and trains_low_precision(config)
    return trains_low_precision(config) and (
        config.optimizer == "SGD" or config.lr < smallest_kept_lr(config.model.policy_dtype)
    )


def times_beside_weights(config: DictConfig) -> int:
    """How many times the memory of the trained weights gradients and optimizer take, at most."""
    # A gradient and two states of the weights' dtype; or a gradient of it, and float32 copies with two states.
    return 1 + 3 * 2 if keeps_master_weights(config) else 1 + 2


def lines_of_precision(config: DictConfig) -> list[str]:
    """What is to be said of weights that are trained in low precision: nothing where there are none."""
    dtype, lines = config.model.policy_dtype, []
    if config.master_weights is True and not trains_low_precision(config):
        why = "an adapter's weights are float32" if dtype in SPACINGS else f"model.policy_dtype={dtype}"
        lines.append(f"master_weights: none are needed: {why}")
    if trains_low_precision(config):
        lines.append(f"master_weights: {_chosen_precision(config)}")
    share = config.loss.get("reference_update_share")
    if share is not None and share < 0.5 and config.model.reference_dtype in SPACINGS:
        lines.append(
            f"loss.reference_update_share: with {share:g} a reference in {config.model.reference_dtype} follows the policy "
            f"only where they differ by more than {0.5 / share:.2g} times the distance of neighbouring numbers: smaller moves "
            "are rounded away. Not so with a share of 0.5 or more, or model.policy_dtype=float32 (and "
            "model.autocast_dtype=bfloat16)"
        )
    return lines


def _chosen_precision(config: DictConfig) -> str:
    dtype = config.model.policy_dtype
    kept = keeps_master_weights(config)
    copies, none = f"the optimizer keeps float32 copies of the {dtype} weights", f"none, {dtype} weights are updated directly"
    what = copies if kept else none
    if config.master_weights != "auto":
        return what
    limit = smallest_kept_lr(dtype)
    if config.optimizer == "SGD":
        return f"{what}: SGD's updates may be too small for {dtype} (master_weights=false does without, in less memory)"
    if kept:
        return f"{what}: updates of lr {config.lr:g} would be rounded away (master_weights=false does without, in less memory)"
    return f"{what}: updates of lr {config.lr:g} are not rounded away in weights of ordinary size (limit: {limit:.1g})"


# The metrics of an evaluation, which a sweep may optimise; the first two are all that SFT has.
OBJECTIVES = (
    EVAL_LOSS, EVAL_CHOSEN_LOGPS, EVAL_REJECTED_LOGPS, EVAL_CHOSEN_REWARD, EVAL_REJECTED_REWARD,
    EVAL_ACCURACY, EVAL_MARGIN,
)  # fmt: skip


# The losses whose examples are single responses, so that there is nothing to compare.
WITHOUT_PAIRS = ("sft",)


MODES = ("DPO", "beta_DPO")


def _is_switch(value) -> bool:
    return isinstance(value, bool)


def _is_share(value, below: float) -> bool:
    return _is_number(value) and 0 <= value < below


# What each key of the files in config/loss/ may be, and how to say so.
LOSS_VALUES = {
    "beta": (lambda value: _is_number(value) and value > 0, "a number above 0: at 0 the loss never changes"),
    "label_smoothing": (lambda value: _is_share(value, 0.5), "a share from 0 to below 0.5"),
    "reference_free": (_is_switch, "true or false"),
    "length_normalised": (_is_switch, "true or false"),
    "mode_weight": (lambda value: _is_share(value, 1), "a share from 0 to below 1"),
    "a": (lambda value: _is_number(value) and value >= 0, "a number from 0"),
    "alpha": (lambda value: _is_number(value) and value >= 0, "a number from 0"),
    "penalty": (lambda value: _is_number(value) and value >= 0, "a number from 0"),
    "gamma": (lambda value: _is_number(value) and value >= 0, "a number from 0"),
    "reference_update_every": (lambda value: type(value) is int and value > 0, "a whole number from 1"),
    "reference_update_share": (lambda value: _is_number(value) and 0 < value <= 1, "a share above 0 to 1"),
    "function": (lambda value: isinstance(value, str) and re.search(r"\.py:\w+$", value), "FILE.py:NAME"),
    "options": (lambda value: isinstance(value, DictConfig), "a section: keys with values, or {}"),
}


@cache
def loss_keys() -> dict[str, frozenset[str]]:
    """The losses that `loss.name` may say, and the other keys that each has in its file."""
    files = [OmegaConf.load(CONFIG_DIR / "loss" / f"{choice}.yaml") for choice in choices_of("loss")]
    return {file.name: frozenset(file) - {"name"} for file in files if "name" in file}


def moves_reference(config: DictConfig) -> bool:
    """Whether the reference follows the policy, so that its log-probs cannot be known before."""
    return "reference_update_every" in config.loss


def _check_loss(config: DictConfig) -> None:
    loss, known = config.loss, loss_keys()
    if loss.name not in known:
        raise UserError(f"loss.name: no loss {loss.name!r}; {nearest(str(loss.name), known)}")
    if "options" in set(loss) - known[loss.name]:
        raise UserError(_unknown_key("loss.options"))
    if set(loss) - {"name"} != known[loss.name]:
        raise UserError(f"loss.name: found {loss.name!r} beside the keys of another loss. Choose it by loss={loss.name}.")
    check_objective(config, loss.name not in WITHOUT_PAIRS)
    for key in sorted(known[loss.name] - {"mode_loss"}):
        sound, expected = LOSS_VALUES[key]
        _require(sound(loss[key]), f"loss.{key}", loss[key], expected)
    if "function" in loss and not Path(loss.function.rpartition(":")[0]).is_file():
        file = loss.function.rpartition(":")[0]
        raise UserError(f"loss.function: {file}: no such file. Expected FILE.py:NAME; paths are relative to {Path.cwd()}.")
    if "mode_loss" in loss and loss.mode_loss not in MODES:
        raise UserError(f"loss.mode_loss: no mode {loss.mode_loss!r}; {nearest(str(loss.mode_loss), MODES)}")
    if "mode_loss" in loss and loss.mode_loss == "beta_DPO":
        reference_free = loss.reference_free
        expected = "false: beta_DPO measures its margins against the reference"
        _require(not reference_free, "loss.reference_free", reference_free, expected)
    if moves_reference(config) and config.reference_logps == "cached":
        raise UserError(
            f"reference_logps: found cached, but the reference of loss={loss.name} follows the policy, and its log-probs with "
            "it. Set it to live or null."
        )


def check_objective(config: DictConfig, paired: bool) -> None:
    """Raise UserError where `objective` is no metric of an evaluation of pairs, or of single responses."""
    known = OBJECTIVES if paired else OBJECTIVES[:2]
    if config.objective not in known:
        raise UserError(
            f"objective: loss={config.loss.name} has no metric {config.objective!r}; {nearest(config.objective, known)}"
        )


def _check_kept_pairs(config: DictConfig) -> None:
    loss = config.loss
    ratio, size = loss.mode_weight, config.batch_size // config.gradient_accumulation_steps
    if int(size * (1 - ratio)) == 0:
        raise UserError(
            f"loss.mode_weight: found {ratio}, which keeps none of the {size} pairs of a micro-batch (batch_size "
            f"{config.batch_size}, gradient_accumulation_steps {config.gradient_accumulation_steps}, 1 process). "
            "Lower it, or make the micro-batches larger."
        )


def check_sizes(config: DictConfig) -> None:
    """Raise UserError where batch_size, the intervals and the lengths do not fit each other."""
    size, pieces = config.batch_size, config.gradient_accumulation_steps
    if size % pieces:
        raise UserError(f"batch_size: found {size}, expected a multiple of gradient_accumulation_steps, which is {pieces}.")
    for key in ("eval_every", "save_every"):
        if config[key] is not None and config[key] < size:
            raise UserError(f"{key}: found {config[key]}, expected at least batch_size, which is {size}; both count examples.")
    if config.max_prompt_length >= config.max_length:
        raise UserError(
            f"max_prompt_length: found {config.max_prompt_length}, expected less than max_length, which is "
            f"{config.max_length}: a response needs room behind its prompt."
        )
    if config.loss.get("mode_loss") == "beta_DPO":
        _check_kept_pairs(config)
    if config.n_epochs is None and config.n_examples is None and config.n_steps is None:
        raise UserError("n_epochs, n_examples, n_steps: all are null, so the run would never end. Set one of them.")


def listed(value):
    """A key's value in plain types, one text or dict as a list of it: brackets may be left out for one. May be no list."""
    plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return [plain] if isinstance(plain, str | dict) else plain


@cache
def _defaults() -> DictConfig:
    return OmegaConf.load(CONFIG_DIR / "config.yaml")


def is_changed(config: DictConfig, key: str) -> bool:
    """Whether a key has another value than its default."""
    return key in config and config[key] != _defaults()[key]


# Who may judge, and whether a name follows.
JUDGES = {"toy": False, "reward_model": True, "openai": True, "ollama": True}


KEY_VARIABLE = "OPENAI_API_KEY"


# What brings the libraries of judges behind HTTP and of tasks.
EVALUATION_REQUIREMENTS = "pip install -r requirements/evaluation.txt"


def _check_evaluation(config: DictConfig) -> None:
    wanted = config.evaluation
    for key in ("judge_timeout", "judge_pause"):
        _require(_is_number(wanted[key]) and wanted[key] > 0, f"evaluation.{key}", wanted[key], "a number of seconds above 0")
    share = wanted.max_missing
    _require(_is_number(share) and 0 <= share < 1, "evaluation.max_missing", share, "a share from 0 to below 1")
    tasks = task_names(config)
    sound = all(isinstance(name, str) for name in tasks)
    _require(sound, "evaluation.tasks", tasks, "names, as in [open_llm,gsm8k]")
    _check_judge(wanted)
    for key in ("against", "task_path", "to"):
        path = wanted[key]
        looked_at = Path(path).absolute().parent if key == "to" and path else path
        if path not in (None, "reference") and not Path(looked_at).is_dir():
            raise UserError(f"evaluation.{key}: {path}: no such directory. Paths are relative to {Path.cwd()}.")
    if wanted.against != "reference" and wanted.judge is None:
        raise UserError(f"evaluation.against: found {wanted.against}, and nobody compares answers. Set evaluation.judge too.")
    if tasks and is_sharded(config):
        raise UserError(f"evaluation.tasks: {config.trainer.name} has a part of the model only. Set trainer=BasicTrainer.")
    for key in ("judge", "tasks"):
        if wanted[key] and not config.eval_only:
            raise UserError(f"evaluation.{key}: found {wanted[key]!r}, and the run would train. Set eval_only=true too.")


def _check_judge(wanted: DictConfig) -> None:
    if wanted.judge is None:
        return
    kind, _, name = wanted.judge.partition(":")
    if kind not in JUDGES:
        raise UserError(f"evaluation.judge: no judge {wanted.judge!r}; {nearest(kind, JUDGES)}")
    _require(bool(name) == JUDGES[kind], "evaluation.judge", wanted.judge, f"{kind}{':NAME' * JUDGES[kind]}")
    url = wanted.judge_url
    _require(url is None or re.match("https?://[^/]", url), "evaluation.judge_url", url, "http://... or https://..., or null")
    if kind == "openai" and url is None and not os.environ.get(KEY_VARIABLE):
        raise UserError(f"evaluation.judge: openai needs a key in the environment, {KEY_VARIABLE}, or evaluation.judge_url.")


def task_names(config: DictConfig) -> list:
    """`evaluation.tasks` as a list: brackets may be left out for one."""
    tasks = OmegaConf.to_container(config.evaluation, resolve=True)["tasks"]
    return tasks if isinstance(tasks, list) else [tasks]


# Where numbers may go; of a run's own files there is no doing without.
TRACKING = ("jsonl", "wandb", "tensorboard")


def dashboard_names(config: DictConfig) -> list[str]:
    """Those of `tracking` that a run's numbers go to beside its own files; brackets may be left out for one."""
    switched_off = {"jsonl"} if config.wandb.enabled else {"jsonl", "wandb"}
    return [] if config.debug else [name for name in listed(config.tracking) if name not in switched_off]


def _check_tracking(config: DictConfig) -> None:
    names = listed(config.tracking)
    sound = isinstance(names, list) and all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    _require(sound, "tracking", names, "names, each once, as in [jsonl,wandb]")
    for name in names:
        if name not in TRACKING:
            raise UserError(f"tracking: nothing is called {name!r}; {nearest(name, TRACKING)}")
    if "tensorboard" in names:
        try:
            distribution("tensorboard")
        except PackageNotFoundError:
            remedy = "Run `pip install -r requirements/tensorboard.txt`."
            raise UserError(f"tracking: tensorboard is not installed. {remedy}") from None


def _check_paths(config: DictConfig) -> None:
    archive = config.model.archive
    if archive and not Path(archive).exists():
        raise UserError(f"model.archive: {archive}: no such file or directory. Paths are relative to {Path.cwd()}.")
    model = config.model
    if not model.name_or_path and not model.from_config.get("model_type"):
        raise UserError("model.name_or_path: not given. Expected a hub id or a directory, or model.from_config.model_type.")
    if not model.name_or_path and not model.tokenizer_name_or_path:
        raise UserError("model.tokenizer_name_or_path: not given. A model from scratch needs one; byte_level is made in code.")
