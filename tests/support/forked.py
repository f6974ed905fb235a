"""Programs of this project as processes of their own, forked from one that has imported the heavy libraries already.

Most of what a short run costs is the import of torch and transformers. Here one process imports them once, and every program is
a fork of it: with its own arguments, folder, environment, output and exit status, and in a session of its own, so that it can
be signalled and killed as any other. What a start from nothing does is for tests that start `sys.executable`.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.forkserver import ensure_running, set_forkserver_preload
from multiprocessing.reduction import DupFd
from pathlib import Path
from tempfile import TemporaryFile
from unittest import mock

from tests.support.files import ROOT

FORKS = multiprocessing.get_context("forkserver")


def start_server() -> None:
    """Start the process that programs are forked from, once; it ends with this one."""
    set_forkserver_preload(["tests.support.preloaded"])
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT)):
        ensure_running()


@atexit.register
def leave_none() -> None:
    """End what a test has started and not seen to its end: this process would wait for it."""
    for process in multiprocessing.active_children():
        process.kill()


class Program:
    """A Python file with arguments, running in a folder; used like a `subprocess.Popen`.

    stdout, stderr: file descriptors. environment: None is this process's own; what a library reads of it while it is imported
    is as it was when the server was started. first: what the process does before anything else, such as `partial(os.umask, 0)`.
    """

    def __init__(
        self,
        command: list,
        folder: Path,
        stdout: int,
        stderr: int,
        environment: dict[str, str] | None = None,
        first: Callable[[], object] | None = None,
    ):
        start_server()
        self.command = [str(text) for text in command]
        environment = dict(os.environ if environment is None else environment)
        become = self.command, str(folder), environment, Output(stdout, stderr), first
        self.process = FORKS.Process(target=_become, args=become)
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while the process lives."""
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, when the process has ended. Raises TimeoutExpired where it has not after so many seconds."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.command, timeout)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        """Signal the process, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process and those that it has started in its session."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def fork_workers() -> None:
    """For `first` of a Program: the workers that it starts are forks of it, in its session, and import nothing anew."""
    from preference_training.distributed import launching

    config = launching.LaunchConfig
    launching.LaunchConfig = lambda **given: config(**given | {"start_method": "fork"})


class Output:
    """Two file descriptors that a process is given on its way."""

    def __init__(self, stdout: int, stderr: int):
        self.descriptors = stdout, stderr

    def __getstate__(self) -> list:
        return [DupFd(descriptor) for descriptor in self.descriptors]

    def __setstate__(self, sent: list) -> None:
        self.descriptors = [descriptor.detach() for descriptor in sent]


def _become(command: list[str], folder: str, environment: dict[str, str], output: Output, first: Callable | None) -> None:
    """In the new process: be `python COMMAND` in a folder."""
    os.setsid()
    for own, given in zip((1, 2), output.descriptors, strict=True):
        os.dup2(given, own)
        os.close(given)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    if first:
        first()
    runpy.run_path(command[0], run_name="__main__")


def run(command: list, folder: Path, environment: dict[str, str] | None = None, first: Callable | None = None):
    """Run a Python file with arguments in a folder to its end: a CompletedProcess with what it has said as texts.

    environment, first: as of Program. Raises TimeoutExpired after five minutes.
    """
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        program = Program(command, folder, out.fileno(), err.fileno(), environment, first)
        try:
            status = program.wait(300)
        finally:
            if program.poll() is None:
                program.kill()
        said = [file.read() for file in (out, err) if not file.seek(0)]
    return subprocess.CompletedProcess(program.command, status, *said)
