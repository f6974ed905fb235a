"""Files: written atomically, locked, linked, hashed; and user code and tensors read from them."""

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import xxhash

from preference_training.core.errors import UserError, first_line

# The suffix of a file that is not complete yet.
PARTIAL = ".partial"


# ---- atomic writing -------------------------------------------------------------------------------------------------------


@contextmanager
def partial_path(path: Path, concurrent: bool = False) -> Iterator[Path]:
    """A temporary path next to `path`, where a file is written before it is renamed; removed after the block.

    concurrent: other processes may write the same file at the same time, each under a temporary name of its own.
    """
    own = f".{os.getpid()}" if concurrent else ""
    partial = path.with_name(f"{path.name}{own}{PARTIAL}")
    try:
        yield partial
    finally:
        # The error from inside the block is to be raised, not one from here.
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: Path, concurrent: bool = False) -> Iterator[Path]:
    """As `partial_path`; at the end the file replaces `path`: a reader finds the old file or the new one."""
    with partial_path(path, concurrent) as partial:
        yield partial
        os.replace(partial, path)


@contextmanager
def atomic_file(path: Path, mode: str = "w", durable: bool = False, concurrent: bool = False, **options) -> Iterator[IO]:
    """As `atomic_path`, opened in a mode with the options of `open`. durable: on the disk before it takes its place."""
    with atomic_path(path, concurrent) as partial, partial.open(mode, **options) as file:
        yield file
        if durable:
            sync(file)


def write_atomically(path: Path, content: str | bytes, concurrent: bool = False) -> None:
    """Write a file atomically, text as UTF-8. Half a surrogate pair, which JSON may hold, becomes a question mark."""
    if isinstance(content, str):
        content = content.encode(errors="replace")
    with atomic_file(path, "wb", concurrent=concurrent) as file:
        file.write(content)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A temporary empty directory, renamed to `path` at the end; removed if anything goes wrong."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        # A killed process may have left one.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(file: IO) -> None:
    """Flush what was written to an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Flush the entries of a directory to the disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_symlink(link: Path, target: str) -> None:
    """Point `link` at `target` in one step: a reader sees the old target or the new one, never neither."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)


# ---- locks ----------------------------------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path, waiting: str) -> Iterator[None]:
    """Inside, this process holds the lock at `path`; prints `waiting` where another has it, and waits."""
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


def is_locked(path: Path) -> bool:
    """Whether a process on this machine holds the lock at `path`. False where that cannot be known; creates no file."""
    from filelock import FileLock, Timeout

    if not path.is_file():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False


# ---- reading ----------------------------------------------------------------------------------------------------------------


def run_file(path: Path, kind: str):
    """Run a user's Python file, and return its module. `kind` is what it is run for: a file may be run for two things.

    Raises whatever the file raises.
    """
    import hashlib
    import importlib.util

    # A unique name, so that a file called utils.py hides no module; dataclasses look their module up in sys.modules.
    spec = importlib.util.spec_from_file_location(f"user_{kind}_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_tensors(path: Path, mapped: bool = False):
    """The tensors and plain values of a `.pt` file; nothing else is ever unpickled. Raises ValueError with the reason.

    mapped: leave tensors in the file until they are used.
    """
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch.load raises half a dozen types for a damaged file
        raise ValueError(first_line(error)) from error


def hash_file(path: Path) -> str:
    """Hash of a file's bytes: 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def first_existing(folders: str | Iterable[str]) -> Path:
    """The first of `folders` (one or several) that exists, else the last one; absolute, not created."""
    paths = [Path(folder).expanduser().absolute() for folder in ([folders] if isinstance(folders, str) else folders)]
    return next((path for path in paths if path.is_dir()), paths[-1])


def check_destination(path: Path) -> None:
    """Raise UserError where a directory cannot be created, or holds files already."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UserError(f"--to: {path} is not a directory. Expected a new directory, or an empty one.")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"--to: {path} is not empty. Expected a new directory, or an empty one.")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--to: {path.absolute().parent} does not exist. Create it first.")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"--to: cannot write {path}: its folder is read-only for this user. Expected a writable folder.")
