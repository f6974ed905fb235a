"""The sections of a run's configuration, typed: a class for each, an attribute for each key. See schema.py."""

import copy
import re
from dataclasses import dataclass, field, replace
from typing import Any, Self

from preference_training.configuration.keys import (
    MAY_CHANGE_ON_RESUME,
    NEWER,
    NOT_SHOWN,
    OPEN,
    OUTSIDE_JOB_IDENTITY,
    PATH,
    Section,
    anything,
    check_section,
    declared,
    expected,
    is_number,
    key,
    known_name,
    listed,
    not_negative,
    one_of,
    optional_key,
    plain_section,
    positive,
    section,
    share,
    switch,
    text,
    texts,
    whole,
)
from preference_training.core.errors import UserError, nearest

# ZeRO stage 3, 2, 1; replicas; stage 3 within a machine and replicas across.
SHARDINGS = ("full", "grad_op", "optimizer", "none", "hybrid")
ATTENTIONS = ("auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3")
DTYPES = ("float32", "bfloat16", "float16")
MODES = ("DPO", "beta_DPO")
# Of model.reference_archive: the model without an archive.
BASE_MODEL = "base"
# Relative distance of neighboring numbers of a low-precision dtype, at most. A smaller update of a weight may be rounded away.
SPACINGS = {"bfloat16": 2**-7, "float16": 2**-10}
# The largest of ordinary weights: matrices of language models have standard deviations of 0.02 to 0.05.
ORDINARY_WEIGHT = 0.05


# How an adapter starts: as no change of any output, or (pissa, olora) as directions of the weights themselves.
LORA_INITS = ("default", "gaussian", "orthogonal", "pissa", "olora")


def is_block_number(value: Any) -> bool:
    """Whether a value can be the number of a block."""
    return type(value) is int and value >= 0


def _init_problem(value: Any) -> str | None:
    if value == "loftq":
        return (
            "found 'loftq', which corrects weights that were quantized: its checkpoints would be wrong on the original base "
            "model, where other libraries load them. Expected default, or pissa."
        )
    is_iterated = isinstance(value, str) and re.fullmatch(r"pissa_niter_[1-9]\d*", value)
    return None if is_iterated else known_name("initialization", (*LORA_INITS, "pissa_niter_16"))(value)


def _modules_problem(value: Any) -> str | None:
    """Names of modules, or a regular expression for whole names, or None."""
    if value == [] or not all(isinstance(name, str) for name in ([] if value is None else listed(value))):
        return f"found {value!r}, expected names of modules, as in [embed_tokens,lm_head], or null."
    try:
        re.compile(value if isinstance(value, str) else "")
    except re.error as error:
        return f"found {value!r}, expected a list of names, or a regular expression for whole names: {error}."
    return None


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Section):
    """model.lora"""

    r: int | None = key(whole(1, null=True))
    alpha: float = key(positive())
    dropout: float = key(share())
    target_modules: list[str] | str | None = key(
        expected(
            "names of layers, as in [q_proj,v_proj], or null",
            lambda value: value is None or (value != [] and all(isinstance(name, str) for name in listed(value))),
        )
    )
    target_parameters: list[str] | None = key(
        expected(
            "ends of names of weights, as in [mlp.experts.down_proj], or null",
            lambda value: (
                value is None or (isinstance(value, list) and value != [] and all(isinstance(each, str) for each in value))
            ),
        ),
        NEWER,
    )
    modules_to_save: list[str] | str | None = key(_modules_problem, NEWER)
    layers: list[int] | None = key(
        expected(
            "numbers of blocks from 0, as in [0,1,2], or null",
            lambda value: value is None or (isinstance(value, list) and value != [] and all(map(is_block_number, value))),
        ),
        NEWER,
    )
    use_dora: bool = key(switch, NEWER)
    use_rslora: bool = key(switch, NEWER)
    init: str = key(_init_problem, NEWER)
    loraplus_lr_ratio: float | None = key(positive(null=True), NEWER)

    @property
    def subtracts_start(self) -> bool:
        """Whether the adapter starts as a change of outputs, or one that only rounding leaves, so that it is subtracted."""
        return self.init.startswith(("pissa", "olora", "orthogonal"))


def _patterns_problem(value: Any) -> str | None:
    """Regular expressions, or None."""
    for pattern in [] if value is None else listed(value):
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            return f"found {pattern!r}, expected a regular expression for names of weights, or a list of them: {error}."
    return "found [], expected names of weights, or null." if value == [] else None


