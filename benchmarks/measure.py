"""Measurements of one process: time per step, peak memory, the rate of a large matrix product; and a command to measure."""

import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


class Clock:
    """Time of optimizer steps, from the end of one to the end of the next, with the device synchronized.

    now: the clock, wall time; `worker.py` may set CPU time.
    """

    now = staticmethod(time.perf_counter)

    def __init__(self):
        self.seconds: list[float] = []
        self.last = 0.0

    def start(self) -> None:
        """Start the first step."""
        self._wait()
        self.last = self.now()

    def tick(self) -> None:
        """End a step and start the next."""
        self._wait()
        now = self.now()
        self.seconds.append(now - self.last)
        self.last = now

    def _wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def clocked(owner, name: str, seconds: list[float], now: Callable[[], float] = time.perf_counter) -> None:
    """Wrap a method to record the duration of each call."""
    usual = getattr(owner, name)

    def method(*args, **kwargs):
        started = now()
        try:
            return usual(*args, **kwargs)
        finally:
            seconds.append(now() - started)

    setattr(owner, name, method)


def run(*command: str) -> None:
    """Run a file of this project with arguments; it says itself what is wrong. Raises CalledProcessError where it fails."""
    subprocess.run([sys.executable, *command], cwd=Path(__file__).parent.parent, check=True)


def cpu_seconds() -> float:
    """The processor time of all commands so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def peak_bytes() -> dict[str, int]:
    """The peak memory of this process so far: its own, and the GPU's if there is one."""
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak["device"] = torch.cuda.max_memory_allocated()
    return peak


def gemm_flops(width: int, dtype: str, repetitions: int = 6) -> float:
    """FLOP/s of a product of two square matrices, the best of several: the machine's achievable peak."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(width, width, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    clock = Clock()
    torch.matmul(a, b)
    clock.start()
    for _ in range(repetitions):
        torch.matmul(a, b)
        clock.tick()
    return 2 * width**3 / min(clock.seconds)


def hardware() -> dict:
    """A description of this machine."""
    facts = {"cpu": _cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    facts["ram_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return facts


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def versions() -> dict[str, str | None]:
    """Versions of Python and the relevant libraries; None if one is not installed."""
    names = ("torch", "transformers", "trl", "accelerate", "liger-kernel", "flash-attn")
    return {"python": platform.python_version()} | {name: _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
