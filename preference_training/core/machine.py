"""Settings of this process's libraries, memory and device."""

import gc
import os
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


def quiet_libraries() -> None:
    """Keep the bars and hints of other libraries out of a run's own output."""
    import logging
    import warnings

    import transformers

    # transformers imports torchao where it is installed, which then says what of it this machine cannot use.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # What is said by whoever writes a checkpoint in one process.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    # A second adapter lies beside the first on purpose.
    warnings.filterwarnings("ignore", message="Already found a `peft_config`")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # Its hints are about kernels for other machines and what each layer casts.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # The tokenizers' own threads are done before any worker process starts.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


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


def allow_tf32(allow: bool) -> None:
    """Whether CUDA's float32 products may use TF32."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = allow
    torch.backends.cudnn.allow_tf32 = allow


def pick_device():
    """The `torch.device` that computes: cuda, else mps, else cpu."""
    import torch

    if torch.cuda.is_available():
        # With its number, as tensors say where they are.
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


# Below so many prompts an interval is too uncertain itself to decide anything by.
FEWEST_PROMPTS = 10


def too_few(prompts: int, what: str) -> str | None:
    """What is to be said where `what` is of too few prompts to decide anything by; None where there are enough."""
    if prompts >= FEWEST_PROMPTS:
        return None
    number = "1 prompt" if prompts == 1 else f"{prompts:,.0f} prompts"
    return f"{what}: {number}, too few to decide anything by; expected at least {FEWEST_PROMPTS}"


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
