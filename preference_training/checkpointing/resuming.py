"""Which checkpoint a run goes on from, and whether it is the same run.

resume=auto   the newest usable checkpoint of the experiment, of this run directory or of the newest one of its name
resume=PATH   a run directory's newest usable checkpoint, or a checkpoint
"""

import json
import re
import shutil
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from torch import Tensor

from preference_training.checkpointing.checkpoints import checkpoints_of, fault_of, newest_usable, read_state
from preference_training.configuration.kept import CONFIG
from preference_training.configuration.keys import MAY_CHANGE_ON_RESUME, is_within
from preference_training.configuration.schema import keys_with
from preference_training.core.errors import UserError, first_line
from preference_training.core.files import replace_symlink
from preference_training.core.values import UNREADABLE, dotted, misfit
from preference_training.losses.registry import losses
from preference_training.modeling.adapters import BASE_DIR
from preference_training.tracking.dashboards import TENSORBOARD
from preference_training.tracking.ledger import FOLDER as LEDGER
from preference_training.tracking.ledger import cut_back_ledger
from preference_training.tracking.run_files import (
    ABOUT,
    ASIDE,
    BAD_STEPS,
    EVENTS,
    FLAGGED,
    METRICS,
    PRUNED,
    REPORT,
    RESULTS_FILE,
    SAMPLES,
)


def checkpoint_to_continue(resume: str | None, run_dir: Path, exp_name: str) -> Path | None:
    """The checkpoint that `resume` means, None for a new run. Runs lie beside `run_dir`.

    Raises UserError for a path that has none that is whole.
    """
    if resume is None:
        return None
    if resume != "auto":
        return _given(Path(resume))
    for folder in runs_of(run_dir, exp_name):
        found = newest_usable(folder, fault_of=fault_of_run)
        if found is not None:
            print(f"resume: going on from {found}", flush=True)
            return found
    print(f"resume: no checkpoint of {exp_name} yet, a new run begins", flush=True)
    return None


def _given(path: Path) -> Path:
    path = path.resolve()
    if checkpoints_of(path):
        found = newest_usable(path, fault_of=fault_of_run)
        fault = "none of its checkpoints is whole"
    else:
        fault = "no such directory" if not path.is_dir() else fault_of_run(path) or fault_of_name(path)
        found = path if fault is None else None
    if found is None:
        raise UserError(f"resume: {path}: {fault}. Expected a run directory or a checkpoint (step-N), or auto.")
    print(f"resume: going on from {found}", flush=True)
    return found


def version_of_data(resume: str | None, run_dir: Path, exp_name: str) -> int | None:
    """The version of the rules by which the data of a run that goes on was prepared; None for a new run.

    Every process looks, before any of them has joined others: at what checkpoints say, and not at their weights.
    """
    given = Path(resume).resolve() if resume not in (None, "auto") else None
    checkpoints = [given] if given and not checkpoints_of(given) else []
    for folder in [given] if given else runs_of(run_dir, exp_name) if resume else []:
        checkpoints += checkpoints_of(folder)
    for checkpoint in checkpoints:
        with suppress(*UNREADABLE):
            state = read_state(checkpoint)
            if misfit(state, STATE, "state") is None:
                # Runs that do not say it are of the first.
                return state["run"].get("data_version", 1)
    return None


def runs_of(run_dir: Path, exp_name: str) -> list[Path]:
    """Where resume=auto looks for checkpoints, in this order: a run's directory, then those of its name, newest first."""
    moment = re.compile(re.escape(exp_name) + r"_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-\d{6}")
    beside = [path for path in run_dir.parent.glob("*") if moment.fullmatch(path.name)]
    return [run_dir, *sorted(beside, reverse=True)]


