"""The checkpoint of a run's best evaluation as its result: what LATEST points at, and where policy.pt lies."""

import json
from pathlib import Path

from preference_training.checkpointing.checkpoint import Checkpoint, best_first, list_checkpoints
from preference_training.checkpointing.model_files import write_policy_pt
from preference_training.checkpointing.snapshot import Snapshot
from preference_training.core.files import hash_file, replace_symlink, sync_directory, write_atomically
from preference_training.core.metric_names import smaller_is_better
from preference_training.core.values import UNREADABLE
from preference_training.tracking.run_files import CHECKSUMS, LATEST, POLICY_PT


def best_checkpoint(run_dir: Path, metric: str) -> Checkpoint | None:
    """The best of a run's checkpoints whose weights were evaluated, by a held-out metric; None where there is none."""
    for path in best_first(list_checkpoints(run_dir), metric):
        try:
            checkpoint = Checkpoint.read(path)
        except UNREADABLE:
            continue
        # Between two evaluations a checkpoint has the metrics of the one before it.
        if checkpoint.state["evaluated_at"] == checkpoint.examples:
            return checkpoint
    return None


def point_at_best(run_dir: Path, metric: str) -> str:
    """Point LATEST at the best of a run's checkpoints; returns what was done as a line of text."""
    found = best_checkpoint(run_dir, metric)
    if found is None:
        return "load_best: no checkpoint was evaluated: LATEST stays the last one"
    replace_symlink(run_dir / LATEST, found.path.name)
    sync_directory(run_dir)
    last = list_checkpoints(run_dir)[0]
    # The best value of all evaluations, those without a checkpoint included.
    value, overall = found.held_out(metric), Checkpoint.read(last).state["best"]
    which = "the last checkpoint" if last == found.path else f"{found.path.name}, not of the last one, {last.name}"
    line = f"load_best: LATEST has the weights of {which}: {metric} {value:.4g} is the best of the checkpoints"
    better = overall is not None and (overall < value if smaller_is_better(metric) else overall > value)
    return f"{line}; before training it was better still, {overall:.4g}" if better else line


def add_policy_pt(checkpoint: Path, tied: dict[str, str]) -> None:
    """Write policy.pt into a complete checkpoint, unless it is there. tied: a weight's other name → its name in the files.

    Its checksums list it last: a kill on the way leaves the checkpoint as it was.
    """
    listed = json.loads((checkpoint / CHECKSUMS).read_text())
    if POLICY_PT in listed:
        return
    found = Checkpoint.read(checkpoint)
    write_policy_pt(checkpoint, Snapshot(found.examples, {}, tied, {}, found.state, {}))
    file = checkpoint / POLICY_PT
    listed[POLICY_PT] = {"bytes": file.stat().st_size, "xxh3_128": hash_file(file)}
    write_atomically(checkpoint / CHECKSUMS, json.dumps(listed, indent=1).encode())
