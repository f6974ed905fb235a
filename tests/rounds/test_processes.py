"""The processes of a loop: how their ends are told, who gets a signal, and that one loop at a time works in a directory."""

import fcntl
import os
import sys

import pytest

from preference_training.core.errors import UserError
from preference_training.core.processes import STEP_LOCK
from preference_training.core.signals import StoppedError
from preference_training.rounds import processes
from preference_training.rounds.processes import LOCK, StepFailedError, _started, locked_loop, run_step, run_together


def program(text: str) -> list[str]:
    """The command of a small program."""
    return [sys.executable, "-S", "-c", f"import os, signal, sys, time\n{text}"]


def test_a_step_that_ends_well_says_nothing():
    run_step(program(""), "judge of round-1")


@pytest.mark.parametrize(("text", "words", "status"), [
    ("sys.exit(2)", "judge of round-1 has ended with exit status 2", 2),
    ("os.kill(os.getpid(), signal.SIGKILL)", "judge of round-1 has ended with SIGKILL", 1),
])  # fmt: skip
def test_a_step_that_fails_is_told_with_its_end(text, words, status, capfd):
    with pytest.raises(StepFailedError, match=words) as failed:
        run_step(program(text), "judge of round-1")
    assert failed.value.told() == status
    assert capfd.readouterr().err == f"rounds: {words}; what it said is above\n"


def test_a_step_that_was_stopped_stops_the_loop():
    with pytest.raises(StoppedError, match="stopped during sample of round-2: its process was stopped"):
        run_step(program("sys.exit(75)"), "sample of round-2")


def test_a_signal_is_forwarded_to_the_step_which_takes_its_time(tmp_path):
    """The step signals its loop when it is ready, and notes what comes back."""
    text = f"""
def note(number, _frame):
    open({str(tmp_path / "noted")!r}, "w").write(signal.Signals(number).name)
    sys.exit(75)
signal.signal(signal.SIGTERM, note)
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""
    with pytest.raises(StoppedError, match="stopped during train of round-1: SIGTERM"):
        run_step(program(text), "train of round-1")
    assert (tmp_path / "noted").read_text() == "SIGTERM"


def test_of_several_processes_of_a_step_the_first_that_fails_ends_the_others(tmp_path):
    """Each has its own environment; the one that waits notes that it was asked to stop."""
    waits = f"""
def note(number, _frame):
    open({str(tmp_path / "noted")!r}, "w").write(os.environ["NUMBER"])
    sys.exit(75)
signal.signal(signal.SIGTERM, note)
open({str(tmp_path / "ready")!r}, "w").close()
time.sleep(60)
"""
    fails = f"while not os.path.exists({str(tmp_path / 'ready')!r}):\n    time.sleep(0.01)\nsys.exit(2)"
    with pytest.raises(StepFailedError, match="sampling has ended with exit status 2"):
        run_together([(program(waits), {"NUMBER": "7"}), (program(fails), {})], "sampling")
    assert (tmp_path / "noted").read_text() == "7"
    run_together([(program(""), {}), (program("time.sleep(0.2)"), {})], "sampling")
    with pytest.raises(StoppedError, match="stopped during sampling"):
        run_together([(program(""), {}), (program("sys.exit(75)"), {})], "sampling")


def test_a_directory_in_which_another_loop_goes_on_working_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 0.2)
    with locked_loop(tmp_path):
        inherited = os.environ.pop(STEP_LOCK)
        told = r"local_run_dir: another command has worked in .* Wait for it, stop it, or name"
        with pytest.raises(UserError, match=told), locked_loop(tmp_path):
            pass
        os.environ[STEP_LOCK] = inherited


def is_locked(folder) -> bool:
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_directory_is_locked_as_long_as_a_step_of_a_loop_lives_whatever_became_of_the_loop(tmp_path):
    with locked_loop(tmp_path):
        # A step of the loop is inside already.
        with locked_loop(tmp_path):
            pass
        step = _started(program("time.sleep(60)"))
        assert is_locked(tmp_path)
    assert STEP_LOCK not in os.environ
    try:
        assert is_locked(tmp_path)
    finally:
        step.kill()
        step.wait()
    assert not is_locked(tmp_path)
