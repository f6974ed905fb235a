"""Keys that are given and that nothing reads, as the run is configured: said in a line, or refused where they surely mislead.

Compared with what the user has given, on the command line or in a file of their own. What presets and recipes set counts for
other choices too, and is never said.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from preference_training.configuration.config_files import key_of
from preference_training.configuration.schema import RunConfig
from preference_training.core.errors import UserError
from preference_training.core.values import dotted


@dataclass(frozen=True)
class Need:
    """What a key needs to be read: another key with one of some values, or with any but null and [] where none are named.

    remedy: of a key whose user is misled unless the other one is given too.
    """

    other: str
    values: tuple[Any, ...] = ()
    remedy: str = ""

    def is_met(self, value: object) -> bool:
        """Whether the other key's value is one that the key needs."""
        return value in self.values if self.values else value not in (None, [])


BETA_DPO = Need("loss.mode_loss", ("beta_DPO",), "Set loss.mode_loss=beta_DPO, or leave it out.")
ADAPTER = Need("model.lora.r", remedy="All weights would be trained. Add +adapter=lora, or leave it out.")
SAMPLES = Need("sample_during_eval", (None, True))
SHARDED = Need("trainer.name", ("FSDPTrainer", "TensorParallelTrainer"))
CHECKPOINTS = Need("save_strategy", ("steps", "epoch"))
WANDB = Need("wandb.enabled", (True,))
NEEDS: dict[str, Need] = {
    "loss.mode_weight": BETA_DPO,
    "loss.a": BETA_DPO,
    "loss.threshold": Need("loss.mode_loss", ("beta_DPO",)),
    "loss.f_alpha": Need("loss.f_divergence", ("alpha",)),
    "model.lora.alpha": ADAPTER,
    "model.lora.dropout": ADAPTER,
    "model.lora.target_modules": ADAPTER,
    "model.quantized_compute_dtype": Need("model.quantization"),
    "model.double_quantization": Need("model.quantization", ("nf4",)),
    "model.fsdp_policy_mp": SHARDED,
    "fsdp_port": SHARDED,
    "decay_share": Need("lr_schedule", ("wsd",)),
    "final_lr_share": Need("lr_schedule", ("linear", "cosine", "wsd")),
    "pruner_kwargs": Need("pruner"),
    "prefix_attention": Need("prefix_sharing", ("auto", "on")),
    "save_every": Need("save_strategy", ("steps",)),
    "keep_last": CHECKPOINTS,
    "keep_best": CHECKPOINTS,
    "wandb.project": WANDB,
    "wandb.entity": WANDB,
    "sample_every": SAMPLES,
    "n_eval_model_samples": SAMPLES,
    "max_sample_length": SAMPLES,
    "evaluation.to": Need("eval_only", (True,)),
    "evaluation.task_path": Need("evaluation.tasks"),
    "evaluation.task_limit": Need("evaluation.tasks"),
}


def given_keys(config: RunConfig) -> list[str]:
    """The keys that the user has set, in order."""
    return [key_of(text) for text in config.origin.overrides]


def check_misleading(config: RunConfig) -> None:
    """Raise UserError for a key without effect whose user surely expects one.

    Of the jobs of a sweep, one may be there to be compared with those that read the key.
    """
    if config.sweep_dir is not None:
        return
    given = given_keys(config)
    for key, need, found in _unread(config):
        if need.remedy and need.other not in given:
            value = dotted(config.as_dict())[key]
            raise UserError(f"{key}: found {value}, without effect, since {need.other} is {_shown(found)}. {need.remedy}")


def unread_keys(config: RunConfig) -> list[str]:
    """A line on each key that the user has set without effect."""
    lines = []
    for key, need, found in _unread(config):
        other = need.other.removesuffix(".name")
        lines.append(f"{key}: without effect, since {other} is {_shown(found)}")
    return lines


def _shown(value: object) -> object:
    """A value as configurations write it."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else value


def _unread(config: RunConfig) -> list[tuple[str, Need, Any]]:
    """Keys that the user has set without effect, what each needs, and what was found of that."""
    values, given = dotted(config.as_dict()), given_keys(config)
    found = []
    for key, need in NEEDS.items():
        is_given = any(name == key or name.startswith(f"{key}.") for name in given)
        # null asks for nothing.
        if is_given and values.get(key, ...) is not None and not need.is_met(values.get(need.other)):
            found.append((key, need, values.get(need.other)))
    return found


def check_warmups(overrides: Sequence[str], steps: Any, share: Any) -> None:
    """Raise UserError where a user sets the length of the warm-up twice."""
    if {"warmup_steps", "warmup_share"} <= set(map(key_of, overrides)) and steps is not None is not share:
        raise UserError(f"warmup_steps: found {steps} beside warmup_share={share}, which sets the same. Expected one of them.")
