"""The YAML files, what command lines compose to, and what is said about values that cannot work."""

import json
import re
from dataclasses import FrozenInstanceError
from importlib.metadata import distribution
from itertools import cycle, islice, product
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from preference_datasets import LAST_ROW
from preference_training.configuration import composition
from preference_training.configuration.checks.run import OBJECTIVES, check_objective
from preference_training.configuration.command_line import prepare_arguments
from preference_training.configuration.composition import (
    ALL_KEYS,
    CONFIG_DIR,
    GROUPS,
    defer_keys_of_swept_groups,
    explain_composition_error,
    force_open_sections,
    group_choices,
    known_keys,
)
from preference_training.configuration.keys import key_names
from preference_training.configuration.model_names import OTHERS
from preference_training.configuration.optimizers import OPTIMIZERS
from preference_training.configuration.saved import read_config, save_config
from preference_training.configuration.schema import RunConfig
from preference_training.configuration.sections import LossConfig
from preference_training.core.errors import UserError
from preference_training.core.values import dotted
from preference_training.data.entries import read_entries
from preference_training.losses.registry import example_kind

# The part of the recipes that several command lines below share.
# The losses that are whole without a file of the user's.
OURS = [loss for loss in group_choices("loss") if loss != "own"]

RECIPE = (
    "gradient_accumulation_steps=2 batch_size=64 eval_batch_size=32 trainer=FSDPTrainer sample_during_eval=false "
    "model.fsdp_policy_mp=bfloat16"
)
RECIPE_VALUES = {
    "gradient_accumulation_steps": 2,
    "batch_size": 64,
    "eval_batch_size": 32,
    "trainer.name": "FSDPTrainer",
    "sample_during_eval": False,
    "model.fsdp_policy_mp": "bfloat16",
}
PYTHIA = {"model.name_or_path": "EleutherAI/pythia-2.8b", "model.block_name": "GPTNeoXLayer"}


@pytest.fixture
def check(compose):
    """Compose overrides and check the result, as `train.py` does; raises what it would tell the user as UserError."""

    def checked(*overrides: str) -> None:
        config = compose(*overrides)
        check_objective(config.objective, config.loss.name, example_kind(config.loss.name))
        read_entries(config)

    return checked


def refusal(check, *overrides: str) -> str:
    with pytest.raises(UserError) as refused:
        check(*overrides)
    return str(refused.value)


# ---- command lines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("", {"datasets": ["toy"], "loss.name": "sft", "trainer.name": "BasicTrainer", "model.name_or_path": None}),
        (
            f"model=pythia28 datasets=[hh] loss=sft exp_name=anthropic_dpo_pythia28 {RECIPE}",
            RECIPE_VALUES
            | PYTHIA
            | {"datasets": ["hh"], "loss": {"name": "sft", "average": "responses"}, "exp_name": "anthropic_dpo_pythia28"},
        ),
        (
            f"model=pythia28 datasets=[hh] loss=dpo loss.beta=0.1 exp_name=x {RECIPE} model.archive=/there/LATEST/policy.pt",
            RECIPE_VALUES
            | PYTHIA
            | {"loss.name": "dpo", "loss.beta": 0.1, "loss.mode_loss": "DPO", "model.archive": "/there/LATEST/policy.pt"},
        ),
        (
            f"model=pythia28 datasets=[hh] {RECIPE} loss=dpo loss.beta=0.1 loss.mode_loss=beta_DPO loss.mode_weight=0.2 "
            "loss.a=0.6",
            RECIPE_VALUES
            | {"loss.name": "dpo", "loss.mode_loss": "beta_DPO", "loss.beta": 0.1, "loss.mode_weight": 0.2, "loss.a": 0.6},
        ),
        (
            "model=blank_model model.name_or_path=/PATH/TO/LLAMA model.block_name=LlamaDecoderLayer datasets=[lc] loss=sft "
            "exp_name=x trainer=FSDPTrainer sample_during_eval=false",
            {
                "model.name_or_path": "/PATH/TO/LLAMA",
                "model.block_name": "LlamaDecoderLayer",
                "datasets": ["lc"],
                "trainer.name": "FSDPTrainer",
            },
        ),
        (
            "model=codellama7b datasets=[lc] loss=dpo loss.beta=0.1 model.archive=/there trainer=FSDPTrainer "
            "sample_during_eval=false",
            {"model.name_or_path": "codellama/CodeLlama-7b-hf", "model.archive": "/there", "loss.beta": 0.1},
        ),
        ("datasets=[hh,shp] loss=ipo loss.beta=0.1", {"datasets": ["hh", "shp"], "loss.name": "ipo", "loss.beta": 0.1}),
        ("loss=dpo loss.beta=0.1 loss.label_smoothing=0.1", {"loss.beta": 0.1, "loss.label_smoothing": 0.1}),
        ("trainer=FSDPTrainer", {"trainer.name": "FSDPTrainer"}),
        ("trainer=TensorParallelTrainer", {"trainer.name": "TensorParallelTrainer"}),
        ("datasets=hh", {"datasets": "hh"}),
    ],
)
def test_a_command_line_composes_to_the_values_that_it_says(plain, line, values):
    config = plain(*line.split())
    found = dotted(config) | {"loss": config["loss"]}
    assert {key: found[key] for key in values} == values


def test_a_sweep_over_beta_is_three_command_lines(compose):
    override = OverridesParser.create().parse_override("loss.beta=0.05,0.1,0.5")
    assert override.is_sweep_override()
    assert [compose("loss=dpo", f"loss.beta={beta}").loss.beta for beta in override.sweep_string_iterator()] == [0.05, 0.1, 0.5]


def test_beta_dpo_is_a_mode_of_dpo_and_also_a_loss_of_its_own(compose):
    mode = compose("loss=dpo", "loss.beta=0.3", "loss.mode_loss=beta_DPO", "loss.mode_weight=0.2", "loss.a=0.6").loss
    assert mode == compose("loss=beta_DPO", "loss.beta=0.3").loss
    assert mode != compose("loss=dpo", "loss.beta=0.3").loss


def test_the_presets_of_the_original_leave_what_belongs_to_training_as_it_is(plain):
    # The embedded model needs its own learning rate and lengths; newer presets have defaults that fit the run.
    defaults = OmegaConf.load(CONFIG_DIR / "config.yaml")
    for model in ("gpt2-large", "gpt2-xl", "gptj", "pythia28", "pythia69", "llama7b", "codellama7b", "blank_model"):
        config = plain(f"model={model}")
        for key in ("batch_size", "lr", "optimizer", "warmup_steps", "max_length", "max_prompt_length", "eval_every"):
            assert config[key] == defaults[key], (model, key)
    assert plain()["lr"] == 1e-3
    assert plain("lr=1e-4")["lr"] == 1e-4


