"""The jobs of a sweep: which directory is whose, which are to be run, which have failed, and what follows the last one.

A job is known by its configuration, whatever its number is. Its job.json says what has become of it, so that the same command
line with the same `sweep_dir` runs what is missing and nothing else: a complete job gives its objective from there, one that
was interrupted goes on from its newest checkpoint. Launchers run jobs in this process or in others, on this machine or on
others, so that all of this lies in files.

Hydra makes the callback at every start, so that nothing heavy is imported before it is needed.

    sweep.json    of a sweep: which start of it this is
    jobs.json     of a sweep: each job's identity and directory
    job.json      of a job: overrides, state, objective or error, how often it was begun
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from math import isfinite
from pathlib import Path
from tempfile import gettempdir

import xxhash
from filelock import FileLock, Timeout
from hydra.experimental.callback import Callback

from preference_training.configuration.keys import OUTSIDE_JOB_IDENTITY
from preference_training.configuration.schema import keys_with
from preference_training.core.errors import UserError, first_line
from preference_training.core.files import locked
from preference_training.core.signals import ENDED_AT_ONCE, SAME_SIGNAL, SIGNALS, STOPPED, StoppedError
from preference_training.losses.registry import evaluation_depends_on_run, training_keys
from preference_training.tracking.run_files import JOB, METRICS, PRUNED, json_object

START, JOBS, STOP = "sweep.json", "jobs.json", ".stop"
# States of a job that is not run again.
OVER = ("complete", "pruned")


# ---- the sweep ----------------------------------------------------------------------------------------------------------


class Sweep(Callback):
    """What goes before a sweep and follows it; Hydra calls it in the process that has the sweep."""

    # The directory of the sweep that this process has begun.
    begun: Path | None = None

    def on_multirun_start(self, config, **_) -> None:
        """Make the directory ready. Ends the process with status 2 where it cannot be, or the search goes the wrong way."""
        # Composed without what is swept over, and not validated.
        folder, sweeper = Path(config.hydra.sweep.dir).absolute(), config.hydra.sweeper
        _check_direction(sweeper.get("direction"), str(config.objective))
        searched = (*map(str, sweeper.get("params") or ()), *_swept(config.hydra.overrides.task))
        for text in _doubts(str(config.objective), str(config.loss.get("name")), searched):
            print(f"warning: {text}", flush=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if Sweep.begun is None:
                (folder / STOP).unlink(missing_ok=True)
                _write_json(folder / START, {"start": uuid.uuid4().hex})
        except OSError as error:
            _refuse(f"sweep_dir: {folder} cannot be written to: {error.strerror}. Expected a folder of yours, with room.")
        # Of processes that the launcher starts, which may have another directory.
        root = str(Path(__file__).parents[2])
        paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *(path for path in paths if path not in ("", root))])
        Sweep.begun = folder
        _pass_signals_on(config.hydra.launcher.get("_target_", ""), folder)

    def on_multirun_end(self, config, **_) -> None:
        """Compare the jobs, into comparison.html and comparison.csv; where that cannot be, it is said."""
        from preference_training.reporting.comparison import write_comparison

        if config.dry_run:
            # Nothing was run.
            return
        folder = Path(config.hydra.sweep.dir)
        try:
            page, _ = write_comparison([folder], folder)
        except UserError as error:
            print(f"comparison: {error}", flush=True)
        else:
            print(f"comparison: {page}", flush=True)


def _refuse(fault: str) -> None:
    # Hydra makes a warning of what a callback raises, and goes on.
    print(fault, file=sys.stderr, flush=True)
    sys.exit(2)


def _check_direction(direction, objective: str) -> None:
    """Refuse a search for the worst run: Optuna's sweeper does not know the objective, and minimizes unless told otherwise."""
    # A name, or a member of Optuna's enumeration; lists are for functions of several values.
    found = getattr(direction, "name", direction)
    if isinstance(found, str):
        from preference_training.checkpointing.checkpoints import smaller_is_better

        wanted = "minimize" if smaller_is_better(objective) else "maximize"
        if found != wanted:
            _refuse(f"hydra.sweeper.direction: found {found}, expected {wanted}: objective is {objective}.")


def _swept(overrides: Iterable[str]) -> list[str]:
    """The keys over which a command line sweeps."""
    given = {text.partition("=")[0]: text.partition("=")[2] for text in overrides}
    return [key for key, value in given.items() if "," in value or "(" in value]


