"""Resuming a run: which checkpoint, whether it is the same run, and its files as they were at the checkpoint.

resume=auto   the newest usable checkpoint of the experiment, of this run directory or of the newest one of its name
resume=PATH   a run directory's newest usable checkpoint, or a checkpoint
"""

import json
import re
import shutil
from collections.abc import Collection
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from preference_training.checkpointing.checkpoint import (
    Checkpoint,
    DamagedError,
    damaged_state,
    list_checkpoints,
    newest_usable,
)
from preference_training.checkpointing.state import NEWER_STATE_SHAPE, STATE_SHAPE
from preference_training.configuration.composition import newer_defaults
from preference_training.configuration.keys import MAY_CHANGE_ON_RESUME, PATH, at_home, is_within
from preference_training.configuration.rerun import RERUN
from preference_training.configuration.saved import CONFIG
from preference_training.configuration.schema import RunConfig, keys_with
from preference_training.core.errors import UserError
from preference_training.core.files import PARTIAL, replace_symlink, write_atomically
from preference_training.core.metric_names import EXAMPLES
from preference_training.core.values import UNREADABLE, dotted, find_mismatch
from preference_training.modeling.adapters.files import BASE_DIR
from preference_training.modeling.archives import MODEL_CONFIG
from preference_training.tracking.ledger import FOLDER as LEDGER
from preference_training.tracking.ledger import truncate_ledger
from preference_training.tracking.run_files import (
    ABOUT,
    ANSWERS,
    ASIDE,
    BAD_STEPS,
    CHECKPOINT,
    EVENTS,
    FLAGGED,
    HELD_OUT_EXAMPLES,
    JUDGEMENTS,
    LATEST,
    METRICS,
    OF_LABELS,
    PRUNED,
    REPORT,
    RESULTS_FILE,
    SAMPLES,
    TENSORBOARD,
    WANDB,
)

# ---- the checkpoint that `resume` means -----------------------------------------------------------------------------------


def checkpoint_to_resume(
    resume: str | None, run_dir: Path, exp_name: str, said: str = "resume: continuing from"
) -> Checkpoint | None:
    """The checkpoint that `resume` means, None for a new run; printed behind what is `said`. Runs are next to `run_dir`.

    Raises UserError for a path without a usable checkpoint.
    """
    if resume is None:
        return None
    if resume != "auto":
        found = _given(Path(resume))
        print(f"{said} {found.path}", flush=True)
        return found
    for directory in candidate_run_dirs(run_dir, exp_name):
        found = newest_usable(directory, opened=resumable)
        if found is not None:
            print(f"{said} {found.path}", flush=True)
            return found
    print(f"resume: no checkpoint of {exp_name} yet, starting a new run", flush=True)
    return None


def _given(path: Path) -> Checkpoint:
    path = path.resolve()
    try:
        if list_checkpoints(path):
            found = newest_usable(path, opened=resumable)
            if found is None:
                raise DamagedError("none of its checkpoints is intact")
        elif not path.is_dir():
            raise DamagedError("no such directory")
        else:
            found = resumable(path)
            # The name tells how far its run was.
            if path not in list_checkpoints(path.parent):
                raise DamagedError(f"its name is no longer {CHECKPOINT}N")
    except DamagedError as problem:
        raise UserError(f"resume: {path}: {problem}. Expected a run directory or a checkpoint (step-N), or auto.") from None
    return found


def resumable(path: Path) -> Checkpoint:
    """A checkpoint from which a run can resume. Raises DamagedError where its files or its state are not what was written."""
    checkpoint = Checkpoint.verified(path, STATE_SHAPE, optional=NEWER_STATE_SHAPE)
    if not checkpoint.state["random"]:
        raise damaged_state("state.random")
    return checkpoint