def test_every_loss_every_model_and_every_trainer_compose(plain):
    groups = [group_choices(group) for group in ("loss", "model", "trainer")]
    for loss, model, trainer in islice(zip(*map(cycle, groups), strict=False), max(map(len, groups))):
        assert plain(f"model={model}", f"loss={loss}", f"trainer={trainer}")["trainer"]["name"] == trainer


@pytest.mark.long
@pytest.mark.parametrize("loss", group_choices("loss"))
def test_every_loss_composes_with_models_and_trainers_of_all_kinds(plain, loss):
    # dpo sees every model with every trainer; of the other losses each a quarter of the models, in turn.
    models, trainers = group_choices("model"), group_choices("trainer")
    some = models[group_choices("loss").index(loss) % 4 :: 4]
    for model, trainer in product(models, trainers) if loss == "dpo" else zip(some, cycle(trainers), strict=False):
        config = plain(f"model={model}", f"loss={loss}", f"trainer={trainer}")
        assert config["trainer"]["name"] == trainer
        assert config["loss"]["name"] == ("dpo" if loss == "beta_DPO" else loss)
        assert model == "blank_model" or config["model"]["name_or_path"] or config["model"]["from_config"]["model_type"]


@pytest.mark.parametrize("loss", OURS)
def test_the_default_of_every_loss_is_sound(check, loss):
    check(f"loss={loss}")


@pytest.mark.parametrize(("loss", "wanted"), [("dpo", "null"), ("dpo", "cached"), ("tr_dpo", "null"), ("tr_dpo", "live")])
def test_log_probs_that_are_read_again_are_computed_before_training_unless_the_reference_moves(compose, loss, wanted):
    config = compose(f"loss={loss}", f"reference_logps={wanted}")
    assert config.caches_reference(read_again=True) is (loss == "dpo")


def test_the_reference_takes_the_policys_dtype_unless_it_is_given_another(compose):
    assert compose("model.policy_dtype=bfloat16").model.reference_dtype == "bfloat16"
    assert compose("model.policy_dtype=bfloat16", "model.reference_dtype=float32").model.reference_dtype == "float32"


# ---- the YAML files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "names"),
    [
        (
            "",
            "seed exp_name batch_size eval_batch_size debug fsdp_port datasets local_dirs sample_during_eval "
            "n_eval_model_samples do_first_eval local_run_dir lr gradient_accumulation_steps max_grad_norm max_length "
            "max_prompt_length n_epochs n_examples n_eval_examples trainer optimizer warmup_steps activation_checkpointing "
            "eval_every minimum_log_interval_secs",
        ),
        ("wandb.", "enabled entity project"),
        ("model.", "name_or_path tokenizer_name_or_path archive block_name policy_dtype fsdp_policy_mp reference_dtype"),
        ("loss.", "name beta label_smoothing reference_free mode_loss mode_weight a"),
    ],
)
def test_the_keys_that_people_know_are_there(compose, prefix, names):
    config = compose("loss=dpo").as_dict()
    for name in names.split():
        assert name in (config[prefix[:-1]] if prefix else config)
        assert f"{prefix}{name}" in known_keys()


def test_the_presets_that_people_know_are_there():
    assert set(group_choices("model")) >= {
        *("gpt2-large", "gpt2-xl", "gptj", "pythia28", "pythia69", "llama7b", "codellama7b", "blank_model", "tiny"),
    }
    assert set(group_choices("loss")) >= {
        *(
            "bco",
            "beta_DPO",
            "dpo",
            "dpo_norm",
            "dpop",
            "hinge",
            "ipo",
            "orpo",
            "own",
            "robust",
            "rpo",
            "sft",
            "simpo",
            "tr_dpo",
        )
    }
    assert group_choices("trainer") == ["BasicTrainer", "FSDPTrainer", "TensorParallelTrainer"]


def leaves(node: yaml.MappingNode, above: tuple[str, ...] = (), lines: tuple[int, ...] = ()):
    """Yield (dotted name, lines of the key and of all sections that it is in, counted from 0) of each leaf."""
    for key, value in node.value:
        names, at = (*above, key.value), (*lines, key.start_mark.line)
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from leaves(value, names, at)
        else:
            yield ".".join(names), at


def keys_with_comments(file: Path) -> dict[str, bool]:
    """Every leaf of a YAML file, and whether a comment stands right above it or above a section that it is in."""
    text = file.read_text()
    lines = text.splitlines()
    # The first line says what the file is for; it belongs to no key.
    commented = [line > 1 and lines[line - 1].lstrip().startswith("#") for line in range(len(lines) + 1)]
    found = {name: any(commented[line] for line in at) for name, at in leaves(yaml.compose(text))}
    # Hydra's own settings are explained by Hydra.
    return {name: sound for name, sound in found.items() if name != "defaults" and not name.startswith("hydra.")}


@pytest.mark.parametrize("file", sorted(CONFIG_DIR.rglob("*.yaml")), ids=lambda file: f"{file.parent.name}/{file.name}")
def test_every_key_has_a_comment_above_it_where_its_default_is_set(file):
    base = {"model": "model/base_model.yaml", "adapter": "model/base_model.yaml", "loss": "loss/dpo.yaml"}.get(file.parent.name)
    explained_elsewhere = {} if base is None or file == CONFIG_DIR / base else keys_with_comments(CONFIG_DIR / base)
    if file.parent.name == "model" and file.read_text().startswith("# @package _global_"):
        explained_elsewhere = {f"model.{key}": sound for key, sound in explained_elsewhere.items()}
        explained_elsewhere |= keys_with_comments(CONFIG_DIR / "config.yaml")
    if file.parent.name == "loss" and "defaults: [dpo]" not in file.read_text():
        explained_elsewhere = {}
    for key, commented in keys_with_comments(file).items():
        if not key.startswith("model.from_config."):
            assert commented or explained_elsewhere.get(key), key