def _doubts(objective: str, loss: str, swept: Iterable[str]) -> list[str]:
    """Why an objective does not compare between the jobs of a sweep over some keys."""
    if objective != "loss/eval":
        return []
    found = []
    keys = sorted({key for key in swept if key.partition(".")[0] == "loss"} - training_keys())
    if keys:
        found.append(
            f"objective=loss/eval does not compare jobs that differ in {', '.join(keys)}, whose losses are of other formulas: "
            "objective=rewards_eval/accuracies does"
        )
    if evaluation_depends_on_run(loss):
        found.append(f"objective=loss/eval of loss={loss} depends on what a run has seen, and does not compare jobs")
    return found


def _pass_signals_on(launcher: str, folder: Path) -> None:
    """Have the signals that stop a run stop the jobs that a launcher has started on this machine, and begin no further one.

    Jobs in this process hear them themselves; those of Slurm go on, whoever waits for them.
    """
    if launcher.endswith(("BasicLauncher", "SlurmLauncher")):
        return
    heard: list[float] = []

    def pass_on(number: int, _frame) -> None:
        import psutil

        now = time.monotonic()
        again = bool(heard) and number == signal.SIGINT and now - heard[0] > SAME_SIGNAL
        heard.append(now)
        (folder / STOP).touch()
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                process.kill() if again else process.send_signal(number)
        if again:
            os._exit(ENDED_AT_ONCE)

    for number in SIGNALS:
        signal.signal(number, pass_on)


def conclude() -> int:
    """Say what has become of the jobs of the sweep that this process has begun; the exit status for it, 0 where all is well.

    1 where a job has failed, 2 where all that went wrong was the user's mistake, 75 where jobs were stopped.
    """
    folder = Sweep.begun
    if folder is None:
        return 0
    jobs = _jobs_of_this_start(folder)
    missing = [job for job in jobs if job.state not in OVER]
    if not missing:
        return 0
    of_all = set.intersection(*(set(job.overrides) for job in jobs))
    lines = [f"sweep: {len(jobs) - len(missing)} of {len(jobs)} jobs are complete"]
    for job in missing:
        own = " ".join(text for text in job.overrides if text not in of_all)
        said = job.said.get("error") or ("its process goes on" if _is_held(job.directory) else "its process has ended")
        lines.append(f"  {job.directory.name}{f' ({own})' * bool(own)}: {job.state}: {said}")
    lines.append(f"The same command line with sweep_dir={folder} runs what is missing.")
    print(*lines, sep="\n", file=sys.stderr, flush=True)
    if (folder / STOP).exists() or any(job.state == "stopped" for job in missing):
        return STOPPED
    return 2 if all(job.said.get("mistake") for job in missing) else 1


def _jobs_of_this_start(folder: Path) -> list["Job"]:
    """The jobs that the newest start of a sweep has come to."""
    start = json_object(folder / START).get("start")
    jobs = [Job(folder / name, json_object(folder / name / JOB)) for name in json_object(folder / JOBS).values()]
    return [job for job in jobs if job.said.get("start") == start]


def run_through(main: Callable[[], object]) -> None:
    """Run `main`, which may be a sweep; behind it `conclude` speaks, and ends the process where something is missing."""
    try:
        _run_past_deaths(main)
    except BaseException as error:
        status = conclude()
        if status and isinstance(error, ValueError) and str(error).startswith("No trials are completed"):
            # Optuna's, who looks for the best of jobs that have all failed.
            sys.exit(status)
        raise
    if status := conclude():
        sys.exit(status)


def _run_past_deaths(main: Callable[[], object]) -> None:
    """Run `main`, and again where a process of joblib's has died, which takes all its others with it.

    A job that has twice been under way then, or once and alone, is taken for the one that kills its process.
    """
    while True:
        try:
            main()
            return
        except BrokenProcessPool as broken:
            in_sweep = Sweep.begun is not None and not (Sweep.begun / STOP).exists()
            under_way = [job for job in _jobs_of_this_start(Sweep.begun) if job.state == "running"] if in_sweep else []
            if not under_way:
                raise
            for job in under_way:
                deaths = job.said.get("deaths", 0) + 1
                news = {"state": "failed", "error": first_line(broken)} if deaths > 1 or len(under_way) == 1 else {}
                job.say(deaths=deaths, **news)
            print("sweep: a process has died; what is missing is begun again", file=sys.stderr, flush=True)
            sys.argv.append(f"sweep_dir={Sweep.begun}")


