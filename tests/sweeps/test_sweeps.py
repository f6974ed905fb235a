"""Sweeps: jobs that run once however often a sweep is begun, that fail alone, share what they can, and end early."""

import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf

from preference_training.core.errors import UserError
from preference_training.evaluation.pruning import Pruning, build_pruner
from preference_training.sweeps import gpus
from preference_training.sweeps.jobs import Job, Request, SweepDirectory
from preference_training.sweeps.summary import job_table
from preference_training.sweeps.sweep import _swept, comparison_warnings
from preference_training.tracking.run_files import JOB
from tests.support import forked
from tests.support.files import ROOT, write

# Runs of a second or two.
SMALL = (
    "loss=dpo", "wandb.enabled=false", "sample_during_eval=false", "n_eval_examples=16", "save_policy_pt=false", "ledger=false",
    "model.from_config.hidden_size=32", "model.from_config.intermediate_size=64", "model.from_config.num_hidden_layers=1",
)  # fmt: skip
BRIEF = (*SMALL, "n_examples=32", "save_strategy=no")


def sweep(folder: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess:
    """`python train.py -m` in a folder, to its end."""
    return forked.run([ROOT / "train.py", "-m", *overrides], folder, {**os.environ, **environment})


def jobs(directory: Path) -> dict[str, dict]:
    """What each job's job.json says, by the job's directory."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(directory.glob(f"*/{JOB}"))}


def counters(run_dir: Path, metric: str) -> list[int]:
    """After how many examples a run has logged a metric, in the order of its rows."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["counters/examples"] for row in rows if metric in row]


# ---- what is run, and what is not ---------------------------------------------------------------------------------------


def rows_of(number: int) -> list[dict]:
    return [{"prompt": f"{n}?", "chosen": f" {n * number}", "rejected": f" {n + number} and more"} for n in range(40)]


def test_of_a_sweep_with_a_failed_job_that_is_killed_the_next_start_runs_what_is_missing_and_nothing_twice(tmp_path):
    for number in range(6):
        write(tmp_path / f"{number}.jsonl", rows_of(number) if number != 2 else [{"prompt": "a row without answers"}])
    steps = ("n_epochs=null", "n_examples=64", "save_every=32", "eval_every=32", "held_out_share=0.3")
    line = (*SMALL, *steps, "datasets=0.jsonl,1.jsonl,2.jsonl,3.jsonl,4.jsonl,5.jsonl", "sweep_dir=sweep")
    with (tmp_path / "said").open("w") as said:
        first = forked.Program([ROOT / "train.py", "-m", *line], tmp_path, said.fileno(), said.fileno())
    while not list((tmp_path / "sweep" / "3").glob("step-*[0-9]")):
        assert first.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.01)
    first.kill()
    first.wait(60)
    found = jobs(tmp_path / "sweep")
    assert [job["state"] for job in found.values()] == ["complete", "complete", "failed", "running"]
    assert "datasets: 2.jsonl: loss=dpo compares answers" in found["2"]["error"]
    (complete,) = {(tmp_path / "sweep" / name / "metrics.jsonl").stat().st_mtime_ns for name in "1"}

    write(tmp_path / "2.jsonl", rows_of(2))
    again = sweep(tmp_path, *line)
    assert again.returncode == 0, again.stderr
    found = jobs(tmp_path / "sweep")
    assert [job["state"] for job in found.values()] == ["complete"] * 6
    assert [job["starts"] for job in found.values()] == [1, 1, 2, 2, 1, 1]
    assert (tmp_path / "sweep" / "1" / "metrics.jsonl").stat().st_mtime_ns == complete
    assert "resume: continuing from" in again.stdout, "the job that was killed goes on from its checkpoint"
    for metric in ("loss/train", "loss/eval"):
        undisturbed = counters(tmp_path / "sweep" / "0", metric)
        assert len(undisturbed) == len(set(undisturbed)) > 2
        for name in "12345":
            assert counters(tmp_path / "sweep" / name, metric) == undisturbed, f"each step of job {name} is there, and once"
    table = list(csv.DictReader((tmp_path / "sweep" / "comparison.csv").open()))
    assert [(row["run"], row["datasets"]) for row in table] == [(str(n), f"{n}.jsonl") for n in range(6)]

    third = sweep(tmp_path, *line)
    assert (third.returncode, third.stdout.count("is complete already")) == (0, 6)
    assert [job["starts"] for job in jobs(tmp_path / "sweep").values()] == [1, 1, 2, 2, 1, 1]


