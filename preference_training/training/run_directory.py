"""A run's directory: its lock, and its files as they were at the checkpoint that a run resumes from."""

import uuid
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from filelock import FileLock, Timeout

from preference_training.checkpointing.checkpoint import Checkpoint
from preference_training.checkpointing.resume import (
    check_same_run,
    check_set_aside,
    find_run_files,
    make_room,
    remove_kept_base,
    roll_back,
)
from preference_training.configuration.composition import usual_values
from preference_training.configuration.rerun import write_rerun
from preference_training.configuration.run_dirs import writable
from preference_training.configuration.saved import save_config
from preference_training.configuration.schema import RunConfig
from preference_training.configuration.sections import FROM_HALVES
from preference_training.core.errors import UserError
from preference_training.data.rendering.chat_templates import detect_format
from preference_training.distributed.placement import Placement
from preference_training.tracking.dashboards.base import RunStart
from preference_training.tracking.dashboards.starting import start_dashboards
from preference_training.tracking.run_files import LOCK, OF_LABELS
from preference_training.tracking.tracker import Tracker
from preference_training.training.preparation import PreparedRun


def describe_run(prepared: PreparedRun, placement: Placement, checkpoint: Checkpoint | None) -> dict:
    """What a run is made of, in plain values, as its checkpoints store it."""
    config, data = prepared.config.as_dict(), prepared.data
    return {
        "config": config,
        "data": [split.fingerprint for split in data],
        "data_version": data[0].version,
        "usual": usual_values(prepared.config),
        "templates": [entry.template for entry in prepared.entries],
        "began_with": placement.began_with,
        "prompt_format": detect_format(config, data[0].table, placement.tokenizer),
        "wandb_id": checkpoint.run["wandb_id"] if checkpoint else uuid.uuid4().hex,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def prepare_run_dir(config: RunConfig, run_dir: Path, checkpoint: Checkpoint | None) -> str | None:
    """Prepare a directory for a new run: move an earlier run aside, and return a notice about it.

    Raises UserError where the earlier run is needed where it is.
    """
    with writable(run_dir):
        if config.resume:
            if checkpoint is None:
                remove_kept_base(run_dir)
            return None
        # This start has trained on the halves already.
        return make_room(run_dir, config, OF_LABELS if config.data.weights == FROM_HALVES else ())


def open_run_dir(
    config: RunConfig, run_dir: Path, about: dict, checkpoint: Checkpoint | None, total: int | None = None, report=None
):
    """Make a run's directory ready for its files, as they were at the checkpoint; returns its tracker.

    total, report: the number of training examples, and what writes the run's page; None where there is none. Raises UserError
    where the checkpoint is another run's.
    """
    seen = checkpoint.examples if checkpoint else 0
    with writable(run_dir):
        if checkpoint:
            check_same_run(checkpoint, about)
        if config.resume:
            roll_back(run_dir, checkpoint.path if checkpoint else None)
        save_config(config, run_dir)
        write_rerun(config, run_dir)
        start = RunStart(about["config"], run_dir, about["wandb_id"], seen)
        dashboards = start_dashboards(config.dashboard_names, start)
        return Tracker(run_dir, total, config.minimum_log_interval_secs, dashboards, report, seen)


def report_earlier_run(config: RunConfig, run_dir: Path) -> None:
    """For a dry run: print what would happen to an earlier run in the directory. Raises UserError if it could not be moved."""
    if config.resume or not find_run_files(run_dir):
        return
    check_set_aside(run_dir, config.model.archive, config.eval_only)
    print(f"local_run_dir: {run_dir} holds an earlier run, which a new run would set aside; resume={run_dir} continues it")


@contextmanager
def lock_run_dir(run_dir: Path):
    """Inside, no other run may use the directory. Raises UserError where one does, or where nothing can be written."""
    lock = FileLock(run_dir / LOCK, timeout=0)
    try:
        with writable(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            lock.acquire()
    except Timeout:
        raise UserError(f"local_run_dir: {run_dir} is in use by another run. Wait for it, stop it, or name another.") from None
    try:
        yield
    finally:
        # Before it is released: a run that starts now finds no lock, or one that is held.
        (run_dir / LOCK).unlink(missing_ok=True)
        lock.release()
