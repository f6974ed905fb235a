"""rerun.yaml: the overrides of a run, as a file that repeats it from any working directory."""

import shutil

import pytest
from omegaconf import OmegaConf

from preference_training.configuration.config_files import insert_config_file
from preference_training.configuration.rerun import rerun_values, write_rerun
from preference_training.configuration.validation import configured
from preference_training.core.errors import UserError


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine.jsonl", "loader.py", "judge.jinja"):
        (tmp_path / name).touch()
    (tmp_path / "model").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("overrides", "values"),
    [
        (["lr=1e-5", "loss=dpo", "loss.beta=0.2"], {"lr": 1e-5, "loss": "dpo", "loss.beta": 0.2}),
        # The last of two counts, as on the command line.
        (["lr=1e-5", "lr=2e-5"], {"lr": 2e-5}),
        (["+adapter=lora", "++optimizer_kwargs.eps=1e-6"], {"adapter": "lora", "optimizer_kwargs.eps": 1e-6}),
        (["n_epochs=null", "debug=true", "exp_name='a b'"], {"n_epochs": None, "debug": True, "exp_name": "a b"}),
        # What belongs to one start.
        (
            ["resume=auto", "dry_run=true", "local_run_dir=x", "hydra.verbose=true", "hydra/launcher=x", "seed=3"],
            {"seed": 3},
        ),
        # Names are no paths.
        (["model=pythia28", "datasets=[hh,shp]"], {"model": "pythia28", "datasets": ["hh", "shp"]}),
        (["model=Qwen/Qwen3-0.6B", "datasets=org/set"], {"model": "Qwen/Qwen3-0.6B", "datasets": "org/set"}),
    ],
)
def test_a_file_has_the_keys_and_values_of_the_command_line(overrides, values, here):
    assert rerun_values(overrides) == values


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("datasets=mine.jsonl", "{here}/mine.jsonl"),
        ("datasets=[hh,{path:mine.jsonl,prompt:mine.jsonl}]", ["hh", {"path": "{here}/mine.jsonl", "prompt": "mine.jsonl"}]),
        ("datasets=loader.py:mine", "{here}/loader.py:mine"),
        ("datasets='*.jsonl'", "{here}/*.jsonl"),
        ("datasets=s3://bucket/mine.jsonl", "s3://bucket/mine.jsonl"),
        ("model=model", "{here}/model"),
        ("model.name_or_path=model", "{here}/model"),
        ("model.chat_template=judge.jinja", "{here}/judge.jinja"),
        ("local_dirs=[runs]", ["{here}/runs"]),
        ("exp_name=model", "model"),
        ("datasets=model/../mine.jsonl", "{here}/mine.jsonl"),
        ("datasets=[{path:./model//../mine.jsonl}]", [{"path": "{here}/mine.jsonl"}]),
        ("datasets=model/../loader.py:mine", "{here}/loader.py:mine"),
        ("datasets='model/../*.jsonl'", "{here}/*.jsonl"),
        ("local_dirs=[model/../runs]", ["{here}/runs"]),
        ("rounds.judge=loader.py:mine", "{here}/loader.py:mine"),
        # The name of a judge, though a folder has it too.
        ("rounds.judge=model", "model"),
        ("rounds.judge=[{judge:model,rubric:mine.jsonl}]", [{"judge": "model", "rubric": "{here}/mine.jsonl"}]),
        ("rounds.second_judge=reward_model:model", "reward_model:{here}/model"),
    ],
)
def test_paths_are_absolute(override, value, here):
    def placed(given):
        if isinstance(given, list):
            return [placed(each) for each in given]
        return {k: placed(v) for k, v in given.items()} if isinstance(given, dict) else given.replace("{here}", str(here))

    assert list(rerun_values([override]).values()) == [placed(value)]


def test_a_run_writes_what_it_was_started_with_and_how_to_repeat_it(here, compose):
    write_rerun(compose("loss=dpo", "lr=3e-4", "datasets=toy"), here)
    text = (here / "rerun.yaml").read_text()
    assert f"python train.py --config-name rerun --config-dir {here}\n" in text
    assert OmegaConf.to_container(OmegaConf.create(text)) == {"loss": "dpo", "lr": 3e-4, "datasets": "toy"}


def test_a_path_through_a_link_leads_to_the_same_file(here):
    (here / "elsewhere" / "inner").mkdir(parents=True)
    (here / "elsewhere" / "mine.jsonl").touch()
    (here / "link").symlink_to(here / "elsewhere" / "inner")
    # Without the link this would be mine.jsonl of the working directory.
    assert rerun_values(["datasets=link/../mine.jsonl"]) == {"datasets": f"{here}/elsewhere/mine.jsonl"}
    # A link that no `..` follows stays one.
    assert rerun_values(["model=link"]) == {"model": f"{here}/link"}


def test_presets_of_the_users_own_are_kept_beside_the_file_and_found_there(here):
    """A loss and a model in a folder of --config-dir; the folder is gone when the run is repeated."""
    texts = {"loss": "defaults: [dpo, _self_]\nbeta: 0.03\n", "model": "defaults: [base_model]\nname_or_path: some/model\n"}
    for group, text in texts.items():
        (here / "my" / group).mkdir(parents=True)
        (here / "my" / group / "gentle.yaml").write_text(text)
    config = configured("--config-dir=my", "loss=gentle", "model=gentle", "lr=1e-5")
    assert (config.loss.beta, config.loss.name, config.model.name_or_path) == (0.03, "dpo", "some/model")
    (here / "run").mkdir()
    write_rerun(config, here / "run")
    shutil.rmtree(here / "my")
    again = configured(*insert_config_file(["--config-name", "rerun", "--config-dir", str(here / "run")]))
    assert again.changed({"local_run_dir": config.local_run_dir}).as_dict() == config.as_dict()
    write_rerun(again, here / "run")


def test_a_preset_of_the_users_own_with_a_key_that_no_loss_has_is_refused(here):
    (here / "my" / "loss").mkdir(parents=True)
    (here / "my" / "loss" / "odd.yaml").write_text("defaults: [dpo, _self_]\nbeat: 0.03\n")
    with pytest.raises(UserError, match=r"loss\.beat: no such key; did you mean loss\.beta"):
        configured("--config-dir", "my", "loss=odd")
