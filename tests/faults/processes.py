"""Runs as real processes, which the tests of this folder disturb, and how a disturbed run is compared with another."""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import numpy
import torch
from filelock import FileLock
from safetensors.torch import load_file

import train
from preference_training.checkpointing.checkpoint import find_damage, list_checkpoints
from preference_training.core.metric_names import MEASURED
from preference_training.tracking.ledger import read_ledger
from tests.support.files import ROOT
from tests.support.forked import Program, fork_workers

# Twenty steps, a checkpoint behind every second of them, a line for each step.
EVERY = 32
COMMON = (
    "n_examples=320", "eval_every=64", f"save_every={EVERY}", "n_eval_examples=16", "sample_during_eval=false",
    "wandb.enabled=false", "minimum_log_interval_secs=0", "save_policy_pt=false", "resume=auto", "local_run_dir=run",
)  # fmt: skip
STEP = r"(\d+)/\d+ loss"
RESUMED = r"resume: continuing from .*/step-(\d+)"
# No run here takes so long; where one does the test fails. Unit: seconds.
PATIENCE = 180


class Run:
    """`python train.py` in a folder, as the leader of a group of processes. Its output is read line by line."""

    def __init__(self, folder: Path, *overrides: str, launcher: tuple[str, ...] = ()):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.dir = folder, folder / "run"
        mark = uuid.uuid4().hex
        self.mark = mark.encode()
        command = [str(ROOT / "train.py"), *COMMON, *overrides]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DISTURBED_RUN": mark}
        reading, writing = os.pipe()
        self.said = open(reading, encoding="utf-8")  # noqa: SIM115, PTH123  until all is read
        if launcher:
            command = [sys.executable, *launcher, *command]
            output = {"stdout": writing, "stderr": writing}
            self.process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **output)
        else:
            first = None if os.environ.get("FAULT_KILLS") else fork_workers
            self.process = Program(command, folder, writing, writing, environment, first)
        os.close(writing)
        self.lines: list[str] = []
        self.unseen: queue.Queue[str | None] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        with self.said:
            for line in self.said:
                self.lines.append(line)
                self.unseen.put(line)
        self.unseen.put(None)

    def until(self, pattern: str) -> re.Match | None:
        """Wait for a line that contains a pattern; None where the run ends before it."""
        while (line := self.unseen.get(timeout=PATIENCE)) is not None:
            if found := re.search(pattern, line):
                return found
        self.unseen.put(None)
        return None

    def until_writing(self) -> bool:
        """Wait until a checkpoint is being written; whether there was one before the run's end."""
        # Nothing tells of a new directory; it is there for some tens of milliseconds.
        while self.process.poll() is None:
            if any(self.dir.glob("step-*.partial")):
                return True
            time.sleep(0.001)
        return False

    def wait(self) -> int:
        """The exit status, when the process has ended and all that it said is read."""
        status = self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        return status

    def kill(self) -> None:
        """Kill all processes of the run at once, and see them gone."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.wait()
        self.see_all_gone(10)

    def processes(self) -> list[int]:
        """Those of the run that live, its launcher among them. One that is dead and not yet waited for is none."""
        # A dead process has no environment any more. Workers of torchrun are in sessions of their own; of a fork /proc does not
        # show the mark.
        return sorted(int(place.name) for place in Path("/proc").glob("[0-9]*") if self._is_mine(place))

    def _is_mine(self, place: Path) -> bool:
        # Behind the name, which may hold anything: state, parent, group, session.
        state, _, _, session, *_ = _read(place / "stat").rpartition(b")")[2].split() or [b"Z", 0, 0, 0]
        return self.mark in _read(place / "environ") or (int(session) == self.process.pid and state != b"Z")

    def workers(self) -> list[int]:
        """The process ids of the ranks, in their order."""
        places = [Path(f"/proc/{pid}") for pid in self.processes()]
        by_rank = {_read(place / "environ").partition(b"\0RANK=")[2][:1]: place for place in places}
        ranked = [int(by_rank[rank].name) for rank in sorted(by_rank) if rank]
        # Those that train.py has started have it in no environment that /proc shows.
        return ranked or [int(place.name) for place in places if self._is_worker(place)]

    def _is_worker(self, place: Path) -> bool:
        is_child = f"PPid:\t{self.process.pid}\n".encode() in _read(place / "status")
        return is_child and b"resource_tracker" not in _read(place / "cmdline")

    def see_all_gone(self, seconds: float) -> None:
        """Fail where a process of the run lives on after so long."""
        deadline = time.monotonic() + seconds
        while left := self.processes():
            assert time.monotonic() < deadline, f"still alive: {left}"
            time.sleep(0.05)

    def numbers(self, pattern: str) -> list[int]:
        """The number in each line that contains a pattern, of all that was said."""
        return [int(found[1]) for line in self.lines if (found := re.search(pattern, line))]

    @property
    def output(self) -> str:
        """All that was said."""
        return "".join(self.lines)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        # The process has ended meanwhile.
        return b""


def train_here(compose, folder: Path, *overrides: str, name: str = "run"):
    """Train a DPO run within this process, where nothing is to be killed, into `run` of a folder or another directory."""
    settings = *COMMON, "loss=dpo", f"local_dirs=[{folder}/runs]", f"local_run_dir={folder / name}"
    return train.run(compose(*settings, *overrides), folder / name)


def rows_of(run_dir: Path) -> list[dict]:
    """metrics.jsonl without what a clock says."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def assert_undisturbed(found: Path, expected: Path) -> None:
    """A run's numbers, files and weights are those of another, bit for bit, in every checkpoint that both have."""
    assert rows_of(found) == rows_of(expected)
    assert_same_ledger(found, expected)
    assert (found / "LATEST").resolve().name == (expected / "LATEST").resolve().name
    # A stop has written checkpoints in between.
    assert {path.name for path in expected.iterdir()} <= {path.name for path in found.iterdir()}
    assert all(re.fullmatch(r"step-\d+", path.name) for path in found.iterdir() if not (expected / path.name).exists())
    for checkpoint in list_checkpoints(expected):
        assert_same_weights(found / checkpoint.name, checkpoint)


def assert_same_ledger(found: Path, expected: Path) -> None:
    """Two runs have seen the same pairs in the same steps, with the same margins."""
    ledgers = [read_ledger(run_dir).columns() for run_dir in (found, expected)]
    assert all(numpy.array_equal(column, ledgers[1][name]) for name, column in ledgers[0].items())


def assert_same_weights(found: Path, expected: Path) -> None:
    """The weights of two checkpoints are the same bits."""
    # A model, or an adapter alone.
    weights, others = (load_file(next(path.glob("*model.safetensors"))) for path in (found, expected))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items()), found


def assert_whole(run_dir: Path) -> None:
    """Every directory that is named as a checkpoint is a whole one."""
    faults = {path.name: find_damage(path) for path in list_checkpoints(run_dir)}
    assert not any(faults.values()), faults


def undisturbed(factory, name: str, *overrides: str) -> Path:
    """The run directory of an undisturbed run, made once for all processes that test."""
    own = factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / f"undisturbed {name}"
    with FileLock(f"{folder}.lock"):
        if not (folder / "run" / "LATEST").exists():
            run = Run(folder, *overrides)
            assert run.wait() == 0, run.output
    return folder / "run"
