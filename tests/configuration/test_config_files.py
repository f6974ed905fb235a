"""A run as a YAML file of the user's own: python train.py --config-name my_run."""

import json
import re
from pathlib import Path

import pytest

from preference_training.configuration.command_line import prepare_arguments
from preference_training.configuration.composition import compose_overrides
from preference_training.configuration.config_files import name_file
from preference_training.core.errors import UserError

MY_RUN = """
model: Qwen/Qwen3-0.6B
adapter: lora
datasets: mine.jsonl
loss: dpo
loss.beta: 0.2
lr: 1e-5
evaluation:
  n_prompts: 64
optimizer_kwargs: {eps: 1e-6}
"""
SAME = (
    "model=Qwen/Qwen3-0.6B", "+adapter=lora", "datasets=mine.jsonl", "loss=dpo", "loss.beta=0.2", "lr=1e-5",
    "evaluation.n_prompts=64", "optimizer_kwargs.eps=1e-6",
)  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text, name="my_run.yaml"):
    Path(name).write_text(text)


def composed(*arguments):
    config = dict(compose_overrides(*prepare_arguments(list(arguments)))[0])
    del config["local_run_dir"]
    return config


def refusal(text):
    write(text)
    with pytest.raises(UserError) as error:
        composed("--config-name", "my_run")
    return str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        "--config-name my_run",
        "--config-name my_run.yaml",
        "--config-name=my_run",
        "-cn my_run",
        "--config my_run.yaml",
        "my_run.yaml",
    ],
)
def test_a_file_is_what_its_keys_are_as_overrides(arguments):
    write(MY_RUN)
    assert composed(*arguments.split()) == composed(*SAME)


def test_a_file_may_lie_in_another_folder(folder):
    (folder / "runs").mkdir()
    write(MY_RUN, "runs/my_run.yaml")
    for name in (f"{folder}/runs/my_run", "runs/my_run.yaml"):
        assert composed("--config-name", name) == composed(*SAME)
    for given in (["--config-dir", "runs"], ["--config-dir=runs"], ["-cd", "runs"]):
        # A folder may have presets too, which Hydra looks for there.
        assert prepare_arguments([*given, "--config-name", "my_run"]) == [
            "--config-dir=runs",
            *prepare_arguments(["runs/my_run.yaml"]),
        ]


def test_a_folder_of_the_users_may_have_presets(folder):
    (folder / "mine" / "model").mkdir(parents=True)
    write("name_or_path: a/b\n", "mine/model/my_model.yaml")
    assert prepare_arguments(["--config-dir=mine", "model=my_model"]) == ["--config-dir=mine", "model=my_model"]
    write("model: my_model\n", "mine/my_run.yaml")
    of_the_file = prepare_arguments(["--config-name", "my_run", "--config-dir", "mine", "seed=1"])
    assert of_the_file == ["--config-dir=mine", "model=my_model", "seed=1"]
    with pytest.raises(UserError, match="model=my_model: there is no such model"):
        prepare_arguments(["model=my_model"])


def test_the_command_line_overrides_the_file():
    write(MY_RUN)
    config = composed("--config-name", "my_run", "lr=3e-4", "model=tiny", "adapter=qlora")
    assert config["lr"] == 3e-4
    assert (config["model"].name_or_path, config["model"].quantization) == (None, "nf4")
    assert config["loss"].beta == 0.2


def test_a_sweep_goes_over_values_of_the_command_line():
    write(MY_RUN)
    arguments = prepare_arguments(["-m", "--config-name", "my_run", "loss.beta=0.1,0.3"])
    assert [text for text in arguments if text.startswith("loss.beta")] == ["loss.beta=0.1,0.3"]
    # Overrides that follow an option behind others would be refused.
    assert arguments[0] == "-m"
    assert "lr=1e-05" in arguments


def test_nested_and_flat_keys_mean_the_same():
    write("loss: dpo\nloss.beta: 0.3\nmodel.lora.r: 4\n", "flat.yaml")
    write("loss: {beta: 0.3, name: dpo}\nmodel:\n  lora: {r: 4}\n", "nested.yaml")
    assert composed("flat.yaml") == composed("nested.yaml")


@pytest.mark.parametrize(
    "value",
    [
        "it's \"fine\"", "a\\", "a\\'b", "two\nlines\n", "x = {a}, [b]", "1e-5", "true", "null", "", " padded ", "50% of 'em",
    ],
)  # fmt: skip
def test_texts_are_read_as_they_stand(value):
    write(f"system_prompt: {json.dumps(value)}")
    assert composed("my_run.yaml")["system_prompt"] == value


