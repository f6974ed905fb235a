"""A run's directory: its name, its lock, and its files as they were at the checkpoint that a run resumes from."""

import uuid
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from preference_training.configuration.kept import save_config
from preference_training.configuration.schema import LONGEST_NAME, RunConfig
from preference_training.core.errors import UserError
from preference_training.core.files import first_existing
from preference_training.data.entries import read_entries

if TYPE_CHECKING:
    # Imports torch.
    from preference_training.checkpointing.checkpoint import Checkpoint


def remove_empty(run_dir: Path) -> None:
    """Remove the directory that Hydra has made for a run which then never began, and its parent if that is empty too."""
    for directory in (run_dir, run_dir.parent):
        # Not looked at before: another rank may do the same at this moment. What is not empty stays.
        with suppress(OSError):
            directory.rmdir()


def new_run_dir(local_dirs, exp_name: str) -> str:
    """A directory name that no other run has: experiment and moment, below the first of `local_dirs` that exists."""
    moment = datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    # Hydra makes the directory before the configuration is checked; a name that leads elsewhere is refused there.
    name = str(exp_name).replace("/", "_").encode()[:LONGEST_NAME].decode(errors="ignore")
    return str(first_existing(folders_of(local_dirs)) / f"{name}_{moment}")


def folders_of(local_dirs) -> list[str]:
    """`local_dirs` as a list: brackets may be left out for one."""
    return [local_dirs] if isinstance(local_dirs, str) else list(local_dirs)


def describe_run(config: RunConfig, placement, data, checkpoint: "Checkpoint | None") -> dict:
    """What a run is made of, in plain values, as every checkpoint of it says."""
    import torch
    import transformers

    from preference_training.data.chat_templates import detect_format

    return {
        "config": config.as_dict(),
        "data": [split.fingerprint for split in data],
        "data_version": data[0].version,
        "began_with": placement.began_with,
        "prompt_format": detect_format(config.as_dict(), data[0].table, placement.tokenizer),
        "wandb_id": checkpoint.run["wandb_id"] if checkpoint else uuid.uuid4().hex,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def describe_start(config: RunConfig, run_dir: Path, data, total: int | None, device) -> None:
    """Leave in a run's directory what its report says of data, machine and code, as they are at this start."""
    from preference_training.tracking.about import write_about

    names = [entry.name for entry in read_entries(config)]
    reports = {name: zip(names, split.reports, strict=True) for name, split in zip(("train", "held out"), data, strict=True)}
    write_about(run_dir, reports, total, device)


def begin_in(config: RunConfig, run_dir: Path, checkpoint: "Checkpoint | None") -> str | None:
    """Make room for a run that begins in a directory: move an earlier run aside, and return what to say of it.

    Raises UserError where the earlier run is needed where it is.
    """
    from preference_training.checkpointing.resume import check_beginning, forget_base, set_aside

    with writable(run_dir):
        if config.resume:
            if checkpoint is None:
                forget_base(run_dir)
            return None
        check_beginning(run_dir, config.model.archive, config.eval_only)
        aside = set_aside(run_dir)
    return aside and f"local_run_dir: {run_dir} held an earlier run, which is now in {aside.name}/"


def open_run_dir(
    config: RunConfig, run_dir: Path, about: dict, checkpoint: "Checkpoint | None", total: int | None = None, report=None
):
    """Make a run's directory ready for its files, as they were at the checkpoint; returns its tracker.

    total, report: the number of training examples, and what writes the run's page; None where there is none. Raises UserError
    where the checkpoint is another run's.
    """
    from preference_training.checkpointing.resume import check_same_run, cut_back
    from preference_training.tracking.dashboards import RunStart, start_dashboards
    from preference_training.tracking.tracker import Tracker

    seen = checkpoint.examples if checkpoint else 0
    with writable(run_dir):
        if checkpoint:
            check_same_run(checkpoint, about)
        if config.resume:
            cut_back(run_dir, checkpoint.path if checkpoint else None)
        save_config(config, run_dir)
        start = RunStart(about["config"], run_dir, about["wandb_id"], seen)
        dashboards = start_dashboards(config.dashboard_names, start)
        return Tracker(run_dir, total, config.minimum_log_interval_secs, dashboards, report, seen)


def say_what_is_set_aside(config: RunConfig, run_dir: Path) -> None:
    """Of a dry run: print what would become of an earlier run in its directory. Raises UserError where that cannot be."""
    from preference_training.checkpointing.resume import check_beginning, parts_of_a_run

    if config.resume or not parts_of_a_run(run_dir):
        return
    check_beginning(run_dir, config.model.archive, config.eval_only)
    print(f"local_run_dir: {run_dir} holds an earlier run, which a run would set aside in it; resume={run_dir} goes on with it")


@contextmanager
def writable(run_dir: Path):
    """Inside, what the system does not let be written is the user's mistake: UserError."""
    try:
        yield
    except TimeoutError:
        # A lock that is held.
        raise
    except OSError as error:
        raise UserError(unwritable(run_dir, error)) from None


def unwritable(place, error: OSError) -> str:
    """What to say of a run directory, or a folder above it, that the system does not let be written."""
    return (
        f"local_run_dir: {place} cannot be written to: {error.strerror}. Expected a folder of yours, with room; set local_dirs "
        "or local_run_dir."
    )


@contextmanager
def used_by_this_run(run_dir: Path):
    """Inside, no other run may use the directory. Raises UserError where one does, or where nothing can be written."""
    from filelock import FileLock, Timeout

    lock = FileLock(run_dir / ".lock", timeout=0)
    try:
        with writable(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            lock.acquire()
    except Timeout:
        raise UserError(f"local_run_dir: {run_dir} is in use by another run. Wait for it, stop it, or name another.") from None
    try:
        yield
    finally:
        # Before it is released: who comes now finds no lock, or one that is held.
        (run_dir / ".lock").unlink(missing_ok=True)
        lock.release()