def _tokens_problem(value: Any) -> str | None:
    if not isinstance(value, list) or not all(isinstance(token, str) and token for token in value):
        return f"found {value!r}, expected a list of texts, as in ['<tool>','</tool>']."
    twice = next((token for token in value if value.count(token) > 1), None)
    return None if twice is None else f"found {twice!r} twice, expected each token once."


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """model"""

    name_or_path: str | None = key(text(null=True), NOT_SHOWN, PATH)
    tokenizer_name_or_path: str | None = key(text(null=True), NOT_SHOWN, PATH)
    chat_template: str | None = key(text(null=True), NEWER, PATH)
    archive: str | None = key(text(null=True), NOT_SHOWN, PATH)
    reference_archive: str | None = key(text(null=True), NOT_SHOWN, NEWER, PATH)
    block_name: str | None = key(text(null=True))
    policy_dtype: str | None = key(known_name("dtype", DTYPES, null=True))
    autocast_dtype: str | None = key(known_name("dtype", DTYPES, null=True))
    fsdp_policy_mp: str | None = key(known_name("dtype", DTYPES, null=True))
    reference_dtype: str | None = key(known_name("dtype", DTYPES, null=True))
    from_config: dict[str, Any] = key(plain_section, OPEN)
    lora: LoraConfig = section(LoraConfig)
    quantization: str | None = key(one_of(("nf4", "int8"), "nf4, int8", null=True))
    double_quantization: bool = key(switch)
    quantized_compute_dtype: str | None = key(known_name("dtype", DTYPES, null=True))
    fp8: bool = key(switch, NEWER)
    router_aux_loss: float | None = key(not_negative(null=True), NEWER)
    trainable: list[str] | str | None = key(_patterns_problem, NEWER)
    freeze: list[str] | str | None = key(_patterns_problem, NEWER)
    spectrum_share: float | None = key(
        expected("a share above 0 and below 1", lambda value: is_number(value) and 0 < value < 1, null=True), NEWER
    )
    neftune_alpha: float | None = key(positive(null=True), NEWER)
    add_tokens: list[str] = key(_tokens_problem, NEWER)
    add_special_tokens: list[str] = key(_tokens_problem, NEWER)
    attn_implementation: str = key(one_of(ATTENTIONS))
    liger_kernels: bool = key(switch)
    trust_remote_code: bool = key(switch)
    # No key: the loss says what head its models have, lm or value.
    head: str = "lm"

    @property
    def chooses_weights(self) -> bool:
        """Whether some weights are frozen without an adapter."""
        return not (self.trainable is None and self.freeze is None and self.spectrum_share is None)

    def untrained(self) -> Self:
        """The same model where nothing is trained, so that no weights are chosen, which Spectrum does by decompositions."""
        return replace(self, trainable=None, freeze=None, spectrum_share=None)

    def of_reference(self) -> Self:
        """The model of `reference_archive`, where it has weights of its own."""
        archive = None if self.reference_archive == BASE_MODEL else self.reference_archive
        return replace(self.untrained(), archive=archive, reference_archive=None, policy_dtype=self.reference_dtype)

    def portable(self) -> Self:
        """The same model without kernels that only the machine of its run may have."""
        return replace(self, liger_kernels=False, attn_implementation="auto", autocast_dtype=None)

    @property
    def added_tokens(self) -> list[str]:
        """The tokens that are added to the vocabulary."""
        return [*self.add_tokens, *self.add_special_tokens]

    @property
    def trains_low_precision(self) -> bool:
        """Whether weights in bfloat16 or float16 are trained; adapters are float32 whatever the base model's dtype."""
        return self.policy_dtype in SPACINGS and (self.lora.r is None or self.lora.modules_to_save is not None)

    @property
    def smallest_kept_lr(self) -> float:
        """The learning rate from which ordinary weights of a low-precision dtype take every update, of one lr in size."""
        # Half of the distance is rounded up.
        return ORDINARY_WEIGHT * SPACINGS[str(self.policy_dtype)] / 2


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    """loss: the keys that losses share, None where the chosen loss has none; `own` are those of its file that only it has."""

    name: str = key(anything)
    beta: float | None = optional_key(
        expected("a number above 0: at 0 the loss never changes", lambda value: is_number(value) and value > 0)
    )
    label_smoothing: float | None = optional_key(share(below=0.5))
    reference_free: bool | None = optional_key(switch)
    length_normalised: bool | None = optional_key(switch)
    mode_loss: str | None = optional_key(known_name("mode", MODES))
    mode_weight: float | None = optional_key(share())
    a: float | None = optional_key(not_negative())
    threshold: str | None = optional_key(one_of(("running_mean", "trend"), "running_mean or trend"), NEWER)
    alpha: float | None = optional_key(not_negative())
    penalty: float | None = optional_key(not_negative())
    gamma: float | None = optional_key(not_negative())
    average: str | None = optional_key(one_of(("responses", "tokens"), "responses or tokens"), NEWER)
    reference_update_every: int | None = optional_key(whole(1))
    reference_update_share: float | None = optional_key(
        expected("a share above 0 to 1", lambda value: is_number(value) and 0 < value <= 1)
    )
    function: str | None = optional_key(
        expected("FILE.py:NAME", lambda value: isinstance(value, str) and re.search(r"\.py:\w+$", value) is not None), PATH
    )
    options: dict[str, Any] | None = optional_key(plain_section, OPEN)
    own: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """The section with these values, unchecked; what only one loss has is checked by that loss."""
        shared = {each.name for each in declared(cls)}
        return replace(super().of(values), own={name: value for name, value in values.items() if name not in shared})

    @property
    def moves_reference(self) -> bool:
        """Whether the reference follows the policy, so that its log-probs cannot be known before."""
        return self.reference_update_every is not None

    def given(self) -> dict[str, Any]:
        """The loss's own keys, `name` among them."""
        shared = {each.name: getattr(self, each.name) for each in declared(type(self))}
        return copy.deepcopy({name: value for name, value in shared.items() if value is not None} | self.own)


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(Section):
    """trainer: the keys of all trainers; those that a trainer does not have are None."""

    name: str = key(anything, MAY_CHANGE_ON_RESUME)
    tensor_parallel_size: int | None = optional_key(whole(1, null=True), MAY_CHANGE_ON_RESUME)
    context_parallel_size: int | None = optional_key(whole(1), MAY_CHANGE_ON_RESUME)
    nproc_per_node: int | None = optional_key(whole(1, null=True), MAY_CHANGE_ON_RESUME, OUTSIDE_JOB_IDENTITY, NOT_SHOWN)
    world_size: int | None = optional_key(whole(1, null=True), NOT_SHOWN)
    device_memory: float | None = optional_key(positive(null=True), NOT_SHOWN)
    sharding: str | None = optional_key(known_name("sharding", SHARDINGS), MAY_CHANGE_ON_RESUME)
    param_dtype: str | None = optional_key(known_name("dtype", DTYPES, null=True))
    reduce_dtype: str | None = optional_key(known_name("dtype", DTYPES, null=True), MAY_CHANGE_ON_RESUME)
    output_dtype: str | None = optional_key(known_name("dtype", DTYPES, null=True))
    cpu_offload: bool | None = optional_key(switch, MAY_CHANGE_ON_RESUME)
    distributed_timeout_minutes: float | None = optional_key(positive(), MAY_CHANGE_ON_RESUME, OUTSIDE_JOB_IDENTITY)

    @property
    def is_sharded(self) -> bool:
        """Whether the trainer shards weights over several processes."""
        return self.name != "BasicTrainer"

    @property
    def splits_layers(self) -> bool:
        """Whether each process has a part of every layer."""
        return self.name == "TensorParallelTrainer"


