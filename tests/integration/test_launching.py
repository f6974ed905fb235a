"""Runs of several processes from the command line: they start, leave what one process leaves, and end when one of them does."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from preference_training.core.errors import UserError
from preference_training.core.metric_names import MEASURED
from preference_training.tracking.ledger import read_ledger
from tests.support import forked
from tests.support.files import ROOT

SHORT = (
    "loss=dpo", "n_examples=32", "n_eval_examples=16", "wandb.enabled=false", "sample_during_eval=false",
)  # fmt: skip


def run(cwd: Path, *overrides: str, launcher: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess:
    command = [str(ROOT / "train.py"), *SHORT, *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    if not launcher:
        return forked.run(command, cwd, environment)
    command = [sys.executable, *launcher, *command]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=environment, timeout=500)


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    done = run(folder, "local_run_dir=run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def assert_same_run(found: Path, expected: Path) -> None:
    """The same numbers, the same files, and weights that load into one process."""
    assert {path.name for path in found.iterdir()} == {path.name for path in expected.iterdir()}
    for one, other in zip(metrics(found), metrics(expected), strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - set(MEASURED):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    one, other = (read_ledger(path) for path in (found, expected))
    assert [one.examples.tolist(), one.preferred.tolist()] == [other.examples.tolist(), other.preferred.tolist()]
    assert one.margins.tolist() == pytest.approx(other.margins.tolist(), rel=1e-3, abs=1e-5)
    files = [torch.load(path / "LATEST" / "policy.pt", weights_only=True)["state"] for path in (found, expected)]
    assert files[0].keys() == files[1].keys()
    for name, weight in files[0].items():
        torch.testing.assert_close(weight, files[1][name], rtol=1e-3, atol=1e-5)
    states = [json.loads((path / "LATEST" / "state.json").read_text()) for path in (found, expected)]
    assert states[0].keys() == states[1].keys() and states[0]["optimizer_groups"] == states[1]["optimizer_groups"]


@pytest.mark.long
def test_a_model_without_a_plan_is_split_in_one_process_from_which_a_run_goes_on_unsplit(tmp_path):
    model = "model.from_config.model_type=gpt2", "n_eval_model_samples=2", "sample_during_eval=true", "max_length=128"
    done = run(tmp_path, "trainer=TensorParallelTrainer", *model, "max_prompt_length=64", "local_run_dir=run")
    assert done.returncode == 0, done.stderr
    again = run(tmp_path, *model, "max_prompt_length=64", f"model.archive={tmp_path}/run/LATEST", "local_run_dir=again")
    assert again.returncode == 0, again.stderr
    steps, first = metrics(tmp_path / "run"), metrics(tmp_path / "again")[0]
    assert steps[0]["loss/eval"] == pytest.approx(0.6931472, abs=1e-6)
    assert first["loss/eval"] == pytest.approx(0.6931472, abs=1e-6)
    for name in ("logps_eval/chosen", "logps_eval/rejected"):
        assert first[name] == pytest.approx(steps[-1][name], rel=1e-5), "it starts from the weights that the other ended with"
        assert first[name] != pytest.approx(steps[0][name], rel=1e-3)
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 4


def assert_one_process_goes_on_from(run_dir: Path) -> None:
    """The weights of a run are those that a run of one process starts from."""
    folder = run_dir.parent
    again = run(folder, f"model.archive={run_dir}/LATEST", "local_run_dir=again", "n_examples=16")
    assert again.returncode == 0, again.stderr
    assert metrics(folder / "again")[0]["loss/eval"] == pytest.approx(0.6931472, abs=1e-5)


def test_a_run_of_two_processes_is_started_here_and_leaves_what_one_process_leaves(alone, tmp_path):
    done = run(tmp_path, "trainer=FSDPTrainer", "local_run_dir=run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("train: 1344 prompts") == 1
    assert_same_run(tmp_path / "run", alone)
    assert_one_process_goes_on_from(tmp_path / "run")


@pytest.mark.long
def test_two_processes_that_split_layers_leave_what_one_process_leaves(alone, compose, forked_workers, tmp_path):
    folders = f"local_dirs=[{tmp_path}]", f"local_run_dir={tmp_path / 'run'}"
    train.start(compose("trainer=TensorParallelTrainer", *SHORT, *folders), tmp_path / "run", in_sweep=False)
    assert_same_run(tmp_path / "run", alone)
    assert_one_process_goes_on_from(tmp_path / "run")


@pytest.mark.long
def test_under_torchrun_each_process_is_a_worker_and_they_share_one_run_directory(alone, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3")
    done = run(tmp_path, "trainer=FSDPTrainer", launcher=torchrun)
    assert done.returncode == 0, done.stderr
    [run_dir] = [path for path in (tmp_path / "runs").iterdir() if path.name.startswith("run_")]
    assert_same_run(run_dir, alone)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # Seen at once by each worker, and seen when they have joined.
        (("loss.betaa=1",), "loss.betaa: no such key; did you mean loss.beta?"),
        pytest.param(
            ("batch_size=2", "gradient_accumulation_steps=2"),
            "batch_size: found 2, which in 2 micro-batches gives 1 examples to",
            marks=pytest.mark.long,
        ),
    ],
    ids=["key", "batch"],
)
def test_under_torchrun_a_mistake_is_said_once_on_a_machine_and_each_worker_ends_with_status_2(overrides, message, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run(tmp_path, "trainer=FSDPTrainer", *overrides, launcher=torchrun)
    assert done.returncode != 0
    assert sum(line.startswith(message) for line in done.stderr.splitlines()) == 1, done.stderr
    # What torchrun says of each worker that it did not end itself.
    assert set(re.findall(r"exitcode +: (-?\d+)", done.stderr)) <= {"2", "-15"} and "exitcode  : 2 " in done.stderr
    # One that torchrun ends while it still reads its command line may leave an empty directory.
    assert "loss.betaa=1" in overrides or not list(tmp_path.glob("runs/run_*"))


# What the cluster's own commands do that the script calls: two nodes here are this machine twice.
SLURM = {
    "scontrol": """case "$*" in
    "show hostnames node[7-8]") printf "localhost\\nnode8\\n" ;;
    "requeue $SLURM_JOB_ID") echo "requeued" ;;
    *) exit 1 ;;