def test_a_key_without_a_comment_would_be_found(tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text(
        "# What it is.\n\n# Above.\nfirst: 1\nsecond: 2\n\n# A section.\nthird:\n  inner: 3\n  # Own.\n  other: 4\n"
    )
    assert keys_with_comments(file) == {"first": True, "second": False, "third.inner": True, "third.other": True}


def test_every_choice_of_the_defaults_list_has_a_comment_above_it():
    lines = (CONFIG_DIR / "config.yaml").read_text().splitlines()
    for group in GROUPS:
        (line,) = (number for number, text in enumerate(lines) if text.startswith(f"  - {group}: "))
        assert lines[line - 1].lstrip().startswith("#")


@pytest.mark.parametrize("file", sorted(CONFIG_DIR.rglob("*.yaml")), ids=lambda file: f"{file.parent.name}/{file.name}")
def test_every_file_begins_with_a_line_that_says_what_it_is(file):
    lines = file.read_text().splitlines()
    assert re.match(r"# \w", lines[lines[0].startswith("# @package")])


def test_the_known_keys_are_dotted_names_of_ours_and_none_of_hydras():
    assert {"lr", "loss.beta", "wandb.project", "model.from_config", "optimizer_kwargs", "trainer"} <= known_keys()
    assert not [key for key in known_keys() if "hydra" in key or "defaults" in key]


@pytest.mark.parametrize("trainer", group_choices("trainer"))
@pytest.mark.parametrize("loss", group_choices("loss"))
def test_every_key_of_the_files_has_a_field_in_the_same_order(plain, loss, trainer):
    composed = plain(f"loss={loss}", f"trainer={trainer}")
    fields = [name for name in key_names(RunConfig) if name in dotted(composed)]
    # What stands in these two is another library's and the user's; what only one loss has, that loss checks.
    theirs = ("model.from_config.", "loss.options.", *(f"loss.{key}" for key in LossConfig.of(composed["loss"]).own))
    assert [key for key in dotted(composed) if not key.startswith(theirs)] == fields


def test_every_field_has_a_key_in_the_files(plain):
    choices = [f"{group}={choice}" for group in ("loss", "trainer") for choice in group_choices(group)]
    rounds = ["+rounds=default", "rounds.prompts=rows.jsonl", "rounds.judge=toy"]
    keys = {key for choice in choices for key in with_sections(plain(choice))} | with_sections(plain(*rounds))
    assert key_names(RunConfig).keys() <= keys


def with_sections(values: dict, prefix: str = "") -> set[str]:
    """The dotted names of all keys and sections."""
    inner = {name: value for name, value in values.items() if isinstance(value, dict)}
    below = (with_sections(value, f"{prefix}{name}.") for name, value in inner.items())
    return {f"{prefix}{name}" for name in values}.union(*below)


def test_a_run_writes_its_configuration_as_it_was_composed_and_a_copy_with_other_values_leaves_it_alone(compose, tmp_path):
    config = compose("model.policy_dtype=bfloat16", "batch_size=32", "local_run_dir=x")
    changed = config.changed({"batch_size": 64, "model.lora.r": 4, "model.from_config.hidden_size": 8})
    save_config(changed, tmp_path)
    assert "reference_dtype: ${.policy_dtype}\n" in (tmp_path / "config.yaml").read_text()
    assert read_config(tmp_path) == changed.as_dict()
    expected = {"batch_size": 64, "model.lora.r": 4, "model.from_config.hidden_size": 8}
    assert dotted(changed.as_dict()) == dotted(config.as_dict()) | expected
    assert (config.batch_size, config.model.lora.r, config.model.from_config["hidden_size"]) == (32, None, 128)
    with pytest.raises(FrozenInstanceError):
        config.batch_size = 64


# ---- unknown names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ("loss=dpo loss.betaa=1", "loss.betaa: no such key; did you mean loss.beta?"),
        ("loss=dpo +loss.betta=1", "loss.betta: no such key; did you mean loss.beta?"),
        ("loss=dpo ++loss.betta=1", "loss.betta: no such key; did you mean loss.beta?"),
        ("learnig_rate=1e-5", "learnig_rate: no such key; did you mean learning_rate: in this project: lr=1e-5"),
        ("batchsize=3", "batchsize: no such key; did you mean batch_size?"),
        ("+optimizer_kwargss=3", "optimizer_kwargss: no such key; did you mean optimizer_kwargs?"),
        ("model.archiv=x", "model.archiv: no such key; did you mean model.archive?"),
        ("wandb.projekt=x", "wandb.projekt: no such key; did you mean wandb.project?"),
        ("loss=dppo", "loss=dppo: there is no such loss; did you mean dpo?"),
        ("model=pythia82", f"model=pythia82: there is no such model; did you mean pythia28? {OTHERS}"),
        ("trainer=FSDPTrainr", "trainer=FSDPTrainr: there is no such trainer; did you mean FSDPTrainer?"),
        (
            "trainer={sharding:full}",
            "trainer: found keys in braces. Expected trainer=NAME, and its keys one by one: trainer.KEY=VALUE.",
        ),
        ("ipo", "ipo: found a word by itself, expected KEY=VALUE; did you mean loss=ipo?"),
        ("hello", "hello: found a word by itself, expected KEY=VALUE."),
        ("lr=1e-5,1e-4", "lr: found several values, 1e-5,1e-4. Add -m for a sweep over them."),
        ("loss.a=0.1", "loss.a: this loss has no such key. It belongs to loss=beta_DPO, dpo."),
        ("loss=orpo loss.gamma=0.1", "loss.gamma: this loss has no such key. It belongs to loss=simpo."),
        ("+loss.gamma=0.1", "loss.gamma: this loss has no such key. It belongs to loss=simpo."),
        (
            "loss.label_smoothing=0.1",
            "loss.label_smoothing: this loss has no such key. It belongs to loss=aot, aot_unpaired, beta_DPO, dpo, exo_pair, "
            "robust.",
        ),
        (
            "loss.beta=0.1",
            "loss.beta: loss=sft has no such key; its key is average; every loss has it except mix, own, reward, sft.",
        ),
        (
            "loss=reward ++loss.beta=0.1",
            "loss.beta: loss=reward has no such key; its key is center_coefficient; every loss has it except mix, own, reward, "
            "sft.",
        ),
        ("loss=ipo loss.mode_loss=DPO", "loss.mode_loss: this loss has no such key. It belongs to loss=beta_DPO, dpo."),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one_or_its_owner(check, overrides, told):
    assert refusal(check, *overrides.split()) == told


def test_a_name_near_no_other_is_refused_with_where_all_are_listed(check):
    assert refusal(check, "zzzz=1") == f"zzzz: no such key; {ALL_KEYS}"


@pytest.mark.parametrize("key", ["lr", "seed", "datasets", "objective", "wandb", "wandb.project", "trainer", "loss"])
def test_a_key_that_was_removed_is_missed(check, key):
    assert "removed by ~, but required" in refusal(check, f"~{key}")


def test_a_value_left_open_is_asked_for(check):
    assert refusal(check, "batch_size=???") == "batch_size: not given. Expected a value on the command line: batch_size=..."


@pytest.mark.parametrize(
    "override", ["optimizer_kwargs.weight_decay=0.1", "+optimizer_kwargs.weight_decay=0.1", "model.from_config.rope_theta=1e6"]
)
def test_keys_of_other_libraries_sections_need_no_plus_and_are_not_ours_to_refuse(check, compose, override):
    check(override)
    config = compose(*force_open_sections([override]))
    key, value = override.lstrip("+").split("=")
    assert dotted(config.as_dict())[key] == float(value)


def test_only_overrides_of_open_sections_are_changed():
    arguments = ["-m", "lr=1", "optimizer_kwargs.betas=[0.9,0.95]", "optimizer_kwargs={}", "+model.from_config.x=1"]
    assert force_open_sections(arguments) == [
        *("-m", "lr=1", "++optimizer_kwargs.betas=[0.9,0.95]", "optimizer_kwargs={}", "+model.from_config.x=1"),
    ]


# ---- values that cannot work --------------------------------------------------------------------------------------------

WHOLE = "a whole number from 1"
# Of no, YAML's word for false, one has to know that it is a text here.
STRATEGIES = {"never": "'never'", "null": "None", "epochs": "'epochs'", "false": "False"}


@pytest.mark.parametrize(
    ("overrides", "key", "found", "expected"),
    [
        # Losses.
        ("loss=dpo loss.beta=0", "loss.beta", "0", "a number above 0"),
        ("loss=dpo loss.beta=-0.1", "loss.beta", "-0.1", "a number above 0"),
        ("loss=dpo loss.beta=nan", "loss.beta", "nan", "a number above 0"),
        ("loss=dpo loss.beta=inf", "loss.beta", "inf", "a number above 0"),
        ("loss=dpo loss.beta=null", "loss.beta", "None", "a number above 0"),
        ("loss=dpo loss.beta=true", "loss.beta", "True", "a number above 0"),
        ("loss=dpo loss.beta=much", "loss.beta", "'much'", "a number above 0"),
        ("loss=ipo loss.beta=0", "loss.beta", "0", "a number above 0"),
        ("loss=ipo loss.length_normalised=1", "loss.length_normalised", "1", "true or false"),
        ("loss=dpo loss.label_smoothing=0.5", "loss.label_smoothing", "0.5", "a share from 0 to below 0.5"),
        ("loss=dpo loss.label_smoothing=-0.1", "loss.label_smoothing", "-0.1", "a share from 0 to below 0.5"),
        ("loss=dpo loss.reference_free=0", "loss.reference_free", "0", "true or false"),
        ("loss=dpo loss.name=dpoo", "loss.name", "'dpoo'", "dpo"),
        ("loss=dpo loss.name=hinge", "loss.name", "'hinge'", "Choose it by loss=hinge"),
        ("loss=hinge loss.beta=0", "loss.beta", "0", "a number above 0"),
        ("loss=robust loss.label_smoothing=0.5", "loss.label_smoothing", "0.5", "a share from 0 to below 0.5"),
        ("loss=rpo loss.alpha=-1", "loss.alpha", "-1", "a number from 0"),
        ("loss=dpop loss.penalty=nan", "loss.penalty", "nan", "a number from 0"),
        ("loss=simpo loss.gamma=-0.5", "loss.gamma", "-0.5", "a number from 0"),
        ("loss=simpo objective=loss/train", "objective", "'loss/train'", "loss/eval"),
        ("loss=tr_dpo loss.reference_update_every=0", "loss.reference_update_every", "0", "a whole number from 1"),
        ("loss=tr_dpo loss.reference_update_every=1.5", "loss.reference_update_every", "1.5", "a whole number from 1"),
        ("loss=tr_dpo loss.reference_update_share=0", "loss.reference_update_share", "0", "a share above 0 to 1"),
        ("loss=tr_dpo loss.reference_update_share=1.1", "loss.reference_update_share", "1.1", "a share above 0 to 1"),
        ("loss=tr_dpo reference_logps=cached", "reference_logps", "cached", "follows the policy"),
        ("loss=dpo loss.mode_loss=beta_dpoo", "loss.mode_loss", "'beta_dpoo'", "beta_DPO"),
        ("loss=dpo loss.mode_loss=null", "loss.mode_loss", "None", "beta_DPO"),
        ("loss=dpo loss.mode_weight=half", "loss.mode_weight", "'half'", "a share from 0 to below 1"),
        ("loss=beta_DPO loss.mode_weight=1", "loss.mode_weight", "1", "a share from 0 to below 1"),
        ("loss=beta_DPO loss.mode_weight=true", "loss.mode_weight", "True", "a share from 0 to below 1"),
        ("loss=beta_DPO loss.a=-1", "loss.a", "-1", "a number from 0"),
        ("loss=beta_DPO loss.threshold=mean", "loss.threshold", "'mean'", "running_mean or trend"),
        ("loss=dpo loss.threshold=trend", "loss.threshold", "trend", "loss.mode_loss=beta_DPO"),
        ("loss=dpo loss.a=[1]", "loss.a", "[1]", "a number from 0"),
        ("loss=beta_DPO loss.reference_free=true", "loss.reference_free", "True", "false: beta_DPO measures"),
        # 4 pairs in 2 micro-batches: int(2 * (1 - 0.9)) = 0 pairs would be kept.
        (
            "loss=beta_DPO loss.mode_weight=0.9 batch_size=4 gradient_accumulation_steps=2",
            "loss.mode_weight",
            "0.9",
            "Lower it",
        ),
        # Sizes.
        (
            "batch_size=15 gradient_accumulation_steps=2",
            "batch_size",
            "15",
            "a multiple of gradient_accumulation_steps, which is 2",
        ),
        ("eval_every=15", "eval_every", "15", "at least batch_size, which is 16"),
        ("save_every=15", "save_every", "15", "at least batch_size, which is 16"),
        ("max_prompt_length=256", "max_prompt_length", "256", "less than max_length, which is 256"),
        ("max_prompt_length=257", "max_prompt_length", "257", "less than max_length, which is 256"),
        ("n_epochs=null n_examples=null", "n_epochs, n_examples, n_steps", "all are null", "Set one of them"),
        # Numbers.
        *((f"{key}=0", key, "0", WHOLE) for key in ("batch_size", "eval_batch_size", "gradient_accumulation_steps")),
        *((f"{key}=0", key, "0", WHOLE) for key in ("max_length", "max_prompt_length", "eval_every")),
        *((f"{key}=0", key, "0", f"{WHOLE} or null") for key in ("n_epochs", "n_examples", "n_eval_examples")),
        *((f"{key}=-1", key, "-1", "a whole number from 0") for key in ("warmup_steps", "n_eval_model_samples", "seed")),
        ("batch_size=true", "batch_size", "True", WHOLE),
        ("batch_size=16.0", "batch_size", "16.0", WHOLE),
        ("batch_size=many", "batch_size", "'many'", WHOLE),
        ("batch_size=null", "batch_size", "None", WHOLE),
        ("seed=false", "seed", "False", "a whole number from 0"),
        ("lr=0", "lr", "0", "a number above 0"),
        ("lr=-1e-3", "lr", "-0.001", "a number above 0"),
        ("lr=nan", "lr", "nan", "a number above 0"),
        ("lr=inf", "lr", "inf", "a number above 0"),
        ("lr=true", "lr", "True", "a number above 0"),
        ("lr=", "lr", "''", "a number above 0"),
        ("max_grad_norm=0", "max_grad_norm", "0", "a number above 0"),
        ("minimum_log_interval_secs=-1", "minimum_log_interval_secs", "-1", "a number of seconds from 0"),
        ("held_out_share=1", "held_out_share", "1", "a share from 0 to below 1"),
        ("held_out_share=-0.1", "held_out_share", "-0.1", "a share from 0 to below 1"),
        ("fsdp_port=70000", "fsdp_port", "70000", "a port from 1 to 65535, or null"),
        ("fsdp_port=true", "fsdp_port", "True", "a port from 1 to 65535, or null"),
        # Switches.
        *((f"{key}=1", key, "1", "true or false") for key in ("debug", "wandb.enabled", "do_first_eval")),
        ("dry_run=1", "dry_run", "1", "true, false or strict"),
        ("contamination_files=[gone.jsonl]", "contamination_files", "gone.jsonl: no such file", "relative to"),
        ("quality.near_duplicate_similarity=0.2", "quality.near_duplicate_similarity", "0.2", "a number from 0.5 to 1"),
        ("quality.max_leaked=2", "quality.max_leaked", "2", "a share from 0 to below 1 or null"),
        ("sample_during_eval=1", "sample_during_eval", "1", "true, false or null"),
        ("trainer=FSDPTrainer trainer.sharding=ful", "trainer.sharding", "'ful'", "did you mean full?"),
        ("trainer=FSDPTrainer trainer.param_dtype=half", "trainer.param_dtype", "'half'", "no dtype"),
        ("trainer=FSDPTrainer trainer.nproc_per_node=0", "trainer.nproc_per_node", "0", "a whole number from 1 or null"),
        ("trainer=FSDPTrainer trainer.world_size=0", "trainer.world_size", "0", "a whole number from 1 or null"),
        ("trainer=FSDPTrainer trainer.device_memory=0", "trainer.device_memory", "0", "a number above 0 or null"),
        (
            "trainer=FSDPTrainer trainer.sharding=hybrid trainer.world_size=8",
            "trainer.nproc_per_node",
            "not given",
            "the processes of each machine",
        ),
        (
            "trainer=FSDPTrainer trainer.sharding=hybrid trainer.world_size=12 trainer.nproc_per_node=8",
            "trainer.world_size",
            "12",
            "a multiple of trainer.nproc_per_node, which is 8",
        ),
        (
            "trainer=TensorParallelTrainer trainer.world_size=12 trainer.tensor_parallel_size=8",
            "trainer.world_size",
            "12",
            "a multiple of trainer.tensor_parallel_size, which is 8",
        ),
        (
            "trainer=FSDPTrainer trainer.distributed_timeout_minutes=0",
            "trainer.distributed_timeout_minutes",
            "0",
            "a number above 0",
        ),
        ("trainer=FSDPTrainer trainer.cpu_offload=1", "trainer.cpu_offload", "1", "true or false"),
        (
            "trainer=TensorParallelTrainer trainer.tensor_parallel_size=x",
            "trainer.tensor_parallel_size",
            "'x'",
            "a whole number",
        ),
        ("activation_checkpointing=yes", "activation_checkpointing", "'yes'", "true, false or selective"),
        ("save_policy_pt=yes", "save_policy_pt", "'yes'", "true or false"),
        ("model.trust_remote_code=null", "model.trust_remote_code", "None", "true or false"),
        # Checkpoints, and what ends a run.
        *((f"save_strategy={value}", "save_strategy", shown, "steps, epoch or no") for value, shown in STRATEGIES.items()),
        *((f"{key}=0", key, "0", f"{WHOLE} or null") for key in ("save_every", "keep_last", "keep_best")),
        *((f"{key}=true", key, "True", f"{WHOLE} or null") for key in ("save_every", "keep_last", "keep_best")),
        ("save_every=1e4", "save_every", "10000.0", f"{WHOLE} or null"),
        ("keep_last=all", "keep_last", "'all'", f"{WHOLE} or null"),
        *((f"{key}=1", key, "1", "true or false") for key in ("save_async", "save_policy_pt")),
        *((f"max_bad_steps={value}", "max_bad_steps", shown, WHOLE) for value, shown in (("0", "0"), ("null", "None"))),
        *(
            (f"max_wall_time={value}", "max_wall_time", value, "a number above 0 or null")
            for value in ("0", "-5", "nan", "inf")
        ),
        ("max_wall_time=1h", "max_wall_time", "'1h'", "a number above 0 or null"),
        *((f"loss_spike={value}", "loss_spike", value, "a number above 0 or null") for value in ("0", "-1", "nan", "inf")),
        ("loss_spike=true", "loss_spike", "True", "a number above 0 or null"),
        ("resume=5", "resume", "5", "a text or null"),
        ("resume=true", "resume", "True", "a text or null"),
        ("resume=[auto]", "resume", "['auto']", "a text or null"),
        ("exp_name=a/b", "exp_name", "'a/b'", "a directory's name"),
        ("exp_name=../x", "exp_name", "'../x'", "a directory's name"),
        (f"exp_name={'x' * 201}", "exp_name", "'xxx", "at most 200 bytes"),
        (f"exp_name='{'é' * 101}'", "exp_name", "'ééé", "at most 200 bytes"),
        ("exp_name='a\x07b'", "exp_name", r"'a\x07b'", "a directory's name"),
        # Names.
        ("optimizer=RMSProp", "optimizer", "'RMSProp'", "did you mean RMSprop?"),
        ("optimizer=zzz", "optimizer", "'zzz'", "known are: Adafactor, Adam, AdamW, AdamW8bit"),
        ("optimizer=null", "optimizer", "None", "known are: Adafactor, Adam, AdamW, AdamW8bit"),
        ("model.policy_dtype=bfloat61", "model.policy_dtype", "'bfloat61'", "did you mean bfloat16?"),
        ("model.reference_dtype=int8", "model.reference_dtype", "'int8'", "bfloat16"),
        ("model.fsdp_policy_mp=bf16", "model.fsdp_policy_mp", "'bf16'", "bfloat16"),
        ("model.policy_dtype=half", "model.policy_dtype", "'half'", "bfloat16, float16, float32"),
        ("bf16=1", "bf16", "1", "true, false or null"),
        ("truncation_mode=keep_stat", "truncation_mode", "'keep_stat'", "keep_start, keep_end, drop or null"),
        ("trainer.name=BasicTrainr", "trainer.name", "'BasicTrainr'", "did you mean BasicTrainer?"),
        ("objective=loss/evel", "objective", "'loss/evel'", "did you mean loss/eval?"),
        ("objective=rewards_eval/margins", "objective", "'rewards_eval/margins'", "loss/eval"),
        ("objective=4", "objective", "4", "a text"),
        # Where numbers go.
        ("tracking=[jsonl,wanbd]", "tracking", "'wanbd'", "did you mean wandb?"),
        ("tracking=[wandb,wandb]", "tracking", "['wandb', 'wandb']", "names, each once"),
        ("tracking=null", "tracking", "None", "names, each once"),
        # Sections and texts.
        ("wandb=3", "wandb", "3", "a section"),
        ("optimizer_kwargs=null", "optimizer_kwargs", "None", "a section"),
        ("model.from_config=null", "model.from_config", "None", "a section"),
        ("exp_name=null", "exp_name", "None", "a text"),
        ("model.archive=3", "model.archive", "3", "a text or null"),
        ("model.name_or_path=[x]", "model.name_or_path", "['x']", "a text or null"),
        ("cache_dir=3", "cache_dir", "3", "a text or null"),
        # Data sets and paths.
        ("datasets=[]", "datasets", "[]", "at least one data set"),
        ("datasets=null", "datasets", "None", "at least one data set"),
        ("datasets=3", "datasets", "3", "at least one data set"),
        ("datasets=[toy,shpp]", "datasets", "'shpp'", "did you mean shp?"),
        ("datasets=[missing.jsonl]", "datasets", "missing.jsonl: no such file", "Expected a readable file"),
        ("datasets=[missing.py:mine]", "datasets", "missing.py: no such file", "Expected a Python file that registers 'mine'"),
        ("model.chat_template=missing.jinja template=chat", "model.chat_template", "missing.jinja: no such", "relative to"),
        ("model.chat_template=README.md template=hh", "model.chat_template", "template is hh", "Set template=chat"),
        ("model.chat_template=README.md template=raw", "model.chat_template", "template is raw", "Set template=chat or null"),
        ("model.archive=missing/policy.pt", "model.archive", "missing/policy.pt: no such file", "relative to"),
        ("model=blank_model", "model.name_or_path", "not given", "Expected a hub id or a directory"),
        ("model.tokenizer_name_or_path=null", "model.tokenizer_name_or_path", "not given", "byte_level"),
    ],
)
def test_a_value_that_cannot_work_is_refused_with_its_key_what_was_found_and_what_was_expected(
    check, overrides, key, found, expected
):
    told = refusal(check, *overrides.split())
    assert told.startswith(f"{key}:")
    assert found in told
    assert expected in told
    assert "\n" not in told


@pytest.mark.parametrize(
    "overrides",
    [
        "n_epochs=null n_examples=100",
        "n_examples=100",
        "n_eval_examples=null",
        "lr=1",
        "max_grad_norm=inf",
        "held_out_share=0",
        "warmup_steps=0",
        "minimum_log_interval_secs=0",
        "truncation_mode=drop",
        "model.fsdp_policy_mp=null",
        "loss=dpo loss.beta=1",
        "loss=dpo loss.label_smoothing=0.49",
        "loss=dpo loss.reference_free=true",
        "loss=beta_DPO loss.mode_weight=0 loss.a=0",
        "loss=robust loss.label_smoothing=0",
        "loss=rpo loss.alpha=0",
        "loss=dpop loss.penalty=0",
        "loss=simpo loss.gamma=0 objective=rewards_eval/margins",
        "loss=tr_dpo loss.reference_update_every=1 loss.reference_update_share=1 reference_logps=live",
        # 1 of 2 pairs is kept.
        "loss=beta_DPO loss.mode_weight=0.5 batch_size=4 gradient_accumulation_steps=2",
        "loss=dpo objective=rewards_eval/accuracies",
        "batch_size=16 eval_every=16",
        "max_prompt_length=255",
        "model.chat_template=README.md template=chat",
        "model.chat_template=README.md",
        "model.policy_dtype=null",
        "model.chat_template=README.md datasets=[{path:README.md,template:chat}]",
        "datasets=toy",
        "datasets=[toy,hh,shp,se]",
        "fsdp_port=29500",
        "tracking=[]",
        "tracking=tensorboard",
        *(f"save_strategy={strategy}" for strategy in ("steps", "epoch", "no")),
        "save_every=16",
        "save_every=null keep_last=1 keep_best=1",
        "max_wall_time=0.5",
        "max_wall_time=null loss_spike=null",
        "loss_spike=1",
        "max_bad_steps=1",
        "resume=auto",
        "resume=runs/that_is_not_there",
        f"exp_name={'x' * 200}",
        "exp_name=..",
        "exp_name='a[b]*?'",
        *(f"optimizer={name}" for name in OPTIMIZERS),
    ],
)
def test_a_value_at_the_edge_of_what_works_is_accepted(check, overrides):
    check(*overrides.split())


def test_a_file_of_data_or_loaders_and_an_archive_are_accepted_where_they_exist(check, tmp_path):
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "policy.pt").touch()
    (tmp_path / "own.py").write_text(
        "from preference_datasets import register\n@register('mine')\ndef get_mine(split, silent=False, cache_dir=None): ..."
    )
    check(f"datasets=[{tmp_path}/rows.jsonl,'{tmp_path}/own.py:mine']", f"model.archive={tmp_path}/policy.pt")


