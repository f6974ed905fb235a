"""The few helpers that code of yours may import: configurations and runs from Python (docs/python.md), and small tools."""

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import train as command_line
from preference_training.configuration.command_line import prepare_arguments
from preference_training.configuration.run_dirs import remove_empty
from preference_training.configuration.schema import RunConfig
from preference_training.configuration.sections import FROM_HALVES
from preference_training.configuration.validation import configured
from preference_training.core.errors import UserError
from preference_training.core.files import load_tensors
from preference_training.core.machine import release_memory
from preference_training.core.random_streams import seed_everything
from preference_training.core.signals import StoppedError
from preference_training.tracking.callbacks import Callback

__all__ = ["Callback", "TrainedRun", "UserError", "compose", "load_tensors", "seed_everything", "train"]


def compose(*overrides: str) -> RunConfig:
    """The configuration of a command line: `compose("model=tiny", "loss=dpo")`. Raises UserError for what cannot work.

    It cannot be changed; `config.changed({"lr": 1e-4})` is a copy with another value.
    """
    return configured(*prepare_arguments(list(overrides)))


@dataclass(frozen=True)
class TrainedRun:
    """What a run has left. metrics: those of its last evaluation and its last step. stopped: why it ended early, if it did.

    findings: what to know first; none of a sound run. `run_dir / "LATEST"` loads with transformers. Of a loop of rounds the
    metrics are of its last policy, `run_dir / "round-K" / "policy"`.
    """

    run_dir: Path
    metrics: dict[str, float]
    findings: list
    stopped: str | None = None

    @classmethod
    def read(cls, run_dir: Path, stopped: str | None = None) -> "TrainedRun":
        """Read a run directory."""
        from preference_training.reporting.findings import ended_early, findings
        from preference_training.reporting.run_record import RunRecord

        run = RunRecord.read(run_dir)
        last_step = run.steps[-1] if run.steps else {}
        return cls(run_dir, last_step | run.last_evaluation, findings(run), stopped or ended_early(run))

    @classmethod
    def of_loop(cls, directory: Path, stopped: str | None = None) -> "TrainedRun":
        """Read the directory of a loop of rounds."""
        from preference_training.reporting.loops.findings import loop_findings
        from preference_training.reporting.loops.record import LoopRecord

        loop = LoopRecord.read(directory)
        return cls(directory, loop.rows[-1] if loop.rows else {}, loop_findings(loop), stopped)

    def history(self) -> list[dict[str, float]]:
        """The rows of metrics.jsonl: of every step and evaluation, in their order; `pandas.DataFrame` takes them."""
        from preference_training.tracking.run_files import METRICS, metric_rows

        return metric_rows(self.run_dir / METRICS)


def train(config: RunConfig, callbacks: Sequence[object] = (), quiet: bool | None = None) -> TrainedRun:
    """Train what a configuration describes, as `python train.py` does.

    callbacks: objects with any of the methods of `Callback`; with several processes they are pickled. quiet: print nothing
    but what callbacks print; None is quiet in notebooks. Raises UserError for a mistake; what a callback raises passes through.
    A loop of rounds trains in processes of its own, and takes no callbacks; halves of the data do so too, before the run.
    """
    from preference_training.checkpointing.resume import checkpoint_to_resume

    run_dir, stopped = Path(config.local_run_dir).absolute(), None
    run_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as opened:
        opened.callback(release_memory)
        opened.callback(remove_empty, run_dir)
        if quiet or (quiet is None and "ipykernel" in sys.modules):
            callbacks = [_Printing(callback, sys.stdout) for callback in callbacks]
            opened.enter_context(redirect_stdout(opened.enter_context(Path(os.devnull).open("w"))))
        if config.rounds is not None:
            return _train_loop(config, run_dir, callbacks)
        if config.data.weights == FROM_HALVES:
            from preference_training.rounds.start import check_not_changed

            check_not_changed(config)
        found = checkpoint_to_resume(config.resume, run_dir, config.exp_name) if config.resume else None
        try:
            command_line.start(config, run_dir, in_sweep=False, callbacks=tuple(callbacks))
        except StoppedError as error:
            stopped = str(error)
    return TrainedRun.read(found.path.parent if found else run_dir, stopped)


def _train_loop(config: RunConfig, run_dir: Path, callbacks: Sequence[object]) -> TrainedRun:
    """Run a loop of rounds. Raises UserError, and StepFailedError where a step has failed for another reason."""
    from preference_training.reporting.loops.page import write_loop_report
    from preference_training.rounds.processes import StepFailedError
    from preference_training.rounds.start import MISTAKE, check_not_changed, find_loop, run_found_loop

    if callbacks:
        raise UserError("callbacks: found some, and a loop of rounds trains in processes of its own. Expected none.")
    check_not_changed(config)
    directory, stopped = find_loop(config, run_dir), None
    try:
        run_found_loop(config, directory, write_loop_report)
    except StoppedError as error:
        stopped = str(error)
    except StepFailedError as failed:
        if failed.status != MISTAKE:
            raise
        raise failed.as_mistake() from failed
    return TrainedRun.of_loop(directory, stopped)


class _Printing:
    """A callback that prints in a quiet run."""

    def __init__(self, callback: object, stdout):
        self.callback, self.stdout = callback, stdout

    def __getattr__(self, name: str):
        return partial(self._call, getattr(self.callback, name))

    def _call(self, method, *arguments):
        with redirect_stdout(self.stdout):
            return method(*arguments)
