"""`benchmarks/gpu_check.py`: what it would run on a GPU is understood, and it tells a wrong number from a right one."""

import json
import sys
from math import inf, nan

import pytest
from transformers import AutoConfig

from preference_training.configuration.composition import force_open_sections
from tests.support import forked
from tests.support.files import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_check
from gpu_check import CHECKS, COMMON, Comparison, FailedRunError, largest_difference


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Runs are forks, which need not import what all of them import; the overrides of each."""
    commands = []

    def start(overrides: tuple[str, ...]) -> tuple[int, str]:
        commands.append(overrides)
        done = forked.run([ROOT / "train.py", *overrides], tmp_path)
        return done.returncode, done.stdout + done.stderr

    monkeypatch.setattr(gpu_check, "start", start)
    return commands


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_every_run_of_a_gpu_composes_to_an_architecture_that_there_is(check, compose):
    sides = (check.own, check.other) if isinstance(check, Comparison) else ((),)
    for side in sides:
        config = compose(*force_open_sections([*COMMON, *check.setting, *side, "n_steps=2"]))
        assert AutoConfig.for_model(**config.model.from_config).hidden_size in (128, 320, 2048)


def test_the_small_form_compares_two_runs_and_keeps_what_it_found(started, tmp_path, capsys):
    assert gpu_check.main(["--cpu", "--only", "llama", "--out", str(tmp_path / "results")]) == 0
    [path] = (tmp_path / "results").glob("*_gpu_check_cpu.json")
    [result] = json.loads(path.read_text())["results"]
    assert result["passed"] and result["starts_at_ln_2"] and result["difference"] < 1e-6
    assert [("prefix_sharing=off" in overrides) for overrides in started] == [False, True]
    assert '"name": "llama float32"' in capsys.readouterr().out


def test_a_run_that_fails_is_a_result_with_its_reason_and_status_1(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "start", lambda overrides: (3, "out of memory"))
    assert gpu_check.main(["--cpu", "--only", "speed", "--out", str(tmp_path)]) == 1
    [path] = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["results"][0]["error"] == "exit status 3: out of memory"


def test_without_a_gpu_nothing_is_run(monkeypatch, capsys):
    monkeypatch.setattr("measure.hardware", lambda: {"cpu": "any"})
    assert gpu_check.main([]) == 2 and "--cpu" in capsys.readouterr().err


def row(examples: int, loss: float) -> dict:
    return {"counters/examples": examples, "loss/train": loss, "logps_train/chosen": -2.0, "logps_train/rejected": -4.0}


def test_the_largest_difference_is_relative_and_of_the_same_steps():
    # |0.5 - 0.4| / 0.4
    assert largest_difference([row(16, 0.6), row(32, 0.5)], [row(16, 0.6), row(32, 0.4)]) == pytest.approx(0.25)
    assert largest_difference([row(16, nan)], [row(16, 0.6)]) == inf
    with pytest.raises(FailedRunError, match="16"):
        largest_difference([row(16, 0.6)], [row(32, 0.6)])