@pytest.mark.parametrize("loss", OURS)
def test_the_objectives_are_the_metrics_of_an_evaluation(loss, compose):
    import torch

    from preference_training.losses.base import Examples, TokenLogps, example_metrics, with_margins
    from preference_training.losses.registry import build_loss

    built = build_loss(**compose(f"loss={loss}").loss.given())
    assert built.examples == example_kind(loss)
    members = torch.tensor([[0], [1]] if built.examples == "targets" else [[0, 1]])
    logps, one = torch.full((2,), -1.0), torch.ones(1)
    tokens = TokenLogps(logps, torch.arange(2), logps)
    data = {"margins": one, "labels": one > 0, "policy_tokens": tokens, "reference_tokens": tokens}
    examples = Examples(members, torch.ones(2, dtype=torch.int64), 1.0, **data)
    metrics = with_margins(example_metrics(built, built(logps, logps, examples), logps, examples, "eval"), "eval")
    expected = set(OBJECTIVES[:2] if built.examples == "targets" else OBJECTIVES)
    if built.model_head == "value":
        expected -= {"logps_eval/chosen", "logps_eval/rejected"}
    assert set(metrics) == expected
    assert json.dumps(OBJECTIVES)  # plain texts, as metrics.jsonl names them


def test_a_loss_of_ones_own_takes_any_option_without_a_plus(check, tmp_path):
    (tmp_path / "own.py").touch()
    overrides = ["loss=own", f"loss.function={tmp_path}/own.py:mine", "loss.options.margin=2"]
    assert force_open_sections(overrides)[-1] == "++loss.options.margin=2"
    check(*force_open_sections(overrides))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ("loss=own", "loss.function: not given. Expected a value on the command line: loss.function=..."),
        ("loss=own loss.function=own.py", "loss.function: found 'own.py', expected FILE.py:NAME."),
        ("loss=own loss.function=nowhere.py:mine", "loss.function: nowhere.py: no such file. Expected FILE.py:NAME;"),
        ("loss=own loss.function=nowhere.py:mine loss.options=3", "loss.options: found 3, expected a section"),
        ("loss=own loss.fucntion=own.py:mine", "loss.fucntion: no such key; did you mean loss.function?"),
        ("loss=dpo loss.options.beta=3", "loss.options: this loss has no such key. It belongs to loss=own."),
        ("loss=dpo loss.function=own.py:mine", "loss.function: this loss has no such key. It belongs to loss=own."),
    ],
)
def test_a_loss_of_ones_own_that_cannot_be_is_refused(overrides, told, check):
    assert refusal(check, *force_open_sections(overrides.split())).startswith(told)


