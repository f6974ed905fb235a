"""Keys that are paths: what begins with ~ lies in the home directory."""

import subprocess
import sys
from pathlib import Path

import pytest

from preference_training.configuration.config_files import insert_config_file
from preference_training.configuration.keys import PATH
from preference_training.configuration.rerun import rerun_values
from preference_training.configuration.schema import keys_with
from preference_training.configuration.validation import configured
from preference_training.core.errors import UserError
from preference_training.data.registry import find_dataset


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("run", "tasks", "cache"):
        (tmp_path / name).mkdir()
    for name in ("policy.pt", "my_loss.py", "prompts.jsonl", "template.jinja"):
        (tmp_path / name).write_text("")
    (tmp_path / "my_data.py").write_text(
        "from preference_datasets import register\n\n\n@register('colors')\ndef colors(split, silent=False, cache_dir=None):\n"
        "    return {}\n"
    )
    return tmp_path


PATHS = {
    "model.archive": "policy.pt",
    "model.reference_archive": "policy.pt",
    "model.chat_template": "template.jinja",
    "loss.function": "my_loss.py:Mine",
    "evaluation.to": "run/results.json",
    "evaluation.task_path": "tasks",
    "cache_dir": "cache",
    "local_run_dir": "run",
    "resume": "run",
}


def value_of(config, key):
    for name in key.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize("key", PATHS)
def test_a_path_may_begin_with_the_home_directory(key, home):
    loss = "own" if key == "loss.function" else "dpo"
    given = [f"loss={loss}", "template=chat", f"{key}='~/{PATHS[key]}'"]
    assert value_of(configured(*given), key) == str(home / PATHS[key])


def test_so_it_is_in_a_file_of_the_users_own(home, monkeypatch):
    monkeypatch.chdir(home)
    Path("my_run.yaml").write_text("loss: dpo\nmodel.archive: ~/policy.pt\ncontamination_files: [~/prompts.jsonl]\n")
    config = configured(*insert_config_file(["my_run.yaml"]))
    assert config.model.archive == config.as_composed["model"]["archive"] == str(home / "policy.pt")
    assert config.contamination_files == [str(home / "prompts.jsonl")]


def test_so_it_is_for_a_loader_of_the_users_own(home):
    assert find_dataset("~/my_data.py:colors").is_user_code
    assert configured("datasets=['~/my_data.py:colors']").datasets == [str(home / "my_data.py:colors")]


def test_what_is_no_path_keeps_its_tilde(home):
    assert configured("system_prompt='~/mind'").system_prompt == "~/mind"
    assert configured("cache_dir='~nobody_of_this_name/x'").cache_dir == "~nobody_of_this_name/x"


def test_a_run_directory_in_the_home_directory_is_made_there(home):
    command = ["train.py", "local_run_dir='~/mine'", "cache_dir=5"]
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, root / command[0], *command[1:]], cwd=home, capture_output=True, text=True)
    assert ended.returncode == 2 and "cache_dir" in ended.stderr
    assert not (home / "~").exists()


def test_all_paths_are_absolute_in_the_file_that_repeats_a_run(home):
    values = rerun_values(
        ["evaluation.judge='~/my_loss.py:brief'", "model.archive='~/policy.pt'", "evaluation.against=reference"]
    )
    assert values == {
        "evaluation.judge": str(home / "my_loss.py:brief"),
        "model.archive": str(home / "policy.pt"),
        "evaluation.against": "reference",
    }
    assert {"evaluation.judge", "datasets", "rounds.prompts"} <= keys_with(PATH)


@pytest.mark.parametrize("given", ["model=''", "+model=''"])
def test_an_empty_name_of_a_model_is_refused(given):
    with pytest.raises(UserError, match="model: found an empty name, expected a preset"):
        configured(given)


def test_so_is_one_in_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_run.yaml").write_text('model: ""\n')
    with pytest.raises(UserError, match="model: found an empty name"):
        configured(*insert_config_file(["my_run.yaml"]))
