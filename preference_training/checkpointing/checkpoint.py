"""A checkpoint on disk: what it holds, whether it is intact, and reading it.

    RUN/step-<examples>/   weights, configuration and tokenizer in Hugging Face format
        optimizer/         optimizer state by weight name, one file per process
        reference/         weights of a reference that follows the policy, likewise
        state.json         counters, position in the data, random streams and the like
        policy.pt          the weights as one file, at the end of a run
        checksums.json     written last: size and hash of every file
    RUN/LATEST             a link to the newest of them

A checkpoint is written under a temporary name, synced, and renamed when it is complete. Every process writes and reads its own
shards: none holds the whole model. Nothing here unpickles.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from preference_training.checkpointing.snapshot import distinct, tensor_state
from preference_training.checkpointing.state import from_json
from preference_training.core.errors import first_line
from preference_training.core.files import hash_file
from preference_training.core.metric_names import EVAL_LOSS, loss_is_at_beta_used, smaller_is_better
from preference_training.core.process_group import is_distributed
from preference_training.core.values import UNREADABLE, find_mismatch
from preference_training.tracking.run_files import CHECKPOINT, CHECKSUMS, OPTIMIZER_DIR, REFERENCE_DIR, STATE


class DamagedError(Exception):
    """A checkpoint is not what was written; the message says what is wrong."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint's directory and its state.json, parsed once."""

    path: Path
    state: dict

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """A checkpoint whose files are not checked. Raises one of UNREADABLE where its state.json is damaged."""
        return cls(path, from_json((path / STATE).read_text()))

    @classmethod
    def verified(cls, path: Path, shape: dict | None = None, optional: dict | None = None) -> "Checkpoint":
        """A checkpoint whose files are as they were written. Raises DamagedError where they are not.

        shape: what its state must be, in the shapes of `find_mismatch`; optional: that of parts that it may lack.
        """
        if problem := find_damage(path):
            raise DamagedError(problem)
        try:
            found = cls.read(path)
            given = {
                name: each for name, each in (optional or {}).items() if isinstance(found.state, dict) and name in found.state
            }
            part = find_mismatch(found.state, (shape or {}) | given, "state") if shape else None
        except UNREADABLE as error:
            raise damaged_state(first_line(error)) from error
        if part is not None:
            raise damaged_state(part)
        return found

    @property
    def examples(self) -> int:
        """After how many training examples it was written."""
        return self.state["examples"]

    @property
    def run(self) -> dict:
        """What its run is made of: config, data, began_with, wandb_id, versions and the like."""
        return self.state["run"]

    @property
    def config(self) -> dict:
        """The whole configuration of its run."""
        return self.run["config"]

    @property
    def data_version(self) -> int:
        """By which version of the rules its run's data was prepared; the first version did not say."""
        return self.run.get("data_version", 1)

    @property
    def has_master_weights(self) -> bool:
        """Whether the optimizer kept float32 master weights."""
        return self.state.get("master_weights", False)

    def held_out(self, metric: str) -> float | None:
        """A held-out metric; None where it was not evaluated, or to no number that compares with those of today."""
        metrics = self.state["held_out"] or {}
        value = None if metric == EVAL_LOSS and loss_is_at_beta_used(metrics) else metrics.get(metric)
        return value if isinstance(value, int | float) and math.isfinite(value) else None

    def random_streams_for(self, rank: int, num_ranks: int) -> dict:
        """The random streams of a rank; those of rank 0 where there were another number of ranks."""
        streams = self.state["random"]
        return streams[rank if len(streams) == num_ranks else 0]

    def read_weights(self, named_weights: dict[str, Tensor]) -> None:
        """Read weights in place. Of a sharded weight each process reads its own shard; all call it together."""
        _read_tensors(self.path, distinct(named_weights)[0])

    def read_optimizer(self, by_weight: dict[str, dict]) -> None:
        """Read the tensors of an optimizer's state in place, by weight name; each process its own shards."""
        _read_tensors(self.path / OPTIMIZER_DIR, distinct(tensor_state(by_weight))[0])

    def optimizer_state_names(self) -> dict[str, set[str]]:
        """What the optimizer kept of each weight, tensors and numbers, by the weight's name."""
        kept: dict[str, set[str]] = {weight: set(values) for weight, values in self.state["optimizer_numbers"].items()}
        folder = self.path / OPTIMIZER_DIR
        tensors = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata if folder.is_dir() else {}
        for weight, _, name in (tensor.rpartition(".") for tensor in tensors):
            kept.setdefault(weight, set()).add(name)
        return kept

    def read_reference(self, named_weights: dict[str, Tensor]) -> None:
        """Read the weights of a reference that follows the policy in place; each process its own shards."""
        _read_tensors(self.path / REFERENCE_DIR, distinct(named_weights)[0])


def damaged_state(what: str) -> DamagedError:
    """The error for a state.json that is not what a run writes."""
    return DamagedError(f"{STATE} is damaged ({what})")


def _read_tensors(directory: Path, tensors: dict[str, Tensor]) -> None:
    if not tensors:
        # Nothing was written then: plain SGD keeps no state.
        return
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=not is_distributed())


# ---- the checkpoints of a run ---------------------------------------------------------------------------------------------


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The directories of a run's checkpoints, newest first; they may be damaged."""
    found = [path for path in run_dir.glob(f"{CHECKPOINT}*") if path.is_dir() and _examples_in_name(path) is not None]
    return sorted(found, key=_examples_in_name, reverse=True)


def _examples_in_name(path: Path) -> int | None:
    number = path.name.removeprefix(CHECKPOINT)
    return int(number) if number.isdecimal() else None


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files; None where each is as it was written."""
    try:
        listed = json.loads((path / CHECKSUMS).read_text())
        files = {(path / name): (facts["bytes"], facts["xxh3_128"]) for name, facts in listed.items()}
    except UNREADABLE:
        return f"{CHECKSUMS} is missing or damaged"
    # Its names are data, and may not lead out of the checkpoint.
    if STATE not in listed or any(Path(name).is_absolute() or ".." in Path(name).parts for name in listed):
        return f"{CHECKSUMS} is damaged"
    for file, (size, digest) in files.items():
        if not file.is_file():
            return f"{file.relative_to(path)} is missing"
        if file.stat().st_size != size or hash_file(file) != digest:
            return f"{file.relative_to(path)} is not what was written"
    return None


def newest_usable(
    run_dir: Path, log_message: Callable[[str], None] = print, opened: Callable[[Path], Checkpoint] = Checkpoint.verified
) -> Checkpoint | None:
    """The newest checkpoint of a run that `opened` does not find damaged; says why newer ones are skipped."""
    for path in list_checkpoints(run_dir):
        try:
            return opened(path)
        except DamagedError as problem:
            log_message(f"checkpoint: {path} is skipped: {problem}")
    return None


def best_first(paths: list[Path], metric: str) -> list[Path]:
    """The checkpoints that were evaluated, best first: by the smallest loss, or the largest value of another metric."""
    values = {path: _held_out(path, metric) for path in paths}
    known = [path for path, value in values.items() if value is not None]
    return sorted(known, key=lambda path: values[path], reverse=not smaller_is_better(metric))


def _held_out(path: Path, metric: str) -> float | None:
    try:
        return Checkpoint.read(path).held_out(metric)
    except UNREADABLE:
        return None
