"""The process that computes: its device and precision, its memory, what other libraries print in it, and signs of life."""

import gc
import os
import sys
import threading
import time
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


@contextmanager
def said_while_slow(what: str, every: float = 20.0, file=None):
    """Inside, a line says every so many seconds that something is still under way: silence looks like a hang.

    what: the line, before the seconds so far. file: where it goes, by default the standard output.
    """
    began, over = time.monotonic(), threading.Event()

    def tell() -> None:
        while not over.wait(every):
            print(f"{what}: {time.monotonic() - began:.0f} s so far", file=file or sys.stdout, flush=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()


def tune_malloc(keep_freed: bool) -> None:
    """Have glibc keep large freed blocks, since the next step allocates the same ones; or have it return all of them.

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


def allow_tf32(allow: bool) -> None:
    """Set whether CUDA's float32 matrix products may use TF32."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = allow
    torch.backends.cudnn.allow_tf32 = allow


def pick_device():
    """The `torch.device` to compute on: cuda, else mps, else cpu."""
    import torch

    if torch.cuda.is_available():
        # With its index, as tensors have it.
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def quiet_libraries() -> None:
    """Keep the progress bars and hints of other libraries out of a run's output."""
    import logging
    import warnings

    import transformers

    # transformers imports torchao where it is installed, which then logs what this machine cannot use of it.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Of writing a checkpoint in one process.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    # There is a second adapter on purpose.
    warnings.filterwarnings("ignore", message="Already found a `peft_config`")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # Hints about kernels for other machines and each layer's casts.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # The tokenizers' threads have ended before any worker process starts.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
