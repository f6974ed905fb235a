"""The configuration of a run, typed: a class for each section, an attribute for each key.

What a key is for, its unit and its default stand in the YAML files under config/; what its value may be and where the key
counts stands here, once. A new key is a line in both.
"""

import copy
import math
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from preference_training.configuration.keys import (
    MAY_CHANGE_ON_RESUME,
    NEWER,
    NOT_SHOWN,
    OPEN,
    OUTSIDE_JOB_IDENTITY,
    PATH,
    Section,
    anything,
    expected,
    factors,
    is_number,
    key,
    key_names,
    known_name,
    listed,
    not_negative,
    one_of,
    optional_section,
    plain_section,
    positive,
    section,
    share,
    switch,
    text,
    texts,
    whole,
)
from preference_training.configuration.optimizers import OPTIMIZERS, OptimizerFacts, states_kept
from preference_training.configuration.sections import (
    DataConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    QualityConfig,
    RoundsConfig,
    TrainerConfig,
    WandbConfig,
)

# Of Optuna's those that judge by the values of runs alone.
PRUNERS = ("MedianPruner", "PercentilePruner", "ThresholdPruner")
SCHEDULES = ("constant", "linear", "cosine", "inverse_sqrt", "wsd")
# Keys of a run that an entry of `datasets` may override, and the values that some of them may have, besides null.
GENERAL_KEYS = ("template", "system_prompt", "train_on", "truncation_mode", "on_bad_row", "weight")
TEMPLATES = ("raw", "hh", "chatml", "chat")
TRUNCATION_MODES = ("keep_start", "keep_end", "drop")
TRAINED_TURNS = ("all_turns", "last_turn")
GENERAL_CHOICES = {
    "template": TEMPLATES,
    "train_on": TRAINED_TURNS,
    "truncation_mode": TRUNCATION_MODES,
    "on_bad_row": ("stop", "skip"),
}
AnySection = TypeVar("AnySection", bound=Section)
# Of exp_name; most systems allow a directory's name 255, and the moment follows it. Unit: bytes.
LONGEST_NAME = 200


def _directory_name(value: Any) -> str | None:
    problem = text()(value)
    valid = problem is None and value.isprintable() and "/" not in value and len(value.encode()) <= LONGEST_NAME
    words = f"the beginning of a directory's name: at most {LONGEST_NAME} bytes, none of them a /"
    return problem or (None if valid else f"found {value!r}, expected {words}.")


