"""Pruning: ends a run of a sweep early where one of Optuna's pruners finds that other jobs do better.

The pruner reads what the jobs of the sweep have left on disk, so that it judges alike under every sweeper and launcher, on one
machine or many.

    metrics.jsonl and job.json of each job -> a study of Optuna's, in memory -> MedianPruner, ... -> pruned.json
"""

import inspect
import json
import math
import warnings
from pathlib import Path

from preference_training.core.errors import UserError, nearest
from preference_training.core.metric_names import EXAMPLES, smaller_is_better
from preference_training.tracking.run_files import JOB, METRICS, PRUNED, json_object, metric_rows

# How to install Optuna.
SWEEP_REQUIREMENTS = "pip install -r requirements/sweeps.txt"


def build_pruner(name: str, kwargs: dict):
    """Optuna's pruner of a name. Raises UserError where Optuna is missing, or takes no such argument."""
    try:
        import optuna
    except ImportError:
        raise UserError(f"pruner: {name} is Optuna's, which is not installed. {SWEEP_REQUIREMENTS}") from None
    pruner = getattr(optuna.pruners, name)
    known = list(inspect.signature(pruner).parameters)
    for key in kwargs:
        if key not in known:
            raise UserError(f"pruner_kwargs.{key}: {name} takes no such argument; {nearest(key, known)}")
    try:
        return pruner(**kwargs)
    except (TypeError, ValueError) as error:
        raise UserError(f"pruner_kwargs: {name} does not take {kwargs}: {error}") from error


class Pruning:
    """Decides after each evaluation whether a run ends here.

    sweep_dir holds the directories of all jobs, run_dir is this one's. objective is the metric that is compared, at the same
    number of examples, rounded to multiples of eval_every: batches of different sizes do not end at the same example.
    """

    def __init__(self, sweep_dir: Path, run_dir: Path, objective: str, eval_every: int, pruner):
        self.sweep_dir, self.run_dir = sweep_dir, run_dir
        self.objective, self.eval_every, self.pruner = objective, eval_every, pruner

    def verdict(self, examples: int, value: float) -> str | None:
        """Why the run ends after so many examples, at which its objective has this value; None where it continues.

        A pruned run is marked in its directory.
        """
        own = self.values_in(self.run_dir) | {self.step(examples): value}
        if not self._is_behind(own):
            return None
        said = {"examples": examples, "objective": self.objective, "value": value}
        (self.run_dir / PRUNED).write_text(json.dumps(said) + "\n", encoding="utf-8")
        return f"{self.objective} is {value:.4g} after {examples} examples, and {type(self.pruner).__name__} prunes it"

    def _is_behind(self, own: dict[int, float]) -> bool:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        trial, states = optuna.trial.create_trial, optuna.trial.TrialState
        with warnings.catch_warnings():
            # It calls what has not changed since experimental.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(direction="minimize" if smaller_is_better(self.objective) else "maximize")
            for others in self.ended_jobs():
                study.add_trial(trial(state=states.COMPLETE, value=others[max(others)], intermediate_values=others))
            return self.pruner.prune(study, trial(state=states.RUNNING, intermediate_values=own))

    def ended_jobs(self) -> list[dict[int, float]]:
        """Of each other job of the sweep that is complete: its objective by number of examples."""
        found = []
        for file in sorted(self.sweep_dir.glob(f"**/{JOB}")):
            if file.parent != self.run_dir and json_object(file).get("state") == "complete":
                found.append(self.values_in(file.parent))
        return [values for values in found if values]

    def values_in(self, run_dir: Path) -> dict[int, float]:
        """The objective at each evaluation that a run has made."""
        rows = [(row[EXAMPLES], row.get(self.objective)) for row in metric_rows(run_dir / METRICS)]
        return {self.step(at): value for at, value in rows if isinstance(value, int | float) and math.isfinite(value)}

    def step(self, examples: float) -> int:
        """So many examples as a multiple of `eval_every`."""
        return round(examples / self.eval_every) * self.eval_every