def find_run(resume: str | None, run_dir: Path, exp_name: str) -> Checkpoint | None:
    """The newest checkpoint of the run that `resume` means whose state can be read; None for a new run.

    Every process looks, before it has joined the others: at the states of checkpoints, not at their weights.
    """
    given = Path(resume).resolve() if resume not in (None, "auto") else None
    paths = [given] if given and not list_checkpoints(given) else []
    for directory in [given] if given else candidate_run_dirs(run_dir, exp_name) if resume else []:
        paths += list_checkpoints(directory)
    for path in paths:
        with suppress(*UNREADABLE):
            checkpoint = Checkpoint.read(path)
            if find_mismatch(checkpoint.state, STATE_SHAPE, "state") is None:
                return checkpoint
    return None


def candidate_run_dirs(run_dir: Path, exp_name: str) -> list[Path]:
    """Where resume=auto looks for checkpoints, in this order: a run's directory, then those of its name, newest first."""
    moment = re.compile(re.escape(exp_name) + r"_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-\d{6}")
    beside = [path for path in run_dir.parent.glob("*") if moment.fullmatch(path.name)]
    return [run_dir, *sorted(beside, reverse=True)]


# ---- whether it is the same run ------------------------------------------------------------------------------------------


ADVICE = "Start a new run from it with model.archive, or restore the old value."


def check_same_config(checkpoint: Checkpoint, config: dict) -> None:
    """Raise UserError where a configuration is not that of the checkpoint's run, in keys that may not change."""
    before, now = dotted(checkpoint.config), dotted(config)
    # A key that the run did not know yet had its default.
    before = {key: value for key, value in newer_defaults(checkpoint.config).items() if key in now} | before
    # Earlier runs have ~ in paths where it is the home directory now.
    before |= {key: at_home(value) for key, value in before.items() if key in keys_with(PATH)}
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    changed = [key for key in changed if not is_within(key, keys_with(MAY_CHANGE_ON_RESUME))]
    # Another loss has other keys: its name says it all.
    names = [key for key in changed if key in ("loss.name", "trainer.name")]
    changed = [key for key in changed if key in names or f"{key.partition('.')[0]}.name" not in names]
    if changed:
        listed = "; ".join(f"{key}: was {_written(before.get(key))}, is {_written(now.get(key))}" for key in changed)
        raise UserError(f"resume: {checkpoint.path} belongs to a run with another configuration: {listed}. {ADVICE}")


def _written(value: object) -> str:
    """A value as configurations write it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def check_same_run(checkpoint: Checkpoint, about: dict) -> None:
    """Raise UserError where what a run is made of (`about`) differs from what the checkpoint's run was made of."""
    then, path = checkpoint.run, checkpoint.path
    check_same_config(checkpoint, about["config"])
    was, is_now = checkpoint.data_version, about.get("data_version", 1)
    if was != is_now:
        raise UserError(
            f"resume: the data of {path} was prepared by version {was} of the rules, and that of this start by version "
            f"{is_now}, of a newer run whose checkpoints are damaged. Expected resume={path.parent}."
        )
    for key, what in (("data", "datasets: the prepared data are"), ("began_with", "model: the weights that it began with are")):
        if then[key] != about[key]:
            raise UserError(f"resume: {what} not those of the run that {path} belongs to. {ADVICE}")


# ---- the files of a run -----------------------------------------------------------------------------------------------------

RUN_FILES = (
    METRICS, SAMPLES, BAD_STEPS, EVENTS, RESULTS_FILE, ABOUT, FLAGGED, PRUNED, CONFIG, RERUN, REPORT, ANSWERS,
    HELD_OUT_EXAMPLES, JUDGEMENTS, LATEST, LEDGER, TENSORBOARD, WANDB, BASE_DIR, f"{CHECKPOINT}*",
    *OF_LABELS,
)  # fmt: skip


def find_run_files(run_dir: Path, but: Collection[str] = ()) -> list[Path]:
    """The files and directories of a run in its directory; none that are not a run's, nor those of some names."""
    parts = sorted(path for pattern in RUN_FILES for path in run_dir.glob(pattern) if path.name not in but)
    # A directory of that name alone is not a run's.
    return [] if [path.name for path in parts] == [BASE_DIR] else parts


