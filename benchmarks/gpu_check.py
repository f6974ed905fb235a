"""What only a GPU can show: whether this project computes there what it is to compute, how fast, and in how much memory.

    python benchmarks/gpu_check.py                       on NVIDIA GPUs, at most eight minutes
    python benchmarks/gpu_check.py --parts values,runs   some parts
    python benchmarks/gpu_check.py --cpu                 does it run: every part in small sizes, about a minute on two cores
    python benchmarks/gpu_check.py --wheels FOLDER       on a machine without pip or network: packages from a folder of wheels

Needs no network, no hub and no data: weights, tokenizer and rows are made here. Every part is a process of its own with a time
limit. A part that fails or hangs is a result, and the others still run. Results are on the disk as soon as they are there: a
line a part in WORK/results.jsonl, and all of them with command, hardware and versions in
RESULTS/<date>_gpu_check_<device>.json. Exit status 1 where anything fails, 2 without a GPU. Imports the standard library only.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu_parts.found import Fork

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# A part that could only begin with fewer seconds left is not begun.
TOO_LATE = 15
# How much longer a part may take on a CPU.
SLOWER = 5


@dataclass(frozen=True)
class Part:
    """A part: the function of its name in gpu_parts/<module>.py.

    seconds: at most. alone: it measures, so nothing runs beside it.
    """

    module: str
    seconds: int
    alone: bool = False


# In the order in which they begin.
PARTS = {
    "environment": Part("environment", 60, alone=True),
    "values": Part("correctness", 200),
    "values_varlen": Part("correctness", 120),
    "compiling": Part("compiling", 220),
    "runs": Part("whole_runs", 220),
    "options": Part("whole_runs", 220),
    "fsdp": Part("whole_runs", 220),
    "speed_hh": Part("speed", 90, alone=True),
    "profile": Part("profiling", 60, alone=True),
    "attention": Part("attention", 60, alone=True),
    "choice": Part("choice", 100, alone=True),
    "speed_answers": Part("speed", 60, alone=True),
    "speed_system": Part("speed", 60, alone=True),
    "speed_large": Part("speed", 100, alone=True),
    "memory": Part("memory", 60, alone=True),
    "generation": Part("generating", 50, alone=True),
    "several_gpus": Part("whole_runs", 100, alone=True),
    "speed_fsdp": Part("whole_runs", 80, alone=True),
    "speed_trl": Part("speed", 120, alone=True),
}
# How many of the parts that need not be alone run beside each other.
BESIDE, BESIDE_ON_CPU = 5, 2


@dataclass
class Running:
    """A part that is running: its process, and when it began."""

    name: str
    process: "subprocess.Popen | Fork"
    limit: float
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return time.monotonic() - self.began

    def exit(self, deadline: float) -> int | str | None:
        """Its exit status, or why it was ended; None while it runs."""
        status = self.process.poll()
        if status is None and (self.seconds > self.limit or time.monotonic() > deadline):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return f"no end after {self.seconds:.0f} s"
        return status


@dataclass
class Check:
    """A check of some parts in a folder of its own. seconds: of all of them."""

    work: Path
    is_cpu: bool
    seconds: float
    packages: Path | None = None
    lines: list[dict] = field(default_factory=list)

    def run(self, names: list[str], save: Callable[[list[dict]], None]) -> list[dict]:
        """Run parts, and save the lines whenever there is a new one. Ends after the environment where there is no GPU."""
        deadline = time.monotonic() + self.seconds
        waiting, running = list(names), []
        while waiting or running:
            while waiting and self._may_begin(waiting[0], running):
                name = waiting.pop(0)
                if deadline - time.monotonic() < TOO_LATE:
                    self._keep({"part": name, "exit": "not begun: no time left", "seconds": 0.0}, save)
                    continue
                running.append(self.begin(name))
            for part in list(running):
                if (status := part.exit(deadline)) is not None:
                    running.remove(part)
                    self._keep(self.line(part, status), save)
                    if self.lines[-1].get("no_gpu"):
                        return self.lines
            time.sleep(0.05)
        return self.lines

    def _may_begin(self, name: str, running: list[Running]) -> bool:
        """Whether a part may begin beside those that run. On a CPU nothing is measured, and none needs to be alone."""
        if name == "environment" or any(part.name == "environment" for part in running):
            return not running
        if self.is_cpu:
            return len(running) < BESIDE_ON_CPU
        alone = PARTS[name].alone or any(PARTS[part.name].alone for part in running)
        return len(running) < (1 if alone else BESIDE)

    def begin(self, name: str) -> Running:
        """Start a part. It writes to WORK/<name>.log and WORK/<name>.json."""
        with (self.work / f"{name}.log").open("w") as log:
            is_fork = self.is_cpu and name != "environment"
            process = self._fork(name, log.fileno()) if is_fork else self._process(name, log.fileno())
        return Running(name, process, PARTS[name].seconds * (SLOWER if self.is_cpu else 1))

    def _process(self, name: str, log: int) -> subprocess.Popen:
        """Start a part as a new process."""
        command = [sys.executable, str(HERE / "gpu_check.py"), "--part", name, "--work", str(self.work)]
        command += ["--cpu"] if self.is_cpu else []
        streams = {"stdout": log, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, env=self._environment(), cwd=self.work, start_new_session=True, **streams)

    def _fork(self, name: str, log: int) -> "Fork":
        """Start a part as a fork of this process, which imports once what all parts import: most of what they take on a CPU."""
        os.environ |= self._environment()
        sys.path += [path for path in os.environ["PYTHONPATH"].split(os.pathsep) if path not in sys.path]
        from gpu_parts.found import Fork

        # What cannot be imported is the result of the parts that need it.
        with suppress(Exception):
            for part in PARTS.values():
                importlib.import_module(f"gpu_parts.{part.module}")
        return Fork(PARTS[name].module, name, self.work, log)

    def _environment(self) -> dict[str, str]:
        # Packages of wheels come before the machine's own, so the folder should have only what it lacks.
        paths = [str(ROOT), str(HERE), os.environ.get("PYTHONPATH", ""), str(self.packages or "")]
        return os.environ | {
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "disabled",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            **({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if self.is_cpu else {}),
        }

    def line(self, part: Running, status: int | str) -> dict:
        """What a part has found, and how it ended."""
        path, log = self.work / f"{part.name}.json", self.work / f"{part.name}.log"
        found = json.loads(path.read_text()) if path.is_file() else {}
        line = {"part": part.name, "exit": status, "seconds": round(part.seconds, 1), **found}
        if status != 0 or line.get("failed"):
            line["end_of_log"] = log.read_text(errors="replace")[-1500:] if log.is_file() else ""
        return line

    def _keep(self, line: dict, save: Callable[[list[dict]], None]) -> None:
        """Write a line to the disk, then say it."""
        self.lines.append(line)
        with (self.work / "results.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        save(self.lines)
        print(json.dumps({key: value for key, value in line.items() if key != "end_of_log"})[:1200], flush=True)


def unpacked(wheels: Path, folder: Path) -> Path:
    """A folder with the packages of some wheels, which are archives: no pip is needed."""
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise SystemExit(f"--wheels: found no *.whl in {wheels}. benchmarks/gpu_parts/make_wheels.sh FOLDER fetches them.")
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return folder


def passed(line: dict) -> bool:
    """Whether a part ended well, and found nothing wrong."""
    return line["exit"] == 0 and not line.get("failed")


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line, understood."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="small sizes on a CPU: does it run")
    parser.add_argument("--parts", default=",".join(PARTS), help="names of parts, separated by commas; default: all")
    parser.add_argument("--seconds", type=float, default=470, help="of all parts together; on a CPU five times as many")
    now = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / f"gpu_check_{now}", help="results.jsonl, logs, runs")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where the JSON with everything goes")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels of what this machine lacks")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    options.parts = [name.strip() for name in options.parts.split(",")]
    if unknown := sorted(set(options.parts) - PARTS.keys()):
        parser.error(f"--parts: found {', '.join(unknown)}, expected some of {', '.join(PARTS)}")
    options.work, options.path = (
        options.work.resolve(),
        options.results / f"{now}_gpu_check_{'cpu' if options.cpu else 'cuda'}.json",
    )
    return options


def main(given: list[str] | None = None) -> int:
    """Run the parts; returns the exit status."""
    options = arguments(given)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.part:
        from gpu_parts.found import run_part

        return run_part(PARTS[options.part].module, options.part, options.work, options.cpu)
    options.results.mkdir(parents=True, exist_ok=True)
    packages = unpacked(options.wheels, options.work / "packages") if options.wheels else None
    check = Check(options.work, options.cpu, options.seconds * (SLOWER if options.cpu else 1), packages)

    def save(lines: list[dict]) -> None:
        environment = next((line for line in lines if line["part"] == "environment"), {})
        facts = {name: environment.get(name) for name in ("hardware", "versions")}
        command = [Path(sys.argv[0]).name, *(Path(text).name if text.startswith("/") else text for text in sys.argv[1:])]
        text = json.dumps({"command": command, **facts, "results": lines}, indent=1)
        part = options.path.with_suffix(".part")
        part.write_text(text + "\n")
        part.replace(options.path)

    lines = check.run(options.parts, save)
    if any(line.get("no_gpu") for line in lines):
        print("No NVIDIA GPU that torch can use was found. Does it run at all: --cpu", file=sys.stderr)
        return 2
    wrong = [line["part"] for line in lines if not passed(line)]
    print(f"{len(lines) - len(wrong)} of {len(lines)} parts passed" + f"; not {', '.join(wrong)}" * bool(wrong))
    print(options.path)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
