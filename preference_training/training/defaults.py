"""Defaults that fit a run: what keys that are null become, decided once, and said in a line each.

    bf16, dtypes             by the device             before processes are started
    lr                       by the kind of training   before data is prepared
    template                 by tokenizer and rows     before data is tokenized: data/rendering/choice.py
    eval_every, warm-up      by the number of steps    once data is prepared

A value that is not null is never changed. A resumed run keeps what it had.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from preference_training.checkpointing.resume import find_run
from preference_training.configuration.optimizers import OPTIMIZERS
from preference_training.configuration.schema import RunConfig
from preference_training.core.errors import UserError
from preference_training.core.values import dotted, size_of_model
from preference_training.losses.base import Learns

# What a run has in its checkpoints, and takes from there when it is resumed with null.
KEPT = ("bf16", "lr", "model.policy_dtype", "model.reference_dtype", "model.autocast_dtype", "model.fsdp_policy_mp")
BFLOAT16, FLOAT32 = "bfloat16", "float32"


def settle_dtypes(config: RunConfig, run_dir: Path) -> RunConfig:
    """The configuration with its dtypes decided, by the run that it resumes, else by the device; once decided, unchanged."""
    found = find_run(config.resume, run_dir, config.exp_name)
    return fit_dtypes(kept_from(config, found and found.config))


def kept_from(config: RunConfig, then: dict[str, Any] | None) -> RunConfig:
    """The configuration with what a run to be resumed, configured as `then`, has for keys that are null now."""
    now, before = dotted(config.as_dict()), dotted(then or {})
    return config.changed({key: before[key] for key in KEPT if now.get(key) is None and before.get(key) is not None})


# ---- dtypes ---------------------------------------------------------------------------------------------------------------


def computes_in_bf16() -> bool:
    """Whether this process has a GPU that computes in bfloat16, rather than emulate it."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def fit_dtypes(config: RunConfig, supported: Callable[[], bool] = computes_in_bf16) -> RunConfig:
    """The configuration with `bf16` and the dtypes that it decides. Raises UserError where it contradicts another key."""
    model, asked = config.model, config.bf16
    keys = {
        "model.policy_dtype": model.policy_dtype,
        "model.reference_dtype": model.reference_dtype,
        "model.autocast_dtype": model.autocast_dtype,
        "model.fsdp_policy_mp": model.fsdp_policy_mp,
        "trainer.param_dtype": config.trainer.param_dtype,
    }
    if asked:
        _check_dtypes(keys)
    given = [f"{key}={value}" for key, value in keys.items() if value is not None]
    uses = bool(asked) or (asked is None and not given and supported())
    changes = {"bf16": uses} if asked is None else {}
    if model.policy_dtype is None:
        # One dtype of weights that is given is that of the other too; those of products leave the weights float32.
        computed = model.autocast_dtype or config.sharded_dtype
        # FSDP sums gradients in the dtype of its shards: float32 ones are master weights, in the same memory.
        shards_masters = config.trainer.name == "FSDPTrainer" and model.lora.r is None
        is_low = uses and not computed and not shards_masters
        changes["model.policy_dtype"] = model.reference_dtype or (BFLOAT16 if is_low else FLOAT32)
    policy = changes.get("model.policy_dtype", model.policy_dtype)
    if model.reference_dtype is None:
        changes["model.reference_dtype"] = policy
    if uses and policy == FLOAT32 and config.trainer.name != "FSDPTrainer" and model.autocast_dtype is None:
        changes["model.autocast_dtype"] = BFLOAT16
    if uses and config.trainer.name == "FSDPTrainer" and config.sharded_dtype is None:
        changes["model.fsdp_policy_mp"] = BFLOAT16
    fitted = config.changed(changes)
    return _chosen(fitted, "bf16", _dtype_line(fitted, given)) if asked is None or (asked and changes) else fitted


def _check_dtypes(keys: dict[str, str | None]) -> None:
    """Raise UserError for a dtype that bf16=true contradicts: float32 weights are none, since products may be bfloat16."""
    weights = ("model.policy_dtype", "model.reference_dtype")
    wrong = [f"{key}={value}" for key, value in keys.items() if value not in (None, BFLOAT16, *[FLOAT32] * (key in weights))]
    if wrong:
        raise UserError(
            f"bf16: found true, and {' and '.join(wrong)}. Expected one of "
            "them: leave out bf16, or leave these null or bfloat16."
        )


def _dtype_line(config: RunConfig, given: list[str]) -> str:
    model = config.model
    if not config.bf16:
        why = f"{' and '.join(given)} given" if given else "no GPU here that computes in bfloat16"
        return f"bf16: false, {why}; weights are {model.policy_dtype}"
    products = model.autocast_dtype or config.sharded_dtype or model.policy_dtype
    return f"bf16: true, weights in {model.policy_dtype}, products in {products}; bf16=false computes in float32"


# ---- the learning rate ----------------------------------------------------------------------------------------------------


class Rates(NamedTuple):
    """Learning rates of all weights and of LoRA adapters; `small` of models below SMALL."""

    full: float
    full_small: float
    lora: float
    lora_small: float