@dataclass(frozen=True, kw_only=True)
class WandbConfig(Section):
    """wandb"""

    enabled: bool = key(switch)
    entity: str | None = key(text(null=True))
    project: str = key(text())


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section):
    """evaluation"""

    to: str | None = key(text(null=True), PATH)
    n_prompts: int | None = key(whole(1, null=True))
    max_sample_length: int | None = key(whole(1, null=True), NEWER)
    judge: str | None = key(text(null=True), PATH)
    judge_url: str | None = key(text(null=True))
    against: str = key(text(), PATH)
    max_missing: float = key(share())
    judge_max_tokens: int | None = key(whole(1, null=True))
    judge_timeout: float = key(positive(" of seconds"))
    judge_attempts: int = key(whole(1))
    judge_pause: float = key(positive(" of seconds"))
    judge_workers: int = key(whole(1))
    tasks: list[str] | str = key(texts("names, as in [open_llm,gsm8k]"))
    task_path: str | None = key(text(null=True), PATH)
    task_limit: int | None = key(whole(1, null=True))

    @property
    def task_names(self) -> list[str]:
        """`tasks` as a list."""
        return listed(self.tasks)


@dataclass(frozen=True, kw_only=True)
class QualityConfig(Section):
    """quality: what a strict dry run does not accept."""

    max_leaked: float | None = key(share(null=True))
    max_near_leaked: float | None = key(share(null=True))
    max_near_duplicates: float | None = key(share(null=True))
    near_duplicate_similarity: float = key(
        expected("a number from 0.5 to 1", lambda value: is_number(value) and 0.5 <= value <= 1)
    )
    max_baseline_accuracy: float | None = key(share(null=True))
    max_contradictions: float | None = key(share(null=True))
    min_agreement: float | None = key(share(null=True))
    max_contaminated: float | None = key(share(null=True))
    contamination_ngram: int = key(whole(8))


# Of data.weights: the run trains on halves of its own data first.
FROM_HALVES = "ledger"


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """data: which training pairs count, and how much."""

    weights: str | None = key(text(null=True), NEWER, PATH)
    half: int | None = key(expected("1, 2", lambda value: type(value) is int and value in (1, 2), null=True), NEWER)


