"""MLflow: a run at a tracking server, or in a database beside the run directory."""

import logging
import os
import time
from pathlib import Path

from preference_training.core.metric_names import EXAMPLES
from preference_training.core.values import dotted
from preference_training.tracking.dashboards.base import Dashboard, RunEnd, RunStart

# What its server takes at once, and of a value at most.
PARAMS_AT_ONCE, LONGEST_VALUE = 100, 6000
# A run that was stopped has not failed: it is killed, and RUNNING again when it is resumed.
STATUSES = {RunEnd.FINISHED: "FINISHED", RunEnd.STOPPED: "KILLED", RunEnd.FAILED: "FAILED"}
# The tag by which a resumed run is found again.
TAG = "preference_training.run_id"


class MLflowDashboard(Dashboard):
    """A run of MLflow, in an experiment of the name of wandb's project; its steps are examples.

    At MLFLOW_TRACKING_URI, or in mlflow/ beside the run directory, with other runs there. Steps after the checkpoint from which
    a run resumes stay there: MLflow cannot take them back.
    """

    def __init__(self, start: RunStart):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        # Its own retries would hold up a run for four minutes before it continues without a server that is gone.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        # It tells of every table of a new database.
        logging.getLogger("mlflow.store.db").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        self.metric, uri, files = Metric, os.environ.get("MLFLOW_TRACKING_URI"), None
        if not uri:
            place = start.run_dir.absolute().parent / "mlflow"
            place.mkdir(exist_ok=True)
            uri, files = f"sqlite:///{place / 'mlflow.db'}", (place / "files").as_uri()
            print(
                f"mlflow: `mlflow ui --backend-store-uri {uri}` shows the run; MLFLOW_TRACKING_URI names a server", flush=True
            )
        self.client = MlflowClient(tracking_uri=uri)
        experiment = self._experiment(start.config["wandb"]["project"], files)
        found = self.client.search_runs([experiment], f"tags.`{TAG}` = '{start.run_id}'", max_results=1)
        if found:
            self.run_id = found[0].info.run_id
            self.client.update_run(self.run_id, status="RUNNING")
            return
        run = self.client.create_run(experiment, run_name=start.config["exp_name"], tags={TAG: start.run_id})
        self.run_id = run.info.run_id
        params = [Param(key, str(value)[:LONGEST_VALUE]) for key, value in dotted(start.config).items()]
        for first in range(0, len(params), PARAMS_AT_ONCE):
            self.client.log_batch(self.run_id, params=params[first : first + PARAMS_AT_ONCE])

    def _experiment(self, name: str, files: str | None) -> str:
        """The id of an experiment, which is created if there is none; its files lie at `files`, None for the server's place."""
        found = self.client.get_experiment_by_name(name)
        return self.client.create_experiment(name, artifact_location=files) if found is None else found.experiment_id

    def log(self, row: dict[str, float]) -> None:
        """As Dashboard's."""
        moment, step = int(time.time() * 1000), int(row[EXAMPLES])
        self.client.log_batch(self.run_id, metrics=[self.metric(name, value, moment, step) for name, value in row.items()])

    def log_table(self, name: str, rows: list[dict], examples: int) -> None:
        """As Dashboard's; a file of JSON that its pages show as a table."""
        table = {"columns": list(rows[0]) if rows else [], "data": [list(row.values()) for row in rows]}
        self.client.log_dict(self.run_id, table, f"{name}/{examples}.json")

    def log_page(self, path: Path) -> None:
        """As Dashboard's."""
        self.client.log_artifact(self.run_id, str(path))

    def finish(self, end: RunEnd) -> None:
        """As Dashboard's."""
        self.client.set_terminated(self.run_id, status=STATUSES[end])
