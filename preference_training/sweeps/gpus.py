"""The GPUs of a sweep's jobs: as many to each as it asks for, no two jobs on the same ones."""

import os
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import gettempdir

from filelock import FileLock, Timeout

from preference_training.core.errors import UserError

# Locks of the GPUs that this process has taken; the system releases them when the process ends, however it ends.
_held: list[FileLock] = []


def visible_gpus() -> list[str]:
    """The GPUs that a process started now would see, by the names that CUDA_VISIBLE_DEVICES has for them."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name.strip() for name in listed.split(",") if name.strip() not in ("", "-1")]
    import torch

    # Asks the driver and does not initialize CUDA, which may still be told what to see.
    return [str(number) for number in range(torch.cuda.device_count())]


def jobs_at_once(gpus_per_job: int | None) -> int:
    """How many jobs this machine's GPUs can take at the same time; 1 without GPUs."""
    return max(1, len(visible_gpus()) // (gpus_per_job or 1))


def take_gpus(number: int | None, directory: Path | None = None) -> None:
    """Reserve a number of GPUs for this process among all processes of sweeps; waits until they are free.

    They stay reserved while the process lives, since CUDA does not look again. Does nothing where number is None, or without
    GPUs. directory holds the locks. Raises UserError where the machine has fewer.
    """
    if number is None or _held:
        return
    names = visible_gpus()
    if not names:
        return
    if len(names) < number:
        raise UserError(f"gpus_per_job: found {number}, and this machine has {len(names)} GPUs. Lower it.")
    directory = directory or Path(gettempdir()) / f"gpus_of_sweeps_{os.getuid()}"
    directory.mkdir(exist_ok=True)
    taken = _free_gpus(names, number, directory)
    if taken is None:
        print(f"gpus_per_job: waiting for {number} free of {len(names)} GPUs", flush=True)
    while taken is None:
        time.sleep(1)
        taken = _free_gpus(names, number, directory)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(taken)


def gpus_of_this_process() -> list[str]:
    """The GPUs that `take_gpus` has reserved; empty where it has not."""
    return os.environ["CUDA_VISIBLE_DEVICES"].split(",") if _held else []


def _free_gpus(names: list[str], number: int, directory: Path) -> list[str] | None:
    """Reserve a number of GPUs, or none at all."""
    with ExitStack() as taken:
        mine = []
        for name in names:
            lock = FileLock(directory / f"{name.replace('/', '_')}.lock")
            with suppress(Timeout):
                taken.enter_context(lock.acquire(timeout=0))
                mine.append((name, lock))
            if len(mine) == number:
                taken.pop_all()
                _held.extend(lock for _, lock in mine)
                return [name for name, _ in mine]
    return None
