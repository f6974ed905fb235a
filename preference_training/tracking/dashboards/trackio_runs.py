"""Trackio: runs in a local database, which `trackio show` shows, or on a Space of the Hub."""

import io
from contextlib import redirect_stdout
from pathlib import Path

from preference_training.core.metric_names import EXAMPLES
from preference_training.tracking.dashboards.base import Dashboard, RunEnd, RunStart


class TrackioDashboard(Dashboard):
    """A run of Trackio, in the project of wandb; its steps are examples.

    Trackio reads where it keeps runs (TRACKIO_DIR), and whether at a Space or server (TRACKIO_SPACE_ID, TRACKIO_SERVER_URL).
    """

    def __init__(self, start: RunStart):
        import trackio

        self.trackio, project = trackio, start.config["wandb"]["project"]
        # Names of runs are what it continues them by.
        name = f"{start.config['exp_name']}-{start.run_id[:8]}"
        with redirect_stdout(io.StringIO()):
            self.run = trackio.init(
                project=project,
                name=name,
                config=start.config,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        print(f"trackio: run {name}; `trackio show --project {project}` shows it", flush=True)

    def log(self, row: dict[str, float]) -> None:
        """As Dashboard's."""
        self.run.log(dict(row), step=int(row[EXAMPLES]))

    def log_table(self, name: str, rows: list[dict], examples: int) -> None:
        """As Dashboard's."""
        table = self.trackio.Table(columns=list(rows[0]) if rows else [], data=[list(row.values()) for row in rows])
        self.run.log({name: table}, step=examples)

    def log_page(self, path: Path) -> None:
        """As Dashboard's."""
        self.run.log_artifact(str(path), name=f"report-{self.run.name}", type="report")

    def finish(self, end: RunEnd) -> None:
        """As Dashboard's; it returns when everything is written. Trackio does not keep how a run has ended."""
        with redirect_stdout(io.StringIO()):
            self.run.finish()