def test_each_line_of_a_sweep_names_its_job_and_the_end_is_a_table_of_them(tmp_path):
    write(tmp_path / "good.jsonl", rows_of(1))
    write(tmp_path / "bad.jsonl", [{"prompt": "p", "chosen": None, "rejected": "r"}])
    line = ("datasets=good.jsonl,bad.jsonl,toy", "seed=5", "objective=rewards_eval/accuracies", "sweep_dir=sweep")
    done = sweep(tmp_path, *BRIEF, *line)
    assert done.returncode == 2, done.stderr
    lines = done.stdout.splitlines()
    assert "[job 0: datasets=good.jsonl] 16/32 loss" in done.stdout and "[job 2: datasets=toy] 32/32 loss" in done.stdout
    assert done.stderr.startswith("[job 1: datasets=bad.jsonl] datasets: bad.jsonl, row 1: ")
    head = next(number for number, line in enumerate(lines) if line.split()[:2] == ["job", "datasets"])
    # Only what is printed before and after the jobs is of none of them.
    assert all(line.startswith("[job ") for line in lines[1:head] if line and "sweep" not in line.split(":")[0])
    table = [line.split() for line in lines[head : head + 4]]
    assert table[0] == ["job", "datasets", "rewards_eval/accuracies", "loss/eval", "state"]
    assert table[1][0] == "best" and [row[-1] for row in table[1:]] == ["complete", "complete", "failed"]
    assert table[3] == ["1", "bad.jsonl", "-", "-", "failed"]
    assert lines[head + 4] == "comparison: sweep/comparison.html"


def test_jobs_are_sorted_by_their_objective_and_an_interval_is_shown(tmp_path):
    directory = SweepDirectory(tmp_path)
    directory.begin(["lr"])
    names = {"a": ("complete", 0.7), "b": ("pruned", 0.1), "c": ("complete", 0.5), "d": ("failed", None)}
    for name, (state, value) in names.items():
        (tmp_path / name).mkdir()
        Job(tmp_path / name).update(start=directory.start, state=state, objective=value, overrides=[f"lr={name}", "loss=dpo"])
    write(
        tmp_path / "c" / "metrics.jsonl",
        [{"counters/examples": 8, "loss/eval": 0.5, "loss/eval/low": 0.4, "loss/eval/high": 0.6}],
    )
    (tmp_path / "jobs.json").write_text(json.dumps({name: name for name in names}))
    assert job_table(directory, "loss/eval") == [
        "      job  lr  loss/eval       state",
        "      b    b   0.1             pruned",
        "best  c    c   0.5 [0.4, 0.6]  complete",
        "      a    a   0.7             complete",
        "      d    d   -               failed",
    ]
    assert [line.split()[0] for line in job_table(directory, "rewards_eval/accuracies")] == ["job", "best", "c", "b", "d"]
    assert not any("best" in line for line in job_table(directory, "loss/eval", compares=False))


def with_a_bug_at_seed_1() -> None:
    """For a process: a run divides by zero in jobs of that seed."""
    from preference_training.distributed import launching

    usual = launching.settle_batch_size
    launching.settle_batch_size = lambda config: usual(config) if config.seed != 1 else 1 / 0


