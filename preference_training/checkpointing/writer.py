"""Writing checkpoints: under a temporary name, renamed when complete, in the background if asked to."""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter

from preference_training.checkpointing.best import add_policy_pt, point_at_best
from preference_training.checkpointing.checkpoint import best_first, list_checkpoints
from preference_training.checkpointing.model_files import (
    file_numbers,
    save_configuration,
    save_tokenizer,
    write_policy_pt,
    write_scalars,
)
from preference_training.checkpointing.snapshot import Snapshot, distinct
from preference_training.checkpointing.state import to_json
from preference_training.core.errors import UserError
from preference_training.core.files import PARTIAL, hash_file, replace_symlink, sync, sync_directory
from preference_training.core.metric_names import EVAL_LOSS
from preference_training.core.process_group import SINGLE_PROCESS, Ranks, is_distributed
from preference_training.modeling.adapters.files import WEIGHTS_FILE, save_adapter_config
from preference_training.modeling.adapters.weights import has_adapter, weights_to_save
from preference_training.modeling.archives import SAFETENSORS_INDEX, WHOLE_WEIGHTS
from preference_training.tracking.run_files import CHECKPOINT, CHECKSUMS, LATEST, OPTIMIZER_DIR, REFERENCE_DIR, STATE


@dataclass(frozen=True)
class SaveOptions:
    """How checkpoints are written, and which are kept.

    run: what the run is made of, as each checkpoint says. background: training continues while one is written. keep_last,
    keep_best: how many are kept, the best by the held-out `metric`; None for no limit. timeout_minutes: how long a process
    waits for the others. end_tokens: what training ended responses with, besides the tokenizer's end-of-sequence token.
    """

    run: dict = field(default_factory=dict)
    background: bool = False
    keep_last: int | None = None
    keep_best: int | None = None
    metric: str = EVAL_LOSS
    timeout_minutes: float | None = None
    end_tokens: tuple[int, ...] = ()


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time. Use as a context manager; all ranks make one and write together.

    A failure (a full disk) costs that checkpoint and is logged; `failed` is true while it was the newest one. `check`, where
    set, is called with the next complete directory before it becomes a checkpoint, and raises what stops the run; `checked`
    tells on rank 0 whether that has happened. `completed` on rank 0: checkpoints that nobody has taken note of yet.
    """

    def __init__(
        self,
        run_dir: Path,
        policy: nn.Module,
        tokenizer,
        ranks: Ranks = SINGLE_PROCESS,
        options: SaveOptions | None = None,
        log_message: Callable[[str], None] = print,
    ):
        self.run_dir, self.policy, self.tokenizer, self.ranks, self.log_message = run_dir, policy, tokenizer, ranks, log_message
        self.options = options or SaveOptions()
        self.check: Callable[[Path], None] | None = None
        self.checked = False
        # A group of its own: training uses its group at the same time.
        minutes = self.options.timeout_minutes
        timeout = timedelta(minutes=minutes) if minutes else None
        self.group = torch.distributed.new_group(backend="gloo", timeout=timeout) if is_distributed() else None
        self.thread = ThreadPoolExecutor(1) if self.options.background else None
        self.pending_write: Future | None = None
        self.failed = False
        self.completed: list[Path] = []

    def write(self, snapshot: Snapshot, with_policy_pt: bool = False) -> None:
        """Write a checkpoint; in the background this returns when its tensors are copied. Waits for the one before."""
        self.wait()
        needed = snapshot.num_bytes * (1 if self.group is None else 2)
        free = self.ranks.broadcast(shutil.disk_usage(self.run_dir).free)
        if needed > free:
            self._give_up(snapshot, f"needs {needed / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free")
        elif self.thread is None or self.check is not None:
            # The check compares with the model as it is now.
            self._write(snapshot, with_policy_pt)
        else:
            self.pending_write = self.thread.submit(self._write, snapshot.copied(), with_policy_pt)

    def point_at_best(self, with_policy_pt: bool) -> str:
        """On rank 0, point LATEST at the best checkpoint, which may get a policy.pt; returns what was done as a line of text.

        All is written by then.
        """
        said = point_at_best(self.run_dir, self.options.metric)
        if with_policy_pt and not has_adapter(self.policy):
            tied = distinct(weights_to_save(self.policy.state_dict(keep_vars=True)))[1]
            add_policy_pt((self.run_dir / LATEST).resolve(), tied)
        return said

    def wait(self) -> None:
        """Return when nothing is being written any more. Raises what went wrong, unless it was the disk."""
        if self.pending_write is not None:
            self.pending_write.result()
            self.pending_write = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *exception) -> None:
        if self.thread is not None:
            self.thread.shutdown()

    def _write(self, snapshot: Snapshot, with_policy_pt: bool) -> None:
        place = self.run_dir / f"{CHECKPOINT}{snapshot.examples}"
        partial = place.with_name(place.name + PARTIAL)
        try:
            if self.ranks.is_rank_zero:
                shutil.rmtree(partial, ignore_errors=True)
            if self.group is not None:
                # Ranks that are ahead would begin in a directory that is then removed.
                torch.distributed.barrier(group=self.group)
            self._write_tensors(snapshot.weights, partial, consolidate=True)
            for name, tensors in ((OPTIMIZER_DIR, snapshot.optimizer), (REFERENCE_DIR, snapshot.reference)):
                if tensors:
                    self._write_tensors(tensors, partial / name, consolidate=False)
            if self.ranks.is_rank_zero:
                self._complete(snapshot, partial, with_policy_pt)
                self._check(partial)
                publish(partial, place)
                self._remove_old()
                self.log_message(f"checkpoint: {place}")
                self.completed.append(place)
            self.checked |= self.check is not None
            self.failed, self.check = False, None
        except (OSError, CheckpointException) as error:
            if not isinstance(reason := _cause_of(error), OSError):
                raise
            self._give_up(snapshot, str(reason))

    def _write_tensors(self, tensors: dict[str, Tensor], directory: Path, consolidate: bool) -> None:
        """Each process writes its shards; `consolidate` joins them in files that Hugging Face libraries read."""
        sharded = self.group is not None
        # peft reads one file.
        numbers = dict.fromkeys(tensors, 1) if has_adapter(self.policy) else file_numbers(tensors)
        storage = HuggingFaceStorageWriter(
            str(directory), numbers, save_distributed=sharded or not consolidate, enable_consolidation=sharded and consolidate
        )
        dcp.save(tensors, storage_writer=storage, process_group=self.group, no_dist=not sharded)

    def _complete(self, snapshot: Snapshot, partial: Path, with_policy_pt: bool) -> None:
        shutil.rmtree(partial / "sharded", ignore_errors=True)
        if self.group is not None:
            write_scalars(partial, snapshot.weights)
        files = sorted(partial.glob("model-*.safetensors"))
        if len(files) == 1:
            files[0].rename(partial / (WEIGHTS_FILE if has_adapter(self.policy) else WHOLE_WEIGHTS))
            (partial / SAFETENSORS_INDEX).unlink()
        if has_adapter(self.policy):
            save_adapter_config(self.policy, partial)
        save_configuration(self.policy, partial, self.tokenizer, self.options.end_tokens)
        save_tokenizer(self.tokenizer, partial)
        (partial / STATE).write_text(to_json(snapshot.state | {"run": self.options.run}))
        if with_policy_pt and not has_adapter(self.policy):
            write_policy_pt(partial, snapshot)

    def _check(self, partial: Path) -> None:
        if self.check is not None:
            try:
                self.check(partial)
            except UserError:
                shutil.rmtree(partial, ignore_errors=True)
                raise

    def _give_up(self, snapshot: Snapshot, reason: str) -> None:
        self.failed = True
        if self.ranks.is_rank_zero:
            name = f"{CHECKPOINT}{snapshot.examples}"
            shutil.rmtree(self.run_dir / f"{name}{PARTIAL}", ignore_errors=True)
            self.log_message(f"checkpoint: {name} could not be written, the run continues: {reason}")

    def _remove_old(self) -> None:
        keep_last, keep_best = self.options.keep_last, self.options.keep_best
        if keep_last is None and keep_best is None:
            return
        newest_first = list_checkpoints(self.run_dir)
        kept = set(newest_first[: keep_last or 1])
        if keep_best is not None:
            kept |= set(best_first(newest_first, self.options.metric)[:keep_best])
        for path in newest_first:
            if path not in kept:
                # Its checksums first: what a kill leaves of it is no checkpoint.
                (path / CHECKSUMS).unlink(missing_ok=True)
                shutil.rmtree(path, ignore_errors=True)


def publish(partial: Path, place: Path) -> None:
    """Make a complete directory a checkpoint: sync and list its files, rename it, point LATEST at it."""
    listed = {}
    for file in sorted(path for path in partial.rglob("*") if path.is_file()):
        with file.open("rb+") as opened:
            sync(opened)
        listed[str(file.relative_to(partial))] = {"bytes": file.stat().st_size, "xxh3_128": hash_file(file)}
    with (partial / CHECKSUMS).open("w") as file:
        json.dump(listed, file, indent=1)
        sync(file)
    sync_directory(partial)
    shutil.rmtree(place, ignore_errors=True)
    os.replace(partial, place)
    replace_symlink(place.parent / LATEST, place.name)
    sync_directory(place.parent)


def _cause_of(error: BaseException) -> BaseException:
    """What stopped a write: torch wraps what each process raised, and safetensors what the system said."""
    if isinstance(error, CheckpointException):
        causes = [cause for cause, _ in error.failures.values()]
        return next((cause for cause in causes if isinstance(cause, OSError)), causes[0])
    return error
