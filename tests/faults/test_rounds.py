"""Loops of rounds that are killed at random moments end with the tables and the weights of the undisturbed one, bit for bit."""

import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from preference_training.rounds.judges.base import Judge
from preference_training.rounds.loop import Loop
from tests.rounds import loops
from tests.rounds.test_loop import content
from tests.support.files import ROOT

KILLS = int(os.environ.get("FAULT_KILLS", 4))
MINUTES = float(os.environ.get("FAULT_MINUTES", "inf"))
# Lines behind which a kill falls: of every step, and of what a training does.
MOMENTS = (
    "rounds: ",
    "sampling",
    "prompts sampled",
    "judging",
    "pairs of",
    "held-out prompts: ",
    ": training",
    "loss ",
    "checkpoint: ",
)
OVERRIDES = ("loss=dpo", "lr=1e-2", "rounds.pairs=all", "save_every=16", "eval_every=16", "n_epochs=2")
PATIENCE = 600


class LoopRun:
    """A loop as the command line runs it, in a session of its own."""

    def __init__(self, folder: Path, *more: str):
        command = [sys.executable, str(ROOT / "train.py"), *loops.overrides(folder, *OVERRIDES, *more)]
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "WANDB_MODE": "offline"}
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
        self.lines: queue.Queue = queue.Queue()
        self.said: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.said.append(line)
            self.lines.put(line)
        self.lines.put(None)

    def until(self, moment: str) -> bool:
        """Wait for a line with a text; False where the loop has ended before."""
        while (line := self.lines.get(timeout=PATIENCE)) is not None:
            if moment in line:
                return True
        return False

    def kill(self) -> None:
        """Kill the loop and all its steps."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)

    def wait(self) -> int:
        """The exit status."""
        return self.process.wait(PATIENCE)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A folder with the loop that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    loops.make_model(folder)
    loops.make_prompts(folder, count=40)
    run = LoopRun(folder)
    assert run.wait() == 0, "".join(run.said)
    return folder


def begin(folder: Path, undisturbed: Path) -> None:
    """The files that a loop begins with, in a folder of its own; the model is the same file."""
    folder.mkdir()
    loops.make_prompts(folder, count=40)
    (folder / "first").symlink_to(undisturbed / "first")


def assert_same(folder: Path, undisturbed: Path) -> None:
    assert content(folder / "loop") == content(undisturbed / "loop")
    for files in Loop.open(undisturbed / "loop").rounds():
        if files.number is not None:
            one, other = (
                load_file(place / "loop" / files.name / "policy" / "model.safetensors") for place in (folder, undisturbed)
            )
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.campaign
@pytest.mark.timeout(2400)
def test_a_loop_that_is_killed_at_random_moments_ends_as_the_undisturbed_one(undisturbed, tmp_path, record_property):
    draw, started, number = random.Random(0), time.monotonic(), 0
    facts = {"seed": 0, "struck": [], "runs": 0, "repeated": [], "written by half": 0, "left out": 0}
    record_property("rounds", facts)
    while len(facts["struck"]) < KILLS and time.monotonic() - started < 60 * MINUTES:
        number += 1
        folder = tmp_path / str(number)
        begin(folder, undisturbed)
        killed, status = 0, None
        while status != 0:
            run = LoopRun(folder, "resume=auto")
            facts["runs"] += 1
            if len(facts["struck"]) < KILLS and run.until(moment := draw.choice(MOMENTS)):
                time.sleep(draw.uniform(0, 1))
                run.kill()
                facts["struck"].append(moment.strip())
                killed += 1
                facts["written by half"] += any((folder / "loop").rglob("*.partial"))
            else:
                status = run.wait()
                assert status == 0, "".join(run.said)
        assert_same(folder, undisturbed)
        again = Counter(loops.asked(folder))
        # Asked again is only what a judge was about to answer when it was killed.
        assert sum(again.values()) - len(again) <= killed * Judge.at_once
        facts["repeated"].append(sum(again.values()) - len(again))
    facts["left out"] = KILLS - len(facts["struck"])


@pytest.mark.campaign
@pytest.mark.timeout(1200)
def test_a_loop_that_is_asked_to_stop_says_how_to_go_on_and_does(undisturbed, tmp_path):
    folder = tmp_path / "stopped"
    begin(folder, undisturbed)
    for moment in ("prompts sampled", ": training"):
        run = LoopRun(folder, "resume=auto")
        assert run.until(moment)
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 75, "".join(run.said)
        assert "; the same command continues from there" in run.said[-1]
    assert LoopRun(folder, "resume=auto").wait() == 0
    assert_same(folder, undisturbed)
