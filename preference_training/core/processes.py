"""Processes on one machine: usable cores, which process prints, and mapping over a process pool."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

# The number of an open file: a command holds the lock of its directory on it, and its steps inherit it.
STEP_LOCK = "PREFERENCE_TRAINING_STEP_LOCK"


def usable_cores() -> int:
    """How many cores this process may run on."""
    # macOS does not tell: all of them.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_worker() -> bool:
    """Whether this process is one of several started by a launcher such as torchrun."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_step() -> bool:
    """Whether another command has started this process, as a step of a loop of rounds or as the run on a half of the data."""
    return STEP_LOCK in os.environ


def reports_for_machine() -> bool:
    """Whether this process prints what all workers of its machine would: true for the first of them that asks.

    Not simply for local rank 0: torchrun ends the others as soon as one has ended, whether they have printed or not.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        return os.environ.get("LOCAL_RANK", "0") == "0"
    # Each worker's file is in a directory of its own, and all of these in a directory of this machine's.
    try:
        (Path(error_file).parent.parent / "spoken").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True  # better twice than never
    return True


def map_in_processes(function: Callable, items: Iterable, chunk: int = 256) -> Iterator:
    """`map(function, items)` in as many processes as there are cores; on one core, in this process.

    function and items are pickled. At most a few chunks per process are pending, so that an endless stream works too.
    """
    import multiprocessing

    cores = usable_cores()
    items = iter(items)
    first = list(islice(items, chunk))
    if cores == 1 or len(first) < chunk:
        yield from map(function, chain(first, items))
        return
    # Spawned: a forked process would share locks with the threads of this one.
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        waiting: deque = deque()
        chunks = chain([first], iter(lambda: list(islice(items, chunk)), []))
        for part in chunks:
            waiting.append(pool.map_async(function, part, len(part)))
            if len(waiting) > 2 * cores:
                yield from waiting.popleft().get()
        while waiting:
            yield from waiting.popleft().get()
