"""Where a run directory lies, and the message where it cannot be written to. Imports no heavy library."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from preference_training.configuration.schema import LONGEST_NAME
from preference_training.core.errors import UserError
from preference_training.core.files import first_existing


def new_run_dir(local_dirs: str | Iterable[str], exp_name: str) -> str:
    """A directory name that no other run has: experiment and moment, below the first of `local_dirs` that exists."""
    moment = datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    # Hydra makes the directory before the configuration is checked; a name that leads elsewhere is refused there.
    name = str(exp_name).replace("/", "_").encode()[:LONGEST_NAME].decode(errors="ignore")
    return str(first_existing(local_dirs) / f"{name}_{moment}")


def check_resume(resume: str | None) -> None:
    """Raise UserError where `resume` names no directory; what is in it is checked with the libraries that read it."""
    if resume not in (None, "auto") and not (path := Path(resume).resolve()).is_dir():
        raise UserError(f"resume: {path}: no such directory. Expected a run directory or a checkpoint (step-N), or auto.")


def remove_empty(run_dir: Path) -> None:
    """Remove the directory that Hydra has made for a run that never started, and its parent if that is empty too."""
    for directory in (run_dir, run_dir.parent):
        # Without a check before: another rank may do the same at this moment. A directory that is not empty stays.
        with suppress(OSError):
            directory.rmdir()


@contextmanager
def writable(run_dir: Path) -> Iterator[None]:
    """Inside, a file that cannot be written is the user's mistake: UserError."""
    try:
        yield
    except TimeoutError:
        # A lock that is held.
        raise
    except OSError as error:
        raise UserError(not_writable_message(run_dir, error)) from None


def not_writable_message(place: Path | str, error: OSError) -> str:
    """The message for a run directory, or a folder above it, that cannot be written to."""
    return (
        f"local_run_dir: {place} cannot be written to: {error.strerror}. Expected a folder of yours, with room; set local_dirs "
        "or local_run_dir."
    )
