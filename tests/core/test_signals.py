"""When a run is asked to stop: signals to a real process, and its time."""

import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from preference_training.core import signals as stopping
from preference_training.core.signals import SAME_SIGNAL, StopRequests
from tests.support.files import ROOT

# Answers each line on its standard input: a number is the time from now on, anything else asks for the reason to stop.
LISTENER = """
import sys, types
from preference_training.core import signals as stopping
from preference_training.core.signals import StopRequests
clock = [0.0]
stopping.time = types.SimpleNamespace(monotonic=lambda: clock[0])
with StopRequests() as stop:
    for line in sys.stdin:
        if line.strip():
            clock[0] = float(line)
        print(stop.reason, flush=True)
"""


class Listener:
    """A process that listens for signals, and whose clock stands where it is put."""

    def __init__(self):
        command, pipe = [sys.executable, "-c", LISTENER], subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)

    def ask(self, time: float | str = "") -> str:
        """The reason to stop, after all signals that were sent before, and at `time` if it is given."""
        self.process.stdin.write(f"{time}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


@pytest.fixture
def listener():
    running = Listener()
    assert running.ask() == "None"
    with running.process:
        yield running
        running.process.kill()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_first_signal_asks_the_run_to_stop_and_ends_nothing(name, listener):
    listener.process.send_signal(getattr(stopping.signal, name))
    assert listener.ask() == name
    listener.process.stdin.close()
    assert listener.process.wait(30) == 0


@pytest.mark.long
def test_a_run_that_is_stopped_while_it_starts_leaves_no_directory(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), f"local_run_dir={tmp_path / 'runs' / 'mine'}", "loss=sft"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        # Its data is read before its model.
        assert next(line for line in process.stdout if line.startswith("train: "))
        assert (tmp_path / "runs" / "mine").is_dir()
        process.send_signal(stopping.signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + stopping.signal.SIGTERM and "SIGTERM: stopped before its first step" in said
    assert not (tmp_path / "runs" / "mine").exists()


START = """
import os, signal, sys, time
from preference_training.core import signals
signals.EXIT_AGAIN = 0.2
class Discarding:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
        time.sleep(0.1)
with signals.stoppable_start():
    try:
        {body}
        time.sleep(60)
    finally:
        print("cleared away", flush=True)
"""


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("SIGTERM", "os.kill(os.getpid(), signal.SIGTERM)"),
        ("SIGINT", "os.kill(os.getpid(), signal.SIGINT)"),
        # Python discards what is raised there.
        ("SIGTERM", "thing = Discarding(); del thing"),
    ],
)
def test_a_signal_ends_a_starting_process_in_one_line_wherever_it_arrives(name, body):
    code = START.format(name=name, body=body)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert found.returncode == 128 + getattr(stopping.signal, name) and found.stdout == "cleared away\n"
    assert found.stderr.count(f"{name}: stopped before its first step") == 1
    assert ("Traceback" in found.stderr) == ("Discarding" in body)


def test_a_start_leaves_other_handlers_of_sigterm():
    number, usual = stopping.signal.SIGTERM, stopping.signal.getsignal(stopping.signal.SIGTERM)
    try:
        stopping.signal.signal(number, stopping.signal.SIG_IGN)
        with stopping.stoppable_start():
            assert stopping.signal.getsignal(number) is stopping.signal.SIG_IGN
    finally:
        stopping.signal.signal(number, usual)


def test_a_run_that_is_to_stop_says_so_at_once_and_once(listener):
    for _ in range(2):
        listener.process.send_signal(stopping.signal.SIGTERM)
        assert listener.ask() == "SIGTERM"
    listener.process.stdin.close()
    said = (
        "SIGTERM: the run stops after its step or the batch of its evaluation, with a checkpoint if it has taken a step; a "
        "second Ctrl-C ends it at once, without one\n"
    )
    assert listener.process.stderr.read() == said


def test_a_second_interrupt_at_once_is_the_same_one_heard_twice_and_a_later_one_ends_the_process(listener):
    interrupt = stopping.signal.SIGINT
    listener.ask(10.0)
    listener.process.send_signal(interrupt)
    assert listener.ask(10.0 + SAME_SIGNAL) == "SIGINT"
    listener.process.send_signal(interrupt)
    assert listener.ask(10.0 + SAME_SIGNAL + 0.001) == "SIGINT"
    listener.process.send_signal(interrupt)
    assert listener.process.wait(30) == 128 + interrupt == 130


def test_an_interrupt_after_another_signal_ends_the_process_and_others_never_do(listener):
    listener.process.send_signal(stopping.signal.SIGTERM)
    assert listener.ask(100.0) == "SIGTERM"
    for again in (stopping.signal.SIGTERM, stopping.signal.SIGUSR1):
        listener.process.send_signal(again)
        assert listener.ask() == "SIGTERM", "the first one is the reason"
    listener.process.send_signal(stopping.signal.SIGINT)
    assert listener.process.wait(30) == 130


def test_the_handlers_of_before_are_put_back_also_behind_an_error():
    code = """
import signal
from preference_training.core.signals import SIGNALS, StopRequests
own = lambda number, frame: None
signal.signal(signal.SIGTERM, own)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
before = {number: signal.getsignal(number) for number in SIGNALS}
try:
    with StopRequests() as stop:
        assert {signal.getsignal(number) for number in SIGNALS} == {stop._receive}
        raise RuntimeError
except RuntimeError:
    pass
assert {number: signal.getsignal(number) for number in SIGNALS} == before
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_a_thread_that_may_not_listen_still_knows_its_time():
    code = """
import threading
from preference_training.core.signals import StopRequests
reasons = []
def work():
    with StopRequests(0) as stop:
        reasons.append(stop.reason)
thread = threading.Thread(target=work)
thread.start()
thread.join()
assert reasons == ["max_wall_time is over"], reasons
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_the_time_is_over_after_so_many_minutes_and_without_a_limit_never(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: now[0]))
    limited, endless = StopRequests(1.5), StopRequests()
    now[0] = 1000.0 + 90 - 0.001
    assert limited.reason is None
    now[0] = 1000.0 + 90
    assert limited.reason == "max_wall_time is over"
    now[0] = 1e12
    assert endless.reason is None


def test_a_signal_is_the_reason_also_where_the_time_is_over():
    stop = StopRequests(0)
    assert stop.reason == "max_wall_time is over"
    stop._receive(stopping.signal.SIGUSR1, None)
    assert stop.reason == "SIGUSR1"


@pytest.mark.parametrize(("ends_process", "status"), [(True, 0), (False, -signal.SIGTERM)])
def test_a_signal_after_a_run_does_not_change_the_exit_status_of_a_process_that_ends_with_it(ends_process, status):
    code = f"""
import os, signal
from preference_training.core.signals import StopRequests
StopRequests.ends_process = {ends_process}
with StopRequests():
    pass
print("run directory: here", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, "run directory: here\n")
