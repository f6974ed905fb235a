"""This process's memory: garbage collection, malloc, and how much is in use."""

import gc
import sys
from contextlib import contextmanager


@contextmanager
def infrequent_garbage_collection():
    """Inside, Python collects garbage every few hundred thousand objects, not every few hundred.

    Lists of token ids come and go by the million and hold no cycles: looking for them took a fifth of data preparation.
    """
    usual = gc.get_threshold()
    gc.set_threshold(200_000, 20, 20)
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def tune_malloc(keep_freed: bool) -> None:
    """Have glibc keep large freed blocks, since the next step allocates the same ones; or have it return them all.

    Returned blocks come back as fresh pages, whose page faults took 4% of a CPU step of one process, and 40% where weights are
    gathered. There kept blocks fragment, and a process held twice what it needed. Does nothing without glibc.
    """
    import ctypes
    import ctypes.util

    mallopt = getattr(ctypes.CDLL(ctypes.util.find_library("c") or None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 2**30 if keep_freed else 2**18)
        mallopt(trim_threshold, 2**31 - 1 if keep_freed else 2**18)


def memory_held(device) -> float:
    """On a GPU the peak allocated by tensors so far, else this process's resident memory now. Unit: GiB."""
    import psutil
    import torch

    held = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return held / 2**30


def release_memory() -> None:
    """Free a finished job's memory for the next job of a sweep."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
