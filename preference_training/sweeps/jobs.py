"""The jobs of a sweep: the directory and the state of each.

A job is identified by its configuration, whatever its number. Its job.json records its state, so that the same command
line with the same `sweep_dir` runs what is missing and nothing else: a complete job returns its objective from there, an
interrupted one resumes from its newest checkpoint. Launchers run jobs in this process or in others, on this machine or on
others, so all of this lies in files.

    sweep.json    of a sweep: which start of it this is, and the keys that it sweeps over
    jobs.json     of a sweep: each job's identity and directory
    job.json      of a job: overrides, state, objective or error, how often it was started
"""

import json
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from math import isfinite
from pathlib import Path
from typing import ClassVar

from filelock import FileLock

from preference_training.configuration.composition import newer_defaults
from preference_training.configuration.keys import OUTSIDE_JOB_IDENTITY
from preference_training.configuration.schema import keys_with
from preference_training.core.files import is_locked, locked, write_atomically
from preference_training.core.values import dotted, hash_values
from preference_training.tracking.run_files import JOB, METRICS, json_object

START, JOBS, STOP = "sweep.json", "jobs.json", ".stop"
# States of a job that is not run again.
OVER = ("complete", "pruned")


@dataclass
class Job:
    """A job's directory, and the record in its job.json."""

    directory: Path
    record: dict = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> "Job":
        """The job of a directory as its job.json has it now."""
        return cls(directory, json_object(directory / JOB))

    @property
    def state(self) -> str | None:
        """new, running, complete, pruned, failed, stopped."""
        return self.record.get("state")

    @property
    def overrides(self) -> list[str]:
        """The job's command line."""
        return self.record.get("overrides", [])

    @property
    def result(self) -> float | None:
        """What the sweeper is given for a job that is over: its objective; None where that is no number.

        A pruned run is no better than the worst complete one: its own number is of a run half done, and might be better than
        that of any complete run.
        """
        value = self.record.get("counts_as")
        return value if isinstance(value, int | float) and isfinite(value) else None

    def update(self, **news) -> None:
        """Write something into job.json."""
        self.record |= news
        _write_json(self.directory / JOB, self.record)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process runs this job; waits for the one that does."""
        with locked(self._lock, f"sweep: waiting for the process that runs {self.directory}"):
            yield

    @property
    def is_running(self) -> bool:
        """Whether a process on this machine runs this job."""
        return is_locked(self._lock)

    @property
    def _lock(self) -> Path:
        return self.directory / f".{JOB}.lock"


@dataclass(frozen=True)
class Request:
    """A job as Hydra asks for it, before it is validated.

    directory is the one that Hydra has made, which the job takes unless it has another. overrides are the job's command line,
    values the composed configuration in plain values, references unresolved.
    """

    sweep: Path
    directory: Path
    overrides: list[str]
    values: dict

    @property
    def resumes(self) -> bool:
        """Whether an interrupted job resumes from its newest checkpoint: nothing else is asked for."""
        return self.values.get("resume") is None and not self.values.get("eval_only")


@dataclass(frozen=True)
class SweepDirectory:
    """The directory of a sweep, and the files by which its processes know of each other."""

    path: Path
    # That of the sweep that this process has started, None in a process that only runs jobs.
    started_here: ClassVar["SweepDirectory | None"] = None

    def begin(self, swept: Sequence[str] = ()) -> None:
        """Mark a new start of the sweep, over some keys. Raises OSError where the directory cannot be written."""
        self.path.mkdir(parents=True, exist_ok=True)
        if SweepDirectory.started_here is None:
            (self.path / STOP).unlink(missing_ok=True)
            _write_json(self.path / START, {"start": uuid.uuid4().hex, "swept": list(swept)})
        SweepDirectory.started_here = self

    @property
    def start(self) -> str | None:
        """The id of the newest start of the sweep."""
        return json_object(self.path / START).get("start")

    def own_values(self, overrides: Sequence[str]) -> dict[str, str]:
        """What a job's command line says of the keys that are swept over: key → value."""
        swept = json_object(self.path / START).get("swept", [])
        given = dict(text.lstrip("+").split("=", 1) for text in overrides if "=" in text)
        return {key: given[key] for key in swept if key in given}

    def label(self, directory: Path, overrides: Sequence[str]) -> str:
        """A job's number and what is its own: job 3: loss.beta=0.1."""
        own = " ".join(f"{key}={value}" for key, value in self.own_values(overrides).items())
        return f"job {directory.relative_to(self.path)}" + f": {own}" * bool(own)

    def stop(self) -> None:
        """Have no further job begin."""
        (self.path / STOP).touch()

    @property
    def is_stopped(self) -> bool:
        """Whether no further job is to begin."""
        return (self.path / STOP).exists()

    def jobs(self) -> list[Job]:
        """All jobs of the sweep, of earlier starts too."""
        return [Job.read(self.path / name) for name in json_object(self.path / JOBS).values()]

    def jobs_of_this_start(self) -> list[Job]:
        """The jobs reached by the latest start of the sweep."""
        start = self.start
        return [job for job in self.jobs() if job.record.get("start") == start]

    def claim(self, request: Request) -> Path:
        """The directory of a job: the one it has, or a new one, the requested one where that is nobody else's."""
        given, identity = request.directory, job_identity(request.values)
        with FileLock(self.path / f".{JOBS}.lock"):
            known = json_object(self.path / JOBS)
            if identity in known:
                directory = self.path / known[identity]
            else:
                directory = self._free_directory(given, known)
                _write_json(self.path / JOBS, known | {identity: str(directory.relative_to(self.path))})
            if directory != given:
                with suppress(OSError):
                    # Made by Hydra, and still empty unless it is another job's.
                    given.rmdir()
            directory.mkdir(parents=True, exist_ok=True)
            if not (directory / JOB).exists():
                Job(directory).update(overrides=request.overrides, state="new")
        return directory

    def _free_directory(self, given: Path, known: dict[str, str]) -> Path:
        taken = known.values()
        if str(given.relative_to(self.path)) not in taken and not (given / METRICS).exists():
            return given
        names = (str(number) for number in count(len(known)))
        return next(self.path / name for name in names if name not in taken and not (self.path / name / METRICS).exists())


def job_identity(values: dict) -> str:
    """Hash of all keys of a composed configuration that make a job what it is: 32 hexadecimal digits."""
    usual, flat = newer_defaults(values), dotted(values)
    at_default = {name for name, value in usual.items() if flat.get(name) == value}
    known = _with_identity(values, keys_with(OUTSIDE_JOB_IDENTITY) | at_default)
    known |= {"resume": None} if values.get("resume") == "auto" else {}
    return hash_values(known, default=str)


def _with_identity(values: dict, outside: Collection[str], prefix: str = "") -> dict:
    found = {}
    for name, value in values.items():
        if f"{prefix}{name}" in outside:
            continue
        kept = _with_identity(value, outside, f"{prefix}{name}.") if isinstance(value, dict) else value
        # A section of which nothing is left did not exist in the first version.
        if kept != {} or not value:
            found[name] = kept
    return found


def _write_json(file: Path, values: dict) -> None:
    write_atomically(file, json.dumps(values, indent=1, ensure_ascii=False) + "\n", concurrent=True)
