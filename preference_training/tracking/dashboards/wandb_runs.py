"""wandb: a run at its server, or in files that `wandb sync` uploads."""

import os
from pathlib import Path

from preference_training.core.errors import first_line
from preference_training.core.metric_names import EXAMPLES
from preference_training.core.signals import STOPPED
from preference_training.tracking.dashboards.base import Dashboard, RunEnd, RunStart
from preference_training.tracking.run_files import WANDB

# wandb shows a run by the exit status of its process. One that was stopped fails there until it is resumed, with the status
# that means "try again later". "Preempted" would have a sweep of wandb's own start it a second time.
EXIT_CODES = {RunEnd.FINISHED: 0, RunEnd.STOPPED: STOPPED, RunEnd.FAILED: 1}


class WandbDashboard(Dashboard):
    """A run at wandb, or in its files where it is offline: metrics, tables of samples, and the report as an artifact.

    Offline without a key (WANDB_API_KEY or a netrc entry) or where its server does not answer; WANDB_MODE decides if set.
    """

    def __init__(self, start: RunStart):
        import wandb

        self.wandb = wandb
        asked = os.environ.get("WANDB_MODE")
        mode = asked or ("online" if _key() else "offline")
        if mode == "offline":
            reason = "as WANDB_MODE says" if asked else "as there is no key"
            print(f"wandb: offline, {reason}; files in {start.run_dir / WANDB}, `wandb sync` uploads them.", flush=True)
        arguments = {
            "project": start.config["wandb"]["project"],
            "entity": start.config["wandb"]["entity"],
            "name": start.config["exp_name"],
            "dir": str(start.run_dir),
            "id": start.run_id,
            "resume": "allow",
            "config": start.config,
            "settings": wandb.Settings(init_timeout=30, silent=True),
        }
        try:
            self.run = wandb.init(**arguments, mode=mode)
        except Exception as error:  # no network, a refused key, a server that does not answer
            if mode != "online":
                raise
            print(f"wandb: offline, as its server could not be used: {without_key(error)}", flush=True)
            self.run = wandb.init(**arguments, mode="offline")
        self.run.define_metric("*", step_metric=EXAMPLES)

    def log(self, row: dict[str, float]) -> None:
        """As Dashboard's; the newest value of each metric is the run's summary."""
        self.run.log(row)

    def log_table(self, name: str, rows: list[dict], examples: int) -> None:
        """As Dashboard's."""
        table = self.wandb.Table(columns=list(rows[0]) if rows else [], data=[list(row.values()) for row in rows])
        self.run.log({name: table, EXAMPLES: examples})

    def log_page(self, path: Path) -> None:
        """As Dashboard's."""
        artifact = self.wandb.Artifact(f"report-{self.run.id}", type="report")
        # A copy: the report may be written again before an offline run is uploaded.
        artifact.add_file(str(path))
        self.run.log_artifact(artifact)

    def finish(self, end: RunEnd) -> None:
        """As Dashboard's; online it returns when everything is uploaded."""
        self.run.finish(exit_code=EXIT_CODES[end])


def without_key(error: Exception) -> str:
    """An error's first line without wandb's key, which a refusal may quote."""
    text, key = first_line(error), _key()
    return text.replace(key, "(the key)") if key else text


def _key() -> str | None:
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    import netrc

    try:
        entry = netrc.netrc().authenticators("api.wandb.ai")
    except (OSError, netrc.NetrcParseError):
        return None
    return entry[2] if entry else None