def test_a_failed_job_leaves_the_others_running_and_is_named_at_the_end_with_what_was_its_own(tmp_path):
    write(tmp_path / "bad.jsonl", [*rows_of(1), {"prompt": "p", "chosen": None, "rejected": "r"}])
    command = [ROOT / "train.py", "-m", *BRIEF, "seed=0,1", "datasets=bad.jsonl,toy", "sweep_dir=sweep"]
    done = forked.run(command, tmp_path, first=with_a_bug_at_seed_1)
    assert done.returncode == 1, "a bug is among what went wrong"
    assert [job["state"] for job in jobs(tmp_path / "sweep").values()] == ["failed", "complete", "failed", "failed"]
    told = done.stderr[done.stderr.index("sweep: 1 of 4 jobs are complete") :].splitlines()
    assert told[1].startswith("  0 (seed=0 datasets=bad.jsonl): failed: datasets: bad.jsonl, row 41: ")
    assert told[2] == "  2 (seed=1 datasets=bad.jsonl): failed: ZeroDivisionError: division by zero"
    assert told[3] == "  3 (seed=1 datasets=toy): failed: ZeroDivisionError: division by zero"
    assert told[4] == f"The same command line with sweep_dir={tmp_path / 'sweep'} runs what is missing."
    assert "else 1 / 0" in done.stderr, "a bug keeps its traceback"
    assert len(list(csv.DictReader((tmp_path / "sweep" / "comparison.csv").open()))) == 1


def test_a_sweep_whose_jobs_all_find_their_data_bad_ends_with_the_status_of_a_mistake(tmp_path):
    write(tmp_path / "bad.jsonl", [{"prompt": "p", "chosen": None, "rejected": "r"}])
    done = sweep(tmp_path, *BRIEF, "datasets=bad.jsonl", "loss.beta=0.1,0.2")
    assert (done.returncode, done.stderr.count("bad.jsonl, row 1: ")) == (2, 4), "each when it happens, and at the end"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["lr=-1", "loss.beta=0.1,0.2"], ["lr: found -1"]),
        (["seed=0,1,x", "loss.beta=0.1,-1"], ["seed: found 'x', expected a whole number", "loss.beta: found -1"]),
        (["datasets=toy,nowhere.jsonl"], ["datasets: nowhere.jsonl: no such file"]),
        (["+experiment=beyond"], ["loss.beta: found 0"]),
    ],
)
def test_values_that_a_job_would_refuse_are_refused_before_the_first_job(given, told, tmp_path):
    beyond = "# @package _global_\nhydra: {sweeper: {params: {loss.beta: '0.1,0'}}}\n"
    (tmp_path / "presets" / "experiment").mkdir(parents=True)
    (tmp_path / "presets" / "experiment" / "beyond.yaml").write_text(beyond)
    done = sweep(tmp_path, "--config-dir", "presets", *BRIEF, *given)
    assert done.returncode == 2 and not done.stdout, done.stderr
    assert all(line.startswith(text) for line, text in zip(done.stderr.splitlines(), told, strict=True)), done.stderr
    assert not (tmp_path / "multirun").exists()


def test_a_sweep_over_losses_takes_a_key_that_all_of_them_have_and_refuses_one_that_some_lack(tmp_path):
    line = ("loss=dpo,beta_DPO", "loss.beta=0.5", "dry_run=true")
    done = sweep(tmp_path, *SMALL[1:], *line, "seed=${hydra:job.num}")
    assert done.returncode == 0 and done.stdout.count("steps of 16 examples") == 2, done.stderr
    refused = sweep(tmp_path, *SMALL[1:], "loss=dpo,sft", *line[1:])
    assert refused.returncode == 2 and "steps of" not in refused.stdout, "before the first job"
    assert refused.stderr.startswith("loss.beta: loss=sft has no such key; its key is average; every loss has it except ")


def test_a_signal_ends_the_sweep_and_not_the_job_alone(tmp_path):
    line = (*SMALL, "n_epochs=null", "n_examples=16000", "loss.beta=0.1,0.2", "sweep_dir=sweep")
    with (tmp_path / "said").open("w") as said:
        program = forked.Program([ROOT / "train.py", "-m", *line], tmp_path, said.fileno(), said.fileno())
    metrics = tmp_path / "sweep" / "0" / "metrics.jsonl"
    while not (metrics.exists() and "loss/train" in metrics.read_text()):
        assert program.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.02)
    program.send_signal(signal.SIGTERM)
    assert program.wait(120) == 75
    assert {name: job["state"] for name, job in jobs(tmp_path / "sweep").items()} == {"0": "stopped"}
    assert list((tmp_path / "sweep" / "0").glob("step-*")), "with a checkpoint to go on from"
    assert "runs what is missing" in (tmp_path / "said").read_text()


