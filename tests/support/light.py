"""Runs of train.py that must load nothing heavy, each a fork of one process that has imported what is light.

As a program it reads lines of JSON, `{"folder", "arguments", "said"}`, and writes the exit status of each run; what a run says
on stdout and stderr goes to the files `said`.
"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.support.files import ROOT

TRAIN = str(ROOT / "train.py")


class LightRuns:
    """The process, and what it is asked. Modules of the folder `forbidden` hide the installed ones."""

    def __init__(self, forbidden: Path):
        path = os.pathsep.join([str(forbidden), str(ROOT)])
        environment = os.environ | {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
        """`python train.py` with arguments in a folder."""
        with TemporaryDirectory() as place:
            said = [Path(place, name) for name in ("out", "err")]
            asked = {"folder": str(folder), "arguments": arguments, "said": [str(file) for file in said]}
            print(json.dumps(asked), file=self.process.stdin, flush=True)
            status = int(self.process.stdout.readline())
            return subprocess.CompletedProcess(arguments, status, *(file.read_text() for file in said))

    def end(self) -> None:
        """No other run will be asked for."""
        self.process.communicate(timeout=60)


def _become(folder: str, arguments: list[str], said: list[str]) -> None:
    """In a new process: be `python train.py ARGUMENTS` in a folder."""
    for descriptor, file in zip((1, 2), said, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(folder)
    sys.argv = [TRAIN, *arguments]
    runpy.run_path(TRAIN, run_name="__main__")
    sys.exit()


def main() -> None:
    """Fork a run for each line, until there is none."""
    import train  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if not child:
            _become(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
