"""What a part has found, on the disk after every piece of it, and how a part is run."""

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Settings:
    """Where a part works, and whether it only shows in small sizes on a CPU that it runs."""

    work: Path
    is_cpu: bool

    @property
    def device(self) -> str:
        """The type of device to compute on."""
        return "cpu" if self.is_cpu else "cuda"

    def choose(self, on_gpu: Any, on_cpu: Any) -> Any:
        """One of two sizes."""
        return on_cpu if self.is_cpu else on_gpu


class Found:
    """The findings of a part by name. A time-out costs nothing of what was there.

    failed: the names of those that raised an error or are not as they must be.
    """

    def __init__(self, path: Path):
        self.path = path
        self.facts: dict[str, Any] = {}
        self.failed: list[str] = []

    def put(self, name: str, value: Any, passed: bool = True) -> None:
        """Keep a finding; `passed`: whether it is as it must be."""
        self.facts[name] = value
        if not passed:
            self.failed.append(name)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps({"failed": self.failed, **self.facts}, default=str))
        part.replace(self.path)

    def attempt(self, name: str, function: Callable, *arguments: Any, must: Callable[[Any], bool] | None = None) -> Any:
        """Keep what a function returns, with the seconds that it took; or what it raised, and return None.

        must: whether a result is as it must be.
        """
        began = time.perf_counter()
        try:
            value = function(*arguments)
        except Exception as error:  # the next piece may do better
            traceback.print_exc()
            self.put(name, {"error": f"{type(error).__name__}: {str(error)[:500]}"}, passed=False)
            return None
        if isinstance(value, dict):
            value = value | {"seconds_taken": round(time.perf_counter() - began, 1)}
        self.put(name, value, passed=must is None or must(value))
        return value


def run_part(module: str, name: str, work: Path, is_cpu: bool) -> int:
    """Run the part of that name in this process; returns the exit status."""
    found = Found(work / f"{name}.json")
    found.put("part", name)
    getattr(importlib.import_module(f"gpu_parts.{module}"), name)(found, Settings(work, is_cpu))
    return 0


class Fork:
    """A part in a process forked from this one, in a session of its own; used like a `subprocess.Popen`.

    Not where there is a GPU: a process that has touched it cannot be forked.
    """

    def __init__(self, module: str, name: str, work: Path, log: int):
        self.status: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._become(module, name, work, log)

    @staticmethod
    def _become(module: str, name: str, work: Path, log: int) -> None:
        """Run the part in the forked process, which ends with it."""
        status = 1
        try:
            os.setsid()
            os.chdir(work)
            for stream in (1, 2):
                os.dup2(log, stream)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            status = run_part(module, name, work, is_cpu=True)
        except BaseException:  # the process ends here, whatever it was
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def wait(self) -> int:
        """The exit status, when it has ended."""
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status
