"""model= takes what a model is called: a preset, a hub id, a directory or a GGUF file."""

import pytest

from preference_training.configuration.command_line import prepare_arguments
from preference_training.configuration.composition import compose_overrides
from preference_training.configuration.model_names import OTHERS
from preference_training.core.errors import UserError


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A directory with a model's configuration, named ./my_model; its absolute path is returned."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my_model").mkdir()
    (tmp_path / "my_model" / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path / "my_model"


def refusal(*overrides):
    with pytest.raises(UserError) as error:
        compose_overrides(*overrides)
    return str(error.value)


@pytest.mark.parametrize(
    "override",
    ["model=Qwen/Qwen3-0.6B", "+model=Qwen/Qwen3-0.6B", "model='Qwen/Qwen3-0.6B'", "model.name_or_path=Qwen/Qwen3-0.6B"],
)
def test_a_hub_id_is_a_model_on_the_preset_of_pretrained_ones(plain, override):
    expected = plain("model=pretrained")
    expected["model"]["name_or_path"] = "Qwen/Qwen3-0.6B"
    found = plain(override)
    assert found.pop("local_run_dir") and expected.pop("local_run_dir")
    assert found == expected
    assert found["model"]["tokenizer_name_or_path"] is None


@pytest.mark.parametrize("name", ["my_model", "my_model/", "./my_model", "~/my_model", "{}", "{}/"])
def test_a_directory_is_a_model_however_its_path_is_written(plain, directory, name):
    config = plain(f"model={name.format(directory)}", "lr=1e-4")
    assert config["model"]["name_or_path"] in (str(directory), "my_model")
    assert config["lr"] == 1e-4


def test_a_path_may_have_characters_that_mean_something_to_hydra(plain, directory):
    odd = directory.with_name("it's 50%, a=b (new)")
    directory.rename(odd)
    assert plain(f"model={odd}")["model"]["name_or_path"] == str(odd)
    assert plain(f"model=./{odd.name}")["model"]["name_or_path"] == str(odd)


def test_a_gguf_file_is_a_model(plain, directory):
    file = directory / "model.Q4_1.gguf"
    file.touch()
    assert plain(f"model={file}")["model"]["name_or_path"] == str(file)


def test_a_preset_of_the_same_name_precedes_a_directory(plain, directory):
    directory.rename(directory.with_name("tiny"))
    assert plain("model=tiny")["model"]["name_or_path"] is None
    assert plain("model=./tiny")["model"]["name_or_path"] == str(directory.with_name("tiny"))


def test_a_sweep_goes_over_models_of_every_kind(directory):
    [argument] = prepare_arguments(["model=tiny,Qwen/Qwen3-0.6B,./my_model"])
    assert argument == f"model=tiny,Qwen/Qwen3-0.6B,{directory}"
    for value, name in (("tiny", None), ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"), (directory, str(directory))):
        assert compose_overrides(f"model={value}")[0].model.name_or_path == name


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gpt2-larg", f"model=gpt2-larg: there is no such model; did you mean gpt2-large? {OTHERS}"),
        ("./nowhere", "model=./nowhere: no such directory: {cwd}/nowhere. " + OTHERS),
        ("/nowhere/at/all", f"model=/nowhere/at/all: no such directory: /nowhere/at/all. {OTHERS}"),
        ("a/b/c", "model=a/b/c: no such directory: {cwd}/a/b/c. " + OTHERS),
        ("m.Q4_1.gguf", "model=m.Q4_1.gguf: no such file: {cwd}/m.Q4_1.gguf. " + OTHERS),
    ],
)
def test_a_name_that_is_no_model_is_refused_with_what_one_looks_like(directory, name, told):
    assert refusal(f"model={name}") == told.format(cwd=directory.parent)
