"""What Hydra calls before a sweep and after it.

Hydra makes the callback at every start, so nothing heavy is imported before it is needed.
"""

import os
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import OmegaConf

from preference_training.configuration.command_line import refuse
from preference_training.configuration.composition import parsed_override
from preference_training.configuration.sections import FROM_HALVES
from preference_training.core.errors import UserError
from preference_training.core.metric_names import EVAL_ACCURACY, EVAL_LOSS, HELD_OUT_REWARD, ROUNDS, smaller_is_better
from preference_training.core.signals import ENDED_AT_ONCE, SAME_SIGNAL, SIGNALS
from preference_training.losses.registry import evaluation_depends_on_run, training_keys
from preference_training.sweeps.jobs import SweepDirectory


class Sweep(Callback):
    """The start and the end of a sweep, in the process that has started it."""

    def on_multirun_start(self, config, **_) -> None:
        """Prepare the directory. Exits with status 2 for what no job could do."""
        # Composed without what is swept over, and not validated.
        sweep, sweeper = SweepDirectory(Path(config.hydra.sweep.dir).absolute()), config.hydra.sweeper
        _check_direction(sweeper.get("direction"), str(config.objective))
        _check_halves(config)
        _check_jobs(config)
        for text in _warnings(config):
            print(f"warning: {text}", flush=True)
        try:
            sweep.begin(_searched(config))
        except OSError as error:
            _refuse(f"sweep_dir: {sweep.path} cannot be written to: {error.strerror}. Expected a folder of yours, with room.")
        # For processes that the launcher starts, which may have another working directory.
        root = str(Path(__file__).parents[2])
        paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *(path for path in paths if path not in ("", root))])
        _forward_signals(config.hydra.launcher.get("_target_", ""), sweep)

    def on_multirun_end(self, config, **_) -> None:
        """Compare the jobs, in a table, comparison.html and comparison.csv; prints why where that fails."""
        from preference_training.reporting.comparison import write_comparison
        from preference_training.sweeps.summary import job_table

        if config.dry_run:
            # Nothing was run.
            return
        directory = Path(config.hydra.sweep.dir)
        warnings = _warnings(config)
        print(*job_table(SweepDirectory(directory.absolute()), str(config.objective), compares=not warnings), sep="\n")
        print(*(f"warning: {text}" for text in warnings), sep="\n", end="\n" * bool(warnings), flush=True)
        try:
            page, _ = write_comparison([directory], directory)
        except UserError as error:
            print(f"comparison: {error}", flush=True)
        else:
            print(f"comparison: {page}", flush=True)


def _searched(config) -> list[str]:
    """The keys that a sweep varies: in its command line, and in its sweeper's own configuration."""
    params, overrides = _given(config)
    return [*params, *_swept(overrides)]


def _given(config) -> tuple[dict[str, str], list[str]]:
    """What a sweep's own configuration has it go through, key → values, and its command line.

    References in them are not resolved: they may be to a job's own values.
    """
    found = OmegaConf.to_container(config.hydra, resolve=False)
    return {str(key): values for key, values in (found["sweeper"].get("params") or {}).items()}, found["overrides"]["task"]


def _warnings(config) -> list[str]:
    parts = OmegaConf.to_container(config.loss).get("parts")
    if config.get("rounds") is not None:
        return loop_warnings(str(config.objective))
    return comparison_warnings(str(config.objective), str(config.loss.get("name")), _searched(config), parts)


def _refuse(problem: str) -> None:
    # Hydra turns an exception of a callback into a warning, and continues.
    sys.exit(refuse(problem))


def _check_direction(direction, objective: str) -> None:
    """Refuse a search for the worst run: Optuna's sweeper does not know the objective, and minimizes unless told otherwise."""
    # A name, or a member of Optuna's enumeration; lists are for several objectives.
    found = getattr(direction, "name", direction)
    if isinstance(found, str):
        required = "minimize" if smaller_is_better(objective) else "maximize"
        if found != required:
            _refuse(f"hydra.sweeper.direction: found {found}, expected {required}: objective is {objective}.")


def _check_halves(config) -> None:
    """Refuse once what each job would refuse: runs on halves of the data in a sweep."""
    if config.data.weights != FROM_HALVES:
        return
    from preference_training.cleaning.halves import check_start

    try:
        check_start(in_sweep=True)
    except UserError as error:
        _refuse(str(error))


def _check_jobs(config) -> None:
    """Refuse a sweep of which a job would be refused, before its first job."""
    from preference_training.sweeps.checks import mistakes

    params, overrides = _given(config)
    if found := mistakes(config, [*(f"{key}={values}" for key, values in params.items()), *overrides]):
        _refuse("\n".join(found))


def _swept(overrides: Iterable[str]) -> list[str]:
    """The keys over which a command line sweeps."""
    found = [override for text in overrides if (override := parsed_override(text)) and override.is_sweep_override()]
    # choice(VALUE) is how a key is given that only some choices of a swept group have.
    several = [each for each in found if not (each.is_choice_sweep() and len(each.value().list) == 1)]
    return list(dict.fromkeys(each.key_or_group for each in several))


def comparison_warnings(objective: str, loss: str, swept: Iterable[str], parts: object = None) -> list[str]:
    """Why an objective does not compare between the jobs of a sweep over some keys. parts: of a mix."""
    if objective != EVAL_LOSS:
        return []
    found = []
    keys = sorted({key for key in swept if key.partition(".")[0] == "loss"} - training_keys())
    if keys:
        change = "changes" if len(keys) == 1 else "change"
        found.append(
            f"objective={EVAL_LOSS} cannot compare these jobs: {', '.join(keys)} {change} what the loss measures; "
            f"objective={EVAL_ACCURACY} can"
        )
    if evaluation_depends_on_run(loss, parts):
        found.append(f"objective={EVAL_LOSS} of loss={loss} depends on what a run has seen, and does not compare jobs")
    return found


def loop_warnings(objective: str) -> list[str]:
    """Why an objective does not compare loops of rounds."""
    if objective.startswith(ROUNDS):
        return []
    return [
        f"objective={objective} cannot compare loops of rounds: it is of their last trainings, each on pairs of its own; "
        f"objective={HELD_OUT_REWARD} can"
    ]


def _forward_signals(launcher: str, sweep: SweepDirectory) -> None:
    """Forward the signals that stop a run to the jobs that a launcher has started on this machine, and start no further one.

    Jobs in this process handle them themselves; those of Slurm continue, whoever waits for them.
    """
    if launcher.endswith(("BasicLauncher", "SlurmLauncher")):
        return
    received: list[float] = []

    def forward(number: int, _frame) -> None:
        import psutil

        now = time.monotonic()
        again = bool(received) and number == signal.SIGINT and now - received[0] > SAME_SIGNAL
        received.append(now)
        sweep.stop()
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                process.kill() if again else process.send_signal(number)
        if again:
            os._exit(ENDED_AT_ONCE)

    for number in SIGNALS:
        signal.signal(number, forward)