# ---- a job --------------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """A job's directory, and what its job.json says."""

    directory: Path
    said: dict = field(default_factory=dict)

    @property
    def state(self) -> str | None:
        """new, running, complete, pruned, failed, stopped."""
        return self.said.get("state")

    @property
    def overrides(self) -> list[str]:
        """The job's command line."""
        return self.said.get("overrides", [])

    def say(self, **news) -> None:
        """Note something in job.json."""
        self.said |= news
        _write_json(self.directory / JOB, self.said)

    @property
    def result(self) -> float | None:
        """What the sweeper is given for a job that is over: its objective; None, which is no number, where that is none.

        A run that was pruned is no better than the worst that has come to its end: its own number is of a run half done, and
        might be better than what any whole run has come to.
        """
        value = self.said.get("counts_as")
        return value if isinstance(value, int | float) and isfinite(value) else None


@dataclass(frozen=True)
class Request:
    """A job as Hydra asks for it, before it is validated.

    directory is the one that Hydra has made, which the job takes where no other has it. overrides are the job's command line,
    values the composed configuration in plain values, references unresolved.
    """

    sweep: Path
    directory: Path
    overrides: list[str]
    values: dict

    @property
    def continues(self) -> bool:
        """Whether an interrupted job goes on from its newest checkpoint: nothing else is asked for."""
        return self.values.get("resume") is None and not self.values.get("eval_only")


def run_job(run: Callable, request: Request) -> float | None:
    """Run one job of a sweep, unless it has been; returns its objective, None where it has failed.

    run is called as run(directory, resume=...). Whatever goes wrong stays with this job: it is said and noted. Raises
    StoppedError in the process that has the sweep, where the sweep is to end.
    """
    sweep, directory = request.sweep, claim(request)
    with locked(directory / f".{JOB}.lock", f"sweep: waiting for the process that runs {directory}"):
        job = Job(directory, json_object(directory / JOB))
        start = json_object(sweep / START).get("start")
        if job.state in OVER:
            print(f"sweep: {directory} is {job.state} already", flush=True)
            job.say(start=start)
            return job.result
        if job.state == "failed" and job.said["start"] == start:
            # The sweep goes on behind the death of a process.
            return None
        if (sweep / STOP).exists():
            job.say(start=start, state="stopped", error="not begun, since the sweep was stopped")
            return None
        resume = "auto" if job.state != "new" and request.continues else None
        deaths = job.said.get("deaths", 0) if job.said.get("start") == start else 0
        job.say(start=start, state="running", starts=job.said.get("starts", 0) + 1, deaths=deaths, error=None)
        return _run(partial(run, directory, resume=resume), job, sweep, request.values.get("objective"))


def _run(run: Callable, job: Job, sweep: Path, objective: str) -> float | None:
    in_sweep_process = Sweep.begun is not None
    try:
        with _signals_end_the_job(in_sweep_process):
            value = run()
    except StoppedError as stopped:
        job.say(state="stopped", error=str(stopped))
        if in_sweep_process:
            raise
        if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
            # Slurm's jobs are stopped one by one.
            (sweep / STOP).touch()
        return None
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        job.say(state="failed", error=first_line(error, 500), mistake=True)
        return None
    except Exception as error:
        traceback.print_exc()
        job.say(state="failed", error=f"{type(error).__name__}: {first_line(error)}", mistake=False)
        return None
    pruned = (job.directory / PRUNED).exists()
    gpus = {"gpus": os.environ["CUDA_VISIBLE_DEVICES"].split(",")} if _held else {}
    counts_as = _no_better_than_whole_runs(value, objective, sweep) if pruned else value
    job.say(state="pruned" if pruned else "complete", objective=value, counts_as=counts_as, **gpus)
    return job.result


def _no_better_than_whole_runs(value: float, objective: str, sweep: Path) -> float:
    from preference_training.checkpointing.checkpoints import smaller_is_better

    said = [json_object(sweep / name / JOB) for name in json_object(sweep / JOBS).values()]
    whole = [each["objective"] for each in said if each.get("state") == "complete" and each.get("objective") is not None]
    return (max if smaller_is_better(objective) else min)([value, *whole])


@contextmanager
def _signals_end_the_job(in_sweep_process: bool) -> Iterator[None]:
    """Inside, the signals that stop a run raise StoppedError where the run does not listen itself, as before its first step.

    In the process that has the sweep they do what they always do.
    """

    def end(number: int, _frame) -> None:
        raise StoppedError(f"stopped before its first step or behind its last: {signal.Signals(number).name}")

    # Only a process's main thread may listen.
    listens = not in_sweep_process and threading.current_thread() is threading.main_thread()
    usual = {number: signal.signal(number, end) for number in SIGNALS} if listens else {}
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