def remove_kept_base(run_dir: Path) -> None:
    """Remove the base model kept by a run that has no checkpoint: it starts over, from its configuration."""
    if (run_dir / BASE_DIR / MODEL_CONFIG).is_file():
        shutil.rmtree(run_dir / BASE_DIR)


def check_set_aside(run_dir: Path, archive: str | None, eval_only: bool) -> None:
    """Raise UserError where a new run cannot set aside the earlier one in its directory."""
    if not find_run_files(run_dir):
        return
    elsewhere = "Name another local_run_dir"
    if eval_only and list_checkpoints(run_dir):
        raise UserError(
            f"local_run_dir: {run_dir} holds a run with checkpoints, and eval_only=true would evaluate the model as "
            f"configured, not it. {elsewhere}, or evaluate the run with resume={run_dir}."
        )
    if archive and Path(archive).resolve().is_relative_to(run_dir.resolve()):
        raise UserError(
            f"local_run_dir: {run_dir} holds the run of model.archive, which a new run there would set aside. {elsewhere}."
        )


def set_aside(run_dir: Path, but: Collection[str] = ()) -> Path | None:
    """Move an earlier run in a directory into a subdirectory of it, and return that; None where there is none.

    but: names of files that stay.
    """
    parts = find_run_files(run_dir, but)
    if not parts:
        return None
    place = run_dir / f"{ASIDE}{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    place.mkdir()
    for part in parts:
        part.rename(place / part.name)
    return place


def make_room(run_dir: Path, config: RunConfig, but: Collection[str] = ()) -> str | None:
    """Set aside an earlier run in the directory of a new one; a notice about it. but: names of files that stay.

    Raises UserError where the earlier run is needed where it is.
    """
    check_set_aside(run_dir, config.model.archive, config.eval_only)
    aside = set_aside(run_dir, but)
    return aside and f"local_run_dir: {run_dir} held an earlier run, which is now in {aside.name}/"


def roll_back(run_dir: Path, checkpoint: Path | None) -> None:
    """Restore a run's files to what they were at a checkpoint: later rows are removed, later checkpoints set aside.

    Without a checkpoint the run starts over: everything there is later.
    """
    examples = int(checkpoint.name.removeprefix(CHECKPOINT)) if checkpoint else -1
    for name in (METRICS, SAMPLES, BAD_STEPS):
        if (run_dir / name).exists():
            _truncate_rows(run_dir / name, examples)
    truncate_ledger(run_dir, examples)
    (run_dir / PRUNED).unlink(missing_ok=True)
    for later in list_checkpoints(run_dir):
        if int(later.name.removeprefix(CHECKPOINT)) > examples:
            aside = later.with_name(f"{later.name}.set-aside")
            shutil.rmtree(aside, ignore_errors=True)
            later.rename(aside)
    for partial in run_dir.glob(f"{CHECKPOINT}*{PARTIAL}"):
        shutil.rmtree(partial, ignore_errors=True)
    # A kill may have come before the link was set, or the link may point at a later checkpoint.
    for link in run_dir.glob(f".{LATEST}.*"):
        link.unlink()
    (run_dir / LATEST).unlink(missing_ok=True)
    if checkpoint:
        replace_symlink(run_dir / LATEST, checkpoint.name)


def _truncate_rows(file: Path, examples: int) -> None:
    kept = []
    # Bytes: a text may hold what Python takes for the end of a line, and half a row may end within a letter.
    for line in file.read_bytes().splitlines():
        try:
            row = json.loads(line)
            is_kept = row.get(EXAMPLES, row.get("examples", 0)) <= examples
        except UNREADABLE:
            # Half a row: the process was killed while it wrote it.
            continue
        if is_kept:
            kept.append(line + b"\n")
    write_atomically(file, b"".join(kept))
