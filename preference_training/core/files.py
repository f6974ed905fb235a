"""Files and locks: waiting for a lock, swapping a link, reading tensors without unpickling anything else."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from preference_training.core.errors import first_line


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


def replace_symlink(link: Path, target: str) -> None:
    """Point `link` at `target` in one step: a reader sees the old target or the new one, never neither."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)