# ---- directories --------------------------------------------------------------------------------------------------------


def claim(request: Request) -> Path:
    """The directory of the job: the one it has, or a new one, that which is asked for where it is nobody else's."""
    sweep, given, identity = request.sweep, request.directory, identity_of(request.values)
    with FileLock(sweep / f".{JOBS}.lock"):
        known = json_object(sweep / JOBS)
        if identity in known:
            directory = sweep / known[identity]
        else:
            names = (str(number) for number in count(len(known)))
            free = (sweep / name for name in names if name not in known.values() and not (sweep / name / METRICS).exists())
            taken = str(given.relative_to(sweep)) in known.values() or (given / METRICS).exists()
            directory = next(free) if taken else given
            _write_json(sweep / JOBS, known | {identity: str(directory.relative_to(sweep))})
        if directory != given:
            with suppress(OSError):
                # Made by Hydra, and still empty unless it is another job's.
                given.rmdir()
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / JOB).exists():
            _write_json(directory / JOB, {"overrides": request.overrides, "state": "new"})
    return directory


def identity_of(values: dict) -> str:
    """Hash of all keys of a composed configuration that make a job what it is: 32 hexadecimal digits."""
    known = _with_identity(values) | ({"resume": None} if values.get("resume") == "auto" else {})
    return xxhash.xxh3_128_hexdigest(json.dumps(known, sort_keys=True, default=str).encode())


def _with_identity(values: dict, prefix: str = "") -> dict:
    outside = keys_with(OUTSIDE_JOB_IDENTITY)
    return {
        name: _with_identity(value, f"{prefix}{name}.") if isinstance(value, dict) else value
        for name, value in values.items()
        if f"{prefix}{name}" not in outside
    }


def _is_held(directory: Path) -> bool:
    """Whether a process runs the job."""
    try:
        FileLock(directory / f".{JOB}.lock").acquire(timeout=0).lock.release()
    except Timeout:
        return True
    return False


def _write_json(file: Path, values: dict) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(file)


# ---- GPUs ---------------------------------------------------------------------------------------------------------------

# Locks of the GPUs that this process has taken; the system lets go of them when the process ends, however it ends.
_held: list[FileLock] = []


def visible_gpus() -> list[str]:
    """The GPUs that a process started now would see, by the names that CUDA_VISIBLE_DEVICES has for them."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name.strip() for name in listed.split(",") if name.strip() not in ("", "-1")]
    import torch

    # Asks the driver: it leaves CUDA alone, which may still be told what to see.
    return [str(number) for number in range(torch.cuda.device_count())]


def jobs_at_once(gpus_per_job: int | None) -> int:
    """How many jobs this machine's GPUs can take at the same time; 1 without GPUs."""
    return max(1, len(visible_gpus()) // (gpus_per_job or 1))


def take_gpus(number: int | None, directory: Path | None = None) -> None:
    """Have this process see so many GPUs and no other process of a sweep the same ones; waits until they are free.

    They stay this process's own while it lives, since CUDA does not look again. Nothing is done where number is None, and on a
    machine without GPUs. directory holds the locks. Raises UserError where the machine has fewer.
    """
    if number is None or _held:
        return
    names = visible_gpus()
    if not names:
        return
    if len(names) < number:
        raise UserError(f"gpus_per_job: found {number}, and this machine has {len(names)} GPUs. Lower it.")
    directory = directory or Path(gettempdir()) / f"gpus_of_sweeps_{os.getuid()}"
    directory.mkdir(exist_ok=True)
    taken = _free_gpus(names, number, directory)
    if taken is None:
        print(f"gpus_per_job: waiting for {number} free of {len(names)} GPUs", flush=True)
    while taken is None:
        time.sleep(1)
        taken = _free_gpus(names, number, directory)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(taken)


def _free_gpus(names: list[str], number: int, directory: Path) -> list[str] | None:
    """Take so many GPUs, or none at all."""
    with ExitStack() as taken:
        mine = []
        for name in names:
            lock = FileLock(directory / f"{name.replace('/', '_')}.lock")
            with suppress(Timeout):
                taken.enter_context(lock.acquire(timeout=0))
                mine.append((name, lock))
            if len(mine) == number:
                taken.pop_all()
                _held.extend(lock for _, lock in mine)
                return [name for name, _ in mine]
    return None