PAIRINGS = ("best_worst", "all", "top_k", "ranking", "unpaired", "best_of_n")
# What becomes of responses that were cut at max_new_tokens.
TRUNCATED = ("keep", "skip", "worst")
REFERENCES = ("previous", "first", "moving")
NORMALIZATIONS = ("z_score", "none")


@dataclass(frozen=True, kw_only=True)
class JudgingConfig(Section):
    """rounds.judging: the options of judges; an entry of rounds.judge that is a mapping has its own."""

    weight: float = key(positive())
    normalize: str = key(one_of(NORMALIZATIONS))
    rules: list[str] | str = key(texts("rules, as in [words<=50,matches Paris]"))
    tests_column: str = key(text())
    tests_seconds: int = key(whole(1))
    tests_memory_mb: int = key(whole(16))
    tests_workers: int | None = key(whole(1, null=True), MAY_CHANGE_ON_RESUME, NOT_SHOWN)
    prefer_fast: bool = key(switch)
    rubric: str | None = key(text(null=True), PATH)
    rubric_scale: int = key(whole(2))
    max_comparisons: int | None = key(whole(1, null=True))
    url: str | None = key(text(null=True), MAY_CHANGE_ON_RESUME, NOT_SHOWN)


def judge_problem(value: Any) -> str | None:
    """What is wrong with the form of a judge: a text, a mapping with `judge` and options of its own, or a list of these."""
    for each in value if isinstance(value, list) and value else [value]:
        if isinstance(each, dict) and isinstance(each.get("judge"), str):
            try:
                known = [option.name for option in declared(JudgingConfig)]
                if unknown := [name for name in each if name not in ("judge", *known)]:
                    return f"no option {unknown[0]!r}; {nearest(str(unknown[0]), known)}"
                check_section(JudgingConfig, {name: found for name, found in each.items() if name != "judge"})
            except UserError as error:
                return f"{each['judge']}: {error}"
        elif not isinstance(each, str):
            return f"found {each!r}, expected a judge, a mapping as {{judge: KIND, weight: 2}}, or a list of these."
    return None


def _second_judge_problem(value: Any) -> str | None:
    return None if value is None else judge_problem(value)


# The sampler of rounds that is no server.
LOCAL_SAMPLER = "local"
SAMPLER_WEIGHTS = ("policy", "fixed")


def _sampler_problem(value: Any) -> str | None:
    is_address = isinstance(value, str) and re.match("https?://[^/]", value)
    return (
        None if value == LOCAL_SAMPLER or is_address else f"found {value!r}, expected local, or http://HOST:PORT of a server."
    )


@dataclass(frozen=True, kw_only=True)
class RoundsConfig(Section):
    """rounds: None of a run that is no loop of rounds."""

    prompts: str = key(text(), NOT_SHOWN, PATH)
    judge: Any = key(judge_problem, PATH)
    second_judge: Any = key(_second_judge_problem, PATH)
    judging: JudgingConfig = section(JudgingConfig)
    rounds: int = key(whole(1), MAY_CHANGE_ON_RESUME)
    prompts_per_round: int | None = key(whole(1, null=True))
    n_samples: int = key(whole(1))
    temperature: float = key(not_negative())
    top_p: float = key(expected("a number above 0 and up to 1", lambda value: is_number(value) and 0 < value <= 1))
    max_new_tokens: int = key(whole(1))
    sampler: str = key(_sampler_problem, MAY_CHANGE_ON_RESUME)
    sampler_processes: int | None = key(whole(1, null=True), MAY_CHANGE_ON_RESUME, NOT_SHOWN)
    sampler_model: str | None = key(text(null=True), MAY_CHANGE_ON_RESUME)
    sampler_weights: str = key(one_of(SAMPLER_WEIGHTS))
    sampler_workers: int = key(whole(1), MAY_CHANGE_ON_RESUME, NOT_SHOWN)
    sampler_timeout: float = key(positive(" of seconds"), MAY_CHANGE_ON_RESUME, NOT_SHOWN)
    truncated: str = key(one_of(TRUNCATED))
    pairs: str | None = key(known_name("way to pair responses", PAIRINGS, null=True))
    margin: float = key(not_negative())
    top_k: int = key(whole(1))
    threshold: float | None = key(expected("a number", is_number, null=True))
    length_matched: float | None = key(share(null=True))
    replay_share: float = key(share())
    reference: str = key(one_of(REFERENCES))
    held_out: float | str = key(
        expected("a share from 0 to below 1, or a file", lambda value: isinstance(value, str) or share()(value) is None), PATH
    )
    n_held_out_samples: int = key(whole(1))