@pytest.mark.parametrize(("examples", "objective"), [("pairs", "rewards_eval/accuracies"), ("targets", "logps_eval/chosen")])
def test_the_objective_is_a_metric_of_what_a_loss_compares(examples, objective, compose):
    check_objective(objective, "sft", examples)
    if examples == "targets":
        with pytest.raises(UserError, match="objective: loss=sft has no metric 'rewards_eval/margins'"):
            check_objective("rewards_eval/margins", "sft", examples)


# ---- evaluation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ("evaluation.judge=toyy", "evaluation.judge: no judge 'toyy'; did you mean toy?"),
        ("evaluation.judge=mine.py", "evaluation.judge: found 'mine.py', expected FILE.py:NAME, with the name of a function."),
        ("evaluation.judge=mine.py:rule", "evaluation.judge: mine.py: no such file. Expected FILE.py:NAME; paths are relative"),
        ("evaluation.judge=toy:x", "evaluation.judge: found 'toy:x', expected toy."),
        ("evaluation.judge=ollama", "evaluation.judge: found 'ollama', expected ollama:NAME."),
        ("evaluation.judge=openai:m", "evaluation.judge: openai needs a key in the environment, OPENAI_API_KEY"),
        ("evaluation.judge=ollama:m evaluation.judge_url=host:1", "evaluation.judge_url: found 'host:1', expected http://"),
        ("evaluation.judge=ollama:m eval_only=false", "evaluation.judge: found 'ollama:m', and the run would train."),
        ("evaluation.tasks=[gsm8k] eval_only=false", "evaluation.tasks: found ['gsm8k'], and the run would train."),
        ("evaluation.tasks=[1]", "evaluation.tasks: found [1], expected names"),
        ("evaluation.tasks=gsm8k trainer=FSDPTrainer", "evaluation.tasks: FSDPTrainer has a part of the model only."),
        ("evaluation.against=nowhere", "evaluation.against: nowhere: no such directory."),
        ("evaluation.against=null", "evaluation.against: found None, expected a text."),
        ("evaluation.against=.", "evaluation.against: found ., and no judge compares responses. Set evaluation.judge too."),
        ("evaluation.task_path=nowhere", "evaluation.task_path: nowhere: no such directory."),
        ("evaluation.to=nowhere/results.json", "evaluation.to: nowhere/results.json: no such directory."),
        ("evaluation.max_missing=1", "evaluation.max_missing: found 1, expected a share from 0 to below 1."),
        ("evaluation.judge_timeout=0", "evaluation.judge_timeout: found 0, expected a number of seconds above 0."),
        ("evaluation.judge_pause=-1", "evaluation.judge_pause: found -1, expected a number of seconds above 0."),
        ("evaluation.judge_attempts=0", "evaluation.judge_attempts: found 0, expected a whole number from 1."),
        ("evaluation.judge_workers=x", "evaluation.judge_workers: found 'x', expected a whole number from 1."),
        ("evaluation.n_prompts=0", "evaluation.n_prompts: found 0, expected a whole number from 1 or null."),
        ("evaluation.task_limit=0.5", "evaluation.task_limit: found 0.5, expected a whole number from 1 or null."),
        ("eval_only=yess", "eval_only: found 'yess', expected true or false."),
        ("evaluation.judgge=toy", "evaluation.judgge: no such key; did you mean evaluation.judge?"),
        ("evaluation=5", "evaluation"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused(overrides, told, check, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert refusal(check, "eval_only=true", *overrides.split()).startswith(told)


def test_judges_and_tasks_that_can_be_are_taken(check, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    for judge in ("toy", "reward_model:some/model", "openai:m", "ollama:llama3.1:8b"):
        check("eval_only=true", f"evaluation.judge={judge}", f"evaluation.against={tmp_path}")
    check("eval_only=true", "evaluation.tasks=open_llm")
    monkeypatch.delenv("OPENAI_API_KEY")
    check("eval_only=true", "evaluation.judge=openai:m", "evaluation.judge_url=http://localhost:8000/v1")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("", ["wandb"]),
        ("wandb.enabled=false", []),
        ("tracking=[jsonl,wandb,tensorboard]", ["wandb", "tensorboard"]),
        ("tracking=tensorboard", ["tensorboard"]),
        ("tracking=[wandb,tensorboard] debug=true", []),
    ],
)
def test_numbers_go_where_tracking_says_and_to_wandb_only_if_it_is_enabled(compose, overrides, expected):
    assert compose(*overrides.split()).dashboard_names == expected


def test_tensorboard_that_is_not_installed_is_asked_for_before_anything_begins(check, monkeypatch):
    monkeypatch.setattr("preference_training.configuration.checks.run.distribution", lambda name: distribution(f"no-{name}"))
    assert refusal(check, "tracking=tensorboard").endswith("Run `pip install -r requirements/tensorboard.txt`.")


# ---- sweeps over groups ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "deferred"),
    [
        (["-m", "loss=dpo,beta_DPO", "loss.beta=0.5", "seed=0"], {"loss.beta=0.5": "loss.beta=choice(0.5)"}),
        (["loss=choice(dpo,ipo)", "loss.beta=0.5"], {"loss.beta=0.5": "loss.beta=choice(0.5)"}),
        (["loss=glob(*dpo*)", "loss.beta=0.5"], {"loss.beta=0.5": "loss.beta=choice(0.5)"}),
        (["trainer=FSDPTrainer,TensorParallelTrainer", "trainer.sharding=grad_op"], {1: "trainer.sharding=choice(grad_op)"}),
        (["model=tiny,blank_model", "model.archive=runs/a b"], {1: "model.archive=choice(runs/a b)"}),
        (["model=tiny,blank_model", "model.archive='runs/x=1'"], {1: "model.archive=choice('runs/x=1')"}),
        (["loss=dpo,ipo", "loss.beta="], {1: "loss.beta=choice('')"}),
        (["model=tiny,blank_model", "model.lora.target_modules=[a,b]"], {1: "model.lora.target_modules=choice([a,b])"}),
        (["loss=dpo,own", "loss.function=mine.py:it"], {1: "loss.function=choice(mine.py:it)"}),
        # What is swept over already, other groups' keys, and what has a sign before it.
        (["loss=dpo,ipo", "loss.beta=0.1,0.5", "loss.a=interval(0,1)", "model.archive=x", "lr=1"], {}),
        (["loss=dpo,own", "++loss.options.margin=2", "~loss.beta", "+loss.c=1"], {}),
        (["loss=dpo", "loss.beta=0.5", "lr_schedule=linear,cosine", "+adapter=lora,qlora", "model.lora.r=4"], {}),
        # Hydra's choice() does not know null.
        (["trainer=FSDPTrainer,TensorParallelTrainer", "trainer.world_size=null"], {}),
        (["--cfg", "job", "loss=[dpo", "loss.beta=0.5"], {}),
    ],
)
def test_a_key_of_a_swept_group_is_left_to_each_job(arguments, deferred):
    expected = [deferred.get(text, deferred.get(place, text)) for place, text in enumerate(arguments)]
    found = defer_keys_of_swept_groups(arguments)
    assert found == expected
    parser = OverridesParser.create()
    for text, changed in zip(arguments, found, strict=True):
        if changed != text:
            [value] = parser.parse_overrides([changed])[0].sweep_iterator()
            assert value == parser.parse_overrides([text])[0].value()


