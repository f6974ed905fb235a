"""model= takes what a model is called: a preset, a hub id, a directory or a GGUF file."""

import json

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


# ---- directories that are more than a model --------------------------------------------------------------------------------


def make_checkpoint(path, complete=True):
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    if complete:
        (path / "checksums.json").write_text("{}")
    return path


def make_adapter(path, base):
    path.mkdir(parents=True)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "base_model_name_or_path": base}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def test_a_run_directory_is_its_newest_complete_checkpoint(plain, tmp_path):
    run = tmp_path / "run"
    make_checkpoint(run / "step-90")
    newest = make_checkpoint(run / "step-160")
    make_checkpoint(run / "step-200", complete=False)
    assert plain(f"model={run}")["model"]["name_or_path"] == str(newest)


def test_an_adapter_is_continued_on_the_model_that_it_names(plain, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", "Qwen/Qwen3-0.6B")
    model = plain(f"model={adapter}")["model"]
    assert (model["name_or_path"], model["archive"]) == ("Qwen/Qwen3-0.6B", str(adapter))
    assert (model["lora"]["r"], model["lora"]["alpha"], model["tokenizer_name_or_path"]) == (4, 8, None)
    (adapter / "tokenizer_config.json").write_text("{}")
    assert plain(f"model={adapter}")["model"]["tokenizer_name_or_path"] == str(adapter)


def test_an_adapter_of_a_run_has_its_base_beside_it(plain, tmp_path):
    adapter = make_adapter(tmp_path / "run" / "step-90", None)
    base = make_checkpoint(tmp_path / "run" / "base")
    assert plain(f"model={adapter}")["model"]["name_or_path"] == str(base)


def test_an_adapter_whose_base_is_gone_is_refused_with_its_name(tmp_path):
    adapter = make_adapter(tmp_path / "adapter", "/gone/llama")
    assert refusal(f"model={adapter}").startswith(f"model={adapter}: it is an adapter of /gone/llama, which is not there. Set ")
    (adapter / "adapter_config.json").write_text("{")
    assert "adapter_config.json is damaged" in refusal(f"model={adapter}")


def test_a_directory_with_one_gguf_file_is_that_file(plain, tmp_path):
    (tmp_path / "a.gguf").touch()
    assert plain(f"model={tmp_path}")["model"]["name_or_path"] == f"{tmp_path}/a.gguf"
    (tmp_path / "b.gguf").touch()
    assert refusal(f"model={tmp_path}").endswith(f"found several GGUF files. Name one, as in model={tmp_path}/a.gguf")


def test_a_directory_that_is_no_model_is_refused_with_what_is_there(tmp_path):
    assert refusal(f"model={tmp_path}").startswith(f"model={tmp_path}: found nothing there, expected a model (config.json, ")
    (tmp_path / "notes.txt").touch()
    assert "found notes.txt there" in refusal(f"model={tmp_path}")
    assert "Weights alone are model.archive" in refusal(f"model={tmp_path / 'notes.txt'}")


def test_a_file_on_the_hub_is_a_model_too(plain):
    name = "unsloth/Qwen3-0.6B-GGUF/Qwen3-0.6B-Q4_K_M.gguf"
    assert plain(f"model={name}")["model"]["name_or_path"] == name
