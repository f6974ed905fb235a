"""What holds the whole together: options have readers, run directories their place, what README and pages show works."""

import inspect
import json
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import train  # noqa: F401  registers the resolvers that the configuration uses
from preference_training.configuration.composition import force_open_sections, group_choices, group_keys, known_keys
from preference_training.configuration.run_dirs import new_run_dir
from preference_training.data.entries import read_entries
from preference_training.data.registry import DATASETS
from preference_training.losses.registry import losses
from tests.support import shown
from tests.support.files import ROOT

PACKAGE = sorted(ROOT.glob("preference_training/**/*.py"))


def test_every_option_has_a_reader():
    code = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *PACKAGE])
    # Read by the resolver that names run directories.
    code += ".local_dirs" if "${new_run_dir:${local_dirs}," in (ROOT / "config" / "config.yaml").read_text() else ""
    by_loss = {key for key in known_keys() if key.startswith("loss.")}
    for key in known_keys() - by_loss:
        name = key.rsplit(".", 1)[-1]
        assert re.search(rf"\.{name}\b|\[\"{name}\"\]", code), f"nothing reads {key}"
    assert {*group_choices("loss")} == losses().keys()
    by_name = {name: keys - {"name"} for name, keys in group_keys("loss").items()}
    for name, keys in by_name.items():
        assert keys <= inspect.signature(losses()[name].make).parameters.keys(), f"loss={name} has a key that nothing reads"
    assert by_loss == {"loss.name"} | {f"loss.{key}" for keys in by_name.values() for key in keys}


def test_run_directories_of_the_same_experiment_differ(tmp_path):
    assert len({new_run_dir([str(tmp_path)], "run") for _ in range(100)}) > 50
    assert new_run_dir([str(tmp_path / "absent"), str(tmp_path)], "run").startswith(str(tmp_path / "run_"))


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/b", "..", "x" * 300, "é" * 300, ""])
def test_a_run_directory_lies_in_its_folder_whatever_the_experiment_is_called(name, tmp_path):
    path = Path(new_run_dir([str(tmp_path)], name))
    path.mkdir()
    assert path.resolve().parent == tmp_path


# ---- the README and the pages ---------------------------------------------------------------------------------------------


TRAININGS = shown.commands(shown.TRAINING)


def test_the_readme_and_the_docs_show_commands():
    assert len([page for page, _ in TRAININGS if page == "README.md"]) >= 6
    assert len({page for page, _ in TRAININGS}) >= 16


def test_the_readme_is_a_screen_and_a_half():
    assert len(shown.PAGES["README.md"].splitlines()) <= 150


@pytest.mark.parametrize(("page", "words"), TRAININGS, ids=[f"{page} {' '.join(words)[:60]}" for page, words in TRAININGS])
def test_every_command_that_is_shown_composes_and_makes_sense(page, words, compose, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    shown.write_files(page, tmp_path)
    for name in ("mine.jsonl", "long.jsonl", "tools_sft.jsonl", "tools_dpo.jsonl", "examples/short_answers.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for file, row in (
        ("my_labels", {"prompt": "A?", "response": "yes", "label": True}),
        ("my_rankings", {"prompt": "A?", "responses": ["yes", "no"], "scores": [2, 1]}),
        ("my_margins", {"prompt": "A?", "chosen": "yes", "rejected": "no", "margin": 2.5}),
    ):
        (tmp_path / f"{file}.jsonl").write_text(json.dumps(row) + "\n")
    arguments = force_open_sections(shown.training_arguments(words))
    overrides = [text for text in arguments if "=" in text and "sweeper" not in text]
    archive = next((text for text in overrides if text.startswith("model.archive=")), None)
    if archive:
        (tmp_path / Path(archive.split("=", 1)[1]).parent).mkdir(parents=True)
        (tmp_path / archive.split("=", 1)[1]).touch()
    for value in sweep_values(overrides):
        read_entries(compose(*value))


def sweep_values(overrides: list[str]) -> list[list[str]]:
    """The jobs that a command line with values like `0.05,0.1` stands for; of an interval, one value."""
    jobs = [[]]
    for text in overrides:
        key, value = text.split("=", 1)
        values = ["0.2"] if "interval" in value else [value] if value.startswith(("[", "{")) else value.split(",")
        jobs = [[*job, f"{key}={choice}"] for job in jobs for choice in values]
    return jobs


def test_own_data_as_shown_is_read(tmp_path, monkeypatch):
    from preference_training.data.entries import load_records, read_entry

    monkeypatch.chdir(tmp_path)
    shown.write_files(shown.OWN_DATA, tmp_path)
    rows = [record for split in ("train", "test") for record in load_records(read_entry("my_preferences.jsonl"), split)]
    assert sorted(record.responses[0] for record in rows) == [" Monday.", "An oak.", "Blue.", "Iron.", "The Nile."]
    [first, _] = load_records(read_entry("my_data.py:colors"), "train")
    assert first.pairs == [(0, 1), (0, 2)]


def test_the_losses_of_their_page_and_their_keys_are_all_there_are():
    table = shown.PAGES["docs/losses.md"].split("| `loss=` |")[1].split("\n\n")[0].splitlines()[2:]
    rows = [re.findall(r"`(\w+)`", f"{row.split('|')[1]} {row.split('|')[3]}") for row in table]
    assert [name for name, *_ in rows] == [*losses()]
    for name, *keys in rows:
        if name not in ("dpo", "beta_DPO"):
            assert {"name", *keys} == group_keys("loss")[name], name
    both = {key for name, *keys in rows if name in ("dpo", "beta_DPO") for key in keys}
    assert both - {"dpo", "beta_DPO"} | {"name"} == group_keys("loss")["dpo"]


def test_the_presets_that_their_page_names_are_all_there_are():
    named = set(re.findall(r"`([\w.-]+)`", shown.PAGES["docs/models.md"].split("## Presets")[1].split("Other keys")[0]))
    assert {path.stem for path in (ROOT / "config" / "model").glob("*.yaml")} - {"base_model", "pretrained"} <= named
    assert OmegaConf.load(ROOT / "config" / "config.yaml").defaults[1].model == "tiny"


def test_the_data_sets_that_their_page_names_are_all_there_are():
    rows = shown.PAGES["docs/data-sets.md"].split("| name | data |")[1].split("\n\n")[0].splitlines()[2:]
    named = {name for row in rows for name in re.findall(r"`([\w-]+)`", row.split("|")[1])}
    # Not those of other tests.
    code = {name: getattr(each.load, "func", each.load).__module__ for name, each in DATASETS.items()}
    assert named == {name for name, module in code.items() if module.startswith("preference_")}


@pytest.mark.parametrize("path", sorted((ROOT / "config" / "experiment").glob("sweep_*.yaml")), ids=lambda path: path.stem)
def test_each_example_of_a_sweep_says_how_it_is_called_and_is_named_on_the_page_of_sweeps(path):
    assert f"python train.py -m +experiment={path.stem}" in path.read_text()
    assert f"python train.py -m +experiment={path.stem}" in shown.PAGES["docs/sweeps.md"]
