"""What a run goes on from, what it refuses to go on from, and that two do not share a directory."""

import json
import shutil
import signal
from contextlib import chdir
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from preference_training.checkpointing.checkpoint import list_checkpoints
from preference_training.core.errors import UserError
from preference_training.core.signals import STOPPED
from tests.faults.processes import (
    RESUMED,
    STEP,
    Run,
    assert_same_weights,
    assert_whole,
    rows_of,
    train_here,
    undisturbed,
)


def write_pairs(path, word: str) -> None:
    rows = [
        {"prompt": f"Name a colour, {n}.\n", "chosen": f"Blue {n % 7}.", "rejected": f"{word} {n % 5}."} for n in range(200)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


SETTINGS = ("datasets=[pairs.jsonl]", "model.archive=weights/LATEST", "n_epochs=null", "n_eval_examples=2")


@pytest.fixture(scope="module")
def beginning(compose, tmp_path_factory):
    """The folder of a run over a file of pairs, from weights in a file, that has come to its 64th example."""
    folder = tmp_path_factory.mktemp("beginning")
    with chdir(folder):
        train_here(compose, Path(), "n_examples=32", "save_strategy=no", name="weights")
        write_pairs(Path("pairs.jsonl"), "No")
        train_here(compose, Path(), *SETTINGS, "n_examples=64")
    return folder


@pytest.fixture
def begun(beginning, compose, tmp_path, monkeypatch):
    """How to go on with a copy of that run, in the test's folder."""
    shutil.copytree(beginning, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return partial(train_here, compose, Path(), *SETTINGS)


def other_data(folder) -> tuple[str, ...]:
    write_pairs(folder / "pairs.jsonl", "Never")
    return ()


def other_weights(folder) -> tuple[str, ...]:
    file = (folder / "weights" / "LATEST").resolve() / "model.safetensors"
    weights = {name: tensor + (name == "model.norm.weight") for name, tensor in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    return ()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda _: ("loss.beta=0.2", "lr=0.1"),
            "with another configuration: loss.beta: was 0.1, is 0.2; lr: was 0.001, is 0.1. Start a",
        ),
        (other_data, "resume: datasets: the prepared data are not those of the run that .*step-64 belongs to. Start a new run"),
        (other_weights, "resume: model: the weights that it began with are not those of the run that .*step-64 belongs to"),
    ],
    ids=["keys", "data", "weights"],
)
def test_another_run_is_refused_with_what_differs_and_nothing_is_changed(change, told, begun, tmp_path):
    rows = rows_of(tmp_path / "run")
    with pytest.raises(UserError, match=told):
        begun(*change(tmp_path), "n_examples=128")
    assert rows_of(tmp_path / "run") == rows
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-64", "step-32"]


def test_a_longer_run_and_one_from_an_older_checkpoint_are_the_run_that_was_never_interrupted(begun, tmp_path, capfd):
    begun("n_examples=128", "resume=null", name="straight")
    before = rows_of(tmp_path / "run")
    begun("n_examples=64")
    assert "resume: that run is complete; a larger n_epochs, n_examples or n_steps would continue it" in capfd.readouterr().out
    assert rows_of(tmp_path / "run") == before
    begun("n_examples=128")
    # In between it was evaluated at its end, where the longer run is evaluated as well.
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "straight")
    assert_same_weights(tmp_path / "run" / "LATEST", tmp_path / "straight" / "LATEST")
    begun("n_examples=96", f"resume={tmp_path}/run/step-64")
    names = {path.name for path in (tmp_path / "run").iterdir() if path.name.startswith("step-")}
    assert names == {"step-32", "step-64", "step-96", "step-96.set-aside", "step-128.set-aside"}
    assert rows_of(tmp_path / "run")[-1]["counters/examples"] == 96
    assert_same_weights(tmp_path / "run" / "step-96", tmp_path / "straight" / "step-96")


def test_the_link_to_the_newest_checkpoint_is_right_after_a_kill_before_it_was_set(begun, tmp_path):
    link = tmp_path / "run" / "LATEST"
    link.unlink()
    link.symlink_to("step-32")
    (tmp_path / "run" / ".LATEST.4711").symlink_to("step-64")
    begun("n_examples=64")
    assert link.resolve().name == "step-64"
    assert not list(link.parent.glob(".LATEST.*"))


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew_without_its_old_rows(begun, tmp_path):
    expected = rows_of(tmp_path / "run")
    for checkpoint in list_checkpoints(tmp_path / "run"):
        shutil.rmtree(checkpoint)
    begun("n_examples=64")
    assert rows_of(tmp_path / "run") == expected
    assert_whole(tmp_path / "run")


def test_the_second_run_on_a_directory_is_refused_and_the_first_goes_on(tmp_path):
    first = Run(tmp_path, "loss=dpo", "n_examples=1000000", "n_epochs=null")
    assert first.until(STEP)
    second = Run(tmp_path, "loss=dpo")
    assert second.wait() == 2
    assert second.lines[-1].startswith(f"local_run_dir: {tmp_path}/run is in use by another run. Wait for it")
    assert first.until(STEP)
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == STOPPED, first.output


TWO = ("trainer=FSDPTrainer", "trainer.nproc_per_node=2")


@pytest.mark.parametrize("trainer", [(), pytest.param(TWO, marks=pytest.mark.long)], ids=["one process", "two processes"])
def test_a_run_that_is_stopped_in_its_first_evaluation_says_that_nothing_was_trained(trainer, tmp_path):
    first = Run(tmp_path, "loss=dpo", "n_eval_examples=256", "eval_batch_size=2", *trainer)
    assert first.until("evaluating: ")
    first.process.send_signal(signal.SIGINT)
    assert first.wait() == STOPPED, first.output
    assert "stopped before the first step: SIGINT; nothing was trained" in first.output
    assert "continues from there" not in first.output and "Traceback" not in first.output
    assert not list_checkpoints(tmp_path / "run") and rows_of(tmp_path / "run") == []


@pytest.mark.long
def test_one_process_two_and_one_again_go_on_with_the_same_data_and_curve(compose, tmp_path, tmp_path_factory):
    go = partial(train_here, compose, tmp_path)
    go("n_examples=128")
    two = Run(tmp_path, "loss=dpo", "trainer=FSDPTrainer", "trainer.nproc_per_node=2", "n_examples=192")
    assert two.wait() == 0, two.output
    assert two.numbers(RESUMED) == [128]
    go("n_examples=320")
    expected = undisturbed(tmp_path_factory, "DPO", "loss=dpo")
    for row, other in zip(rows_of(tmp_path / "run"), rows_of(expected), strict=True):
        for name, value in other.items():
            assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-4), (name, other["counters/examples"])
    found, known = (load_file(path / "LATEST" / "model.safetensors") for path in (tmp_path / "run", expected))
    for name, weight in known.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4)
