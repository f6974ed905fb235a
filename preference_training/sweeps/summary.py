"""Running a sweep to its end, and reporting the state of its jobs."""

import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool

from preference_training.core.errors import first_line
from preference_training.core.metric_names import EVAL_ACCURACY, EVAL_LOSS, smaller_is_better
from preference_training.core.signals import STOPPED
from preference_training.core.values import aligned
from preference_training.evaluation.phrasing import metric_text
from preference_training.sweeps.jobs import OVER, Job, SweepDirectory
from preference_training.tracking.run_files import METRICS, metric_rows, split_rows

# Metrics of the table of jobs, besides the objective.
SHOWN = (EVAL_LOSS, EVAL_ACCURACY)


def run_to_end(main: Callable[[], object]) -> None:
    """Run `main`, which may be a sweep; then print the jobs that are missing, and exit with the status for them."""
    try:
        _run_despite_deaths(main)
    except BaseException as error:
        status = print_missing_jobs()
        if status and isinstance(error, ValueError) and str(error).startswith("No trials are completed"):
            # Raised by Optuna, which looks for the best of jobs that have all failed.
            sys.exit(status)
        raise
    if status := print_missing_jobs():
        sys.exit(status)


def _run_despite_deaths(main: Callable[[], object]) -> None:
    """Run `main`, and again where one of joblib's processes has died, which ends all its others.

    A job that was running at two deaths, or alone at one, is taken to be the one that kills its process.
    """
    while True:
        try:
            main()
            return
        except BrokenProcessPool as broken:
            sweep = SweepDirectory.started_here
            jobs = sweep.jobs_of_this_start() if sweep is not None and not sweep.is_stopped else []
            running = [job for job in jobs if job.state == "running"]
            if not running:
                raise
            for job in running:
                deaths = job.record.get("deaths", 0) + 1
                failed = {"state": "failed", "error": first_line(broken)} if deaths > 1 or len(running) == 1 else {}
                job.update(deaths=deaths, **failed)
            print("sweep: a process has died; missing jobs are started again", file=sys.stderr, flush=True)
            sys.argv.append(f"sweep_dir={sweep.path}")


def job_table(sweep: SweepDirectory, objective: str, compares: bool = True) -> list[str]:
    """The jobs of the latest start of a sweep as lines, sorted by their objective, the best first and marked.

    compares: whether the objective compares them; without it no job is the best.
    """
    jobs = sorted(sweep.jobs_of_this_start(), key=lambda job: _rank(job, objective))
    if not jobs:
        return []
    own = [sweep.own_values(job.overrides) for job in jobs]
    keys = list(dict.fromkeys(key for values in own for key in values))
    last = [_last_evaluation(job) for job in jobs]
    metrics = [objective, *(name for name in SHOWN if name != objective and any(name in row for row in last))]
    best = next((job for job in jobs if job.state == "complete" and _objective(job) is not None), None) if compares else None
    rows = [["", "job", *keys, *metrics, "state"]]
    for job, values, row in zip(jobs, own, last, strict=True):
        shown = row | ({objective: found} if (found := _objective(job)) is not None else {})
        mark = "best" if job is best and len(jobs) > 1 else ""
        cells = [values.get(key, "") for key in keys] + [metric_text(shown, name) for name in metrics]
        rows.append([mark, job.directory.name, *cells, str(job.state)])
    return aligned(rows)


def _objective(job: Job) -> float | None:
    value = job.record.get("objective")
    return value if isinstance(value, int | float) else None


def _rank(job: Job, objective: str) -> tuple[bool, float]:
    """A sort key: the best objective first, jobs without one last."""
    value = _objective(job)
    return value is None, (value or 0.0) * (1 if smaller_is_better(objective) else -1)


def _last_evaluation(job: Job) -> dict:
    _, evaluations = split_rows(metric_rows(job.directory / METRICS))
    return evaluations[-1] if evaluations else {}


def print_missing_jobs() -> int:
    """Print the state of the jobs of this process's sweep; returns its exit status, 0 where none is missing.

    1 where a job has failed, 2 where only the user's mistakes went wrong, 75 where jobs were stopped.
    """
    sweep = SweepDirectory.started_here
    jobs = sweep.jobs_of_this_start() if sweep is not None else []
    missing = [job for job in jobs if job.state not in OVER]
    if not missing:
        return 0
    lines = [f"sweep: {len(jobs) - len(missing)} of {len(jobs)} jobs are complete"]
    for job in missing:
        own = " ".join(f"{key}={value}" for key, value in sweep.own_values(job.overrides).items())
        fate = job.record.get("error") or ("its process is still running" if job.is_running else "its process has ended")
        lines.append(f"  {job.directory.name}{f' ({own})' * bool(own)}: {job.state}: {fate}")
    lines.append(f"The same command line with sweep_dir={sweep.path} runs what is missing.")
    print(*lines, sep="\n", file=sys.stderr, flush=True)
    if sweep.is_stopped or any(job.state == "stopped" for job in missing):
        return STOPPED
    return 2 if all(job.record.get("mistake") for job in missing) else 1
