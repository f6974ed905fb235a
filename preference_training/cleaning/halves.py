"""Runs on the two halves of the data, each of which judges the labels of the other: what data.weights=ledger does first.

RUN/halves/half_1.yaml, half_2.yaml    their configurations
RUN/halves/1/, 2/                      their runs, each with margins.jsonl of the half that it has not seen
RUN/label_weights.jsonl, ...           what follows from both

What is done follows from which files there are, so that a start that was stopped goes on.
"""

import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from preference_training.checkpointing.checkpoint import list_checkpoints
from preference_training.checkpointing.resume import candidate_run_dirs, make_room
from preference_training.cleaning.labels import judge_labels
from preference_training.configuration.checks.run import check_weights
from preference_training.configuration.keys import MAY_CHANGE_ON_RESUME, PATH, at_home, is_within
from preference_training.configuration.rerun import keep_presets, rerun_values
from preference_training.configuration.run_dirs import writable
from preference_training.configuration.schema import RunConfig, keys_with
from preference_training.core.errors import UserError
from preference_training.core.files import write_atomically
from preference_training.core.processes import in_worker
from preference_training.losses.registry import example_kind
from preference_training.rounds.processes import StepFailedError, handling, locked_loop, run_step, stop_at_signal
from preference_training.rounds.start import MISTAKE
from preference_training.rounds.training import TRAIN
from preference_training.tracking.run_files import CHECKPOINT, HALF_MARGINS, HALVES, LABEL_WEIGHTS

HEAD = """# A run on one half of the training pairs, which judges the labels of the other. To run it by itself:
#   python train.py --config-name {name} --config-dir {directory}
"""
# Keys of a run that those on its halves do not have.
OF_THE_WHOLE = ("gpus_per_job", "pruner", "data")
# No evaluation but the last, on all pairs of the other half, and nothing that only a reader of the run would look at.
OF_A_HALF = {
    "resume": "auto", "tracking": ["jsonl"], "ledger": False, "sample_during_eval": False, "do_first_eval": False,
    "n_eval_examples": None, "eval_every": 10**9, "early_stopping_patience": None, "keep_last": 1, "keep_best": None,
    "load_best": False, "save_policy_pt": False,
}  # fmt: skip
# Batches between two checkpoints where neither save_every nor eval_every is set.
BATCHES_BETWEEN = 100


def train_halves(config: RunConfig, run_dir: Path, in_sweep: bool = False) -> tuple[RunConfig, Path]:
    """Run what is missing of the halves; the configuration and the directory with which the run on all pairs goes on.

    Exits as a run on a half does that a bug has ended. Raises UserError, and StoppedError.
    """
    check_start(in_sweep)
    check_weights(config, example_kind(config.loss.name))
    directory = find_directory(config, run_dir)
    if directory is None:
        return config, run_dir
    try:
        with locked_loop(directory), handling(stop_at_signal):
            for half in (1, 2):
                command = write_half(config, directory, half)
                if not is_done(directory, half):
                    print(
                        f"data.weights: training on half {half} of the pairs, in {directory / HALVES / str(half)}", flush=True
                    )
                    run_step(command, f"the run on half {half}")
            if not (directory / LABEL_WEIGHTS).is_file():
                with writable(directory):
                    print(*judge_labels(directory), sep="\n", flush=True)
    except StepFailedError as failed:
        if failed.status == MISTAKE:
            raise failed.as_mistake("data.weights") from failed
        sys.exit(failed.told("data.weights"))
    return config.changed({"resume": None, "local_run_dir": str(directory)}), directory


def check_start(in_sweep: bool) -> None:
    """Raise UserError where the runs on halves could not be started."""
    if in_worker():
        raise UserError(
            "data.weights: found ledger, which starts runs of its own, and a launcher has started this process. Run python "
            "train.py by itself, or name the directory of a run with ledger."
        )
    if in_sweep:
        raise UserError(
            "data.weights: found ledger in a sweep, each of whose jobs would train three runs. Train one run with it, and "
            "name its directory in the sweep."
        )


def find_directory(config: RunConfig, run_dir: Path) -> Path | None:
    """The directory in which the halves are trained: the new run's, or one that `resume` means; None where no half is missing.

    An earlier run in the new run's directory is set aside.
    """
    if config.resume is None:
        with writable(run_dir):
            if notice := make_room(run_dir, config):
                print(notice, flush=True)
        return run_dir
    given = [Path(config.resume).resolve()] if config.resume != "auto" else candidate_run_dirs(run_dir, config.exp_name)
    for directory in given:
        if list_checkpoints(directory) or directory.name.startswith(CHECKPOINT):
            # The run on all pairs has begun.
            return None
        if (directory / HALVES).is_dir():
            print(f"resume: continuing the halves of {directory}", flush=True)
            return directory
    return run_dir if config.resume == "auto" else None


def is_done(directory: Path, half: int) -> bool:
    """Whether the run on a half is complete."""
    return (directory / HALVES / str(half) / HALF_MARGINS).is_file()


def half_values(config: RunConfig, directory: Path, half: int) -> dict[str, Any]:
    """The configuration of the run on a half, as the keys of a command line.

    A pair is seen as often as in the run on all pairs: examples and steps are halved where they set its length, and warm-up.
    """
    values = rerun_values(config.origin.overrides)
    values = {key: value for key, value in values.items() if key.partition(".")[0] not in OF_THE_WHOLE}
    values |= OF_A_HALF | {
        "data.half": half,
        "exp_name": f"{config.exp_name}-half-{half}",
        "local_run_dir": str(directory / HALVES / str(half)),
        "save_every": config.save_every or config.eval_every or BATCHES_BETWEEN * config.batch_size,
    }
    if config.n_examples is not None:
        values["n_examples"] = max(config.batch_size, -(-config.n_examples // 2))
    steps = {"n_steps": config.n_steps, "warmup_steps": config.warmup_steps if config.warmup_share is None else None}
    values |= {key: -(-number // 2) for key, number in steps.items() if number is not None}
    return values


def write_half(config: RunConfig, directory: Path, half: int) -> list[str]:
    """Write the configuration of the run on a half; the command that trains it.

    Raises UserError where an earlier start had another one.
    """
    folder, name = directory / HALVES, f"half_{half}"
    file, values = folder / f"{name}.yaml", half_values(config, directory, half)
    if file.is_file():
        check_same(directory, OmegaConf.to_container(OmegaConf.load(file)), values)
    with writable(directory):
        folder.mkdir(parents=True, exist_ok=True)
        keep_presets(config.origin.folder, folder)
        text = OmegaConf.to_yaml(OmegaConf.create(values))
        write_atomically(file, HEAD.format(name=name, directory=folder) + text)
    return [sys.executable, str(TRAIN), "--config-name", name, "--config-dir", str(folder)]


def check_same(directory: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UserError where halves that are continued were started with other values of keys that may not change."""
    # Earlier ones have ~ in paths where it is the home directory now.
    before = before | {key: at_home(value) for key, value in before.items() if key in keys_with(PATH)}
    keys = [key for key in sorted(before.keys() | now.keys()) if not is_within(key, keys_with(MAY_CHANGE_ON_RESUME))]
    if changed := [key for key in keys if before.get(key) != now.get(key)]:
        listed = "; ".join(f"{key}: was {before.get(key)!r}, is {now.get(key)!r}" for key in changed)
        raise UserError(
            f"resume: the halves of {directory} were begun with another configuration: {listed}. Restore it, or start a new "
            "run."
        )