esac""",
    "srun": """while [[ $1 == --* ]]; do shift; done
trap 'kill -USR1 "${pids[@]}"' USR1
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do
    SLURM_NODEID=$node SLURM_PROCID=$node SLURM_LOCALID=0 "$@" & pids+=($!)
done
for pid in "${pids[@]}"; do
    # A trapped signal ends the wait, not the task.
    until wait "$pid" || ! kill -0 "$pid" 2>/dev/null; do :; done
    wait "$pid" || status=$?
done
exit "${status:-0}" """,
}


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """The environment of a job on two nodes, with the cluster's commands."""
    for name, text in SLURM.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "1", "SLURM_GPUS_ON_NODE": "1",
    }  # fmt: skip


@pytest.mark.long
def test_the_slurm_script_starts_one_torchrun_on_each_node_and_they_share_one_run(slurm, alone, tmp_path):
    overrides = [*SHORT, f"local_dirs={tmp_path}", f"local_run_dir={tmp_path / 'run'}"]
    done = subprocess.run(
        ["bash", "scripts/slurm.sbatch", *overrides],
        cwd=ROOT, capture_output=True, text=True, check=False, env=slurm, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run directory:") == 1
    assert "FSDPTrainer" in (tmp_path / "run" / "config.yaml").read_text()
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.long
def test_a_slurm_job_that_is_warned_writes_a_checkpoint_and_is_put_into_the_queue_again(slurm, tmp_path):
    endless = ("loss=dpo", "n_epochs=1000", "wandb.enabled=false", "n_eval_examples=16", "minimum_log_interval_secs=0")
    job = subprocess.Popen(
        ["bash", "scripts/slurm.sbatch", *endless, f"local_dirs={tmp_path}", f"local_run_dir={tmp_path / 'run'}"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=slurm,
    )  # fmt: skip
    for line in job.stdout:
        if re.match(r"\d+/\d+ loss", line):
            break
    os.kill(job.pid, signal.SIGUSR1)
    rest = job.stdout.read()
    assert job.wait(timeout=300) != 0
    [examples] = re.findall(r"stopped after (\d+) examples: SIGUSR1", rest)
    assert rest.rstrip().endswith("requeued"), rest
    assert (tmp_path / "run" / "LATEST").resolve().name == f"step-{examples}"


def test_no_worker_waits_for_a_launcher_that_has_died_while_the_run_came_to_its_end(tmp_path):
    with (tmp_path / "said").open("w") as said:
        command = [ROOT / "tests" / "integration" / "outliving_work.py", tmp_path]
        program = forked.Program(command, tmp_path, said.fileno(), said.fileno(), first=forked.fork_workers)
    workers = wait_for(lambda: [path for path in tmp_path.glob("[0-9]*")], lambda found: len(found) == 2)
    os.kill(program.pid, signal.SIGKILL)
    wait_for(lambda: [path for path in workers if Path("/proc", path.name).exists()], lambda alive: not alive)


def test_a_run_that_a_signal_reaches_too_late_to_stop_it_ends_as_complete(tmp_path):
    with (tmp_path / "said").open("w") as said:
        command = [ROOT / "tests" / "integration" / "outliving_work.py", tmp_path]
        program = forked.Program(command, tmp_path, said.fileno(), said.fileno(), first=forked.fork_workers)
    wait_for(lambda: [path for path in tmp_path.glob("[0-9]*")], lambda found: len(found) == 2)
    program.send_signal(signal.SIGTERM)
    assert program.wait(60) == 0
    # torch warns where the network does not know this machine's name.
    said = [line for line in (tmp_path / "said").read_text().splitlines() if not line.startswith("[W")]
    # Of the two workers the first says that it stops.
    announced, returned = said
    assert announced.startswith("SIGTERM: the run stops after its step") and returned == "SIGTERM"


def wait_for(look, is_there, seconds: float = 60):
    """What `look` gives, when it is what was waited for; fails after so long."""
    deadline = time.monotonic() + seconds
    while not is_there(found := look()):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


def test_a_port_that_is_taken_is_refused_before_anything_starts(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run(tmp_path, "trainer=FSDPTrainer", f"fsdp_port={port}")
    assert done.returncode == 2
    assert done.stderr.startswith(f"fsdp_port: {port} cannot be used: Address already in use.")


def test_processes_that_cannot_be_divided_into_context_groups_are_refused_before_anything_starts(tmp_path):
    done = run(tmp_path, "trainer=FSDPTrainer", "trainer.context_parallel_size=3")
    assert done.returncode == 2
    assert done.stderr.startswith("trainer.context_parallel_size: found 3, expected a divisor of the number of processes, 2.")


def test_a_mistake_that_only_workers_can_see_is_one_message_and_exit_status_2(tmp_path):
    command = [ROOT / "train.py", *SHORT, "trainer=FSDPTrainer", "batch_size=4", "gradient_accumulation_steps=4"]
    done = forked.run(command, tmp_path, first=forked.fork_workers)
    assert done.returncode == 2, done.stderr
    message = "batch_size: found 4, which in 4 micro-batches gives 1 examples to 2 processes. Expected at least 8,"
    assert any(line.startswith(message) for line in done.stderr.splitlines()), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("trainer=FSDPTrainer", "model.block_name=GPTBlock"),
            "model.block_name: found 'GPTBlock'. Expected the class of a block of LlamaForCausalLM: LlamaDecoderLayer (4).",
        ),
        (
            ("trainer=TensorParallelTrainer", "trainer.nproc_per_node=3"),
            "trainer.tensor_parallel_size: found 3, which does not divide the model's 4 attention heads.",
        ),
        (
            ("trainer=TensorParallelTrainer", "trainer.tensor_parallel_size=3"),
            "trainer.tensor_parallel_size: found 3, expected a divisor of the number of processes, 2.",
        ),
        (
            (
                "trainer=FSDPTrainer",
                "trainer.context_parallel_size=2",
                "+model.from_config.rope_parameters={rope_type:dynamic,rope_theta:10000.0,factor:2.0}",
            ),
            "trainer.context_parallel_size: found 2, but LlamaForCausalLM has rotary embeddings (dynamic) that depend on the",
        ),
    ],
    ids=["block", "heads", "world", "rotary frequencies"],
)
def test_what_only_workers_can_see_is_said_with_its_key(overrides, message, compose, forked_workers, tmp_path):
    config = compose(*SHORT, *overrides, f"local_dirs=[{tmp_path}]", f"local_run_dir={tmp_path / 'run'}")
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        train.start(config, tmp_path / "run", in_sweep=False)