# ---- launchers ----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_jobs_of_joblib_run_together_on_gpus_of_their_own_and_share_data_and_reference(tmp_path):
    line = (*BRIEF, "+experiment=sweep_joblib", "loss.beta=0.1,0.2")
    # From nothing: joblib's processes cannot be started by one that was forked as those of `forked` are.
    command = [sys.executable, ROOT / "train.py", "-m", *line]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "5,7", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    [directory] = tmp_path.glob("multirun/*/*")
    found = jobs(directory)
    assert [job["state"] for job in found.values()] == ["complete", "complete"]
    assert sorted(job["gpus"] for job in found.values()) == [["5"], ["7"]]
    counts = done.stdout.count("computed and saved"), done.stdout.count("responses read from")
    assert counts == (1, 1), "one job computed the reference's log-probs, the other waited for them"
    assert len(list((tmp_path / "runs" / "prepared_data").glob("*.arrow"))) == 2
    table = list(csv.DictReader((directory / "comparison.csv").open()))
    assert [row["loss.beta"] for row in table] == ["0.1", "0.2"]


@pytest.mark.long
def test_submitit_runs_each_job_in_a_process_of_its_own_and_what_is_complete_is_not_sent_again(tmp_path):
    write(tmp_path / "own.jsonl", [{"prompt": "p", "chosen": None, "rejected": "r"}])
    line = (*BRIEF, "hydra/launcher=submitit_local", "sweep_dir=sweep", "datasets=toy,own.jsonl", "held_out_share=0.3")
    done = sweep(tmp_path, *line)
    assert done.returncode == 2, done.stderr
    assert "  1 (datasets=own.jsonl): failed: datasets: own.jsonl, row 1" in done.stderr
    assert [job["state"] for job in jobs(tmp_path / "sweep").values()] == ["complete", "failed"]
    write(tmp_path / "own.jsonl", rows_of(1))
    done = sweep(tmp_path, *line)
    assert done.returncode == 0, done.stderr
    assert [job["state"] for job in jobs(tmp_path / "sweep").values()] == ["complete"] * 2
    assert [job["starts"] for job in jobs(tmp_path / "sweep").values()] == [1, 2]


# What Slurm does with a job array of one job, in the background of this machine. $0 is in the folder that keeps the script.
SLURM = {
    "sbatch": """
        cp "${@: -1}" "$(dirname "$0")/script"
        echo "Submitted batch job 7"
        "$(dirname "$0")/begin"
    """,
    "begin": """
        export SLURM_JOB_ID=7 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
        export SLURM_JOB_NODELIST=here
        setsid bash "$(dirname "$0")/script" > /dev/null 2>&1 &
    """,
    "srun": """
        while [[ "$1" == --* ]]; do
            [[ "$1" == --unbuffered ]] && shift 1 || shift 2
        done
        exec "$@"
    """,
    "sacct": """
        echo "JobID|State|NodeList"
        echo "7|RUNNING|here"
    """,
    "scontrol": """
        (while ! rm "$(dirname "$0")/ended" 2> /dev/null; do sleep 0.1; done; "$(dirname "$0")/begin") > /dev/null 2>&1 &
    """,
}


@pytest.mark.long
def test_a_job_of_slurm_that_is_out_of_time_is_queued_again_and_goes_on_from_its_checkpoint(tmp_path):
    slurm = tmp_path / "slurm"
    slurm.mkdir()
    for name, lines in SLURM.items():
        (slurm / name).write_text(f"#!/bin/bash\n{textwrap.dedent(lines)}")
        (slurm / name).chmod(0o755)
    steps = ("n_epochs=null", "n_examples=1600", "save_every=160", "n_eval_examples=4", "loss.beta=0.1", "sweep_dir=sweep")
    line = (*SMALL, "+experiment=sweep_slurm", "hydra.launcher.partition=gpu", *steps)
    environment = os.environ | {"PATH": f"{slurm}:{os.environ['PATH']}"}
    with (tmp_path / "said").open("w") as said:
        program = forked.Program([ROOT / "train.py", "-m", *line], tmp_path, said.fileno(), said.fileno(), environment)
    while not list((tmp_path / "sweep" / "0").glob("step-*[0-9]")):
        assert program.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.05)
    # As `#SBATCH --signal` has it, some time before the end.
    [job] = [each for each in psutil.process_iter(["cmdline"]) if is_a_job(each.info["cmdline"], tmp_path)]
    job.send_signal(signal.SIGUSR2)
    job.wait(60)
    (slurm / "ended").touch()
    assert program.wait(120) == 0, (tmp_path / "said").read_text()
    [said] = jobs(tmp_path / "sweep").values()
    assert (said["state"], said["starts"]) == ("complete", 2)
    assert counters(tmp_path / "sweep" / "0", "loss/train") == list(range(16, 1601, 16)), "each step is there, and once"


