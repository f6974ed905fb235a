"""Small things that several modules need, and nothing else. Imports no heavy library at the top."""

import gc
import os
import random
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path


class UserError(Exception):
    """A mistake of the user's. `train.py` prints the message without a traceback and exits with status 2."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause that names what `name` may have meant: "did you mean loss.beta?", or the known names if none is near."""
    by_lower = {key.lower(): key for key in sorted(known)}
    close = get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f"did you mean {by_lower[close[0]]}?" if close else f"known are: {', '.join(by_lower.values())}."


def first_line(error: BaseException, length: int = 200) -> str:
    """The first line of what an error says, without what a terminal would obey; its type where it says nothing."""
    if "Weights only load failed" in str(error):
        # torch's own first line says how to unpickle it nevertheless.
        other = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        held = other[1][:length] if other else "something else"
        return f"it holds {held}, and nothing but tensors and plain values is ever unpickled"
    said = str(error).strip().splitlines() or [type(error).__name__]
    visible = "".join(letter for letter in re.sub(r"\x1b\[[0-9;]*m", "", said[0]) if letter.isprintable())
    return visible[:length].rstrip(" .:")


def dotted(values: dict, prefix: str = "") -> dict:
    """A dict of dicts as one, under names such as loss.beta."""
    flat: dict = {}
    for key, value in values.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


@contextmanager
def locked(path: Path, waiting: str) -> Iterator[None]:
    """Inside, no other process holds the lock at `path`; says `waiting` where one does, and waits for it."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(waiting, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


# What reading damaged JSON raises, and looking for something in it.
UNREADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError)


def misfit(value, shape, name: str) -> str | None:
    """The name of the first part of a value that is not of a shape; None where all of it is.

    Shapes: a type, None, or a function that decides; a tuple of shapes, any of which will do; {name: shape}, at least these
    names, and with {...: shape} all others; [shape], a list of such; [shape, shape], a list of just these.
    """
    if isinstance(shape, tuple):
        return None if any(misfit(value, each, name) is None for each in shape) else name
    if isinstance(shape, dict | list) and type(value) is not type(shape):
        return name
    if isinstance(shape, dict):
        others = dict.fromkeys(value, shape[...]) if ... in shape else {}
        wanted = others | {key: each for key, each in shape.items() if key is not ...}
        parts = [(value[key], wanted[key], f"{name}.{key}") for key in wanted if key in value]
        missing = [f"{name}.{key}" for key in wanted if key not in value]
    elif isinstance(shape, list):
        shapes = shape * len(value) if len(shape) == 1 else shape
        parts = [(item, each, name) for item, each in zip(value, shapes, strict=False)]
        missing = [] if len(shapes) == len(value) else [name]
    else:
        sound = value is None if shape is None else type(value) is shape if isinstance(shape, type) else shape(value)
        return None if sound else name
    return next((found for found in (*missing, *(misfit(*part) for part in parts)) if found is not None), None)


def run_file(path: Path, kind: str):
    """Run a Python file of the user's, and return its module. `kind` is what is looked for in it: a file may be run for two.

    What the file raises is raised on.
    """
    import hashlib
    import importlib.util

    # A name of its own, so that a file called utils.py hides no module; dataclasses look their module up in sys.modules.
    spec = importlib.util.spec_from_file_location(f"user_{kind}_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_tensors(path: Path, mapped: bool = False):
    """What a `.pt` file holds: tensors and plain values, nothing else is ever unpickled. Raises ValueError, saying why not.

    mapped: leave tensors in the file until they are looked at.
    """
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch.load raises half a dozen types for a file that is not its own
        raise ValueError(first_line(error)) from error


def first_existing(folders: Iterable[str]) -> Path:
    """The first of `folders` that exists, else the last one; absolute, not created."""
    paths = [Path(folder).expanduser().absolute() for folder in folders]
    return next((path for path in paths if path.is_dir()), paths[-1])


def usable_cores() -> int:
    """How many cores this process may run on."""
    # macOS does not say; there it is all of them.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_worker() -> bool:
    """Whether this process is one of several that a launcher has started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def first_to_speak() -> bool:
    """Whether this process is to say what all workers of its machine would: the first of them that asks; always, if alone.

    Not simply the worker numbered 0: torchrun ends the others as soon as one has ended, whether they have spoken or not.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        return os.environ.get("LOCAL_RANK", "0") == "0"
    # Each worker's file is in a folder of its own, and all of these in a folder of this machine's.
    try:
        (Path(error_file).parent.parent / "spoken").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True  # better twice than never
    return True


def in_workers(function: Callable, items: Iterable, chunk: int = 256) -> Iterator:
    """`function` of every item, in their order, computed by as many processes as there are cores; on one core, here.

    function and items are pickled. At most a few chunks per process are under way, so that an endless stream works too.
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


def seed_everything(seed: int) -> None:
    """Seed Python's, torch's and (where it is loaded) numpy's global random streams."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_streams() -> dict:
    """Where the global random streams are, in plain values and uint8 tensors; `restore_random_streams` takes it back."""
    import numpy
    import torch

    _, key, position, has_gauss, gauss = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [key.tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_streams(streams: dict) -> None:
    """Put the global random streams where `random_streams` found them."""
    import numpy
    import torch

    version, words, gauss = streams["python"]
    random.setstate((version, tuple(words), gauss))
    numpy.random.set_state(("MT19937", *streams["numpy"]))
    torch.set_rng_state(streams["torch"])
    if streams["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(streams["cuda"])


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


def with_interval(mean: float, low: float | None, high: float | None) -> str:
    """A mean and its interval, if there is one, three significant digits each."""
    return f"{mean:.3g}" if low is None else f"{mean:.3g} [{low:.3g}, {high:.3g}]"


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


def replace_symlink(link: Path, target: str) -> None:
    """Point `link` at `target` in one step: a reader sees the old target or the new one, never neither."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)
