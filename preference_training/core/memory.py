"""This process's memory: garbage collection, what glibc keeps, what tensors take."""

import gc
import sys
from contextlib import contextmanager


@contextmanager
def rare_garbage_collection():
    """Inside, Python looks for cycles of dead objects every few hundred thousand objects, not every few hundred.

    Lists of token ids come and go by the million and hold no cycles: looking for some took a fifth of the preparation of data.
    """
    usual = gc.get_threshold()
    gc.set_threshold(200_000, 20, 20)
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def settle_memory(keep_freed: bool) -> None:
    """Let glibc keep the large blocks it is given back, for the next step asks for the same ones; or have it return all.

    Returned to the system, they would come back as fresh pages, and the faults of touching them took 4% of a CPU step of one
    process, and 40% where weights are gathered. There what is kept falls into pieces, and a process held twice what it needed.
    Elsewhere than on Linux with glibc nothing is changed.
    """
    import ctypes
    import ctypes.util

    mallopt = getattr(ctypes.CDLL(ctypes.util.find_library("c") or None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 2**30 if keep_freed else 2**18)
        mallopt(trim_threshold, 2**31 - 1 if keep_freed else 2**18)


def memory_held(device) -> float:
    """On a GPU the most that tensors have taken of it so far, else what this process takes now. Unit: GiB."""
    import psutil
    import torch

    held = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return held / 2**30


def release_memory() -> None:
    """Give a finished job's memory back, so that the next job of a sweep starts with all of it."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