def is_a_job(command: list[str] | None, folder: Path) -> bool:
    """Whether a process is one that submitit has sent off for a sweep in this folder."""
    return "submitit.core._submit" in (command or []) and any(text.startswith(str(folder)) for text in command)


# ---- searches -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_an_interrupted_search_of_optuna_goes_on_as_if_it_had_not_been_and_bad_runs_end_early(tmp_path):
    line = (
        *SMALL, "+experiment=sweep_optuna", "lr=tag(log, interval(1e-6, 1e-2))", "loss.beta=0.1", "objective=loss/eval",
        "hydra.sweeper.direction=minimize", "pruner_kwargs.n_startup_trials=1", "n_examples=64", "eval_every=32",
    )  # fmt: skip
    for n_trials in (1, 3):
        done = sweep(tmp_path, *line, f"hydra.sweeper.n_trials={n_trials}", "sweep_dir=interrupted")
        assert done.returncode == 0, done.stderr
    whole = sweep(tmp_path, *line, "hydra.sweeper.n_trials=3", "sweep_dir=whole")
    assert whole.returncode == 0, whole.stderr
    two = jobs(tmp_path / "interrupted"), jobs(tmp_path / "whole")
    asked, came_to = ([[job[key] for job in found.values()] for found in two] for key in ("overrides", "objective"))
    assert [text[:-1] for text in asked[0]] == [text[:-1] for text in asked[1]]
    assert came_to[0] == came_to[1]
    assert [job["starts"] for job in two[0].values()] == [1, 1, 1]
    ends = [job["state"] for job in two[0].values()]
    assert ends[0] == "complete" and "pruned" in ends
    pruned = tmp_path / "interrupted" / str(ends.index("pruned"))
    assert counters(pruned, "loss/train")[-1] == 32
    worst = max(job["objective"] for job in two[0].values() if job["state"] == "complete")
    assert two[0][pruned.name]["counts_as"] >= worst, "half a run is no better than any whole one"
    assert "examples, 2 updates, pruned" in (tmp_path / "interrupted" / "comparison.html").read_text()
    best = OmegaConf.load(tmp_path / "interrupted" / "optimization_results.yaml").best_value
    assert best == min(job["objective"] for job in two[0].values() if job["state"] == "complete")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            ["+experiment=sweep_optuna", "hydra.sweeper.direction=minimize"],
            "hydra.sweeper.direction: found minimize, expected maximize: objective is rewards_eval/accuracies.",
        ),
        (
            ["data.weights=ledger", "lr=1e-3,1e-4"],
            "data.weights: found ledger in a sweep, each of whose jobs would train three runs. Train one run with it, and "
            "name its directory in the sweep.",
        ),
    ],
)
def test_what_no_job_could_do_is_refused_once(given, told, tmp_path):
    done = sweep(tmp_path, *BRIEF, *given)
    assert (done.returncode, done.stderr) == (2, f"{told}\n")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def pruning(tmp_path, compose):
    """A function: pruning as a run asks for it, beside complete jobs with these objectives at 0, about 32 and 64 examples."""

    def made(*others: tuple[float, float, float]) -> Pruning:
        for number, values in enumerate(others):
            folder = tmp_path / str(number)
            rows = [{"counters/examples": at, "loss/eval": value} for at, value in zip((0, 30, 60), values, strict=True)]
            write(folder / "metrics.jsonl", rows)
            (folder / JOB).write_text(json.dumps({"state": "complete"}))
        (tmp_path / "own").mkdir()
        pruner = build_pruner("MedianPruner", {"n_startup_trials": 2, "n_warmup_steps": 32})
        return Pruning(tmp_path, tmp_path / "own", "loss/eval", 32, pruner)

    return made


