"""Sweeps over loops of rounds: each job is a loop, its objective is of its last policy, and it goes on where it was."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from preference_training.configuration.validation import configured
from preference_training.core.errors import UserError
from preference_training.core.signals import StoppedError
from preference_training.rounds import start
from preference_training.rounds.loop import Loop
from preference_training.rounds.processes import StepFailedError
from preference_training.rounds.summary import read_summary
from preference_training.rounds.training import training_values
from preference_training.sweeps.jobs import STOP, Request
from preference_training.sweeps.running import run_job
from preference_training.sweeps.sweep import loop_warnings
from tests.rounds import loops
from tests.support import forked
from tests.support.files import ROOT

REWARD = "rounds/reward_held_out"
BRIEF = ("loss=dpo", "lr=1e-2", "rounds.rounds=1", "rounds.pairs=all", "rounds.n_held_out_samples=4", f"objective={REWARD}")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory, with prompts, a judge, and the place of a model."""
    loops.make_prompts(tmp_path, count=6)
    (tmp_path / "first" / "LATEST").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def line(folder: Path, *more: str) -> list[str]:
    """The command line of a job, without the place that a single loop has."""
    return [text for text in loops.overrides(folder, *BRIEF, *more) if not text.startswith("local_run_dir=")]


def score_of(directory: Path) -> float:
    """The mean held-out score of the last policy of a loop."""
    return json.loads((directory / "final" / "summary.json").read_text())["held_out"]["score"]["mean"]


def test_a_job_is_a_loop_that_returns_the_score_of_its_last_policy_and_goes_on_where_it_was_stopped(folder, monkeypatch):
    began = []

    def run_loop(loop: Loop, **_) -> None:
        """Is stopped in its first round; when it goes on, its last policy has a score of 0.75."""
        began.append(loop.directory)
        if len(began) == 1:
            raise StoppedError("stopped during train of round-1: SIGTERM")
        for files, score in zip(loop.rounds(), (0.25, 0.75), strict=True):
            files.directory.mkdir()
            files.summary.write_text(json.dumps({"held_out": {"score": {"mean": score, "low": None, "high": None}}}))

    def job(directory: Path, resume: str | None = None) -> float | None:
        given = [f"resume={resume}"] * bool(resume)
        return start.start_loop(configured(*line(folder), f"local_run_dir={directory}", *given), directory, in_sweep=True)

    monkeypatch.setattr(start, "run_loop", run_loop)
    directory = folder / "sweep" / "0"
    request = Request(folder / "sweep", directory, line(folder), {"seed": 0, "objective": REWARD})
    assert run_job(job, request) is None
    assert json.loads((directory / "job.json").read_text())["state"] == "stopped"
    # As a new start of the sweep does.
    (folder / "sweep" / STOP).unlink()
    assert run_job(job, request) == 0.75
    # A third start finds it complete.
    assert run_job(job, request) == 0.75 and began == [directory, directory]


def test_trainings_of_a_loop_have_no_keys_that_only_the_loop_has(folder):
    loop = loops.start(folder, *BRIEF, "gpus_per_job=1")
    values = training_values(loop, 1)
    assert not {"objective", "gpus_per_job", "pruner", "rounds.rounds"} & values.keys()
    assert values["loss"] == "dpo"
    loop = loops.start(folder, *BRIEF, "objective=rewards_eval/accuracies", f"local_run_dir={folder / 'other'}")
    assert training_values(loop, 1)["objective"] == "rewards_eval/accuracies"


@pytest.mark.parametrize(("status", "error"), [(2, UserError), (1, StepFailedError)])
def test_a_step_that_fails_ends_its_own_job_only(folder, monkeypatch, status, error):
    def fail(*_, **__):
        raise StepFailedError(f"sample of round-1 has ended with exit status {status}", status)

    monkeypatch.setattr(start, "run_loop", fail)
    for name in "01":
        (folder / name).mkdir()
    config = configured(*line(folder), f"local_run_dir={folder / '0'}")
    with pytest.raises(error, match="sample of round-1 has ended with exit status"):
        start.start_loop(config, folder / "0", in_sweep=True)
    with pytest.raises(SystemExit) as ended:
        start.start_loop(configured(*line(folder), f"local_run_dir={folder / '1'}"), folder / "1")
    assert ended.value.code == status


def test_only_metrics_of_held_out_prompts_compare_loops():
    assert loop_warnings(REWARD) == []
    [warning] = loop_warnings("loss/eval")
    assert warning.endswith(f"each on pairs of its own; objective={REWARD} can")


@pytest.mark.campaign
def test_a_sweep_over_loops_that_is_killed_runs_what_is_missing(folder):
    """Two values of beta; the first job is complete and the second in its training when all is killed."""
    shutil.rmtree(folder / "first")
    loops.make_model(folder)
    given = [ROOT / "train.py", "-m", *line(folder, "loss.beta=0.05,0.2", "sweep_dir=sweep")]
    with (folder / "said").open("w") as said:
        program = forked.Program(given, folder, said.fileno(), said.fileno())
    started = time.monotonic()
    while not (folder / "sweep" / "1" / "round-1" / "train.yaml").is_file():
        assert program.poll() is None and time.monotonic() - started < 900, (folder / "said").read_text()
        time.sleep(0.05)
    program.kill()
    program.wait(60)
    asked = len(loops.asked(folder))
    again = forked.run(given, folder, dict(os.environ))
    assert again.returncode == 0, again.stdout + again.stderr
    jobs = [json.loads((folder / "sweep" / name / "job.json").read_text()) for name in ("0", "1")]
    assert [(job["state"], job["starts"]) for job in jobs] == [("complete", 1), ("complete", 2)]
    assert [job["objective"] for job in jobs] == [score_of(folder / "sweep" / name) for name in ("0", "1")]
    best = max((0, 1), key=lambda number: jobs[number]["objective"])
    [row] = [text for text in again.stdout.splitlines() if text.startswith("best ")]
    assert row.split()[1] == str(best)
    assert (folder / "sweep" / "comparison.html").is_file() and (folder / "sweep" / "1" / "report.html").is_file()
    # Of the second job only what the last policy has written is judged again.
    last = Loop.open(folder / "sweep" / "1")
    assert read_summary(last.round(2))["held_out"]["responses"] == 16
    assert len(loops.asked(folder)) - asked <= 16
