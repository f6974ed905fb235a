"""Running one job of a sweep, once however often the sweep is started."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from preference_training.core.errors import UserError, first_line
from preference_training.core.labeled_output import labeled_output
from preference_training.core.metric_names import smaller_is_better
from preference_training.core.signals import SIGNALS, StoppedError
from preference_training.sweeps.gpus import gpus_of_this_process
from preference_training.sweeps.jobs import OVER, Job, Request, SweepDirectory
from preference_training.tracking.run_files import PRUNED


def run_job(run: Callable, request: Request) -> float | None:
    """Run one job of a sweep, unless it is over already; returns its objective, None where it has failed.

    run is called as run(directory, resume=...). Whatever goes wrong stays with this job: it is printed and recorded. Raises
    StoppedError in the process that has started the sweep, where the sweep is to end.
    """
    sweep = SweepDirectory(request.sweep)
    directory = sweep.claim(request)
    with labeled_output(sweep.label(directory, request.overrides)), Job(directory).locked():
        job, start = Job.read(directory), sweep.start
        if job.state in OVER:
            print(f"sweep: {directory} is {job.state} already", flush=True)
            job.update(start=start)
            return job.result
        if job.state == "failed" and job.record["start"] == start:
            # The sweep continues after the death of a process.
            return None
        if sweep.is_stopped:
            job.update(start=start, state="stopped", error="not started, since the sweep was stopped")
            return None
        resume = "auto" if job.state != "new" and request.resumes else None
        deaths = job.record.get("deaths", 0) if job.record.get("start") == start else 0
        job.update(start=start, state="running", starts=job.record.get("starts", 0) + 1, deaths=deaths, error=None)
        return _run(partial(run, directory, resume=resume), job, sweep, request.values.get("objective"))


def _run(run: Callable, job: Job, sweep: SweepDirectory, objective: str) -> float | None:
    in_sweep_process = SweepDirectory.started_here is not None
    try:
        with _signals_end_the_job(in_sweep_process):
            value = run()
    except StoppedError as stopped:
        job.update(state="stopped", error=str(stopped))
        if in_sweep_process:
            raise
        if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
            # Slurm's jobs are stopped one by one.
            sweep.stop()
        return None
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        job.update(state="failed", error=first_line(error, 500), mistake=True)
        return None
    except Exception as error:
        traceback.print_exc()
        job.update(state="failed", error=f"{type(error).__name__}: {first_line(error)}", mistake=False)
        return None
    pruned = (job.directory / PRUNED).exists()
    gpus = {"gpus": found} if (found := gpus_of_this_process()) else {}
    counts_as = _no_better_than_complete_runs(value, objective, sweep) if pruned else value
    job.update(state="pruned" if pruned else "complete", objective=value, counts_as=counts_as, **gpus)
    return job.result


def _no_better_than_complete_runs(value: float, objective: str, sweep: SweepDirectory) -> float:
    complete = [job.record["objective"] for job in sweep.jobs() if job.state == "complete"]
    return (max if smaller_is_better(objective) else min)([value, *(each for each in complete if each is not None)])


@contextmanager
def _signals_end_the_job(in_sweep_process: bool) -> Iterator[None]:
    """Inside, signals raise StoppedError where the run does not handle them itself, as before its first step.

    In the process that has started the sweep they keep their usual effect.
    """

    def end(number: int, _frame) -> None:
        raise StoppedError(f"stopped before its first step or after its last: {signal.Signals(number).name}")

    # Only a process's main thread may handle signals.
    handles = not in_sweep_process and threading.current_thread() is threading.main_thread()
    usual = {number: signal.signal(number, end) for number in SIGNALS} if handles else {}
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