def test_a_run_behind_the_median_of_complete_jobs_ends_and_says_so_and_one_before_it_goes_on(pruning, tmp_path):
    judge = pruning((0.7, 0.5, 0.2), (0.7, 0.6, 0.3), (0.7, 0.4, 0.4))
    assert judge.verdict(32, 0.49) is None
    assert not (tmp_path / "own" / "pruned.json").exists()
    # The median at 32 examples is 0.5; another batch size has it after 30.
    assert judge.verdict(32, 0.51) == "loss/eval is 0.51 after 32 examples, and MedianPruner prunes it"
    assert json.loads((tmp_path / "own" / "pruned.json").read_text()) == {
        "examples": 32, "objective": "loss/eval", "value": 0.51,
    }  # fmt: skip


def test_nobody_is_judged_before_enough_jobs_are_complete(pruning, tmp_path):
    judge = pruning((0.7, 0.5, 0.2), (0.7, 0.6, 0.3))
    (tmp_path / "1" / JOB).write_text(json.dumps({"state": "running"}))
    assert judge.verdict(32, 5.0) is None


def test_accuracies_are_to_be_large(pruning, tmp_path):
    judge = pruning((0.7, 0.5, 0.2), (0.7, 0.6, 0.3))
    judge.objective = "rewards_eval/accuracies"
    for number in "01":
        write(tmp_path / number / "metrics.jsonl", [{"counters/examples": 32, "rewards_eval/accuracies": 0.8}])
    assert judge.verdict(32, 0.9) is None
    assert judge.verdict(32, 0.7) is not None


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("n_startup=2", "pruner_kwargs.n_startup: MedianPruner takes no such argument; did you mean n_startup_trials?"),
        ("n_startup_trials=-2", "pruner_kwargs: MedianPruner does not take {'n_startup_trials': -2}: "),
    ],
)
def test_arguments_that_a_pruner_does_not_take_are_refused(compose, given, told):
    with pytest.raises(UserError) as refused:
        build_pruner("MedianPruner", compose(f"pruner_kwargs.{given}").pruner_kwargs)
    assert str(refused.value).startswith(told)


def test_a_pruner_without_a_sweep_is_refused(tmp_path):
    done = forked.run([ROOT / "train.py", "pruner=MedianPruner"], tmp_path)
    assert (done.returncode, done.stderr) == (
        2, "pruner: found MedianPruner, and this run has no others to be compared with. Add -m.\n",
    )  # fmt: skip


# ---- directories and GPUs -----------------------------------------------------------------------------------------------


def test_a_job_is_known_by_its_configuration_whatever_its_number_is_and_takes_nobodys_directory(tmp_path, compose):
    def claimed(number: int, *overrides: str) -> str:
        (tmp_path / str(number)).mkdir(exist_ok=True)
        request = Request(tmp_path, tmp_path / str(number), list(overrides), compose(*overrides).as_composed)
        return SweepDirectory(tmp_path).claim(request).name

    assert [claimed(number, f"seed={number}") for number in range(3)] == ["0", "1", "2"]
    assert claimed(0, "seed=2") == "2"
    assert claimed(1, "seed=7") == "3", "a new job with an old number"
    assert claimed(2, "seed=7", "max_wall_time=5", "cache_dir=elsewhere", "resume=auto") == "3", "not what makes a job another"
    assert claimed(4, "n_steps=7", "seed=7") == "4"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["0", "1", "2", "3", "4"]


def test_a_job_does_not_take_the_directory_of_a_run_that_no_sweep_knows(tmp_path, compose):
    write(tmp_path / "0" / "metrics.jsonl", [{"counters/examples": 1}])
    assert SweepDirectory(tmp_path).claim(Request(tmp_path, tmp_path / "0", [], compose().as_composed)).name == "1"