def fault_of_name(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's name, which says how far its run was."""
    return None if checkpoint in checkpoints_of(checkpoint.parent) else "it is not called step-N any more"


# ---- what a run's state.json holds ------------------------------------------------------------------------------------------


def _count(value) -> bool:
    return type(value) is int and value >= 0


def _number(value) -> bool:
    return type(value) in (int, float)


def _run_id(value) -> bool:
    return type(value) is str and re.fullmatch("[0-9a-f]{32}", value) is not None


# The shapes of `misfit`.
SETTING = (_number, bool, None, [_number])
STREAMS = {
    "python": [_count, [_count], (_number, None)],
    "numpy": [[_count], _count, _count, _number],
    "torch": Tensor,
    "cuda": (Tensor, None),
}
STATE = {
    "examples": _count,
    "updates": _count,
    "bad_steps": _count,
    "evaluated_at": (_count, None),
    "held_out": ({...: _number}, None),
    "best": (_number, None),
    "evaluations_since_best": _count,
    "reference_answers": ([str], None),
    "scheduler": {"last_epoch": _count, "base_lrs": [_number], "lr_lambdas": [None], ...: SETTING},
    "scaler": {...: _number},
    "loss": (
        *(shape for loss in losses().values() if (shape := loss.objective.state_shape()) is not None),
        # Of a loss of the user's.
        {"own": dict},
        {...: None},
    ),
    "train_batches": {
        "position": {"epoch": _count, "examples_in_epoch": _count, "examples": _count},
        # What the run began with stands behind; not in checkpoints of older versions.
        "budget": ([_count, _count], [_count, _count, _count, _count]),
        "ranks": _count,
    },
    "watch": {"newest": {...: [_number]}, "chosen_at_start": (_number, None), "said": [str]},
    # Of each process.
    "random": [STREAMS],
    "optimizer_numbers": {...: {...: (_number, bool, None)}},
    "optimizer_groups": [{"params": [str], "lr": _number, ...: SETTING}],
    "run": {"config": dict, "data": [str], "began_with": (str, None), "wandb_id": _run_id},
}
# Parts that older versions did not write.
NEWER_STATE = {"tokens": _count, "master_weights": bool}


def fault_of_run(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint from which a run is to go on; None where nothing is."""
    fault = fault_of(checkpoint)
    if fault is not None:
        return fault
    try:
        state = read_state(checkpoint)
        newer = {name: shape for name, shape in NEWER_STATE.items() if isinstance(state, dict) and name in state}
        part = misfit(state, STATE | newer, "state") or (None if state["random"] else "state.random")
    except UNREADABLE as error:
        part = first_line(error)
    return part and f"state.json is damaged ({part})"


# ---- is it the same run? ----------------------------------------------------------------------------------------------------


def check_same_run(checkpoint: Path, about: dict) -> None:
    """Raise UserError where what a run is made of (`about`) differs from what the checkpoint's run was made of."""
    then = read_state(checkpoint)["run"]
    before, now = (dotted(run["config"]) for run in (then, about))
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    changed = [key for key in changed if not is_within(key, keys_with(MAY_CHANGE_ON_RESUME))]
    advice = "Start a new run from it with model.archive, or leave it as it was."
    if changed:
        listed = "; ".join(f"{key}: was {before.get(key)!r}, is {now.get(key)!r}" for key in changed)
        raise UserError(f"resume: {checkpoint} belongs to a run that was configured otherwise: {listed}. {advice}")
    was, is_now = (each.get("data_version", 1) for each in (then, about))
    if was != is_now:
        raise UserError(
            f"resume: the data of {checkpoint} was prepared by version {was} of the rules, and that of this start by version "
            f"{is_now}, of a newer run whose checkpoints are damaged. Expected resume={checkpoint.parent}."
        )
    for key, what in (("data", "datasets: the prepared data are"), ("began_with", "model: the weights that it began with are")):
        if then[key] != about[key]:
            raise UserError(f"resume: {what} not those of the run that {checkpoint} belongs to. {advice}")


# ---- what lies in a run's directory ---------------------------------------------------------------------------------------

OF_A_RUN = (
    METRICS, SAMPLES, BAD_STEPS, EVENTS, RESULTS_FILE, ABOUT, FLAGGED, PRUNED, CONFIG, REPORT, "answers.jsonl",
    "judgements.jsonl", "LATEST", LEDGER, TENSORBOARD, "wandb", BASE_DIR, "step-*",
)  # fmt: skip


def parts_of_a_run(run_dir: Path) -> list[Path]:
    """What a run has left in its directory; nothing of what is somebody else's."""
    parts = sorted(path for pattern in OF_A_RUN for path in run_dir.glob(pattern))
    # A folder of that name alone is not a run's.
    return [] if [path.name for path in parts] == [BASE_DIR] else parts


def forget_base(run_dir: Path) -> None:
    """Remove the model under an adapter that a run without a checkpoint has left: it begins anew, from its configuration."""
    if (run_dir / BASE_DIR / "config.json").is_file():
        shutil.rmtree(run_dir / BASE_DIR)


def check_beginning(run_dir: Path, archive: str | None, eval_only: bool) -> None:
    """Raise UserError where a run that begins anew cannot set aside what an earlier one has left in its directory."""
    if not parts_of_a_run(run_dir):
        return
    elsewhere = "Name another local_run_dir"
    if eval_only and checkpoints_of(run_dir):
        raise UserError(
            f"local_run_dir: {run_dir} holds a run with checkpoints, and eval_only=true would evaluate the model as "
            f"configured, not it. {elsewhere}, or evaluate the run with resume={run_dir}."
        )
    if archive and Path(archive).resolve().is_relative_to(run_dir.resolve()):
        raise UserError(
            f"local_run_dir: {run_dir} holds the run of model.archive, which a new run there would set aside. {elsewhere}."
        )


def set_aside(run_dir: Path) -> Path | None:
    """Move what an earlier run has left in a directory into a folder there, whole; returns it, None where there is nothing."""
    parts = parts_of_a_run(run_dir)
    if not parts:
        return None
    place = run_dir / f"{ASIDE}{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    place.mkdir()
    for part in parts:
        part.rename(place / part.name)
    return place


def cut_back(run_dir: Path, checkpoint: Path | None) -> None:
    """Make the run's files as they were when the checkpoint was written: rows and checkpoints behind it are not its own.

    Without a checkpoint the run begins anew, and nothing there is its own. Later checkpoints are set aside, not removed.
    """
    examples = int(checkpoint.name.removeprefix("step-")) if checkpoint else -1
    for name in (METRICS, SAMPLES, BAD_STEPS):
        if (run_dir / name).exists():
            _keep_rows(run_dir / name, examples)
    cut_back_ledger(run_dir, examples)
    (run_dir / PRUNED).unlink(missing_ok=True)
    for later in checkpoints_of(run_dir):
        if int(later.name.removeprefix("step-")) > examples:
            aside = later.with_name(f"{later.name}.set-aside")
            shutil.rmtree(aside, ignore_errors=True)
            later.rename(aside)
    for partial in run_dir.glob("step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
    # A kill may have come before the link was set, and a later checkpoint is gone.
    for link in run_dir.glob(".LATEST.*"):
        link.unlink()
    (run_dir / "LATEST").unlink(missing_ok=True)
    if checkpoint:
        replace_symlink(run_dir / "LATEST", checkpoint.name)


def _keep_rows(file: Path, examples: int) -> None:
    kept = []
    # Bytes: a text may hold what Python takes for the end of a line, and half a row may end within a letter.
    for line in file.read_bytes().splitlines():
        try:
            row = json.loads(line)
            is_kept = row.get("counters/examples", row.get("examples", 0)) <= examples
        except UNREADABLE:
            # Half a row: the process was killed while it wrote it.
            continue
        if is_kept:
            kept.append(line + b"\n")
    partial = file.with_name(f"{file.name}.partial")
    partial.write_bytes(b"".join(kept))
    partial.replace(file)