def test_a_group_that_an_experiments_file_sweeps_over_counts_too(tmp_path, monkeypatch):
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    file.write_text("hydra: {mode: MULTIRUN, sweeper: {params: {loss: 'dpo,ipo'}}}")
    monkeypatch.setattr(composition, "CONFIG_DIR", tmp_path)
    arguments = ["+experiment=mine", "loss.beta=0.5"]
    assert defer_keys_of_swept_groups(arguments) == ["+experiment=mine", "loss.beta=choice(0.5)"]
    assert defer_keys_of_swept_groups(["+experiment=none", *arguments[1:]]) == ["+experiment=none", "loss.beta=0.5"]


def test_a_key_is_said_to_belong_to_those_that_have_it_from_another_file_too():
    said = explain_composition_error(ValueError("Could not override 'loss.label_smoothing'."))
    assert "beta_DPO" in said and "dpo" in said and "sft" not in said.partition("belongs")[2]


# ---- what has no effect -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "notes"),
    [
        ("datasets=[toy]", []),
        ("datasets=[toy] held_out_share=0.2", ["held_out_share has no effect: the data set defines its held-out split"]),
        (
            "datasets=[toy] truncation_mode=drop max_prompt_length=100",
            ["max_prompt_length has no effect: truncation_mode=drop truncates nothing"],
        ),
        ("datasets=[toy] truncation_mode=keep_end max_prompt_length=100", []),
        ("datasets=[hh] loss=dpo", []),
        ("datasets=[hh-helpful-base] loss=sft", [LAST_ROW]),
    ],
)
def test_settings_of_the_run_that_say_nothing_to_an_entry_are_noted(compose, line, notes):
    [entry] = read_entries(compose(*line.split()))
    assert list(entry.notes) == notes


def test_a_share_that_is_held_out_of_a_file_has_an_effect(compose, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}")
    for keys, count in (("", 0), (f", test_path: {path}", 1)):
        [entry] = read_entries(compose(f"datasets=[{{path: {path}{keys}}}]", "held_out_share=0.2"))
        assert len(entry.notes) == count


def test_a_section_of_any_keys_takes_them_in_braces(compose):
    assert compose("loss=dpo", "optimizer_kwargs={eps:1e-6}").optimizer_kwargs == {"eps": 1e-6}


def test_the_flag_of_a_sweep_may_stand_anywhere():
    assert prepare_arguments(["loss=dpo", "-m", "lr=1e-5,1e-4"]) == ["-m", "loss=dpo", "lr=1e-5,1e-4"]


def test_an_option_without_its_value_is_not_true():
    with pytest.raises(UserError, match="--lr: found no value, and written without dashes here: lr=VALUE"):
        prepare_arguments(["--lr"])
    with pytest.raises(UserError, match="--dry_run: written without dashes here: dry_run=true"):
        prepare_arguments(["--dry_run"])