def test_two_processes_have_no_gpu_in_common_and_a_third_waits_until_one_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(gpus, "_held", [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3,GPU-a")
    took = [gpus._free_gpus(gpus.visible_gpus(), number, tmp_path) for number in (2, 2, 1, 1)]
    assert took == [["0", "3"], None, ["GPU-a"], None]
    for lock in gpus._held:
        # As the system does at the end of the processes that had them.
        lock.release()
    assert gpus._free_gpus(gpus.visible_gpus(), 3, tmp_path) == ["0", "3", "GPU-a"]


def test_a_process_sees_the_gpus_it_has_taken_and_keeps_them(tmp_path, monkeypatch):
    monkeypatch.setattr(gpus, "_held", [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert gpus.jobs_at_once(1) == 3 and gpus.jobs_at_once(2) == 1 and gpus.jobs_at_once(None) == 3
    gpus.take_gpus(2, tmp_path)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5"
    gpus.take_gpus(2, tmp_path)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5"
    monkeypatch.setattr(gpus, "_held", [])
    with pytest.raises(UserError, match="gpus_per_job: found 3, and this machine has 2 GPUs"):
        gpus.take_gpus(3, tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    gpus.take_gpus(3, tmp_path)
    assert gpus.jobs_at_once(3) == 1 and os.environ["CUDA_VISIBLE_DEVICES"] == "", "a machine without GPUs"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("pruner=MedianPrune", "pruner: no pruner 'MedianPrune'; did you mean MedianPruner?"),
        ("pruner=HyperbandPruner", "pruner: no pruner 'HyperbandPruner'; "),
        ("pruner_kwargs=3", "pruner_kwargs: found 3, expected a section"),
        ("gpus_per_job=0", "gpus_per_job: found 0, expected a whole number from 1 or null"),
        ("sweep_dir=3", "sweep_dir: found 3, expected a text or null"),
    ],
)
def test_a_key_of_sweeps_that_makes_no_sense_is_refused(compose, override, told):
    with pytest.raises(UserError) as refused:
        compose(override)
    assert str(refused.value).startswith(told)


@pytest.mark.parametrize(
    ("objective", "task", "params", "told"),
    [
        ("loss/eval", ["loss.beta=0.1,0.5", "lr=1e-3,1e-4"], None, "these jobs: loss.beta changes"),
        ("loss/eval", ["loss=dpo,ipo"], None, "these jobs: loss changes"),
        ("loss/eval", ["loss=dpo,ipo", "loss.beta=choice(0.5)"], None, "these jobs: loss changes"),
        ("loss/eval", [], {"loss.beta": "interval(0.1, 1)", "lr": "interval(1e-5, 1e-4)"}, "these jobs: loss.beta changes"),
        ("loss/eval", ["lr=1e-3,1e-4", "loss.beta=0.1", "loss.a=0.2,0.6"], None, None),
        ("loss/eval", ["loss=mix", "loss.parts=[{name: dpo}, {name: sft, weight: 0.2}]", "lr=1e-5,1e-6"], None, None),
        ("rewards_eval/accuracies", ["loss.beta=0.1,0.5"], None, None),
    ],
)
def test_an_objective_that_does_not_compare_the_jobs_is_said(objective, task, params, told):
    found = comparison_warnings(objective, "dpo", [*(params or ()), *_swept(task)])
    assert len(found) == bool(told) and all(told in text for text in found)


def test_only_several_values_of_a_key_are_a_sweep():
    lists = ["datasets=[hh,shp]", "+experiment=a", "exp_name='a,b'", "loss.parts=[{name: dpo, weight: 0.2}]"]
    swept = ["lr=1e-5,1e-6", "+adapter=lora,qlora", "seed=range(3)", "loss.beta=interval(0.1,1)", "max_length=choice(64,128)"]
    assert _swept([*lists, "-m", "~loss.a", "loss.beta=choice(0.5)"]) == []
    assert _swept([*lists, *swept]) == ["lr", "adapter", "seed", "loss.beta", "max_length"]


def test_a_mix_with_a_loss_that_depends_on_its_run_does_not_compare_jobs():
    for names, expected in ((["dpo", "bco"], 1), (["dpo", "sft"], 0)):
        assert len(comparison_warnings("loss/eval", "mix", [], [{"name": name} for name in names])) == expected
