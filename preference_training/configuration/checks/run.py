"""What does not go together in a run's configuration, or names what is not there."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from preference_training.configuration.checks.evaluation import check_evaluation
from preference_training.configuration.checks.model import check_model_keys
from preference_training.configuration.checks.unread import check_misleading
from preference_training.configuration.keys import listed, refuse, texts
from preference_training.configuration.model_names import is_gguf, local_gguf
from preference_training.configuration.schema import RunConfig
from preference_training.configuration.sections import BASE_MODEL, FROM_HALVES
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

# The metrics of an evaluation, which a sweep may optimize; the first two are all that SFT has.
OBJECTIVES = (
    EVAL_LOSS, EVAL_CHOSEN_LOGPS, EVAL_REJECTED_LOGPS, EVAL_CHOSEN_REWARD, EVAL_REJECTED_REWARD,
    EVAL_ACCURACY, EVAL_MARGIN,
)  # fmt: skip
# Those of a loop of rounds, of its last policy.
OBJECTIVES_OF_ROUNDS = (HELD_OUT_REWARD, HELD_OUT_WIN_RATE)
# Where metrics may go; a run's own files are always written.
TRACKING = ("jsonl", "wandb", "tensorboard", "trackio", "mlflow")


def check_together(config: RunConfig) -> None:
    """Raise UserError for values that do not go together, or name what is not there."""
    _check_choices(config)
    _check_optimizer(config)
    _check_load_best(config)
    check_model_keys(config)
    check_misleading(config)
    _check_sharding(config)
    _check_loss(config)
    if config.per_device_batch_size is None:
        check_sizes(config)
    _check_paths(config)
    _check_data(config)
    _check_contamination(config)
    check_evaluation(config.evaluation, config)
    _check_tracking(config.tracking)


def _check_choices(config: RunConfig) -> None:
    if config.weight_decay is not None and "weight_decay" in config.optimizer_kwargs:
        raise UserError("weight_decay: given here and in optimizer_kwargs, which decays all weights. Expected one of them.")
    if config.compile and config.trainer.splits_layers:
        raise UserError("compile: TensorParallelTrainer splits what would be compiled. Use FSDPTrainer or BasicTrainer.")


def _check_optimizer(config: RunConfig) -> None:
    name, facts, trainer = config.optimizer, config.optimizer_facts, config.trainer
    if not facts.shards and trainer.is_sharded:
        raise UserError(
            f"optimizer: found {name}, whose kernels do not support sharded weights. Use trainer=BasicTrainer, or AdamW, whose "
            "states the processes share."
        )
    if name == "Muon" and trainer.splits_layers:
        raise UserError(
            "optimizer: found Muon, whose updates are of whole matrices, and TensorParallelTrainer splits them. Use "
            "FSDPTrainer, or AdamW."
        )
    if facts.averages and config.lr_schedule != "constant":
        raise UserError(
            f"lr_schedule: found {config.lr_schedule}, expected constant: {name} averages its weights in place of a schedule. "
            "Set lr_schedule=constant; warm-up may stay."
        )
    if facts.averages and config.ema_decay is not None:
        raise UserError(f"ema_decay: found {config.ema_decay}, expected null: {name} averages its weights itself.")
    if config.averages_weights and config.master_weights is False and config.model.trains_low_precision:
        key = "optimizer" if facts.averages else "ema_decay"
        raise UserError(
            f"master_weights: found false, and {key} averages weights, which in {config.model.policy_dtype} would be rounded "
            "away. Set master_weights to auto or true."
        )
    if config.lr_restarts and config.lr_schedule != "cosine":
        raise UserError(f"lr_restarts: found {config.lr_restarts}, and lr_schedule is {config.lr_schedule}. Set it to cosine.")


def _check_load_best(config: RunConfig) -> None:
    """Raise UserError where load_best could not find the best evaluation's weights on disk."""
    if not config.load_best:
        return
    every = config.save_every in (None, config.eval_every)
    if config.save_strategy != "steps" or not every:
        found = f"save_strategy={config.save_strategy}" if every else f"save_every={config.save_every}"
        raise UserError(
            f"load_best: found true with {found}, expected a checkpoint at each evaluation. Set save_strategy=steps and "
            "save_every=null."
        )
    if config.keep_last is not None and config.keep_best is None:
        raise UserError(
            f"load_best: found true, and keep_last={config.keep_last} may remove the best checkpoint. Set keep_best=1 too."
        )
    if config.debug:
        raise UserError("load_best: found true, and debug=true writes no checkpoints. Set one of them to false.")


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
        if not Path(model.chat_template).is_file():
            raise UserError(f"model.chat_template: {model.chat_template}: no such file. Paths are relative to {Path.cwd()}.")
        given = [entry.get("template") if isinstance(entry, dict) else None for entry in listed(config.datasets)]
        if {None, "chat"}.isdisjoint(template or config.template for template in given):
            raise UserError(
                f"model.chat_template: found {model.chat_template}, but template is {config.template}, which does not read it. "
                "Set template=chat or null."
            )


def _check_data(config: RunConfig) -> None:
    weights, half = config.data.weights, config.data.half
    if weights is not None and half is not None:
        raise UserError(f"data.half: found {half} with data.weights={weights}. Expected one of them: halves have no weights.")
    if weights is not None and config.rounds is not None:
        raise UserError(
            f"data.weights: found {weights}, and a loop of rounds makes its own pairs in each round. Set it to null."
        )
    # An evaluation weighs nothing.
    if weights not in (None, FROM_HALVES) and not config.eval_only and not Path(weights).is_dir():
        raise UserError(
            f"data.weights: {weights}: no such directory. Expected {FROM_HALVES}, or the directory of a run that was started "
            f"with data.weights={FROM_HALVES}; paths are relative to {Path.cwd()}."
        )


def check_weights(config: RunConfig, examples: str) -> None:
    """Raise UserError where the examples of a loss are no pairs, of which data.weights and data.half are."""
    for name, found in {"weights": config.data.weights, "half": config.data.half}.items():
        if found is not None and examples != "pairs":
            raise UserError(
                f"data.{name}: found {found}, and loss={config.loss.name} does not train on pairs. Expected a loss that does, "
                f"such as dpo, or data.{name}=null."
            )


def _check_contamination(config: RunConfig) -> None:
    for path in listed(config.contamination_files):
        if not Path(path).is_file():
            raise UserError(f"contamination_files: {path}: no such file. Paths are relative to {Path.cwd()}.")


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