def test_values_may_be_nested():
    write("datasets:\n  - toy\n  - {path: 'my rows.jsonl', where: {'a column': '>= 0.5'}, weight: 2.5, split: null}\n")
    assert composed("my_run.yaml")["datasets"] == [
        "toy",
        {"path": "my rows.jsonl", "where": {"a column": ">= 0.5"}, "weight": 2.5, "split": None},
    ]


def test_a_file_with_a_list_of_defaults_is_left_to_hydra(folder):
    write("defaults: [config, _self_]\nlr: 1e-3\n")
    assert prepare_arguments(["--config-name", "my_run", "seed=1"]) == [
        f"--config-dir={folder}",
        "--config-name=my_run",
        "seed=1",
    ]


def test_the_projects_own_configuration_is_left_to_hydra():
    assert prepare_arguments(["--config-name", "config"]) == ["--config-name", "config"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lrr: 1", "my_run.yaml: lrr: no such key; did you mean lr?"),
        ("loss: {betta: 1}", "my_run.yaml: loss.betta: no such key; did you mean loss.beta?"),
        ("learning_rate: 0.1", "my_run.yaml: learning_rate: in this project: lr: 0.1"),
        ("dpo_beta: 0.2", "my_run.yaml: dpo_beta: in this project: loss: dpo, loss.beta: 0.2"),
        ("use_lora: true", "my_run.yaml: use_lora: in this project: adapter: lora"),
        ("lr: 1\nlr: 2", "my_run.yaml, line 2: found duplicate key lr. Expected YAML: a key and a value on each line."),
        ("a: b: c", "my_run.yaml, line 1: mapping values are not allowed here. Expected YAML: a key and a value on each line."),
        ("[1]", "my_run.yaml: expected keys with values, such as lr: 1e-5."),
    ],
)  # fmt: skip
def test_a_mistake_is_said_with_the_file_and_the_key(text, told):
    assert refusal(text) == told


def test_all_wrong_keys_of_a_file_are_said_at_once():
    assert refusal("lrr: 1\nloss: {name: dpo, betta: 1}\nepochs: 2\nseed: 1") == (
        "my_run.yaml: lrr: no such key; did you mean lr?\n"
        "my_run.yaml: loss.betta: no such key; did you mean loss.beta?\n"
        "my_run.yaml: epochs: in this project: n_epochs: 2"
    )


@pytest.mark.parametrize(
    ("told", "in_file"),
    [
        ("lr: found x. Set warmup_share=0.1, or +adapter=lora.", "lr: found x. Set warmup_share: 0.1, or adapter: lora."),
        ("lr: It belongs to loss=dpo, ipo.", "lr: It belongs to loss: dpo, ipo."),
        ("lr: 'datasets=[{path: a.jsonl}]'", "lr: datasets: [{path: a.jsonl}]"),
        # No overrides, and commands.
        ("lr: a=1, 2*b=3, --lr=4 and lr==5", "lr: a=1, 2*b=3, --lr=4 and lr==5"),
        ("lr: python train.py lr=1", "lr: python train.py lr=1"),
    ],
)
def test_a_message_about_a_key_of_a_file_shows_overrides_as_the_file_has_them(told, in_file):
    write("lr: 1")
    prepare_arguments(["--config-name", "my_run"])
    assert name_file(told) == f"my_run.yaml: {in_file}"
    assert name_file(told.replace("lr:", "seed:", 1)) == told.replace("lr:", "seed:", 1)


def test_a_value_that_cannot_work_is_said_with_the_file(compose):
    write("batch_size: 0\nmodel: qwen\n")
    with pytest.raises(UserError) as error:
        prepare_arguments(["--config-name", "my_run"])
    assert name_file(str(error.value)).startswith("my_run.yaml: model: qwen: there is no such model")
    assert name_file("batch_size: found 0") == "my_run.yaml: batch_size: found 0"
    assert name_file("seed: found x") == "seed: found x"


def test_a_file_that_does_not_exist_is_named_with_the_nearest(folder):
    write(MY_RUN)
    with pytest.raises(
        UserError, match=re.escape(f"--config-name: my_rum: no such file: {folder}/my_rum.yaml; did you mean my_run.y")
    ):
        prepare_arguments(["--config-name", "my_rum"])
