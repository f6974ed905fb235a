"""Where a run's numbers go beside its own files: wandb and TensorBoard, under the names of metrics.jsonl.

A dashboard may fail, be unreachable or miss its disk: that is said in one line, and the run goes on without it.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from preference_training.core.errors import first_line
from preference_training.core.metric_names import EXAMPLES
from preference_training.tracking.run_files import TENSORBOARD


class Dashboard(Protocol):
    """What a tracker asks of a place for its numbers."""

    def log(self, row: dict[str, float]) -> None:
        """Take one row of metrics, with counters/examples among them."""

    def log_table(self, name: str, rows: list[dict], examples: int) -> None:
        """Take rows of text, all with the same keys, as a table of the moment after so many examples."""

    def log_page(self, path: Path) -> None:
        """Take the run's report, a page in one file."""

    def finish(self) -> None:
        """All that there will be has been handed over."""


class Guarded:
    """A dashboard that can never end a run: its first failure is said in one line, and then it is left alone."""

    def __init__(self, name: str, dashboard: Dashboard):
        self.name = name
        self.dashboard: Dashboard | None = dashboard

    def log(self, row: dict[str, float]) -> None:
        """As Dashboard's."""
        self._try(lambda dashboard: dashboard.log(row))

    def log_table(self, name: str, rows: list[dict], examples: int) -> None:
        """As Dashboard's."""
        self._try(lambda dashboard: dashboard.log_table(name, rows, examples))

    def log_page(self, path: Path) -> None:
        """As Dashboard's."""
        self._try(lambda dashboard: dashboard.log_page(path))

    def finish(self) -> None:
        """As Dashboard's."""
        self._try(lambda dashboard: dashboard.finish())

    def _try(self, action: Callable[[Dashboard], None]) -> None:
        if self.dashboard is None:
            return
        try:
            action(self.dashboard)
        except Exception as error:  # whatever it does, the run goes on
            print(f"{self.name}: switched off for the rest of this run: {_said(error)}", flush=True)
            self.dashboard = None


def start_dashboards(names: list[str], config: dict, run_dir: Path, run_id: str, examples: int) -> list[Guarded]:
    """Those of `names` that can be started, for a run whose whole configuration is `config`.

    run_id: wandb's name for the run, which is continued if there is one; examples: where the run goes on, 0 at its beginning.
    """
    starts = {
        "wandb": lambda: start_wandb(config, run_dir, run_id),
        "tensorboard": lambda: start_tensorboard(config, run_dir, examples),
    }
    started = ((name, starts[name]()) for name in names)
    return [Guarded(name, dashboard) for name, dashboard in started if dashboard is not None]


# ---- wandb --------------------------------------------------------------------------------------------------------------


class WandbRun:
    """A run at wandb, or in its files where it is offline: metrics, tables of samples, and the report as an artifact."""

    def __init__(self, wandb, run):
        self.wandb, self.run = wandb, run
        run.define_metric("*", step_metric=EXAMPLES)

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
        # A copy: the report may be made anew before an offline run is sent.
        artifact.add_file(str(path))
        self.run.log_artifact(artifact)

    def finish(self) -> None:
        """As Dashboard's; online it returns when all is sent."""
        self.run.finish()


def start_wandb(config: dict, run_dir: Path, run_id: str | None = None) -> WandbRun | None:
    """Start wandb for a run whose whole configuration is `config`; None, said in one line, where it cannot start.

    A run that was started under `run_id` before is continued.

    Offline without a key (WANDB_API_KEY or a netrc entry) or where its server does not answer; WANDB_MODE decides if set.
    """
    try:
        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if _wandb_key() else "offline")
        if mode == "offline":
            print(f"wandb: offline, as there is no key; files in {run_dir / 'wandb'}, `wandb sync` uploads them.", flush=True)
        arguments = {
            "project": config["wandb"]["project"],
            "entity": config["wandb"]["entity"],
            "name": config["exp_name"],
            "dir": str(run_dir),
            "id": run_id,
            "resume": "allow",
            "config": config,
        }
        settings = wandb.Settings(init_timeout=30, silent=True)
        try:
            run = wandb.init(**arguments, mode=mode, settings=settings)
        except Exception as error:  # no network, a refused key, a server that does not answer
            if mode != "online":
                raise
            print(f"wandb: offline, as its server could not be used: {_said(error)}", flush=True)
            run = wandb.init(**arguments, mode="offline", settings=settings)
        return WandbRun(wandb, run)
    except Exception as error:  # whatever wandb does, the run goes on
        print(f"wandb: not used: {_said(error)}", flush=True)
        return None


def _said(error: Exception) -> str:
    """What an error says, in one line and without wandb's key: it may have been refused by quoting it."""
    text, key = first_line(error), _wandb_key()
    return text.replace(key, "(the key)") if key else text


def _wandb_key() -> str | None:
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    import netrc

    try:
        entry = netrc.netrc().authenticators("api.wandb.ai")
    except (OSError, netrc.NetrcParseError):
        return None
    return entry[2] if entry else None


# ---- TensorBoard --------------------------------------------------------------------------------------------------------


class TensorBoardRun:
    """TensorBoard's files of a run; its steps are examples. `writer` is a SummaryWriter."""

    def __init__(self, writer):
        self.writer = writer

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

    def log_page(self, path: Path) -> None:
        """As Dashboard's: it stays in the run directory, beside these files."""

    def finish(self) -> None:
        """As Dashboard's."""
        self.writer.close()


def start_tensorboard(config: dict, run_dir: Path, examples: int) -> TensorBoardRun | None:
    """Start TensorBoard's files in a run directory; None, said in one line, where that fails.

    What earlier files say of steps behind `examples`, where the run goes on, is no longer shown.
    """
    try:
        from omegaconf import OmegaConf
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run_dir / TENSORBOARD), purge_step=examples + 1 if examples else None)
        text = OmegaConf.to_yaml(OmegaConf.create(config))
        writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()), examples)
        return TensorBoardRun(writer)
    except Exception as error:  # a disk without room, or libraries that do not fit each other: the run goes on
        print(f"tensorboard: not used: {_said(error)}", flush=True)
        return None