@dataclass(frozen=True)
class Origin:
    """What a configuration was composed from: the command line, the model preset, and the keys that were null.

    folder: presets of the user's own, None without any (--config-dir).
    """

    overrides: tuple[str, ...] = ()
    preset: str = "base_model"
    nulls: frozenset[str] = frozenset()
    folder: Path | None = None


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """Everything a run is configured by. `as_composed` has the same keys in plain values, references to others unresolved."""

    seed: int = key(whole(0))
    exp_name: str = key(_directory_name, MAY_CHANGE_ON_RESUME, NOT_SHOWN)
    batch_size: int = key(whole(1))
    per_device_batch_size: int | None = key(whole(1, null=True))
    eval_batch_size: int = key(whole(1), MAY_CHANGE_ON_RESUME)
    debug: bool = key(switch, MAY_CHANGE_ON_RESUME, NOT_SHOWN)
    fsdp_port: int | None = key(
        expected("a port from 1 to 65535, or null", lambda value: value is None or (type(value) is int and 0 < value < 2**16)),
        *(MAY_CHANGE_ON_RESUME, OUTSIDE_JOB_IDENTITY, NOT_SHOWN),
    )
    datasets: list[Any] | str | dict[str, Any] = key(anything, NOT_SHOWN, PATH)
    data: DataConfig = section(DataConfig)
    held_out_share: float = key(share())
    template: str | None = key(one_of(TEMPLATES, null=True))
    system_prompt: str | None = key(text(null=True))
    train_on: str = key(one_of(TRAINED_TURNS), NEWER)
    on_bad_row: str | None = key(one_of(GENERAL_CHOICES["on_bad_row"], null=True))
    dry_run: bool | str = key(
        expected("true, false or strict", lambda value: isinstance(value, bool) or value == "strict"),
        *(MAY_CHANGE_ON_RESUME, NOT_SHOWN),
    )
    contamination_files: list[str] | str = key(
        texts("paths, as in [gsm8k_test.jsonl]"), MAY_CHANGE_ON_RESUME, OUTSIDE_JOB_IDENTITY, NOT_SHOWN, PATH
    )
    quality: QualityConfig = section(QualityConfig, MAY_CHANGE_ON_RESUME, OUTSIDE_JOB_IDENTITY, NOT_SHOWN)
    eval_only: bool = key(switch, MAY_CHANGE_ON_RESUME)
    evaluation: EvaluationConfig = section(EvaluationConfig, MAY_CHANGE_ON_RESUME)
    tracking: list[str] | str = key(anything, MAY_CHANGE_ON_RESUME, OUTSIDE_JOB_IDENTITY)
    wandb: WandbConfig = section(WandbConfig, MAY_CHANGE_ON_RESUME, OUTSIDE_JOB_IDENTITY, NOT_SHOWN)
    local_dirs: list[str] | str = key(anything, MAY_CHANGE_ON_RESUME, OUTSIDE_JOB_IDENTITY, NOT_SHOWN, PATH)
    local_run_dir: str = key(anything, MAY_CHANGE_ON_RESUME, OUTSIDE_JOB_IDENTITY, NOT_SHOWN, PATH)
    sweep_dir: str | None = key(text(null=True), MAY_CHANGE_ON_RESUME, OUTSIDE_JOB_IDENTITY, NOT_SHOWN, PATH)
    gpus_per_job: int | None = key(whole(1, null=True), MAY_CHANGE_ON_RESUME, OUTSIDE_JOB_IDENTITY, NOT_SHOWN)
    pruner: str | None = key(known_name("pruner", PRUNERS, null=True), MAY_CHANGE_ON_RESUME, NOT_SHOWN)
    pruner_kwargs: dict[str, Any] = key(plain_section, OPEN, MAY_CHANGE_ON_RESUME, NOT_SHOWN)
    cache_dir: str | None = key(text(null=True), MAY_CHANGE_ON_RESUME, OUTSIDE_JOB_IDENTITY, NOT_SHOWN, PATH)
    sample_during_eval: bool | None = key(
        expected("true, false or null", lambda value: value is None or isinstance(value, bool)), MAY_CHANGE_ON_RESUME
    )
    n_eval_model_samples: int = key(whole(0), MAY_CHANGE_ON_RESUME)
    sample_every: int | None = key(whole(1, null=True), NEWER, MAY_CHANGE_ON_RESUME)
    max_sample_length: int | None = key(whole(1, null=True), NEWER, MAY_CHANGE_ON_RESUME)
    do_first_eval: bool = key(switch, MAY_CHANGE_ON_RESUME)
    lr: float | None = key(positive(null=True))
    lr_schedule: str = key(one_of(SCHEDULES))
    final_lr_share: float = key(share())
    decay_share: float = key(expected("a share above 0, at most 1", lambda value: is_number(value) and 0 < value <= 1), NEWER)
    lr_restarts: int = key(whole(0), NEWER)
    lr_groups: dict[str, float] | None = key(factors, NEWER)
    weight_decay: float | None = key(not_negative(null=True))
    gradient_accumulation_steps: int = key(whole(1))
    max_tokens_per_microbatch: int | None = key(whole(1, null=True), MAY_CHANGE_ON_RESUME)
    prefix_sharing: str = key(one_of(("auto", "on", "off"), "auto, on or off"), MAY_CHANGE_ON_RESUME)
    prefix_attention: str = key(one_of(("auto", "flex", "varlen"), "auto, flex or varlen"), MAY_CHANGE_ON_RESUME, NEWER)
    reference_logps: str | None = key(one_of(("live", "cached"), null=True), MAY_CHANGE_ON_RESUME)
    tf32: bool = key(switch)
    bf16: bool | None = key(expected("true, false or null", lambda value: value is None or isinstance(value, bool)), NEWER)
    peak_tflops: float | None = key(positive(null=True), MAY_CHANGE_ON_RESUME, OUTSIDE_JOB_IDENTITY, NOT_SHOWN, NEWER)
    assumed_mfu: float = key(
        expected("a share above 0, at most 1", lambda value: is_number(value) and 0 < value <= 1),
        *(MAY_CHANGE_ON_RESUME, OUTSIDE_JOB_IDENTITY, NOT_SHOWN, NEWER),
    )
    max_grad_norm: float = key(
        expected("a number above 0", lambda value: value == math.inf or (is_number(value) and value > 0))
    )
    max_length: int = key(whole(1))
    # Half of max_length where it is null; never None behind `validate`.
    max_prompt_length: int = key(whole(1, null=True))
    truncation_mode: str | None = key(one_of(TRUNCATION_MODES, null=True))
    sampling: str = key(one_of(("shuffle", "replacement"), "shuffle or replacement"), NEWER)
    n_epochs: int | None = key(whole(1, null=True), MAY_CHANGE_ON_RESUME)
    n_examples: int | None = key(whole(1, null=True), MAY_CHANGE_ON_RESUME)
    n_steps: int | None = key(whole(1, null=True), MAY_CHANGE_ON_RESUME)
    early_stopping_patience: int | None = key(whole(1, null=True), MAY_CHANGE_ON_RESUME)
    n_eval_examples: int | None = key(whole(1, null=True), MAY_CHANGE_ON_RESUME)
    optimizer: str = key(known_name("optimizer", tuple(OPTIMIZERS)))
    optimizer_kwargs: dict[str, Any] = key(plain_section, OPEN)
    ema_decay: float | None = key(
        expected("a number above 0 and below 1, or null", lambda value: value is None or (is_number(value) and 0 < value < 1)),
        *(NEWER,),
    )
    master_weights: bool | str = key(
        expected("auto, true or false", lambda value: value == "auto" or isinstance(value, bool)), MAY_CHANGE_ON_RESUME
    )
    warmup_steps: int | None = key(whole(0, null=True))
    warmup_share: float | None = key(share(null=True))
    activation_checkpointing: bool | str = key(
        expected("true, false or selective", lambda value: value == "selective" or isinstance(value, bool)),
        *(MAY_CHANGE_ON_RESUME,),
    )
    compile: bool = key(switch)
    eval_every: int | None = key(whole(1, null=True), MAY_CHANGE_ON_RESUME)
    resume: str | None = key(text(null=True), MAY_CHANGE_ON_RESUME, NOT_SHOWN, PATH)
    save_strategy: str = key(one_of(("steps", "epoch", "no"), "steps, epoch or no"), MAY_CHANGE_ON_RESUME, NOT_SHOWN)
    save_every: int | None = key(whole(1, null=True), MAY_CHANGE_ON_RESUME, NOT_SHOWN)
    save_async: bool = key(switch, MAY_CHANGE_ON_RESUME, NOT_SHOWN)
    keep_last: int | None = key(whole(1, null=True), MAY_CHANGE_ON_RESUME, NOT_SHOWN)
    keep_best: int | None = key(whole(1, null=True), MAY_CHANGE_ON_RESUME, NOT_SHOWN)
    max_wall_time: float | None = key(positive(null=True), MAY_CHANGE_ON_RESUME, OUTSIDE_JOB_IDENTITY, NOT_SHOWN)
    max_bad_steps: int = key(whole(1), MAY_CHANGE_ON_RESUME)
    loss_spike: float | None = key(positive(null=True), MAY_CHANGE_ON_RESUME)
    load_best: bool = key(switch, MAY_CHANGE_ON_RESUME, NEWER)
    save_policy_pt: bool = key(switch, MAY_CHANGE_ON_RESUME, NOT_SHOWN)
    ledger: bool = key(switch, MAY_CHANGE_ON_RESUME)
    minimum_log_interval_secs: float = key(not_negative(" of seconds"), MAY_CHANGE_ON_RESUME, OUTSIDE_JOB_IDENTITY, NOT_SHOWN)
    objective: str = key(text(), MAY_CHANGE_ON_RESUME)
    model: ModelConfig = section(ModelConfig)
    loss: LossConfig = section(LossConfig)
    trainer: TrainerConfig = section(TrainerConfig)
    # Only with +rounds=default.
    rounds: RoundsConfig | None = optional_section(RoundsConfig)
    as_composed: dict[str, Any] = field(repr=False, compare=False)
    origin: Origin = field(default=Origin(), repr=False, compare=False)
    # For keys that were null, what became of them, as a line of text.
    chosen: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, values: dict[str, Any], as_composed: dict[str, Any] | None = None) -> "RunConfig":
        """The configuration with these plain values, unchecked. as_composed: the same with references, if there are any."""
        return super().of({**values, "as_composed": as_composed or values})

    def changed(self, values: dict[str, Any]) -> "RunConfig":
        """A copy with other values, by dotted names, unchecked."""
        composed = copy.deepcopy(self.as_composed)
        config: RunConfig = self
        for name, value in values.items():
            *above, last = name.split(".")
            config, place = _replaced(config, name.split("."), value), composed
            for each in above:
                place = place[each]
            place[last] = value
        return replace(config, as_composed=composed)

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain values: the keys that were composed, in that order, references resolved."""
        return _plain(self, self.as_composed)

    def with_head(self, head: str) -> "RunConfig":
        """A copy whose model has a head: lm or value."""
        return replace(self, model=replace(self.model, head=head))

    @property
    def sharded_dtype(self) -> str | None:
        """The dtype that a sharded trainer gathers weights in and computes in; None is the weights' own."""
        return (self.trainer.param_dtype or self.model.fsdp_policy_mp) if self.trainer.is_sharded else None

    @property
    def dashboard_names(self) -> list[str]:
        """The dashboards in `tracking`: where a run's metrics go besides its own files."""
        switched_off = {"jsonl"} if self.wandb.enabled else {"jsonl", "wandb"}
        return [] if self.debug else [name for name in listed(self.tracking) if name not in switched_off]

    @property
    def optimizer_facts(self) -> OptimizerFacts:
        """What is known of the optimizer."""
        return OPTIMIZERS[self.optimizer]

    @property
    def averages_weights(self) -> bool:
        """Whether the weights that are evaluated and saved are an average of those that are trained."""
        return self.ema_decay is not None or self.optimizer_facts.averages

    @property
    def keeps_master_weights(self) -> bool:
        """Whether low-precision weights have float32 master weights in the optimizer, from which they are rounded.

        auto has them where updates would be rounded away, or an average of weights. RMSprop, AdamW and the like take steps of
        about lr; of SGD's nothing is known before, and Adafactor's are a share of the weights.
        """
        trained = self.model.trains_low_precision
        if self.master_weights != "auto":
            return bool(self.master_weights) and trained
        unknown = not self.optimizer_facts.updates_by_lr or self.averages_weights
        return trained and (unknown or (self.lr or 0.0) < self.model.smallest_kept_lr)

    @property
    def weight_copies(self) -> float:
        """How many times the memory of the trained weights gradients, optimizer and averages take, about."""
        facts, masters = self.optimizer_facts, self.keeps_master_weights
        weight = 2 if self.model.trains_low_precision else 4
        updated = 4 if masters else weight
        # A gradient of the weights' dtype; or a summed one and a copy, both in float32.
        gradient = 4 + 4 if masters else weight
        states = states_kept(self.optimizer, self.optimizer_kwargs) * (facts.state_bytes or updated)
        return (gradient + states + updated * (self.ema_decay is not None)) / weight

    def caches_reference(self, read_again: bool) -> bool:
        """Whether the reference's log-probs are computed before training: if asked for, or left open and read more than once.

        Never where the reference follows the policy.
        """
        requested = self.reference_logps
        return requested == "cached" or (requested is None and read_again and not self.loss.moves_reference)

    @property
    def two_models_notice(self) -> str | None:
        """The notice for a policy and a reference that are different models from the start, as configured."""
        policy, reference = self.model.policy_dtype, self.model.reference_dtype
        if self.model.reference_archive is not None:
            return (
                f"model.reference_archive: the reference is {self.model.reference_archive}, and the policy another model, as "
                "configured: margins are not 0 at the beginning, and that they start alike is not checked"
            )
        if policy == reference:
            return None
        return (
            f"model.reference_dtype: {reference}, and the policy is {policy}: two models, whose margins are not 0 at the "
            "beginning; that they start alike is not checked"
        )


def _replaced(found: AnySection, names: list[str], value: Any) -> AnySection:
    name, *below = names
    if isinstance(found, LossConfig) and name in found.own:
        return replace(found, own={**found.own, name: value})
    inner = getattr(found, name)
    if below and isinstance(inner, Section):
        value = _replaced(inner, below, value)
    elif below:
        value = {**inner, below[0]: value}
    return replace(found, **{name: value})


def _plain(found: Section, composed: dict[str, Any]) -> dict[str, Any]:
    own = found.own if isinstance(found, LossConfig) else {}
    values = {name: own[name] if name in own else getattr(found, name) for name in composed}
    return {
        name: _plain(value, composed[name]) if isinstance(value, Section) else copy.deepcopy(value)
        for name, value in values.items()
    }


@cache
def keys_with(flag: str) -> frozenset[str]:
    """The dotted names of the keys that have a flag, and of the sections whose keys all have it."""
    return frozenset(name for name, flags in key_names(RunConfig).items() if flag in flags)
