"""Where a run's metrics go besides its own files: wandb and TensorBoard, under the names of metrics.jsonl.

A dashboard may fail, be unreachable or run out of disk: that is printed in one line, and the run continues without it.
A new one is a subclass of Dashboard in DASHBOARDS, with its name among those that `tracking` may have.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from preference_training.configuration.saved import as_yaml
from preference_training.core.errors import first_line
from preference_training.core.metric_names import EXAMPLES
from preference_training.tracking.run_files import TENSORBOARD, WANDB


@dataclass(frozen=True)
class RunStart:
    """What a dashboard needs to know of a run that starts.

    config: the whole configuration, plain. run_id: wandb's name for the run, which is continued if there is one. examples:
    where the run resumes, 0 at its beginning.
    """

    config: dict
    run_dir: Path
    run_id: str
    examples: int = 0


class Dashboard:
    """A place for a run's numbers. Making one starts it; whatever it raises, then or later, is printed and ends no run."""

    def __init__(self, start: RunStart):
        pass

    def log(self, row: dict[str, float]) -> None:
        """Take one row of metrics, counters/examples among them."""
        raise NotImplementedError

    def log_table(self, name: str, rows: list[dict], examples: int) -> None:
        """Take rows of text, all with the same keys, as a table after so many examples."""

    def log_page(self, path: Path) -> None:
        """Take the run's report, a page in one file."""

    def finish(self) -> None:
        """Everything has been logged."""


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
            print(f"{self.name}: switched off for the rest of this run: {_without_key(error)}", flush=True)
            self.dashboard = None


def start_dashboards(names: list[str], start: RunStart) -> list[Guarded]:
    """Those of `names` that can be started; prints why of the others."""
    started = []
    for name in names:
        try:
            started.append(Guarded(name, DASHBOARDS[name](start)))
        except Exception as error:  # no room, or incompatible libraries: the run continues
            print(f"{name}: not used: {_without_key(error)}", flush=True)
    return started


def _without_key(error: Exception) -> str:
    """An error's first line without wandb's key, which a refusal may quote."""
    text, key = first_line(error), _wandb_key()
    return text.replace(key, "(the key)") if key else text


# ---- wandb ------------------------------------------------------------------------------------------------------------------


class WandbDashboard(Dashboard):
    """A run at wandb, or in its files where it is offline: metrics, tables of samples, and the report as an artifact.

    Offline without a key (WANDB_API_KEY or a netrc entry) or where its server does not answer; WANDB_MODE decides if set.
    """

    def __init__(self, start: RunStart):
        import wandb

        self.wandb = wandb
        mode = os.environ.get("WANDB_MODE") or ("online" if _wandb_key() else "offline")
        if mode == "offline":
            print(
                f"wandb: offline, as there is no key; files in {start.run_dir / WANDB}, `wandb sync` uploads them.", flush=True
            )
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
            print(f"wandb: offline, as its server could not be used: {_without_key(error)}", flush=True)
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

    def finish(self) -> None:
        """As Dashboard's; online it returns when everything is uploaded."""
        self.run.finish()


def _wandb_key() -> str | None:
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    import netrc

    try:
        entry = netrc.netrc().authenticators("api.wandb.ai")
    except (OSError, netrc.NetrcParseError):
        return None
    return entry[2] if entry else None


# ---- TensorBoard ------------------------------------------------------------------------------------------------------------


class TensorBoardDashboard(Dashboard):
    """TensorBoard's files in a run directory; its steps are examples.

    Earlier files' steps after the checkpoint from which the run resumes are no longer shown.
    """

    def __init__(self, start: RunStart):
        from torch.utils.tensorboard import SummaryWriter

        purge_step = start.examples + 1 if start.examples else None
        self.writer = SummaryWriter(str(start.run_dir / TENSORBOARD), purge_step=purge_step)
        text = "".join(f"    {line}\n" for line in as_yaml(start.config).splitlines())
        self.writer.add_text("config", text, start.examples)

    def log(self, row: dict[str, float]) -> None:
        """As Dashboard's."""
        for name, value in row.items():
            if name != EXAMPLES:
                self.writer.add_scalar(name, value, int(row[EXAMPLES]))

    def log_table(self, name: str, rows: list[dict], examples: int) -> None:
        """As Dashboard's; one text a row, with what each key holds beneath its name."""
        for number, row in enumerate(rows):
            # Indented, TensorBoard's Markdown shows a text as it is.
            parts = ("\n".join((f"**{key}**", "", *(f"    {line}" for line in str(row[key]).split("\n")))) for key in row)
            self.writer.add_text(f"{name}/{number}", "\n\n".join(parts), examples)

    def finish(self) -> None:
        """As Dashboard's."""
        self.writer.close()


# By the names that `tracking` has for them.
DASHBOARDS: dict[str, type[Dashboard]] = {"wandb": WandbDashboard, "tensorboard": TensorBoardDashboard}
