"""Starting the dashboards of a run, which can never end it.

A dashboard may fail, be unreachable or run out of disk: that is printed in one line, and the run continues without it.
A new one is a subclass of Dashboard in DASHBOARDS, with its name among those that `tracking` may have.
"""

from collections.abc import Callable
from functools import partial

from preference_training.tracking.dashboards.base import Dashboard, RunStart
from preference_training.tracking.dashboards.mlflow_runs import MLflowDashboard
from preference_training.tracking.dashboards.tensorboard_files import TensorBoardDashboard
from preference_training.tracking.dashboards.trackio_runs import TrackioDashboard
from preference_training.tracking.dashboards.wandb_runs import WandbDashboard, without_key

# By the names that `tracking` has for them.
DASHBOARDS: dict[str, type[Dashboard]] = {
    "wandb": WandbDashboard,
    "tensorboard": TensorBoardDashboard,
    "trackio": TrackioDashboard,
    "mlflow": MLflowDashboard,
}


class Guarded:
    """A dashboard that can never end a run: its first failure is printed in one line, later calls do nothing."""

    def __init__(self, name: str, dashboard: Dashboard):
        self.name = name
        self.dashboard: Dashboard | None = dashboard

    def __getattr__(self, name: str) -> Callable[..., None]:
        return partial(self._call, name)

    def _call(self, name: str, *arguments) -> None:
        """Call a method of the dashboard, as long as none has failed."""
        if self.dashboard is None:
            return
        try:
            getattr(self.dashboard, name)(*arguments)
        except Exception as error:  # whatever it raises, the run continues
            print(f"{self.name}: switched off for the rest of this run: {without_key(error)}", flush=True)
            self.dashboard = None


def start_dashboards(names: list[str], start: RunStart) -> list[Guarded]:
    """Those of `names` that can be started; prints why of the others."""
    started = []
    for name in names:
        try:
            started.append(Guarded(name, DASHBOARDS[name](start)))
        except ModuleNotFoundError as error:
            print(f"{name}: not used: {without_key(error)}. pip install -r {_requirements(name)}", flush=True)
        except Exception as error:  # no room, or incompatible libraries: the run continues
            print(f"{name}: not used: {without_key(error)}", flush=True)
    return started


def _requirements(name: str) -> str:
    """The file that installs a dashboard's package."""
    return "requirements.txt" if name == "wandb" else f"requirements/{name}.txt"
