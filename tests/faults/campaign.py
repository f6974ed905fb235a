"""A campaign of faults against one run: it is killed and stopped at random moments, and resumed until it is done."""

import os
import random
import re
import signal
import time
from pathlib import Path

from preference_training.core.signals import STOPPED
from tests.faults.processes import (
    EVERY,
    PATIENCE,
    RESUMED,
    STEP,
    Run,
    assert_undisturbed,
    assert_whole,
    list_checkpoints,
    rows_of,
)

SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1, "SIGINT": signal.SIGINT}
KILLS = ("kill while writing", "kill")
BATCH = 16
RANK_FAULTS = ["kill a rank", "stop a rank", "kill the launcher"]
AT_THE_END = "SIGTERM at the end"


class Campaign:
    """Disturbs runs of one configuration, until all `faults` have struck. `strict`: no checkpoint is written beside training.

    facts counts what has happened.
    """

    def __init__(self, folder: Path, expected: Path, overrides: tuple[str, ...], seed: int, strict: bool = False):
        self.folder, self.expected, self.overrides, self.strict = folder, expected, overrides, strict
        self.draw = random.Random(seed)
        self.facts = {"seed": seed, "struck": [], "runs": 0, "repeated": [], "written by half": 0, "seconds": 0.0}

    def carry_out(self, faults: list[str], minutes: float) -> None:
        """Strike each of the faults, in random order; after so many minutes those that are left are counted and left out."""
        started, left = time.monotonic(), list(faults)
        self.draw.shuffle(left)
        while left and time.monotonic() - started < 60 * minutes:
            self._disturb_one_run(left)
            self.facts |= {"left out": len(left), "seconds": round(time.monotonic() - started, 1)}

    def _disturb_one_run(self, left: list[str]) -> None:
        """A run from its beginning to its end; what strikes it is taken from `left`."""
        self.facts["runs"] += 1
        folder = self.folder / str(self.facts["runs"])
        last_seen = last_stop = None
        while True:
            fault = left[-1] if left else None
            # Seconds, not minutes, until a rank that hangs is given up.
            patience = ["trainer.distributed_timeout_minutes=0.25"] if fault == "stop a rank" else []
            run = Run(folder, *self.overrides, *patience)
            struck = fault is not None and self._strike(run, fault)
            status = run.wait()
            run.see_all_gone(PATIENCE)
            self._check_start(run, last_seen, last_stop)
            assert_whole(run.dir)
            # At the end a signal may come too late, and is no fault then.
            if struck and (status != 0 or fault == AT_THE_END):
                left.pop()
                self.facts["struck"].append(fault)
                last_seen, last_stop = self._check_end(run, fault, status)
            if status == 0:
                assert_undisturbed(run.dir, self.expected)
                return
            assert struck, run.output

    def _strike(self, run: Run, fault: str) -> bool:
        """Wait for the fault's moment; False where the run has ended before it."""
        if fault in SIGNALS:
            if not run.until(STEP):
                return False
            time.sleep(self.draw.uniform(0, 1))
            run.process.send_signal(SIGNALS[fault])
            return True
        if fault == "kill while writing":
            for _ in range(self.draw.randrange(3)):
                run.until("checkpoint: ")
            if not run.until_writing():
                return False
            time.sleep(self.draw.uniform(0, 0.06))
        elif fault == AT_THE_END:
            total = rows_of(self.expected)[-1]["counters/examples"]
            if not run.until(f"^{total - BATCH}/{total} loss"):
                return False
            run.process.send_signal(signal.SIGTERM)
            return True
        elif fault in RANK_FAULTS:
            return self._strike_one_process(run, fault)
        else:
            # Some before training has begun.
            moment = self.draw.choice(["train: ", "held out|" + RESUMED, STEP, STEP])
            if not run.until(moment):
                return False
            time.sleep(self.draw.uniform(0, 2))
        run.kill()
        self.facts["written by half"] += any(run.dir.glob("step-*.partial"))
        return True

    def _strike_one_process(self, run: Run, fault: str) -> bool:
        if not run.until(STEP):
            return False
        time.sleep(self.draw.uniform(0, 0.5))
        workers = run.workers()
        if len(workers) != 2:
            return False
        number = signal.SIGSTOP if fault == "stop a rank" else signal.SIGKILL
        os.kill(run.process.pid if fault == "kill the launcher" else self.draw.choice(workers), number)
        return True

    def _check_start(self, run: Run, last_seen: int | None, last_stop: int | None) -> None:
        """That a run has gone on from where it had to."""
        went_on = run.numbers(RESUMED) or [0] * ("resume: no checkpoint" in run.output)
        if last_seen is None or not went_on:
            return
        repeated = last_seen - went_on[0]
        if last_stop is not None:
            assert repeated == 0 and went_on[0] == last_stop, run.output
        # In the background a checkpoint is written while the steps behind it are computed, but before the next one is.
        assert repeated <= EVERY * (1 if self.strict else 2), run.output
        self.facts["repeated"].append(repeated)

    def _check_end(self, run: Run, fault: str, status: int) -> tuple[int, int | None]:
        """How a run has ended that was struck; up to which example it was seen to train, and where it has stopped by itself."""
        newest = list_checkpoints(run.dir)
        kept = int(newest[0].name.removeprefix("step-")) if newest else 0
        seen = max([*run.numbers(STEP), kept])
        if fault in ("kill a rank", "stop a rank"):
            assert status == 1 and re.search(r"rank [01] of 2 died \(.*\); the others were ended", run.output), run.output
            return seen, None
        if fault == AT_THE_END and kept == rows_of(self.expected)[-1]["counters/examples"]:
            # It was past the last step in which it could have stopped, and is complete.
            assert status == 0, run.output
            return seen, kept
        if fault not in (*SIGNALS, AT_THE_END):
            assert status == -signal.SIGKILL, run.output
            return seen, None
        assert status == STOPPED, run.output
        # Of several processes each may say why; one is enough.
        stopped = re.search(rf"stopped after (\d+) examples: ({fault.split()[0]}|another process)", run.output)
        assert stopped and kept == int(stopped[1]) == seen, run.output
        return seen, kept


def faults_of(kills: int, stops: int) -> list[str]:
    """So many kills, half of them while a checkpoint is written, and so many signals."""
    signals = ("SIGTERM", "SIGUSR1", "SIGTERM", "SIGINT", "SIGTERM")
    return [KILLS[number % 2] for number in range(kills)] + [signals[number % len(signals)] for number in range(stops)]
