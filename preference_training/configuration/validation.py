"""Validation: turn a composed configuration into a typed one, or explain why it cannot work. Imports no heavy library."""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from preference_training.configuration.composition import (
    GROUPS,
    choice_keys,
    compose_overrides,
    default_values,
    group_keys,
    loss_keys,
    preset_of,
    unknown_key,
)
from preference_training.configuration.keys import Section, check_section, declared, listed, refuse, texts
from preference_training.configuration.model_names import ADAPTER_CONFIG, is_gguf, local_gguf
from preference_training.configuration.schema import BITSANDBYTES_OPTIMIZERS, Origin, RunConfig
from preference_training.configuration.sections import BASE_MODEL, EvaluationConfig, LossConfig
from preference_training.core.errors import UserError, nearest
from preference_training.core.metric_names import (
    EVAL_ACCURACY,
    EVAL_CHOSEN_LOGPS,
    EVAL_CHOSEN_REWARD,
    EVAL_LOSS,
    EVAL_MARGIN,
    EVAL_REJECTED_LOGPS,
    EVAL_REJECTED_REWARD,
    HELD_OUT_REWARD,
    HELD_OUT_WIN_RATE,
)
from preference_training.core.values import dotted

# The metrics of an evaluation, which a sweep may optimize; the first two are all that SFT has.
OBJECTIVES = (
    EVAL_LOSS, EVAL_CHOSEN_LOGPS, EVAL_REJECTED_LOGPS, EVAL_CHOSEN_REWARD, EVAL_REJECTED_REWARD,
    EVAL_ACCURACY, EVAL_MARGIN,
)  # fmt: skip
# Those of a loop of rounds, of its last policy.
OBJECTIVES_OF_ROUNDS = (HELD_OUT_REWARD, HELD_OUT_WIN_RATE)
# Who may judge, and whether a name follows.
JUDGES = {"toy": False, "reward_model": True, "openai": True, "ollama": True}
# A user's function as a judge, FILE.py:NAME.
RULE = re.compile(r"\.py:\w+$")
KEY_VARIABLE = "OPENAI_API_KEY"
# Installs what HTTP judges and task suites need.
EVALUATION_REQUIREMENTS = "pip install -r requirements/evaluation.txt"
# Where metrics may go; a run's own files are always written.
TRACKING = ("jsonl", "wandb", "tensorboard", "trackio", "mlflow")