# Parameters of a small model.
SMALL = 1e9
# What is usual for batches of 8 to 64 and AdamW. docs/defaults.md has the sources of each number, and this table.
RATES: dict[Learns, Rates] = {
    "responses": Rates(full=2e-5, full_small=1e-4, lora=2e-4, lora_small=5e-4),
    "log-ratios": Rates(full=1e-6, full_small=5e-6, lora=1e-5, lora_small=5e-5),
    "margins": Rates(full=5e-7, full_small=2e-6, lora=5e-6, lora_small=2e-5),
    "odds": Rates(full=5e-6, full_small=2e-5, lora=5e-5, lora_small=1e-4),
    "labels": Rates(full=1e-6, full_small=5e-6, lora=1e-5, lora_small=5e-5),
    "rewards": Rates(full=1e-5, full_small=2e-5, lora=1e-4, lora_small=2e-4),
}


def usual_lr(learns: Learns, parameters: int, has_adapter: bool, optimizer: str = "AdamW") -> float:
    """What is usual for a loss that learns from this, on a model with so many parameters."""
    rates = RATES[learns]
    full, lora = (rates.full_small, rates.lora_small) if parameters < SMALL else (rates.full, rates.lora)
    # Rounded, so that 30 times 5e-6 is 1.5e-4.
    return float(f"{(lora if has_adapter else full) * (OPTIMIZERS[optimizer].lr_factor or 1.0):.6g}")


def fit_lr(config: RunConfig, learns: Learns, count_parameters: Callable[[], int]) -> RunConfig:
    """The configuration with `lr`. count_parameters: of the model, called only where needed.

    Quantized models have the learning rates of LoRA on others: Dettmers et al. 2023 (QLoRA) found that of LoRA in 16 bits best.
    """
    if config.lr is not None:
        return config
    parameters = count_parameters()
    lr = usual_lr(learns, parameters, config.model.lora.r is not None, config.optimizer)
    line = f"lr: {lr:g}, usual for {_kind_of_training(config, parameters)} (docs/defaults.md)"
    return _chosen(config.changed({"lr": lr}), "lr", line)


def unusual_lr(config: RunConfig, learns: Learns, count_parameters: Callable[[], int]) -> str | None:
    """The warning for a learning rate of the user's that is FAR from what is usual; None for any other.

    None also where nothing is usual: for a model from scratch, for SGD, whose steps are not of the size of lr, and for Muon
    whose updates are not of the size of AdamW's.
    """
    is_given = any(text.lstrip("+").startswith("lr=") for text in config.origin.overrides)
    from_scratch = config.model.name_or_path is None and config.model.archive is None
    other_size = config.optimizer_facts.lr_factor is None or config.optimizer_kwargs.get("adjust_lr_fn") == "original"
    if not is_given or from_scratch or other_size:
        return None
    parameters = count_parameters()
    usual = usual_lr(learns, parameters, config.model.lora.r is not None, config.optimizer)
    if (far := far_from_usual(config.lr, usual)) is None:
        return None
    what = _kind_of_training(config, parameters)
    consequence = "such runs often break the model. Lower it" if config.lr > usual else "such runs hardly learn. Raise it"
    return f"warning: lr={config.lr:g} is {far} what is usual for {what}, {usual:g} (docs/defaults.md): {consequence}."


# How many times above or below what is usual a learning rate is far from it.
FAR = 10


def far_from_usual(lr: float, usual: float) -> str | None:
    """How far a learning rate is from the usual one, as the words before "what is usual"; None for one that is near."""
    # Rounded, since 10 times 5e-6 is a little less than 5e-5.
    ratio = float(f"{lr / usual:.6g}")
    return f"{ratio:,.3g} times" if ratio >= FAR else f"1/{1 / ratio:,.3g} of" if ratio <= 1 / FAR else None


def _kind_of_training(config: RunConfig, parameters: int) -> str:
    what = "a LoRA adapter" if config.model.lora.r is not None else "all weights"
    by = f" with {config.optimizer}" if config.optimizer_facts.lr_factor not in (None, 1.0) else ""
    return f"loss={config.loss.name} on {what} of a model of {size_of_model(parameters)} parameters{by}"


# ---- what depends on the number of steps ------------------------------------------------------------------------------------

EVALUATIONS = 10
# Of these, besides the one before training: sampling 128 tokens takes as long as a step and a half on a CPU.
SAMPLINGS = 4
# Examples between two evaluations of a long run.
MOST_BETWEEN = 20_000


def evaluation_interval(total: int, batch_size: int) -> int:
    """Examples between two evaluations of a run over so many in total: whole batches, for at least ten evaluations."""
    return max(batch_size, min(MOST_BETWEEN, total // EVALUATIONS) // batch_size * batch_size)


def fit_steps(config: RunConfig, examples: int, steps: int) -> RunConfig:
    """The configuration with `eval_every` and `sample_every`, for a run over so many examples; config.yaml keeps the nulls."""
    fitted = config
    if config.eval_every is None:
        every = evaluation_interval(examples, config.batch_size)
        number = -(-examples // every)
        line = f"eval_every: {every:,} examples, {number} evaluation{'s' * (number != 1)} in the run"
        between = max(every, -(-examples // SAMPLINGS))
        fitted = _chosen(replace(config, eval_every=every, sample_every=config.sample_every or between), "eval_every", line)
    if config.warmup_steps is None and config.warmup_share is not None:
        warmup = round(config.warmup_share * steps)
        line = f"warmup_steps: {warmup:,} of {steps:,}, warmup_share={config.warmup_share:g}"
        fitted = _chosen(fitted, "warmup_steps", line)
    return fitted


def _chosen(config: RunConfig, key: str, line: str) -> RunConfig:
    return replace(config, chosen={**config.chosen, key: line})