def validate(config: DictConfig, overrides: Sequence[str] = (), choices: dict[str, str] | None = None) -> RunConfig:
    """The configuration, typed. Raises UserError, with one message, for the first thing in it that cannot work.

    `overrides` are the command line's. `choices` name the file that each group was composed from: with them removed keys and
    keys of other files are found.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"{missing[0]}: not given. Expected a value on the command line: {missing[0]}=...")
    _prefer_given_warmup(config, choices)
    values = OmegaConf.to_container(config, resolve=True)
    _check_keys(RunConfig, values)
    for group, choice in (choices or {}).items():
        if group in GROUPS:
            _check_keys_of_group(group, values[group], choice)
    _check_group_names(values["loss"], values["trainer"])
    check_section(RunConfig, values)
    preset = preset_of((choices or {}).get("model", "base_model"))
    origin = Origin(tuple(overrides), preset, frozenset(key for key, value in dotted(values).items() if value is None))
    typed = replace(RunConfig.of(values, OmegaConf.to_container(config, resolve=False)), origin=origin)
    if typed.max_prompt_length is None:
        typed = typed.changed({"max_prompt_length": typed.max_length // 2})
    if typed.per_device_batch_size is not None and any(text.startswith("batch_size=") for text in overrides):
        raise UserError("per_device_batch_size: given together with batch_size, which follows from it. Expected one of them.")
    _check_together(typed)
    return typed


def _prefer_given_warmup(config: DictConfig, choices: dict[str, str] | None) -> None:
    """Let warmup_steps replace the share that a preset has in its place."""
    usual = default_values(model=preset_of((choices or {}).get("model", "base_model")))
    if usual["warmup_steps"] is None is not config.get("warmup_steps") and config.get("warmup_share") == usual["warmup_share"]:
        config.warmup_share = None


def _check_together(config: RunConfig) -> None:
    """Raise UserError for values that do not go together, or name what is not there."""
    _check_choices(config)
    _check_adapter(config)
    _check_float8(config)
    _check_sharding(config)
    _check_loss(config)
    if config.per_device_batch_size is None:
        check_sizes(config)
    _check_paths(config)
    _check_contamination(config)
    _check_evaluation(config.evaluation, config)
    _check_tracking(config.tracking)


def configured(*overrides: str) -> RunConfig:
    """The configuration of a command line. Raises UserError for what cannot work."""
    config, choices = compose_overrides(*overrides)
    return validate(config, overrides, choices)


# ---- keys -----------------------------------------------------------------------------------------------------------------


def _check_keys(section: type[Section], values: object, prefix: str = "") -> None:
    """Raise UserError for a key that no section has, or that one needs and lacks."""
    if not isinstance(values, dict):
        # Reported later, with its value.
        return
    keys = {each.name: each for each in declared(section)}
    own = loss_keys() if section is LossConfig else frozenset()
    for name in sorted(values.keys() - keys.keys() - own):
        raise UserError(unknown_key(f"{prefix}{name}"))
    needed = {name for name, each in keys.items() if each.default is not None}
    for name in sorted(needed - values.keys()):
        raise UserError(_removed(f"{prefix}{name}"))
    for name, each in keys.items():
        if "section" in each.metadata and name in values:
            _check_keys(each.metadata["section"], values[name], f"{prefix}{name}.")


def _check_keys_of_group(group: str, values: object, choice: str) -> None:
    """Raise UserError where a group has other keys than the file that it was composed from."""
    if not isinstance(values, dict) or group == "model":
        return
    known = choice_keys(group, choice)
    for name in sorted(values.keys() ^ known):
        raise UserError(unknown_key(f"{group}.{name}", choice) if name in values else _removed(f"{group}.{name}"))


def _removed(name: str) -> str:
    return f"{name}: removed by ~, but required. Drop it from the command line, or give it a value."


def _check_group_names(loss: dict[str, Any], trainer: dict[str, Any]) -> None:
    """Raise UserError where a name is no loss's or trainer's, or its section has the keys of another."""
    for group, found in {"loss": loss, "trainer": trainer}.items():
        known = group_keys(group)
        if found["name"] not in known:
            raise UserError(f"{group}.name: no {group} {found['name']!r}; {nearest(str(found['name']), known)}")
        if found.keys() != known[found["name"]]:
            name = found["name"]
            raise UserError(f"{group}.name: found {name!r} with the keys of another {group}. Choose it by {group}={name}.")


# ---- what does not go together ----------------------------------------------------------------------------------------------


def _check_choices(config: RunConfig) -> None:
    if config.optimizer in BITSANDBYTES_OPTIMIZERS and config.trainer.is_sharded:
        raise UserError(
            f"optimizer: found {config.optimizer}, whose kernels do not support sharded weights. Use "
            "trainer=BasicTrainer, or AdamW, whose states the processes share."
        )
    if config.weight_decay is not None and "weight_decay" in config.optimizer_kwargs:
        raise UserError("weight_decay: given here and in optimizer_kwargs, which decays all weights. Expected one of them.")
    if config.compile and config.trainer.splits_layers:
        raise UserError("compile: TensorParallelTrainer splits what would be compiled. Use FSDPTrainer or BasicTrainer.")


def _check_adapter(config: RunConfig) -> None:
    model, has_adapter = config.model, config.model.lora.r is not None
    if model.quantization and not has_adapter:
        raise UserError("model.quantization: quantized weights cannot be trained themselves. Add +adapter=lora.")
    if model.quantization and config.trainer.splits_layers:
        raise UserError(
            "model.quantization: TensorParallelTrainer splits the rows and columns of a layer, and quantized weights share "
            "scales across both. Use trainer=FSDPTrainer, or leave model.quantization null."
        )
    if model.quantization == "int8" and config.trainer.is_sharded:
        raise UserError(
            "model.quantization: FSDPTrainer cannot check int8 layers at load: they round activations to eight bits on a GPU, "
            "and not on the CPU of rank 0, which it compares with. Use nf4, or trainer=BasicTrainer."
        )
    if has_adapter and config.trainer.splits_layers:
        raise UserError(
            "model.lora.r: TensorParallelTrainer splits the layers that an adapter changes. Use FSDPTrainer or BasicTrainer."
        )
    if has_adapter and config.loss.moves_reference:
        raise UserError(
            f"model.lora.r: loss={config.loss.name} moves the reference, which with an adapter has no weights of its own. "
            "Train all weights, or use another loss."
        )
    reference = model.reference_archive
    if has_adapter and reference not in (None, BASE_MODEL) and not (Path(reference) / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"model.reference_archive: found {reference}, expected an adapter or base: with an adapter the reference is the "
            "same model, under another adapter or none."
        )
    if has_adapter and model.reference_dtype != model.policy_dtype:
        raise UserError(
            f"model.reference_dtype: found {model.reference_dtype}, expected policy_dtype, {model.policy_dtype}: with an "
            "adapter the reference is the same weights."
        )


def _check_float8(config: RunConfig) -> None:
    model = config.model
    if not model.fp8:
        return
    if model.lora.r is not None:
        raise UserError(
            "model.fp8: found true with an adapter: FP8 layers compute gradients of the weights under it, which are frozen. "
            "Train all weights, or set it to false."
        )
    if config.trainer.name != "BasicTrainer":
        raise UserError(
            f"model.fp8: {config.trainer.name} compares its sharded model with the unsharded one, whose products are "
            "not rounded to FP8. Use trainer=BasicTrainer."
        )


def _check_sharding(config: RunConfig) -> None:
    trainer = config.trainer
    size = trainer.context_parallel_size or 1
    if size > 1 and config.prefix_sharing == "off":
        raise UserError(
            f"prefix_sharing: found off, expected auto or on: trainer.context_parallel_size is {size}, and padded rows cannot "
            "be divided among processes."
        )
    if trainer.world_size is None:
        return
    if trainer.sharding == "hybrid" and trainer.nproc_per_node is None:
        raise UserError(
            "trainer.nproc_per_node: not given. Expected the processes of each machine: with trainer.sharding=hybrid they "
            "share the weights, and trainer.world_size does not say how many they are."
        )
    divisors = {name: getattr(trainer, name) for name in ("tensor_parallel_size", "context_parallel_size")}
    if trainer.sharding == "hybrid":
        divisors["nproc_per_node"] = trainer.nproc_per_node
    for name, divisor in divisors.items():
        if divisor and trainer.world_size % divisor:
            raise UserError(
                f"trainer.world_size: found {trainer.world_size}, expected a multiple of trainer.{name}, which is {divisor}."
            )


def _check_loss(config: RunConfig) -> None:
    loss = config.loss
    if loss.function is not None and not Path(file := loss.function.rpartition(":")[0]).is_file():
        raise UserError(f"loss.function: {file}: no such file. Expected FILE.py:NAME; paths are relative to {Path.cwd()}.")
    if loss.mode_loss == "beta_DPO" and loss.reference_free:
        raise UserError("loss.reference_free: found True, expected false: beta_DPO measures its margins against the reference.")
    if loss.mode_loss == "DPO" and loss.threshold == "trend":
        raise UserError(
            "loss.threshold: found trend, but loss.mode_loss is DPO, whose beta is fixed. Set loss.mode_loss=beta_DPO, or "
            "loss.threshold=running_mean."
        )
    if loss.moves_reference and config.reference_logps == "cached":
        raise UserError(
            f"reference_logps: found cached, but the reference of loss={loss.name} follows the policy, and its log-probs with "
            "it. Set it to live or null."
        )


def check_objective(objective: str, loss: str, examples: str, model_head: str = "lm", in_rounds: bool = False) -> None:
    """Raise UserError where `objective` is no metric of an evaluation of a loss with such examples and models.

    in_rounds: a loop of rounds has its own, too.
    """
    known: tuple[str, ...] = OBJECTIVES[:2] if examples == "targets" else OBJECTIVES
    if model_head == "value":
        known = tuple(name for name in known if name not in (EVAL_CHOSEN_LOGPS, EVAL_REJECTED_LOGPS))
    if in_rounds:
        known += OBJECTIVES_OF_ROUNDS
    if objective not in known:
        raise UserError(f"objective: loss={loss} has no metric {objective!r}; {nearest(objective, known)}")


def check_sizes(config: RunConfig) -> None:
    """Raise UserError where batch_size, the intervals and the lengths do not fit each other."""
    size, pieces = config.batch_size, config.gradient_accumulation_steps
    if size % pieces:
        raise UserError(f"batch_size: found {size}, expected a multiple of gradient_accumulation_steps, which is {pieces}.")
    for name, every in {"eval_every": config.eval_every, "save_every": config.save_every}.items():
        if every is not None and every < size:
            raise UserError(f"{name}: found {every}, expected at least batch_size, which is {size}; both count examples.")
    if config.max_prompt_length >= config.max_length:
        raise UserError(
            f"max_prompt_length: found {config.max_prompt_length}, expected less than max_length, which is "
            f"{config.max_length}: a response needs room behind its prompt."
        )
    ratio = config.loss.mode_weight or 0.0
    if config.loss.mode_loss == "beta_DPO" and int(size // pieces * (1 - ratio)) == 0:
        raise UserError(
            f"loss.mode_weight: found {ratio}, which keeps none of the {size // pieces} pairs of a micro-batch (batch_size "
            f"{size}, gradient_accumulation_steps {pieces}, 1 process). Lower it, or make the micro-batches larger."
        )
    if config.n_epochs is None and config.n_examples is None and config.n_steps is None:
        raise UserError("n_epochs, n_examples, n_steps: all are null, so the run would never end. Set one of them.")


def _check_paths(config: RunConfig) -> None:
    model = config.model
    if model.archive and not Path(model.archive).exists():
        raise UserError(f"model.archive: {model.archive}: no such file or directory. Paths are relative to {Path.cwd()}.")
    reference = model.reference_archive
    if reference not in (None, BASE_MODEL) and not Path(reference).exists():
        raise UserError(
            f"model.reference_archive: {reference}: no such file or directory. Expected a checkpoint directory, a policy.pt or "
            f"base; paths are relative to {Path.cwd()}."
        )
    if model.name_or_path and is_gguf(model.name_or_path):
        local_gguf(model.name_or_path)
    if not model.name_or_path and not model.from_config.get("model_type"):
        raise UserError("model.name_or_path: not given. Expected a hub id or a directory, or model.from_config.model_type.")
    if not model.name_or_path and not model.tokenizer_name_or_path:
        raise UserError("model.tokenizer_name_or_path: not given. A model from scratch needs one; byte_level is made in code.")
    if model.chat_template:
        if not Path(model.chat_template).expanduser().is_file():
            raise UserError(f"model.chat_template: {model.chat_template}: no such file. Paths are relative to {Path.cwd()}.")
        given = [entry.get("template") if isinstance(entry, dict) else None for entry in listed(config.datasets)]
        if {None, "chat"}.isdisjoint(template or config.template for template in given):
            raise UserError(
                f"model.chat_template: found {model.chat_template}, but template is {config.template}, which does not read it. "
                "Set template=chat or null."
            )


def _check_contamination(config: RunConfig) -> None:
    for path in listed(config.contamination_files):
        if not Path(path).expanduser().is_file():
            raise UserError(f"contamination_files: {path}: no such file. Paths are relative to {Path.cwd()}.")


def _check_evaluation(evaluation: EvaluationConfig, config: RunConfig) -> None:
    _check_judge(evaluation)
    for name, path in {"against": evaluation.against, "task_path": evaluation.task_path, "to": evaluation.to}.items():
        directory = Path(path or ".").absolute()
        if path not in (None, "reference") and not (directory.parent if name == "to" else directory).is_dir():
            raise UserError(f"evaluation.{name}: {path}: no such directory. Paths are relative to {Path.cwd()}.")
    if evaluation.against != "reference" and evaluation.judge is None:
        raise UserError(
            f"evaluation.against: found {evaluation.against}, and no judge compares responses. Set evaluation.judge too."
        )
    if evaluation.tasks and config.trainer.is_sharded:
        raise UserError(f"evaluation.tasks: {config.trainer.name} has a part of the model only. Set trainer=BasicTrainer.")
    for name, found in {"judge": evaluation.judge, "tasks": evaluation.tasks}.items():
        if found and not config.eval_only:
            raise UserError(f"evaluation.{name}: found {found!r}, and the run would train. Set eval_only=true too.")


def _check_judge(evaluation: EvaluationConfig) -> None:
    if evaluation.judge is None:
        return
    if RULE.search(evaluation.judge):
        file = evaluation.judge.rpartition(":")[0]
        if not Path(file).expanduser().is_file():
            raise UserError(
                f"evaluation.judge: {file}: no such file. Expected FILE.py:NAME; paths are relative to {Path.cwd()}."
            )
        return
    kind, _, name = evaluation.judge.partition(":")
    if kind.endswith(".py"):
        raise UserError(f"evaluation.judge: found {evaluation.judge!r}, expected FILE.py:NAME, with the name of a function.")
    if kind not in JUDGES:
        raise UserError(
            f"evaluation.judge: no judge {evaluation.judge!r}; {nearest(kind, JUDGES)} A rule of your own is FILE.py:NAME."
        )
    if bool(name) != JUDGES[kind]:
        raise UserError(f"evaluation.judge: found {evaluation.judge!r}, expected {kind}{':NAME' * JUDGES[kind]}.")
    url = evaluation.judge_url
    if url is not None and not re.match("https?://[^/]", url):
        raise UserError(f"evaluation.judge_url: found {url!r}, expected http://... or https://..., or null.")
    if kind == "openai" and url is None and not os.environ.get(KEY_VARIABLE):
        raise UserError(f"evaluation.judge: openai needs a key in the environment, {KEY_VARIABLE}, or evaluation.judge_url.")


def _check_tracking(tracking: object) -> None:
    names, words = listed(tracking), "names, each once, as in [jsonl,wandb]"
    refuse(
        texts(words)(tracking) or (f"found {names!r}, expected {words}." if len(set(names)) < len(names) else None), "tracking"
    )
    for name in names:
        if name not in TRACKING:
            raise UserError(f"tracking: no tracker {name!r}; {nearest(name, TRACKING)}")
    if "tensorboard" in names:
        try:
            distribution("tensorboard")
        except PackageNotFoundError:
            remedy = "Run `pip install -r requirements/tensorboard.txt`."
            raise UserError(f"tracking: tensorboard is not installed. {remedy}") from None
